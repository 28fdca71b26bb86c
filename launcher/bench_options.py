"""The options of `epplan bench`, declared once for the command and for the ranks it starts.

No torch here: the command line imports this.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _grid(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"tp[1-9]\d*pp[1-9]\d*", value):
        raise click.BadParameter(f"{value!r} is not of the form tp8pp2")
    return value


_OPTIONS = (
    click.option(
        "--phase",
        type=click.Choice(["both", "prefill", "decode"]),
        default="both",
        show_default=True,
    ),
    click.option(
        "--baseline",
        metavar="tpNppM",
        callback=_grid,
        help="Time the same model with N tensor shards and M pipeline stages in the plan's place.",
    ),
    click.option(
        "--one-rank",
        type=click.IntRange(0),
        metavar="R",
        help="Time the work of rank R alone on this machine, without transfers.",
    ),
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
        help="Positions of a sequence in prefill.",
    ),
    click.option(
        "--context",
        type=click.IntRange(0),
        default=64,
        show_default=True,
        help="Positions of a sequence before a decode step.",
    ),
    click.option(
        "--micro-batches",
        type=click.IntRange(1),
        help="Parts of a step; chosen by size if not given.",
    ),
    click.option(
        "--overlap/--no-overlap",
        default=True,
        show_default=True,
        help="Let a micro-batch compute while another's data are under way.",
    ),
    click.option(
        "--graph/--no-graph",
        default=True,
        show_default=True,
        help="Replay decode steps as a CUDA graph, on a GPU: of --one-rank, and of a plan whose "
        "rows are padded.",
    ),
    click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Timed."),
    click.option(
        "--warm-up", type=click.IntRange(1), default=2, show_default=True, help="Steps before."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of weights and inputs."),
    click.option(
        "--router-skew",
        metavar="SIGMA",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Seeded routers only: prefer some experts, about as traffic lognormal:SIGMA does.",
    ),
)


def bench_options(command: Decorated) -> Decorated:
    """Add the benchmark's options to a click command, in their order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to time, as the options above explain; the same on all ranks."""

    phase: str
    baseline: str | None
    one_rank: int | None
    backend: str
    sequences: int
    sequence_length: int
    context: int
    micro_batches: int | None
    overlap: bool
    graph: bool
    steps: int
    warm_up: int
    seed: int
    router_skew: float = 0.0

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases to time, in order."""
        return ("prefill", "decode") if self.phase == "both" else (self.phase,)

    def positions(self, phase: str) -> int:
        """New positions of a sequence in a step."""
        return self.sequence_length if phase == "prefill" else 1

    def before(self, phase: str) -> int:
        """Positions of a sequence before a step."""
        return 0 if phase == "prefill" else self.context
