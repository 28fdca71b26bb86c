"""The baseline: tensor parallel stages, one after the other, with micro-batches in flight.

Shapes: B sequences of all ranks, S positions, H hidden size, h = H / shards columns.

Ranks are `stage * shards + shard`, so that a stage's shards, which talk most, share a host. A
micro-batch is a generator, as in the expert-parallel model: with overlap two of them take turns
while sums and hidden states are under way, without it each runs alone. Between stages every shard
sends its own h columns, and the next stage's shards gather them: no byte crosses hosts twice.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.runtime.clock import PhaseClock, Place
from epplan.runtime.layer.filled_cache import filled_cache
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.pipeline import Point, Schedule, take_turns
from epplan.runtime.timing.workload import tensor_bytes
from epplan.runtime.weights import Weights

from .tensor_parallel import (
    Shard,
    StageOutput,
    TensorParallelStage,
    build_shard,
    check_shards,
)

_TURNS = Schedule(
    micro_batches=2,
    in_flight=2,
    turns=(frozenset({"sent"}),),
    reason="one computes while the other's sums and hidden states are under way",
)
_ALONE = replace(_TURNS, micro_batches=1, in_flight=1, reason="nothing overlaps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How ranks are spread over shards and stages."""

    shards: int
    stages: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.shards * self.stages

    def stage_of(self, rank: int) -> int:
        """Return which layers a rank runs."""
        return rank // self.shards

    def shard_of(self, rank: int) -> Shard:
        """Return which slice of them it holds."""
        return Shard(rank=rank % self.shards, size=self.shards)

    def layers_of(self, stage: int, num_layers: int) -> range:
        """Return a stage's layers: as even as can be, the longer parts first."""
        share, rest = divmod(num_layers, self.stages)
        first = stage * share + min(stage, rest)
        return range(first, first + share + (stage < rest))


def check_grid(grid: Grid, spec: ModelSpec, world_size: int) -> None:
    """Check that the model can be spread so.

    Raises:
        InputError: names what does not fit.
    """
    if grid.world_size != world_size:
        raise InputError(
            f"tp{grid.shards}pp{grid.stages} is for {grid.world_size} ranks, there are {world_size}"
        )
    if grid.stages > spec.num_layers:
        raise InputError(
            f"model {spec.name} has {spec.num_layers} layers, too few for {grid.stages} stages"
        )
    check_shards(spec, grid.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineStep:
    """What one forward pass returns on one rank."""

    hidden_BSH: Tensor | None  # on the last stage, the same on all its shards
    experts_LTK: list[Tensor]  # the choice in each MoE layer of this rank's stage


class PipelineParallelModel:
    """This rank's part of the baseline; building it is a collective.

    Args:
        weights: of the whole model; this rank's slice is built.
        grid: shards and stages.
        rank: this process.
        clock: times phases.
    """

    def __init__(self, weights: Weights, grid: Grid, rank: int, clock: PhaseClock) -> None:
        spec = weights.spec
        check_grid(grid, spec, dist.get_world_size())
        self._spec = spec
        self._grid = grid
        self._rank = rank
        self._stage_number = grid.stage_of(rank)
        self._clock = clock
        self._device, self._dtype = weights.device, weights.dtype
        shard = grid.shard_of(rank)
        self._shard = shard
        numbers = grid.layers_of(self._stage_number, spec.num_layers)
        self._num_layers = len(numbers)
        self._stage = TensorParallelStage(
            spec,
            numbers,
            build_shard(weights, numbers, shard),
            shard,
            _own_group(grid, rank),
            clock,
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of this rank's slices."""
        return tensor_bytes(self._stage.layers)

    def new_caches(self, num_micro_batches: int) -> list[KvCache]:
        """Return an empty cache for every micro-batch."""
        return [KvCache(self._num_layers) for _ in range(num_micro_batches)]

    def filled_caches(self, sequences: int, num_micro_batches: int, context: int) -> list[KvCache]:
        """Return caches of random positions for the micro-batches of `sequences`."""
        share, rest = divmod(sequences, num_micro_batches)
        return [
            filled_cache(
                self._stage.attention,
                num_layers=self._num_layers,
                sequences=share + (number < rest),
                context=context,
                device=self._device,
                dtype=self._dtype,
            )
            for number in range(num_micro_batches)
        ]

    @torch.inference_mode()
    def forward(
        self,
        x_BSH: Tensor,
        *,
        num_micro_batches: int,
        overlap: bool,
        caches: list[KvCache] | None = None,
    ) -> BaselineStep:
        """Run all ranks' sequences; a collective: every rank calls it with the same arguments.

        Args:
            x_BSH: hidden states; only the first stage reads more of them than their shape.
            num_micro_batches: parts of the batch; at most one a sequence is made.
            overlap: let two micro-batches take turns.
            caches: positions already seen, by micro-batch; these follow them.
        """
        parts = split_sequences(x_BSH, num_micro_batches)
        self._clock.start()
        sending: list[dist.Work] = []
        micro_batches = [
            self._micro_batch(number, part, None if caches is None else caches[number], sending)
            for number, part in enumerate(parts)
        ]
        outputs = take_turns(micro_batches, _TURNS if overlap else _ALONE)
        for work in sending:
            work.wait()
        self._clock.mark("transfer", Place(-1, -1))
        is_last = self._stage_number == self._grid.stages - 1
        by_layer = zip(*(output.experts_LTK for output in outputs), strict=True)
        return BaselineStep(
            hidden_BSH=torch.cat([output.hidden_BSH for output in outputs]) if is_last else None,
            experts_LTK=[torch.cat(choices) for choices in by_layer],
        )

    def _micro_batch(
        self, number: int, x_BSH: Tensor, cache: KvCache | None, sending: list[dist.Work]
    ) -> Generator[Point, None, StageOutput]:
        if self._stage_number > 0:
            x_BSH = yield from self._receive(number, x_BSH.shape)
        output = yield from self._stage.micro_batch(number, x_BSH, cache)
        if self._stage_number < self._grid.stages - 1:
            slice_BSh = self._shard.of(output.hidden_BSH, dim=2)
            # The work holds the slice until it is sent.
            work = dist.isend(slice_BSh, self._rank + self._grid.shards, tag=number)
            assert work is not None
            sending.append(work)
        return output

    def _receive(self, number: int, shape: torch.Size) -> Generator[Point, None, Tensor]:
        """Return the micro-batch as the stage before left it."""
        slice_BSh = torch.empty(
            *shape[:2], shape[2] // self._grid.shards, dtype=self._dtype, device=self._device
        )
        work = dist.irecv(slice_BSh, self._rank - self._grid.shards, tag=number)
        assert work is not None
        yield "sent"
        work.wait()
        return (yield from self._stage.gather(slice_BSh, Place(-1, number)))


def split_sequences(x_BSH: Tensor, num_parts: int) -> list[Tensor]:
    """Return the micro-batches, as even as can be, none of them empty."""
    return list(torch.tensor_split(x_BSH, min(num_parts, x_BSH.shape[0])))


def _own_group(grid: Grid, rank: int) -> dist.ProcessGroup:
    """Return the group of this rank's stage; a collective, as making groups is."""
    groups = [
        dist.new_group(range(stage * grid.shards, (stage + 1) * grid.shards))
        for stage in range(grid.stages)
    ]
    group = groups[grid.stage_of(rank)]
    assert isinstance(group, dist.ProcessGroup)
    return group
