"""Two hops: one row per token and node over the network, then one to each rank that wants it.

Shapes: T tokens, K experts per token, V rows received at a node's entry, W ranks, P slots per rank,
S = W x P slots, I nodes, G ranks of this node, H hidden size.

A node is an island of the plan: ranks that reach each other without the network, those of a host or
of an NVLink domain over hosts. A row enters a node at one of its ranks (`epplan.planner.forwarding`
has the rule, and prices it), which sends it on. Back the same way: ranks add up their experts'
outputs of a row, its entry adds up its node's, and one row goes home. Inside its own node a rank is
its own entry.

    source --dispatch--> entry --forward--> rank of the expert
    source <--combine--- entry <--gather--- rank of the expert

The hops over the network run under another micro-batch's computation. Those inside a node do not,
but have a process group of their own, so that they need not wait for its rows on the network.
"""

import numpy as np
import torch
from torch import Tensor

from epplan.planner.forwarding import Ints, entry_ranks

from .channel import Channel
from .dedup import Arrived, choices_of
from .dispatch import Counts, Dispatcher, Routed, SlotRows, Transfer, checked_counts
from .hop import Choices, Hop, Splits, mark
from .order import count
from .wire import Wire


class NodeDeduplicated(Dispatcher):
    """Sends one row per token and node, which is forwarded there.

    Args:
        channel: to travel by.
        slots_per_rank: experts a rank may hold.
        wire: how rows are written on the way to the experts; they are forwarded as written.
        node_W: number of every rank's node, from 0, [W].

    Building it is a collective.
    """

    def __init__(self, channel: Channel, slots_per_rank: int, wire: Wire, node_W: Ints) -> None:
        super().__init__(channel, slots_per_rank)
        self.wire = wire
        self.nodes = _Nodes(node_W, channel.rank)
        numbers = range(int(node_W.max()) + 1)
        self.inside = channel.among([np.flatnonzero(node_W == each).tolist() for each in numbers])
        self.entry_W = self.nodes.entry_W.to(channel.device)
        self.number_W = self.nodes.number_W.to(channel.device)

    def begin(self, routed: Routed) -> Transfer:
        """Count and sort rows and choices; the counts are under way."""
        return _TwoHops(self, routed)


class _Nodes:
    """Who enters where, as one rank sees it; on the CPU.

    Args:
        node_W: number of every rank's node.
        rank: whose view.
    """

    def __init__(self, node_W: Ints, rank: int) -> None:
        entry_WI = torch.from_numpy(entry_ranks(node_W))
        nodes = torch.from_numpy(node_W)
        self.entry_W = entry_WI[rank, nodes]  # where this rank's rows for each rank enter
        self.inside = (nodes == nodes[rank]).nonzero().flatten()  # this node's ranks
        self.number_W = torch.zeros_like(nodes)  # of this node's ranks among themselves
        self.number_W[self.inside] = torch.arange(len(self.inside))
        self.enters_W = entry_WI[:, nodes[rank]]  # where each rank's rows enter this node
        self.most_nodes, self.most_ranks = entry_WI.shape[1], len(self.inside)
        self._rank = rank

    def first_hop(self, counts_WWP: Tensor, rows_WW: Tensor) -> Splits:
        """Return what goes to entries.

        Args:
            counts_WWP: choices by source, rank and slot.
            rows_WW: rows by source and entry.
        """
        slots_per_rank = counts_WWP.shape[2]
        to_rank_W = counts_WWP[self._rank].sum(-1)
        via_here_W = self.enters_W == self._rank
        arriving_WC = counts_WWP[:, self.inside].flatten(1) * via_here_W[:, None]
        slots_C = self.inside[:, None] * slots_per_rank + torch.arange(slots_per_rank)
        return Splits(
            send_rows=rows_WW[self._rank].tolist(),
            receive_rows=rows_WW[:, self._rank].tolist(),
            send_choices=torch.zeros_like(to_rank_W)
            .scatter_add_(0, self.entry_W, to_rank_W)
            .tolist(),
            receive_choices_WC=arriving_WC,
            slots_C=slots_C.flatten(),
        )

    def second_hop(self, counts_WWP: Tensor, rows_WW: Tensor) -> Splits:
        """Return what entries send on inside this node, whose ranks are numbered among themselves.

        Args:
            counts_WWP: choices by source, rank and slot.
            rows_WW: rows that each source has for each rank.
        """
        rank, slots_per_rank = self._rank, counts_WWP.shape[2]
        via_here_W = self.enters_W == rank
        via_GW = (self.enters_W[None, :] == self.inside[:, None]).long()
        return Splits(
            send_rows=rows_WW[via_here_W].sum(0)[self.inside].tolist(),
            receive_rows=(via_GW @ rows_WW[:, rank]).tolist(),
            send_choices=counts_WWP[via_here_W].sum((0, 2))[self.inside].tolist(),
            receive_choices_WC=via_GW @ counts_WWP[:, rank],
            slots_C=torch.arange(slots_per_rank) + rank * slots_per_rank,
        )


class _TwoHops(Transfer):
    def __init__(self, dispatcher: NodeDeduplicated, routed: Routed) -> None:
        self._dispatcher, self._channel = dispatcher, dispatcher.channel
        self._wire, self._place, self._nodes = dispatcher.wire, routed.place, dispatcher.nodes
        channel = dispatcher.channel
        self._slots_per_rank = dispatcher.slots_per_rank
        self._check, self._dtype = routed.check_rows, routed.x_TH.dtype
        self._num_tokens, self._top_k = routed.slot_TK.shape
        choices = choices_of(routed)
        rank_N = choices.slot_N // dispatcher.slots_per_rank
        self._num_slots = channel.world_size * dispatcher.slots_per_rank
        self._over_network = Hop(
            channel,
            choices,
            dispatcher.entry_W.index_select(0, rank_N),
            num_rows=self._num_tokens,
            num_slots=self._num_slots,
            place=routed.place,
        )
        self.counts = Counts(own_S=count(choices.slot_N, self._num_slots))
        place_N = choices.row_N * channel.world_size + rank_N
        rows_W = mark(place_N, self._num_tokens, channel.world_size).sum(0)
        numbers = torch.cat([self.counts.own_S, self._over_network.rows_W, rows_W])
        self._gathered = channel.gather_to_host(numbers, routed.place)
        self._over_network.pack(self._wire.write(routed.x_TH))

    def send(self) -> None:
        """Wait for the counts on the host, then send rows and choices to entries."""
        rank, world_size = self._channel.rank, self._channel.world_size
        matrix = checked_counts(self._gathered.wait(), rank, self._place)
        counts_WS, entered_WW, rows_WW = torch.split(
            matrix, [self._num_slots, world_size, world_size], dim=1
        )
        counts_WWP = counts_WS.reshape(world_size, world_size, -1)
        self.counts.all_WWP = counts_WWP
        self._inside_splits = self._nodes.second_hop(counts_WWP, rows_WW)
        self._over_network.start(self._nodes.first_hop(counts_WWP, entered_WW), "dispatch")
        del self._gathered

    def receive(self) -> SlotRows:
        """Send on what enters here; return a row for every choice, in the order of their slots."""
        rows_V, row_R, weight_R = self._over_network.finish(check=self._check)
        slot_R = self._over_network.received_slots()
        self._inside = Hop(
            self._dispatcher.inside,
            Choices(row_N=row_R, slot_N=slot_R, weight_N=weight_R),
            self._dispatcher.number_W.index_select(0, slot_R // self._slots_per_rank),
            num_rows=len(rows_V),
            num_slots=self._num_slots,
            place=self._place,
        )
        self._inside.pack(rows_V, sum(self._inside_splits.send_rows))
        self._inside.start(self._inside_splits, "forward")
        arrived = self._inside.finish(check=self._check)
        arriving_WP = self._inside_splits.receive_choices_WC
        self._arrived = Arrived(*arrived, arriving_WP, self._top_k)
        return self._arrived.by_slot(self._wire, self._dtype)

    def take_outputs(self, outputs_RH: Tensor) -> None:
        """Add up the outputs for each row by weight."""
        self._sums_VH = self._arrived.sums(outputs_RH)
        self._ready = self._channel.point()

    def send_back(self) -> None:
        """Send the sums to entries, which add up their nodes' and send them home."""
        self._inside.send_back(self._sums_VH, "gather", self._ready)
        sums_VH = self._inside.finish_back(min(self._top_k, self._nodes.most_ranks))
        self._over_network.send_back(sums_VH, "combine")
        del self._sums_VH

    def receive_back(self) -> Tensor:
        """Add up the sums of each token's nodes."""
        out_TH = self._over_network.finish_back(min(self._top_k, self._nodes.most_nodes))
        self._channel.release()
        self._dispatcher.inside.release()
        del self._arrived, self._inside, self._over_network
        return out_TH
