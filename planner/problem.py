"""The placement problem: an EP group of GPUs, their routes, the traffic, and what fits."""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epplan.errors import InfeasibleError, InputError
from epplan.topologies.graph import Cluster, Gpu
from epplan.topologies.hardware import hardware
from epplan.topologies.routes import Routes, find_routes
from epplan.topologies.units import format_bytes

from .feasibility import Room, conflict_in_words
from .forwarding import path_latency
from .model import DTYPE_BYTES, ModelSpec
from .objective import Objective
from .plan import RankMemory, TransferMode
from .remedies import Ask, remedies
from .token_sets import TokenSets
from .traffic import Traffic

Floats = npt.NDArray[np.float64]

MEMORY_HEADROOM = 0.10  # of a GPU, for the CUDA context, NCCL's buffers and fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """Which replicas are allowed; never two copies of an expert on one GPU.

    Attributes:
        extra: copies of a layer on top of one of each expert.
        equal_shares: copies of an expert take equal shares of its rows; otherwise any.
        survive_hosts: hosts that may fail without an expert losing all copies: 0 or 1.
    """

    extra: int = 0
    equal_shares: bool = False
    survive_hosts: int = 0

    @property
    def least_copies(self) -> int:
        """Copies that every expert has at least."""
        return 1 + self.survive_hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything the evaluator and the solver need.

    Attributes:
        model: the model.
        gpus: the EP group in rank order, contiguous per host.
        routes: between these GPUs.
        counts: assignments of a step, [windows, layers, ranks, experts].
        flops_per_s: what a GPU reaches in the experts' matrix products, [ranks].
        hbm_bytes_per_s: what it reaches reading weights, [ranks].
        experts_per_gpu: most experts of one layer on a GPU.
        slots_of_gpu: most experts of all layers together that fit in a GPU's memory, [ranks].
        fixed: memory of every rank without its experts.
        objective: which seconds count.
        replication: which replicas are allowed.
        transfer: how a token's copies travel.
        sets: tokens of a step, [windows][layers]; None where `counts` are all that is needed.
        keep_groups: all experts of a routing group sit on one host.
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
    objective: Objective = field(default_factory=Objective)
    replication: Replication = field(default_factory=Replication)
    transfer: TransferMode = "per-choice"
    sets: tuple[tuple[TokenSets, ...], ...] | None = None
    keep_groups: bool = False

    @property
    def num_ranks(self) -> int:
        """Size of the EP group."""
        return len(self.gpus)

    def path_latency_s(self, *, combine: bool) -> Floats:
        """Return the latency of all paths, without the start, [home ranks, experts' ranks].

        Args:
            combine: of the way back.
        """
        latency_s = self.routes.latency_s.T if combine else self.routes.latency_s
        if self.transfer == "node-dedup":
            return path_latency(latency_s, self.routes.island)
        return latency_s

    @property
    def hosts(self) -> list[str]:
        """The group's hosts, in rank order."""
        return _hosts(self.gpus)

    @property
    def host_of_gpu(self) -> npt.NDArray[np.intp]:
        """Number of every GPU's host in `hosts`, [ranks]."""
        return _host_of_gpu(self.gpus)

    @property
    def copies_per_layer(self) -> int:
        """Copies of all experts of a layer, replicas included."""
        return self.model.num_experts + self.replication.extra

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
    objective: Objective | None = None,
    replication: Replication | None = None,
    *,
    transfer: TransferMode = "per-choice",
    keep_groups: bool = False,
) -> Problem:
    """Return the problem, checked for room.

    Raises:
        InputError: GPUs that cannot reach each other; whole groups that make no sense.
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
        objective=objective or Objective(),
        replication=replication or Replication(),
        transfer=transfer,
        sets=traffic.sets if needs_sets(transfer, experts_per_gpu) else None,
        keep_groups=keep_groups,
    )
    if problem.sets is None and needs_sets(transfer, experts_per_gpu):
        raise ValueError(f"transfer {transfer} needs traffic with token sets")
    _check_together(problem)
    room = room_for(gpus, model, traffic, experts_per_gpu, problem.replication)
    if not room.fits():
        raise _infeasible(problem, traffic, room)
    return problem


def needs_sets(transfer: TransferMode, experts_per_gpu: int) -> bool:
    """Whether the rows sent depend on which experts are chosen together.

    With one expert a GPU a row per (token, rank) is a row per (token, expert).
    """
    return transfer == "node-dedup" or (transfer == "direct" and experts_per_gpu > 1)


def _hosts(gpus: tuple[Gpu, ...]) -> list[str]:
    return list(dict.fromkeys(gpu.host for gpu in gpus))


def _host_of_gpu(gpus: tuple[Gpu, ...]) -> npt.NDArray[np.intp]:
    hosts = _hosts(gpus)
    return np.array([hosts.index(gpu.host) for gpu in gpus], dtype=np.intp)


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
    per_expert = np.sort(traffic.counts.sum(axis=2), axis=2)  # [windows, layers, experts]
    received = int(per_expert[:, :, -experts_per_gpu:].sum(axis=2).max())  # without replicas' help
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
        for expert in range(problem.copies_per_layer):
            room = np.where(dealt[layer] < problem.experts_per_gpu, left, 0)
            gpu = int(room.argmax())
            if not room[gpu]:
                raise InfeasibleError(_no_room(problem, layer, expert))
            dealt[layer, gpu] += 1
            left[gpu] -= 1
    return dealt


def room_for(
    gpus: tuple[Gpu, ...],
    model: ModelSpec,
    traffic: Traffic,
    experts_per_gpu: int,
    replication: Replication,
) -> Room:
    """Return what is to be placed, and the room for it; arguments of `make_problem`."""
    return Room(
        layers=model.num_moe_layers,
        experts=model.num_experts,
        replicas=replication.extra,
        survive=bool(replication.survive_hosts),
        experts_per_gpu=experts_per_gpu,
        slots=slots_left(fixed_memory(gpus, model, traffic, experts_per_gpu), model),
        host=_host_of_gpu(gpus),
    )


def _check_together(problem: Problem) -> None:
    """Refuse what is not planned together.

    Raises:
        InputError: whole groups of a router without groups, or that are to survive their host.
    """
    if problem.keep_groups and problem.model.router.groups == 1:
        raise InputError(
            f"--keep-groups: the router of {problem.model.name} has one group; there is nothing to "
            "keep together",
            hints=["leave out --keep-groups"],
        )
    if problem.keep_groups and problem.replication.survive_hosts:
        raise InputError(
            "--survive 1-host cannot be had with --keep-groups: all copies of an expert are on its "
            "routing group's host, and are lost with it",
            hints=["leave out --keep-groups", "or leave out --survive"],
        )


def _infeasible(problem: Problem, traffic: Traffic, room: Room) -> InfeasibleError:
    """Return the error for a problem without a placement: why, and what would help."""
    model = problem.model
    ask = Ask(
        ep=problem.num_ranks,
        groups=1,
        experts_per_gpu=problem.experts_per_gpu,
        replicas=room.replicas,
        survive=room.survive,
        tokens=traffic.tokens_per_rank,
        layers=model.num_layers,
        experts=model.num_experts,
    )

    def fits(changed: Ask) -> bool:
        try:
            kept = model.with_overrides(layers=changed.layers)
        except InputError:  # no layer with experts is left
            return False
        counts = traffic.counts[:, : kept.num_moe_layers] * (changed.tokens / ask.tokens)
        smaller = replace(traffic, counts=counts, tokens_per_rank=changed.tokens)
        rule = Replication(extra=changed.replicas, survive_hosts=int(changed.survive))
        return room_for(problem.gpus, kept, smaller, changed.experts_per_gpu, rule).fits()

    others = frozenset({"ep", "groups", "experts", "scale"})  # other GPUs, or other traffic
    names = [gpu.id for gpu in problem.gpus]
    return InfeasibleError(
        _headline(problem, room),
        problems=conflict_in_words(room, names, problem.fixed, model.expert_bytes),
        hints=remedies(ask, problem.num_ranks, fits, others)
        or ["use more GPUs, GPUs with more memory, or a smaller model"],
    )


def _headline(problem: Problem, room: Room) -> str:
    rule, experts = problem.replication, problem.model.num_experts
    if rule.survive_hosts and len(set(room.host.tolist())) < 2:
        return "no plan survives the loss of a host: all GPUs are on one"
    if rule.survive_hosts and rule.extra < experts:
        return (
            f"to survive the loss of a host every one of {experts} experts needs two copies; "
            f"{rule.extra} replicas are allowed"
        )
    if problem.copies_per_layer > (most := experts * problem.num_ranks):
        return (
            f"{rule.extra} replicas are too many: {experts} experts on {problem.num_ranks} GPUs "
            f"have {most} places, because a GPU holds one copy of an expert at most"
        )
    if room.places().sum() >= room.wanted:
        return "the hosts are too uneven for every expert to be on two of them"
    if problem.layers_coupled:
        dealt = int(room.places().sum())
        layer, expert = divmod(dealt, problem.copies_per_layer)
        return _no_room(problem, layer, expert)
    return (
        f"{problem.copies_per_layer} copies of {experts} experts a layer do not fit on "
        f"{problem.num_ranks} GPUs with at most {problem.experts_per_gpu} of a layer on a GPU"
    )


def no_room_for_copies(problem: Problem) -> InfeasibleError:
    """Return the error for copies that find no GPU: too many of an expert, or hosts too uneven."""
    rule, experts = problem.replication, problem.model.num_experts
    hosts = len({gpu.host for gpu in problem.gpus})
    problems = [
        f"{problem.copies_per_layer} copies of {experts} experts on {problem.num_ranks} GPUs with "
        f"at most {problem.experts_per_gpu} of a layer each, never two of an expert on one GPU"
    ]
    if rule.survive_hosts:
        problems.append(f"every expert on two of {hosts} hosts or more")
    return InfeasibleError(
        "no place was found for some copy of an expert",
        problems=problems,
        hints=["allow more experts on a GPU (--experts-per-gpu)", "use more hosts (--ep)"],
    )


def _no_room(problem: Problem, layer: int, expert: int) -> str:
    """Say which copy is too much, and what the GPU lacks that is nearest to taking it."""
    model, size = problem.model, problem.model.expert_bytes
    most = model.num_moe_layers * min(problem.experts_per_gpu, model.num_experts)
    rests = [
        _free_bytes(use) - int(n) * size if n < most else -np.inf  # not short of memory
        for use, n in zip(problem.fixed, problem.slots_of_gpu, strict=True)
    ]
    roomiest = int(np.argmax(rests))
    rest = int(rests[roomiest])
    gpu, held = problem.gpus[roomiest].id, int(problem.slots_of_gpu[roomiest])
    room = (
        f"{gpu}, where most is left, has {format_bytes(rest)} free"
        if rest >= 0
        else f"{gpu}, where most is left, is over its memory by {format_bytes(-rest)} without it"
    )
    which = f"expert {expert}" if expert < model.num_experts else "a replica"
    return (
        f"{which} of layer {model.moe_layers[layer]} fits on no GPU that may still take one: it "
        f"needs {format_bytes(size)} ({size} bytes); {room}, with {held} experts: short by "
        f"{size - rest} bytes"
    )
