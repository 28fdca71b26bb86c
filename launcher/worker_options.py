"""The worker's command-line options, declared once.

`epplan launch` takes them for all ranks and hands them on as they are; the worker reads them. No
torch here: the command line imports this.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(["auto", "gloo", "nccl"]),
        default="auto",
        show_default=True,
        help="nccl computes on GPUs, gloo on the CPU; auto: nccl where every rank has a GPU.",
    ),
    click.option(
        "--sequences", type=click.IntRange(1), default=2, show_default=True, help="Per rank."
    ),
    click.option(
        "--sequence-length",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="In tokens.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(1),
        default=3,
        show_default=True,
        help="Timed steps, after one to warm up.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of weights and inputs."),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Compare with the dense model, on rank 0.",
    ),
    click.option(
        "--progress",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Keep the number of finished steps in this file, and go on after them.",
    ),
)


def worker_options(command: Decorated) -> Decorated:
    """Add the worker's options to a click command, in their order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def option_arguments(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return parsed options as the worker reads them from its command line.

    Args:
        options: values by parameter name; None is an option that was not given. Paths become
            absolute, because ranks may run in another folder.
    """
    arguments = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Path):
            arguments.append(f"--{option}={value.absolute()}")
        elif value is not None:
            arguments.append(f"--{option}={value}")
    return tuple(arguments)
