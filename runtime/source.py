"""What a run starts from: weights and inputs, drawn from a seed or read from a checkpoint.

Shapes: B sequences per rank, S positions, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.runtime.checkpoints.checkpoint import checkpoint_problems, open_checkpoint
from epplan.runtime.layer.head import Head, build_head

from .environment import Setting
from .weights import SeededWeights, Weights, seeded_hidden, seeded_tokens


class Source(Protocol):
    """Weights, and the inputs of every rank: the dense check needs them all."""

    @property
    def weights(self) -> Weights:
        """The model's weights."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know about them."""

    def hidden(self, rank: int) -> Tensor:
        """Return the input hidden states of a rank, [B, S, H]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededSource:
    """Weights and hidden states of one seed."""

    weights: SeededWeights
    sequences: int
    positions: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the load is."""
        return ("routers have seeded random weights: the load is theirs, not the plan's traffic",)

    def hidden(self, rank: int) -> Tensor:
        """Return the input hidden states of a rank, [B, S, H]."""
        weights = self.weights
        shape = (self.sequences, self.positions, weights.spec.hidden_size)
        return seeded_hidden(weights.seed, rank, shape, device=weights.device, dtype=weights.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """A checkpoint's weights, and its embeddings of a prompt or of seeded tokens."""

    weights: Weights
    head: Head
    prompt: tuple[int, ...]  # of every sequence; empty: seeded
    seed: int
    sequences: int
    positions: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Say where the tokens come from."""
        if self.prompt:
            return ()
        return ("tokens are drawn from the seed: the load is not that of text",)

    def tokens(self, rank: int) -> Tensor:
        """Return the input tokens of a rank, [B, S]."""
        device = self.weights.device
        if self.prompt:
            return torch.tensor([self.prompt] * self.sequences, device=device)
        shape, vocabulary = (self.sequences, self.positions), self.weights.spec.vocab_size
        return seeded_tokens(self.seed, rank, shape, vocabulary, device=device)

    def hidden(self, rank: int) -> Tensor:
        """Return the embedded tokens of a rank, [B, S, H]."""
        return self.head.embed(self.tokens(rank))


def open_source(
    spec: ModelSpec,
    setting: Setting,
    *,
    checkpoint: Path | None,
    prompt: Sequence[int],
    seed: int,
    router_skew: float = 0.0,
    sequences: int,
    positions: int,
    rank: int,
) -> SeededSource | CheckpointSource:
    """Return the source of a run; a collective where there is a checkpoint.

    Args:
        spec: the plan's model.
        setting: device and dtype.
        checkpoint: a folder; None: weights and inputs are seeded.
        prompt: token ids every sequence consists of; empty: seeded tokens.
        seed: of what is seeded.
        router_skew: of seeded routers.
        sequences: per rank.
        positions: of a sequence.
        rank: this process; rank 0 checks all tensors for the others.

    Raises:
        InputError: on all ranks, with everything wrong about checkpoint and prompt.
    """
    if checkpoint is None:
        if prompt:
            raise InputError("--prompt-tokens needs --checkpoint: seeded models have no words")
        weights = SeededWeights(
            spec=spec,
            seed=seed,
            device=setting.device,
            dtype=setting.dtype,
            router_skew=router_skew,
        )
        return SeededSource(weights=weights, sequences=sequences, positions=positions)
    if router_skew:
        raise InputError(
            f"--router-skew is {router_skew:g}, but a checkpoint has routers of its own",
            hints=["leave out --router-skew or --checkpoint"],
        )
    beyond = [token for token in prompt if token >= spec.vocab_size]
    if beyond:
        raise InputError(
            f"--prompt-tokens holds {beyond}; the model's {spec.vocab_size:,} tokens are 0 to "
            f"{spec.vocab_size - 1}"
        )
    read = open_checkpoint(checkpoint, spec, device=setting.device, dtype=setting.dtype)
    problems = [checkpoint_problems(read) if rank == 0 else None]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise InputError(
            f"checkpoint {checkpoint} has not the tensors of model {spec.name}",
            problems=problems[0],
        )
    return CheckpointSource(
        weights=read,
        head=build_head(read),
        prompt=tuple(prompt),
        seed=seed,
        sequences=sequences,
        positions=positions,
    )
