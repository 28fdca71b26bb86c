"""The placement problem: an EP group of GPUs, their routes, the traffic, and what fits."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.errors import InfeasibleError
from epplan.topologies.graph import Cluster, Gpu
from epplan.topologies.hardware import hardware
from epplan.topologies.routes import Routes, find_routes
from epplan.topologies.units import format_bytes

from .model import DTYPE_BYTES, ModelSpec
from .plan import RankMemory
from .traffic import Traffic

Floats = npt.NDArray[np.float64]

MEMORY_HEADROOM = 0.10  # of a GPU, for the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything the evaluator and the solver need.

    Attributes:
        model: the model.
        gpus: the EP group in rank order, contiguous per host.
        routes: between these GPUs.
        counts: assignments of a step, [layers, ranks, experts].
        flops_per_s: what a GPU reaches in the experts' matrix products, [ranks].
        hbm_bytes_per_s: what it reaches reading weights, [ranks].
        experts_per_gpu: most experts of one layer on a GPU.
        slots_of_gpu: most experts of all layers together that fit in a GPU's memory, [ranks].
        fixed: memory of every rank without its experts.
    """

    model: ModelSpec
    gpus: tuple[Gpu, ...]
    routes: Routes
    counts: Floats
    flops_per_s: Floats
    hbm_bytes_per_s: Floats
    experts_per_gpu: int
    slots_of_gpu: npt.NDArray[np.int64]
    fixed: tuple[RankMemory, ...]

    @property
    def num_ranks(self) -> int:
        """Size of the EP group."""
        return len(self.gpus)

    @property
    def layers_coupled(self) -> bool:
        """Whether memory forbids some GPU to take `experts_per_gpu` experts in every layer."""
        wanted = self.experts_per_gpu * self.model.num_moe_layers
        return bool((self.slots_of_gpu < wanted).any())


def make_problem(
    cluster: Cluster,
    gpus: tuple[Gpu, ...],
    model: ModelSpec,
    traffic: Traffic,
    experts_per_gpu: int,
) -> Problem:
    """Return the problem, checked for room.

    Raises:
        InputError: GPUs that cannot reach each other.
        InfeasibleError: memory too small, with the first expert that finds no room.
    """
    efficiency = hardware().efficiency
    profiles = [gpu.profile for gpu in gpus if gpu.profile is not None]
    assert len(profiles) == len(gpus)  # planner.group refuses unknown models
    fixed = fixed_memory(gpus, model, traffic, experts_per_gpu)
    problem = Problem(
        model=model,
        gpus=gpus,
        routes=find_routes(cluster, [gpu.id for gpu in gpus]),
        counts=traffic.counts,
        flops_per_s=np.array([profile.flops for profile in profiles]) * efficiency["flops"],
        hbm_bytes_per_s=np.array([profile.hbm for profile in profiles]) * efficiency["hbm"],
        experts_per_gpu=experts_per_gpu,
        slots_of_gpu=slots_left(fixed, model),
        fixed=fixed,
    )
    even_capacity(problem)  # refuses what does not fit
    return problem


def _free_bytes(use: RankMemory) -> int:
    """Return what a rank has left for experts; negative when its fixed part is too large."""
    return use.capacity - use.replicated - use.kv_cache - use.buffers


def slots_left(fixed: tuple[RankMemory, ...], model: ModelSpec) -> npt.NDArray[np.int64]:
    """Return how many experts of all layers together fit beside the fixed memory, [ranks]."""
    free = np.array([_free_bytes(use) for use in fixed])
    slots: npt.NDArray[np.int64] = np.maximum(free // model.expert_bytes, 0)
    return slots


def fixed_memory(
    gpus: tuple[Gpu, ...], model: ModelSpec, traffic: Traffic, experts_per_gpu: int
) -> tuple[RankMemory, ...]:
    """Return every rank's memory before experts; rows are bounded by the hottest experts' rows."""
    per_expert = np.sort(traffic.counts.sum(axis=1), axis=1)  # [layers, experts]
    received = int(per_expert[:, -experts_per_gpu:].sum(axis=1).max())
    sent = traffic.tokens_per_rank * model.top_k
    # Rows sent and received, their results on the way back, and the experts' hidden layer.
    hidden = (2 if model.gated else 1) * model.expert_ffn_size * DTYPE_BYTES[model.dtype]
    buffers = 2 * (sent + received) * model.row_bytes + received * hidden
    return tuple(
        RankMemory(
            rank=rank,
            experts=0,
            replicated=model.replicated_bytes,
            kv_cache=traffic.tokens_per_rank * model.kv_bytes_per_token,
            buffers=buffers,
            capacity=round(gpu.memory_bytes * (1 - MEMORY_HEADROOM)),
        )
        for rank, gpu in enumerate(gpus)
    )


def even_capacity(problem: Problem) -> npt.NDArray[np.int64]:
    """Return how many experts of each layer every GPU takes at most, [layers, gpus].

    That is `experts_per_gpu` everywhere unless memory couples the layers. Then slots are dealt one
    by one where most room is left, which keeps the rest even and so finds room whenever there is
    some: experts are equal and a layer only needs slots on enough different GPUs.

    Raises:
        InfeasibleError: with the first expert that finds no room.
    """
    model = problem.model
    shape = (model.num_moe_layers, problem.num_ranks)
    if not problem.layers_coupled:
        return np.full(shape, problem.experts_per_gpu)
    dealt = np.zeros(shape, dtype=np.int64)
    left = problem.slots_of_gpu.copy()
    for layer in range(model.num_moe_layers):
        for expert in range(model.num_experts):
            room = np.where(dealt[layer] < problem.experts_per_gpu, left, 0)
            gpu = int(room.argmax())
            if not room[gpu]:
                raise _no_room(problem, layer, expert)
            dealt[layer, gpu] += 1
            left[gpu] -= 1
    return dealt


def _no_room(problem: Problem, layer: int, expert: int) -> InfeasibleError:
    model, size = problem.model, problem.model.expert_bytes
    rests = [
        _free_bytes(use) - int(n) * size
        for use, n in zip(problem.fixed, problem.slots_of_gpu, strict=True)
    ]
    roomiest = int(np.argmax(rests))
    use, rest = problem.fixed[roomiest], rests[roomiest]
    gpu, held = problem.gpus[roomiest].id, int(problem.slots_of_gpu[roomiest])
    total, wanted = int(problem.slots_of_gpu.sum()), model.num_moe_layers * model.num_experts
    room = (
        f"{gpu}, where most is left, has {format_bytes(rest)} free"
        if rest >= 0
        else f"{gpu}, where most is left, is over its memory by {format_bytes(-rest)} without it"
    )
    parts = {
        "replicated weights": use.replicated,
        "dispatch buffers": use.buffers,
        "KV cache": use.kv_cache,
        f"{held} experts": held * size,
    }
    return InfeasibleError(
        f"expert {expert} of layer {model.moe_layers[layer]} fits on no GPU: it needs "
        f"{format_bytes(size)} ({size} bytes); {room}: short by {size - rest} bytes",
        problems=[
            f"{gpu} may use {format_bytes(use.capacity)} ({1 - MEMORY_HEADROOM:.0%} of its "
            f"memory): {', '.join(f'{name} {format_bytes(x)}' for name, x in parts.items())}",
            f"all {problem.num_ranks} GPUs together hold {total} experts; the model has {wanted} "
            f"({model.num_moe_layers} layers x {model.num_experts})",
        ],
        hints=[
            f"use more GPUs: one holds {total / problem.num_ranks:.1f} experts on average, so "
            f"{-(-wanted * problem.num_ranks // total)} would do"
            if total
            else "use GPUs with more memory: no expert fits on any of these",
            f"plan for fewer tokens a rank (--tokens): dispatch buffers and KV cache take "
            f"{format_bytes(use.buffers + use.kv_cache)}",
            f"store weights in fewer bytes: now {model.weight_bytes:g} a weight",
            "take a smaller model (--layers, --scale)",
        ],
    )
