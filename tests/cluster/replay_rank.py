"""One rank that replays a plan's traffic: every all-to-all with exactly the rows of the counts.

Nothing is computed. All ranks share one clock, so that a round lasts from when the first rank began
to when the last one ended. They meet before it in shared memory and not on the network: what tells
the last ranks to begin would wait in long queues behind the data of the first ones, for up to a
second.

Receives are posted before anybody sends. A gloo rank may send to another only when that one's
permission has come, which in `all_to_all_single` travels behind the other's own data: ranks that
begin a little later than others got nothing for up to 300 ms, while their links were idle. What is
measured is the network and not this handshake, which NCCL does not have.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from .gloo import gloo_on
from .namespaces import Emulation

Rows = npt.NDArray[np.int64]  # [from, to]
SETTLE_S = 0.03  # until the permissions have come, on a network without load
STARVED = 0.2  # of a round: a rank that waited longer for a processor spoils it
MOST_TRIES = 4  # of a round, until one is not spoiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One all-to-all of all ranks.

    Attributes:
        seconds: from when the first rank began to when the last one had everything.
        is_calm: whether no rank waited long for a processor.
        spoiled: rounds before this one that were thrown away because some rank did.
    """

    seconds: float
    is_calm: bool
    spoiled: int


def replay(
    rank: int,
    emulation: Emulation,
    store: Path,
    meeting: Barrier,
    shared: Any,
    exchanges: Sequence[Rows],
    row_bytes: int,
    repeats: int,
) -> list[list[Round]]:
    """Run every exchange `repeats` times on the rank's host; a collective of all ranks.

    Args:
        rank: this rank.
        emulation: the cluster.
        store: a file that does not exist yet, where the ranks find each other.
        meeting: of all ranks.
        shared: memory of all ranks, three doubles each.
        exchanges: rows from every rank to every rank, a matrix each.
        row_bytes: of one row.
        repeats: rounds of each exchange, after the first of all to warm up.

    Returns:
        The rounds, by exchange and repeat; all ranks return the same.
    """
    host, world_size = emulation.host_of_rank[rank], len(emulation.host_of_rank)
    notes = np.frombuffer(shared).reshape(world_size, 3)  # begin, end, waited for a processor
    sent = torch.zeros(
        max(int(rows[rank].sum()) for rows in exchanges), row_bytes, dtype=torch.uint8
    )
    received = torch.empty(
        max(int(rows[:, rank].sum()) for rows in exchanges), row_bytes, dtype=torch.uint8
    )

    def calm_round(rows: Rows) -> Round:
        for spoiled in count():
            waited_s = _waited_s()
            begin_s, end_s = _round(rank, meeting, rows, sent, received)
            notes[rank] = begin_s, end_s, _waited_s() - waited_s
            meeting.wait()
            seconds = float(notes[:, 1].max() - notes[:, 0].min())
            is_calm = bool((notes[:, 2] <= STARVED * seconds).all())
            if is_calm or spoiled + 1 == MOST_TRIES:
                break
        return Round(seconds=seconds, is_calm=is_calm, spoiled=spoiled)

    with gloo_on(emulation, host, store, rank, world_size):
        _round(rank, meeting, exchanges[0], sent, received)  # opens the connections
        rounds = [[calm_round(rows) for rows in exchanges] for _ in range(repeats)]
    return [list(of_exchange) for of_exchange in zip(*rounds, strict=True)]


def _round(
    rank: int, meeting: Barrier, rows: Rows, sent: torch.Tensor, received: torch.Tensor
) -> tuple[float, float]:
    """Return when this rank began to send, and when it had everything."""
    outgoing, incoming = rows[rank].tolist(), rows[:, rank].tolist()
    out = torch.split(sent[: sum(outgoing)], outgoing)
    into = torch.split(received[: sum(incoming)], incoming)
    world_size = len(outgoing)
    work = [dist.irecv(into[peer], peer) for peer in _in_turn(rank, -1, incoming, world_size)]
    meeting.wait()
    time.sleep(SETTLE_S)
    meeting.wait()
    begin_s = time.monotonic()
    work += [dist.isend(out[peer], peer) for peer in _in_turn(rank, 1, outgoing, world_size)]
    into[rank].copy_(out[rank])
    for each in work:
        assert each is not None
        each.wait()
    return begin_s, time.monotonic()


def _in_turn(rank: int, step: int, rows: list[int], world_size: int) -> Iterator[int]:
    """Yield the other ranks that have rows, each rank in its own order, as gloo does."""
    for distance in range(1, world_size):
        peer = (rank + step * distance) % world_size
        if rows[peer]:
            yield peer


def _waited_s() -> float:
    """Return how long all threads of this process have waited for a processor."""
    waits = [
        int((thread / "schedstat").read_text().split()[1])
        for thread in Path("/proc/self/task").iterdir()
    ]
    return sum(waits) * 1e-9
