"""One rank that replays a plan's traffic: every all-to-all with exactly the rows of the counts.

Nothing is computed. A round is one `all_to_all_single`; all ranks share one clock, so that a round
lasts from when the first rank began to when the last one ended. They meet before it in shared
memory and not on the network: what tells the last ranks to begin would wait in long queues behind
the data of the first ones, for up to a second.
"""

import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from .gloo import gloo_on
from .namespaces import Emulation

Rows = npt.NDArray[np.int64]  # [from, to]
Span = tuple[float, float]  # begin and end of a round on the machine's monotonic clock
_PORT = 29500


def replay(
    rank: int,
    emulation: Emulation,
    store: Path,
    meeting: Barrier,
    exchanges: Sequence[Rows],
    row_bytes: int,
    repeats: int,
) -> list[list[Span]]:
    """Run every exchange `repeats` times on the rank's host; a collective of all ranks.

    Args:
        rank: this rank.
        emulation: the cluster.
        store: a file that does not exist yet, where the ranks find each other.
        meeting: of all ranks.
        exchanges: rows from every rank to every rank, a matrix each.
        row_bytes: of one row.
        repeats: rounds of each exchange, after the first of all to warm up.

    Returns:
        This rank's spans, by exchange and repeat.
    """
    host, world_size = emulation.host_of_rank[rank], len(emulation.host_of_rank)
    sent = torch.zeros(
        max(int(rows[rank].sum()) for rows in exchanges), row_bytes, dtype=torch.uint8
    )
    received = torch.empty(
        max(int(rows[:, rank].sum()) for rows in exchanges), row_bytes, dtype=torch.uint8
    )
    with gloo_on(emulation, host, store, rank, world_size):
        _round(rank, meeting, exchanges[0], sent, received)  # opens the connections
        rounds = [
            [_round(rank, meeting, rows, sent, received) for rows in exchanges]
            for _ in range(repeats)
        ]
    return [list(spans) for spans in zip(*rounds, strict=True)]


def _round(
    rank: int, meeting: Barrier, rows: Rows, sent: torch.Tensor, received: torch.Tensor
) -> Span:
    outgoing, incoming = rows[rank].tolist(), rows[:, rank].tolist()
    out, into = sent[: sum(outgoing)], received[: sum(incoming)]
    meeting.wait()
    begin = time.monotonic()
    dist.all_to_all_single(into, out, incoming, outgoing)
    return begin, time.monotonic()
