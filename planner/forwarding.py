"""How a token's copies travel: once per expert, per rank or per island, and who forwards them.

    per-choice   one row per (token, expert): `all_to_all_single`, low-latency kernels
    direct       one row per (token, rank): a rank with several of a token's experts gets it once
    node-dedup   one row per (token, island) over the network, forwarded inside: DeepEP's normal
                 kernels

An island is the ranks that reach each other without the network: a host, or the hosts of one
NVLink domain. The forwarding rule of node-dedup: ranks of an island are numbered in rank order, and
the rows of the rank with number i enter an island of n ranks at its rank number i mod n; so NIC i
talks to NIC i. That rank keeps a row if it holds one of the token's experts, and sends one to each
other rank of the island that does. Inside its own island a rank sends straight, one row a rank.
Combine is the mirror image: every rank adds up its experts' outputs of a token, the entry rank adds
up its island's, and one row goes home.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


def entry_ranks(island: Ints) -> Ints:
    """Return where each rank's rows enter each island, [ranks, islands]; itself for its own.

    Args:
        island: number of every rank's island, [ranks].
    """
    members = [np.flatnonzero(island == number) for number in range(int(island.max()) + 1)]
    entry = np.empty((len(island), len(members)), dtype=np.intp)
    for own in members:
        for place, rank in enumerate(own.tolist()):
            entry[rank] = [ranks[place % len(ranks)] for ranks in members]
            entry[rank, island[rank]] = rank
    return entry


def through_islands(to_rank: Floats, to_island: Floats, island: Ints) -> Floats:
    """Return the rows sent from rank to rank where islands forward them, [ranks, ranks].

    Args:
        to_rank: rows each source has for each rank, [ranks, ranks].
        to_island: rows each source has for each island, [ranks, islands]; its own does not count.
        island: of every rank, [ranks].
    """
    entry = entry_ranks(island)
    sent = np.zeros_like(to_rank)
    for number in range(entry.shape[1]):
        inside = np.flatnonzero(island == number)
        outside = np.flatnonzero(island != number)
        np.add.at(sent, (outside, entry[outside, number]), to_island[outside, number])
        # Whatever comes into the island, and whatever its own ranks send, ends at ranks in it.
        np.add.at(sent, (entry[:, number, None], inside[None, :]), to_rank[:, inside])
    return sent


def path_latency(latency_s: Floats, island: Ints) -> Floats:
    """Return the latency of every forwarded path, both hops, [ranks, ranks].

    Args:
        latency_s: of direct paths, [ranks, ranks].
        island: of every rank, [ranks].
    """
    entry = entry_ranks(island)[:, island]  # of the path from a rank to a rank, [ranks, ranks]
    ranks = np.arange(len(island))
    total: Floats = latency_s[ranks[:, None], entry] + latency_s[entry, ranks[None, :]]
    return total
