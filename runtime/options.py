"""What a rank is asked to run; the same on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .replicas import ReplicaChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The worker's options, as `launcher/worker_options.py` explains them."""

    backend: str
    sequences: int  # per rank
    sequence_length: int
    steps: int
    seed: int
    verify: bool
    dispatcher: str = "auto"
    micro_batches: int | None = None  # None: chosen
    replicas: ReplicaChoice = "share"
    dedup: bool = False
    fp8_dispatch: bool = False
    capacity_factor: float = 1.25
    trace: Path | None = None  # rank 0 writes it
    checkpoint: Path | None = None  # None: weights are seeded
    prompt: tuple[int, ...] = ()  # tokens of every sequence; empty: seeded
    new_tokens: int = 1  # to generate after them, with a checkpoint


def read_options(values: Mapping[str, Any]) -> Options:
    """Return the options as the command line gives them; a prompt sets the sequences' length."""
    values = dict(values)
    text = values.pop("prompt_tokens")
    if text is None:
        return Options(**values)
    prompt = tuple(map(int, text.split(",")))
    return Options(**{**values, "prompt": prompt, "sequence_length": len(prompt)})
