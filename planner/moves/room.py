"""Room for the experts that nobody holds any more: maximum flows over slots and memory.

layers' lost experts --> slots (layer, rank) --> memory of ranks          `deal_room`
experts of layers    --> slots where a copy is, or any for a lost one --> memory of ranks
                                                                          `one_copy_each`
"""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from epplan.planner.problem import Problem

Copies = npt.NDArray[np.bool_]  # of one layer, [experts, ranks]
Held = npt.NDArray[np.bool_]  # copies that are there already, [layers, experts, ranks]
Ints = npt.NDArray[np.int64]


def deal_room(problem: Problem, used: Ints, lost: Ints) -> Ints | None:
    """Return the most experts of every rank, [layers, ranks], None where room does not suffice.

    Args:
        problem: of the ranks that are left.
        used: slots that are taken, [layers, ranks].
        lost: experts that need one, [layers].
    """
    num_layers, ranks = used.shape
    free = problem.experts_per_gpu - used
    if (free < 0).any() or (free.sum(axis=1) < lost).any():
        return None
    if not problem.layers_coupled:
        return np.full_like(used, problem.experts_per_gpu)
    source, sink = num_layers + ranks, num_layers + ranks + 1
    flow = np.zeros((sink + 1, sink + 1), dtype=np.int32)
    flow[source, :num_layers] = lost
    flow[:num_layers, num_layers:source] = free
    flow[num_layers:source, sink] = np.maximum(problem.slots_of_gpu - used.sum(axis=0), 0)
    found = maximum_flow(csr_array(flow), source, sink)
    dealt: Ints = found.flow.toarray()[:num_layers, num_layers:source].astype(np.int64)
    fits = found.flow_value == lost.sum() and (used.sum(axis=0) <= problem.slots_of_gpu).all()
    room: Ints = used + dealt
    return room if fits else None


def one_copy_each(problem: Problem, held: Held) -> Held | None:
    """Return one of the copies of every expert that has some, so that the others find room.

    Returns:
        None where no choice leaves room for the experts without a copy.
    """
    num_layers, num_experts, ranks = held.shape
    lost: Held = ~np.asarray(held.any(axis=2))
    layer, expert, rank = np.nonzero(held | lost[:, :, None])
    experts = num_layers * num_experts  # the nodes: experts, slots, ranks, source, sink
    slots, source = experts + num_layers * ranks, experts + num_layers * ranks + ranks
    slot = experts + np.arange(num_layers * ranks)
    on_rank = slots + np.arange(ranks)
    tails = [np.full(experts, source), layer * num_experts + expert, slot, on_rank]
    heads = [
        np.arange(experts),
        slot[layer * ranks + rank],
        np.tile(on_rank, num_layers),
        np.full(ranks, source + 1),
    ]
    wide = np.minimum(problem.slots_of_gpu, experts)  # what a large GPU has room for is no int32
    capacity = [
        np.ones(experts + len(layer)),
        np.full(len(slot), problem.experts_per_gpu),
        wide,
    ]
    graph = csr_array(
        (
            np.concatenate(capacity).astype(np.int32),
            (np.concatenate(tails), np.concatenate(heads)),
        ),
        shape=(source + 2, source + 2),
    )
    found = maximum_flow(graph, source, source + 1)
    if found.flow_value < experts:
        return None
    chosen = np.zeros_like(held)
    taken = np.asarray(found.flow[layer * num_experts + expert, slot[layer * ranks + rank]]) > 0
    chosen[layer[taken], expert[taken], rank[taken]] = True
    return chosen & held
