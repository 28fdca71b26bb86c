"""What a rank holds in memory, by what it is for."""

from dataclasses import asdict, dataclass

import numpy as np

from epplan.planner.model import DTYPE_BYTES
from epplan.planner.problem import MEMORY_HEADROOM

from .compute import Part
from .scene import Floats, Layout, Scene, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    rank: int
    experts: float
    replicated: float  # weights that every rank, or every share of the model, holds beside experts
    kv_cache: float
    buffers: float
    capacity: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.experts + self.replicated + self.kv_cache + self.buffers

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.total <= self.capacity

    @property
    def largest(self) -> str:
        """What takes most."""
        parts = {name: value for name, value in asdict(self).items() if name in _NAMES}
        return _NAMES[max(parts, key=parts.__getitem__)]


_NAMES = {
    "experts": "experts",
    "replicated": "attention and other weights",
    "kv_cache": "KV cache",
    "buffers": "buffers",
}


def memory(scene: Scene, usage: Usage, layout: Layout, window: int) -> list[Memory]:
    """Return every rank's memory, in rank order."""
    model = scene.model
    share = 1 if layout.is_expert_parallel else layout.size
    copies = scene.num_ranks // layout.size if not layout.is_expert_parallel else 1
    holders = scene.num_ranks if layout.is_expert_parallel else copies
    sequences = -(-usage.batch // holders)
    if layout.is_expert_parallel:
        held = sum(np.count_nonzero(shares, axis=0) for shares in scene.shares)
        kv_per_token: float = model.kv_bytes_per_token
    else:
        held = np.full(scene.num_ranks, model.num_experts * model.num_moe_layers / share)
        kv_per_token = Part(model=model, tp=layout.tp).kv_bytes * model.num_layers / layout.pp
    tokens = sequences / usage.micro_batches
    tokens *= usage.context if usage.phase == "prefill" else 1
    buffers = _buffers(scene, usage, layout, window, tokens)
    return [
        Memory(
            rank=rank,
            experts=float(np.asarray(held)[rank]) * model.expert_bytes,
            replicated=model.replicated_bytes / share,
            kv_cache=sequences * usage.context * kv_per_token,
            buffers=float(buffers[rank]),
            capacity=gpu.memory_bytes * (1 - MEMORY_HEADROOM),
        )
        for rank, gpu in enumerate(scene.gpus)
    ]


def _buffers(scene: Scene, usage: Usage, layout: Layout, window: int, tokens: float) -> Floats:
    """Return the buffers of one layer, [ranks]: rows sent, received and back, hidden layers.

    Two micro-batches in flight have two sets.
    """
    model = scene.model
    if layout.is_expert_parallel:
        received = np.zeros(scene.num_ranks)
        for counts, shares in zip(scene.counts[window], scene.shares, strict=True):
            received = np.maximum(received, counts.sum(axis=0) @ shares * tokens)
    else:
        received = np.full(scene.num_ranks, tokens * model.top_k)
    width = (2 if model.gated else 1) * model.expert_ffn_size / layout.tp
    hidden = width * DTYPE_BYTES[model.dtype]
    rows = tokens * model.top_k + received
    in_flight = 2 if usage.overlap and usage.micro_batches > 1 else 1
    total: Floats = in_flight * (2 * rows * model.row_bytes) + received * hidden
    return total
