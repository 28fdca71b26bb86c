"""Which dispatcher and how many micro-batches, from the size of a step; with the reason.

All ranks must choose alike, so only what all know goes in: the plan and the options.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from epplan.errors import InputError
from epplan.planner.forwarding import Ints
from epplan.planner.model import DTYPE_BYTES
from epplan.planner.plan import Plan, TransferMode
from epplan.runtime.dispatchers.dispatch import DispatcherKind
from epplan.runtime.dispatchers.padded import capacity_for
from epplan.runtime.dispatchers.replicas import ReplicaChoice, all_local

from .options import Options
from .pipeline import CPU_TURNS, GPU_TURNS, Schedule
from .timing.workload import step_flops

# One computes while the other's rows travel. Four shorten the unhidden first and last transfer, but
# took two H200 5 to 14 % longer than two (docs/log.md): smaller products beside more transfers.
_IN_FLIGHT = 2
# Two halves of 1024 rows take an H200 3 % longer than the whole, two of 256 rows 10 %, and below
# 128 rows twice as long, because each reads the expert's weights (docs/log.md).
_ROWS_OF_AN_EXPERT = 512
# Of one layer and part: the host takes 4.5 to 5.7 ms for each (two H200, a virtual machine), and
# where the device takes less one part ends sooner. Two parts of 0.5e12 took 42.7 ms, both in one
# 22.9; two of 2.1e12 took 62.0 and 41.6, two of 4.2e12 took 76.7 and 79.6 (docs/log.md).
_FLOPS_OF_A_PART = 3e12
# Of padding per rank and direction. To read counts and to order rows by them costs the host some
# 0.5 to 1 ms a layer: 4 layers with 6 to 17 MiB of padding took two H200 11 to 16 ms, without 14 to
# 18 (docs/log.md). Half of that, because routers are less even than the one measured, and a network
# port is slower than NVLink: it carries 8 MiB in some 0.2 ms.
_PADDING_BYTES = 8 << 20
# Experts compute the padding, which costs nothing while the host takes longer to start kernels than
# they compute: up to 0.4e12 operations of a layer padding took less, from 0.9e12 on more.
_FLOPS_OF_A_PADDED_LAYER = 5e11
# A step of padded rows fits into a CUDA graph. Without one a decode step of 4 layers took two
# H200 14 to 21 ms, most of it for starting kernels; as a graph with 48 MiB of padding 10.8, with
# 0.8e12 operations of a layer 11.0, with 0.9e12 as long as without (docs/log.md).
_PADDING_BYTES_OF_GRAPH = 48 << 20
_FLOPS_OF_A_GRAPHED_LAYER = 1e12
_ACTIVATION_SHARE = 0.5  # of the memory the plan leaves free
_SKEW = 2.0  # rows of the busiest rank over the mean, for memory
_NO_LONGER_DENSE = "gradients could not be compared with the dense model's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One step of one rank."""

    sequences: int
    positions: int  # of each sequence; 1 is decode
    device_type: str

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.sequences * self.positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen for the size of a step."""

    dispatcher: DispatcherKind
    dispatcher_reason: str
    schedule: Schedule
    transfer: TransferMode
    transfer_note: str | None  # what is sent, where the plan does not price one row per choice


def choose(plan: Plan, options: Options, device: torch.device) -> Choice:
    """Return dispatcher and schedule for a step of `options`, on a rank's `device`.

    Raises:
        InputError: what was asked for cannot run this plan.
    """
    problems = [
        f"{option}: {reason}" for option, given, reason in _not_in_training(options) if given
    ]
    if options.train and problems:
        raise InputError("--train excludes other options", problems=problems)
    workload = Workload(
        sequences=options.sequences,
        positions=options.positions,
        device_type=device.type,
    )
    dispatcher, reason = choose_dispatcher(
        options.dispatcher, plan, workload, options.replicas, transfer=options.transfer
    )
    transfer, note = choose_transfer(options.transfer, plan, dispatcher)
    return Choice(
        dispatcher=dispatcher,
        dispatcher_reason=reason,
        schedule=choose_schedule(options.micro_batches, plan, workload, dispatcher),
        transfer=transfer,
        transfer_note=note,
    )


def choose_transfer(
    asked: TransferMode | None, plan: Plan, dispatcher: DispatcherKind
) -> tuple[TransferMode, str | None]:
    """Return how often a token's row travels, and how that meets the plan's price.

    Args:
        asked: None: as the plan prices it.
        plan: names the transfer it was priced for.
        dispatcher: only `alltoall` sends a row less often than it is chosen.
    """
    planned = plan.workload.transfer
    done = _plainest(asked or planned, plan) if dispatcher == "alltoall" else "per-choice"
    how_often = _how_often(done, plan)
    if dispatcher == "local" or _plainest(planned, plan) == "per-choice":
        return done, None
    if done == _plainest(planned, plan):
        return done, f"rows go {how_often}, as the plan prices them ({planned})"
    why = "was not taken"
    if dispatcher != "alltoall":
        why = f"is nothing dispatcher {dispatcher} can do"
    return done, f"the plan prices transfer {planned}, which {why}: rows go {how_often}"


def _plainest(transfer: TransferMode, plan: Plan) -> TransferMode:
    """Return the plainest way in which the same rows travel."""
    if transfer == "node-dedup" and islands_of(plan).max() == 0:
        transfer = "direct"  # there is no network to save
    if transfer == "direct" and plan.slots_per_rank == 1:
        return "per-choice"
    return transfer


def _how_often(transfer: TransferMode, plan: Plan) -> str:
    if transfer == "per-choice":
        return "once per choice"
    if transfer == "direct":
        return "once to a rank"
    num_hosts = len({rank.host for rank in plan.ranks})
    island = "a host" if num_hosts == islands_of(plan).max() + 1 else "an NVLink domain"
    return f"once to {island}, and on from there"


def islands_of(plan: Plan) -> Ints:
    """Return the number of every rank's island, from 0, [ranks]."""
    _, island = np.unique([rank.island for rank in plan.ranks], return_inverse=True)
    return island


def _not_in_training(options: Options) -> list[tuple[str, bool, str]]:
    return [
        ("--fp8-dispatch", options.fp8_dispatch, "rounding to 8 bits has no gradient"),
        (
            "--rebalance-drift",
            options.rebalance_drift is not None,
            "experts would move away from their gradients",
        ),
        ("--gating-bias", options.gating_bias is not None, _NO_LONGER_DENSE),
        ("--drop-beyond", options.drop_beyond is not None, _NO_LONGER_DENSE),
    ]


def choose_dispatcher(
    asked: str,
    plan: Plan,
    workload: Workload,
    replicas: ReplicaChoice,
    *,
    transfer: TransferMode | None,
    graph: bool = False,
) -> tuple[DispatcherKind, str]:
    """Return the dispatcher and why.

    Args:
        asked: "auto" or a dispatcher.
        plan: the placement.
        workload: of a step.
        replicas: which copies are used.
        transfer: what was asked for; only `alltoall` sends a row less often than it is chosen.
        graph: whether a step that waits for nothing will be a CUDA graph.

    Raises:
        InputError: what was asked for cannot run this plan.
    """
    local = all_local(plan, replicas)
    if asked == "local" and not local:
        raise InputError(
            "dispatcher local moves no rows, and the plan's experts are spread over "
            f"{plan.world_size} ranks",
            hints=[
                "take --dispatcher auto",
                "or a plan with every expert on every rank, and --replicas nearest",
            ],
        )
    once = transfer not in (None, "per-choice")
    if once and asked in ("padded", "local"):
        raise InputError(
            f"--transfer {transfer} sends a row less often than it is chosen, which dispatcher "
            f"{asked} cannot do",
            hints=["take --dispatcher alltoall"],
        )
    match asked:
        case "alltoall" | "padded" | "local":
            return asked, "asked for"
    if local:
        whose = "there is one rank" if plan.world_size == 1 else "every expert is on every rank"
        return "local", f"{whose}: no rows travel"
    if workload.device_type == "cuda" and not once and _is_short(plan, workload, graph):
        padding = f"{_padding_bytes(plan, workload) / 2**20:.1f} MiB of padding cost less than"
        dearer = "starting kernels one by one" if graph else "waiting for counts"
        return "padded", f"short step: {padding} {dearer}"
    return "alltoall", "rows travel without padding"


def _is_short(plan: Plan, workload: Workload, graph: bool) -> bool:
    padding, flops = _padding_bytes(plan, workload), _flops_of_a_layer(plan, workload)
    if graph:
        return padding <= _PADDING_BYTES_OF_GRAPH and flops <= _FLOPS_OF_A_GRAPHED_LAYER
    return padding <= _PADDING_BYTES and flops <= _FLOPS_OF_A_PADDED_LAYER


def choose_schedule(
    asked: int | None, plan: Plan, workload: Workload, dispatcher: DispatcherKind
) -> Schedule:
    """Return the schedule; `asked` is the number of micro-batches, None to choose it."""
    turns = GPU_TURNS if workload.device_type == "cuda" else CPU_TURNS
    number, reason = (
        (asked, "asked for")
        if asked is not None
        else _number_of_micro_batches(plan, workload, dispatcher)
    )
    in_flight = min(number, _IN_FLIGHT)
    return Schedule(micro_batches=number, in_flight=in_flight, turns=turns, reason=reason)


def _number_of_micro_batches(
    plan: Plan, workload: Workload, dispatcher: DispatcherKind
) -> tuple[int, str]:
    model = plan.model
    rows = workload.tokens * plan.world_size * model.top_k / model.num_experts
    flops = _flops_of_a_layer(plan, workload)
    phase = "decode" if workload.positions == 1 else "prefill"
    for_memory = _for_memory(plan, workload)
    if workload.device_type != "cuda":
        number, reason = 1, "on a CPU transfers and computation share the cores"
    elif dispatcher == "local":
        number, reason = 1, "no transfers to hide"
    elif workload.sequences == 1:
        number, reason = 1, "a single sequence is not split"
    elif rows < 2 * _ROWS_OF_AN_EXPERT:
        number = 1
        reason = (
            f"{phase} step, {rows:.0f} rows an expert: "
            "parts would take longer than transfers, each reads the expert's weights"
        )
    elif flops < _IN_FLIGHT * _FLOPS_OF_A_PART:
        number = 1
        reason = (
            f"{phase} step, {flops / 1e12:.1f}e12 operations a layer: "
            "the host would take longer to start parts of it than they compute"
        )
    else:
        number = _IN_FLIGHT
        reason = (
            f"{phase} step, {rows:.0f} rows an expert: one computes under the transfers of another"
        )
    if for_memory > number:
        return for_memory, f"activations of {_IN_FLIGHT} at a time must fit into memory"
    return number, reason


def _flops_of_a_layer(plan: Plan, workload: Workload) -> float:
    model = plan.model
    return step_flops(model, workload.sequences, workload.positions, 0) / model.num_layers


def _padding_bytes(plan: Plan, workload: Workload) -> int:
    model = plan.model
    num_slots = plan.world_size * plan.slots_per_rank
    capacity = capacity_for(workload.tokens, model.top_k, model.num_experts, 1.0)
    return (num_slots * capacity - workload.tokens * model.top_k) * model.row_bytes


def _for_memory(plan: Plan, workload: Workload) -> int:
    """Return how many micro-batches let two of them fit into what the plan leaves free."""
    if workload.device_type != "cuda":
        return 1
    free = min(
        0.9 * rank.capacity - rank.experts - rank.replicated - rank.kv_cache for rank in plan.memory
    )
    if free <= 0:  # no estimate in the plan
        return 1
    model = plan.model
    hidden, inner = model.hidden_size, (3 if model.gated else 2) * model.expert_ffn_size
    attention = 4 * model.attention.num_heads * model.attention.head_dim
    rows = _SKEW * model.top_k * (3 * hidden + inner)
    token_bytes = DTYPE_BYTES[model.dtype] * (6 * hidden + attention + rows)
    tokens = int(free * _ACTIVATION_SHARE / token_bytes / _IN_FLIGHT)  # of a micro-batch
    return ceil(workload.sequences / max(1, tokens // workload.positions))
