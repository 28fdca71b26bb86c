"""The worker's command-line options, declared once.

`epplan launch` takes them for all ranks and hands them on as they are; the worker reads them. No
torch here: the command line imports this.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .shared_options import (
    BACKEND,
    ROUTER_SKEW,
    SEED,
    SEQUENCES,
    Decorated,
    add_options,
    number,
    switch,
)


def _number_or_auto(_: click.Context, __: click.Parameter, value: str) -> int | None:
    """Return a positive number; None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value!r} is neither a positive number nor auto")
    return int(value)


def _token_ids(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Check a list of token ids; it stays text, to be handed on."""
    if value is not None and not all(part.isdecimal() for part in value.split(",")):
        raise click.BadParameter(f"{value!r} is no list of token ids such as 12,7,400")
    return value


_OPTIONS = (
    BACKEND,
    SEQUENCES,
    number("--sequence-length", 64, "In tokens."),
    number("--steps", 3, "Timed steps, after one to warm up."),
    SEED,
    ROUTER_SKEW,
    switch("verify", "Compare with the dense model, on rank 0.", default=True),
    click.option(
        "--timeout",
        metavar="SECONDS",
        type=click.FloatRange(1),
        default=600.0,
        show_default=True,
        help="How long a rank waits for the others before it gives up and says for whom.",
    ),
    click.option(
        "--dispatcher",
        type=click.Choice(["auto", "alltoall", "padded", "local"]),
        default="auto",
        show_default=True,
        help="alltoall: uneven splits; padded: fixed room for rows, the host waits for nothing; "
        "local: no rows travel; auto: by the size of a step.",
    ),
    click.option(
        "--micro-batches",
        metavar="N|auto",
        default="auto",
        callback=_number_or_auto,
        show_default=True,
        help="Parts of a step, of which one computes while another's rows travel.",
    ),
    click.option(
        "--replicas",
        type=click.Choice(["share", "nearest"]),
        default="share",
        show_default=True,
        help="Copies of an expert: by the plan's shares, or own GPU, own host, then shares.",
    ),
    click.option(
        "--transfer",
        type=click.Choice(["per-choice", "direct", "node-dedup"]),
        show_default="as the plan prices it",
        help="Send a token's row once per choice of it, once to a rank (direct), or once to a host "
        "or NVLink domain and on from there (node-dedup).",
    ),
    switch(
        "fp8-dispatch", "Send rows to experts as 8-bit numbers with a scale a row. Changes outputs."
    ),
    click.option(
        "--capacity-factor",
        type=click.FloatRange(0, min_open=True),
        default=1.25,
        show_default=True,
        help="Of dispatcher padded: room for rows, over the mean rows of an expert.",
    ),
    switch(
        "train", "Time training steps: forward, backward, gradients added up over ranks; no update."
    ),
    click.option(
        "--trace",
        type=click.Path(path_type=Path),
        help="File for a trace of the last step, to be opened in ui.perfetto.dev.",
    ),
    click.option(
        "--checkpoint",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Hugging Face folder with safetensors files of the plan's model, on every host; "
        "otherwise weights are seeded.",
    ),
    click.option(
        "--prompt-tokens",
        metavar="ID,ID,...",
        callback=_token_ids,
        help="Tokens of every sequence, in place of seeded ones and of --sequence-length; with "
        "--checkpoint.",
    ),
    number(
        "--new-tokens",
        1,
        "To generate after each sequence, the likeliest each time; with --checkpoint.",
    ),
    click.option(
        "--window",
        metavar="STEPS",
        type=click.IntRange(1),
        default=10,
        show_default=True,
        help="Steps after which load, waits and drift are told and acted on.",
    ),
    click.option(
        "--metrics",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Append every window to FILE, one JSON object a line.",
    ),
    click.option(
        "--counts",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write who sent how many rows to which expert in the last steps, for `epplan solve "
        "--load FILE`.",
    ),
    click.option(
        "--metrics-port",
        metavar="PORT",
        type=click.IntRange(0, 65535),
        help="Serve every window to Prometheus on this port of rank 0's host; 0: a free one.",
    ),
    click.option(
        "--rebalance-drift",
        metavar="SHARE",
        type=click.FloatRange(0, 1),
        help="Ask the planner, and move experts while running, when this share of a layer's rows "
        "goes to other experts than the table was made for. Outputs stay.",
    ),
    click.option(
        "--gating-bias",
        metavar="RATE",
        type=click.FloatRange(0, min_open=True),
        help="After every step, raise each expert's bias by RATE if it had fewer rows than the "
        "mean, else lower it. Changes outputs.",
    ),
    click.option(
        "--drop-beyond",
        metavar="FACTOR",
        type=click.FloatRange(0, min_open=True),
        help="Drop a rank's rows to an expert beyond FACTOR times an even share. Changes outputs.",
    ),
    click.option(
        "--identity/--no-identity",
        default=None,
        help="Stop unless every rank is on its planned host and GPU. [default: identity, except "
        "with --to local and a plan of other hosts]",
    ),
    click.option(
        "--host-map",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Renamed hosts: YAML lines `planned: real`.",
    ),
    click.option(
        "--progress",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Keep the number of finished steps in this file, and go on after them.",
    ),
)


def worker_options(command: Decorated) -> Decorated:
    """Add the worker's options to a click command, in their order."""
    return add_options(_OPTIONS, command)


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
