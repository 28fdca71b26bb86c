"""What a rank is asked to run; the same on all ranks."""

from dataclasses import dataclass
from pathlib import Path

from epplan.planner.plan import TransferMode
from epplan.runtime.dispatchers.replicas import ReplicaChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The worker's options, as `launcher/worker_options.py` explains them."""

    backend: str
    sequences: int  # per rank
    sequence_length: int
    steps: int
    seed: int
    verify: bool
    router_skew: float = 0.0  # standard deviation of seeded routers' preferences
    timeout: float = 600.0  # seconds
    dispatcher: str = "auto"
    micro_batches: int | None = None  # None: chosen
    replicas: ReplicaChoice = "share"
    transfer: TransferMode | None = None  # None: as the plan prices it
    fp8_dispatch: bool = False
    capacity_factor: float = 1.25
    train: bool = False
    trace: Path | None = None  # rank 0 writes it
    checkpoint: Path | None = None
    prompt_tokens: str | None = None  # ids, separated by commas
    new_tokens: int = 1  # to generate after them, with a checkpoint
    progress: Path | None = None  # rank 0's file of finished steps
    window: int = 10  # steps
    metrics: Path | None = None  # rank 0 writes it
    counts: Path | None = None  # rank 0 writes it
    metrics_port: int | None = None  # rank 0 listens there
    rebalance_drift: float | None = None  # None: experts stay where they are
    gating_bias: float | None = None  # changes outputs
    drop_beyond: float | None = None  # changes outputs

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens of every sequence; empty: they are seeded."""
        return tuple(map(int, self.prompt_tokens.split(","))) if self.prompt_tokens else ()

    @property
    def positions(self) -> int:
        """Tokens of a sequence."""
        return len(self.prompt) or self.sequence_length
