"""Puts a rank's model together: its weights, and the dispatcher and schedule chosen for it."""

from math import ceil

from epplan.planner.plan import Plan, TransferMode
from epplan.runtime.dispatchers.alltoall import AllToAll
from epplan.runtime.dispatchers.channel import Channel
from epplan.runtime.dispatchers.dedup import Deduplicated
from epplan.runtime.dispatchers.dispatch import Dispatcher, DispatcherKind
from epplan.runtime.dispatchers.local import Local
from epplan.runtime.dispatchers.node_dedup import NodeDeduplicated
from epplan.runtime.dispatchers.padded import Padded, capacity_for
from epplan.runtime.dispatchers.wire import Float8Wire, PlainWire, Wire
from epplan.runtime.layer.layers import build_layers

from .clock import PhaseClock
from .model import ExpertParallelModel
from .options import Options
from .schedule import Choice, islands_of
from .weights import Weights


def build_model(
    plan: Plan, options: Options, choice: Choice, weights: Weights, rank: int
) -> ExpertParallelModel:
    """Return the model as `rank` runs it, on the device of its weights."""
    clock = PhaseClock(weights.device)
    sequences = ceil(options.sequences / choice.schedule.micro_batches)
    dispatcher = make_dispatcher(
        choice.dispatcher,
        Channel(rank=rank, world_size=plan.world_size, device=weights.device, clock=clock),
        plan,
        tokens=sequences * options.positions,
        capacity_factor=options.capacity_factor,
        transfer=choice.transfer,
        fp8=options.fp8_dispatch,
    )
    layers = build_layers(plan, rank, weights, options.replicas, joined=not options.train)
    return ExpertParallelModel(plan.model, layers, dispatcher, choice.schedule, clock)


def make_dispatcher(
    kind: DispatcherKind,
    channel: Channel,
    plan: Plan,
    *,
    tokens: int,
    capacity_factor: float,
    transfer: TransferMode,
    fp8: bool,
) -> Dispatcher:
    """Return the dispatcher.

    Args:
        kind: which.
        channel: to travel by.
        plan: the placement.
        tokens: of one rank in one micro-batch, at most.
        capacity_factor: of a padded dispatcher: room over the mean rows of an expert.
        transfer: how often a token's row travels; of `alltoall`.
        fp8: whether rows travel to the experts as 8-bit numbers.
    """
    wire: Wire = Float8Wire() if fp8 else PlainWire()
    slots_per_rank = plan.slots_per_rank
    match kind:
        case "local":
            return Local(channel, slots_per_rank)
        case "alltoall":
            if transfer == "node-dedup":
                return NodeDeduplicated(channel, slots_per_rank, wire, islands_of(plan))
            once_a_rank = transfer == "direct"
            return (Deduplicated if once_a_rank else AllToAll)(channel, slots_per_rank, wire)
        case "padded":
            model = plan.model
            return Padded(
                channel,
                slots_per_rank,
                wire,
                capacity=capacity_for(tokens, model.top_k, model.num_experts, capacity_factor),
                dropless=AllToAll(channel, slots_per_rank, wire),
            )
