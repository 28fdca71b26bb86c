"""Ends a rank that waits in vain, and says for whom it waited.

When one rank dies or hangs, all others fail a moment later, in a collective that says nothing but
"connection closed" or "timed out". Each rank therefore tells a store shared by all, from a thread
of its own, that it lives and where it is. Who finds a collective broken looks there: a rank that
is silent was killed or stopped, one that is behind hangs.

The thread also ends this rank where a collective would wait for ever. Error classes and exit
codes tell a rank that failed by itself from one that failed because of another, so that a
launcher names the cause (`epplan/errors.py`).
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from epplan.errors import EpplanError, PeerError

_MAX_INTERVAL_S = 1.0  # between two signs of life
_INTERVALS = 10  # of them at least in the timeout
_LOOK_INTERVALS = 2.5  # between two looks at the others: each gives two signs meanwhile
_RESTART = "TORCHELASTIC_RESTART_COUNT"
_SILENT = "does not respond: it was killed or stopped, or its host or the network to it is gone"
_FAILED, _GAVE_UP = "failed: ", "gave up: "
_GLOO_SOURCE = re.compile(r"^\[\S*/gloo/\S*\] |\. This is typically caused by .*")
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory")


class At(Protocol):
    """How a rank says where it is: `Watchdog.at`."""

    def __call__(self, place: str, *, limited: bool = True) -> None:
        """Say it."""


def say_nothing(place: str, *, limited: bool = True) -> None:
    """Be an `At` that nobody hears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a rank last told about itself."""

    beat: int  # counts up while the process runs
    progress: int  # counts up from place to place
    place: str


class Watchdog:
    """This rank's signs of life, and its patience; a context manager.

    Args:
        store: reached by all ranks; nothing else of the process may wait for it.
        rank: this process.
        world_size: number of ranks.
        timeout_s: how long a place may take; the process group's timeout.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        # torchrun's agent keeps the store, and what is in it, over a restart of the ranks.
        self._store = PrefixStore(f"watchdog/{os.environ.get(_RESTART, '0')}", store)
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._interval_s = min(_MAX_INTERVAL_S, timeout_s / _INTERVALS)
        self._place, self._progress, self._beat = "its start", 0, 0
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Start to give signs of life."""
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Stop; the last sign says whether this rank failed by itself."""
        if error is not None:
            kind_of_end = _GAVE_UP if isinstance(error, PeerError) else _FAILED
            self._place = f"{kind_of_end}{_first_line(error)}"
        if isinstance(error, PeerError) and self._rank == 0:
            time.sleep(_LOOK_INTERVALS * self._interval_s)  # the store ends with this process
        self._ended.set()
        self._thread.join(_LOOK_INTERVALS * self._interval_s)

    def at(self, place: str, *, limited: bool = True) -> None:
        """Say where this rank is now, in words; all ranks come by the same places.

        Args:
            place: "step 3".
            limited: end this process if it stays there for longer than the timeout.
        """
        self._place = place
        self._progress += 1
        # The collective's own timeout comes first: it has the better message.
        patience_s = self._timeout_s + 2 * self._interval_s
        self._deadline = time.monotonic() + patience_s if limited else None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what a broken collective or a full memory raises into an error that says why.

        Raises:
            PeerError: another rank failed or hangs, with its number if that can be found out.
            EpplanError: this rank ran out of memory.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self._deadline = None
            if ran_out_of_memory(error):
                raise self._out_of_memory(error) from None
            if not is_peer_failure(error):
                raise
            raise self._peer_failed(str(error)) from None

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._tell()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._give_up()
        self._tell()

    def _give_up(self) -> None:
        """End this process, which no collective's timeout has ended: by itself it hangs."""
        words = f"hangs: it has been at {self._place} for more than {self._timeout_s:g} s"
        self._place = f"{_FAILED}it {words}"
        self._tell()
        error = EpplanError(
            f"rank {self._rank} {words}",
            problems=self._others(),
            hints=["give a larger --timeout if this may take so long"],
        )
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)

    def _tell(self) -> None:
        self._beat += 1
        # Without rank 0 there is no store, and whoever waits for others will find out.
        with suppress(RuntimeError):
            self._store.set(str(self._rank), f"{self._beat} {self._progress} {self._place}")

    def _out_of_memory(self, error: BaseException) -> EpplanError:
        return EpplanError(
            f"rank {self._rank} ran out of memory at {self._place}: {_first_line(error)}",
            hints=[
                "take fewer --sequences or a shorter --sequence-length",
                "make a plan with fewer experts on a GPU, or for more GPUs",
            ],
        )

    def _peer_failed(self, reason: str) -> PeerError:
        return PeerError(
            f"rank {self._rank} waited in vain at {self._place}: "
            f"{_GLOO_SOURCE.sub('', reason.strip().splitlines()[0])}",
            problems=self._others(),
        )

    def _others(self) -> list[str]:
        """Return what can be said against the other ranks; takes some intervals."""
        found: list[str] = []
        # In a thread, because a store whose process is stopped does not answer at all.
        look = threading.Thread(target=lambda: found.extend(self._look_around()), daemon=True)
        look.start()
        look.join(6 * self._interval_s)
        if look.is_alive():
            return [f"rank 0 {_SILENT}"]
        return found

    def _look_around(self) -> list[str]:
        try:
            before = self._signs()
            time.sleep(_LOOK_INTERVALS * self._interval_s)
            after = self._signs()
        except RuntimeError:
            return ["rank 0 is gone, and with it the store that tells of the others"]
        return blame(before, after, self._rank, self._world_size)

    def _signs(self) -> dict[int, Sign]:
        signs = {}
        for rank in range(self._world_size):
            if self._store.check([str(rank)]):
                beat, progress, place = self._store.get(str(rank)).decode().split(" ", 2)
                signs[rank] = Sign(beat=int(beat), progress=int(progress), place=place)
        return signs


def blame(before: dict[int, Sign], after: dict[int, Sign], own: int, world_size: int) -> list[str]:
    """Return which ranks are silent, or else behind, one line each.

    Args:
        before: what the ranks told.
        after: the same, some intervals later.
        own: the rank that asks.
        world_size: number of ranks.
    """
    others = [rank for rank in range(world_size) if rank != own]
    failed = [
        f"rank {rank} {after[rank].place}"
        for rank in others
        if rank in after and after[rank].place.startswith(_FAILED)
    ]
    if failed:
        return failed
    # Rank 0 has started, or there were no store to ask; it may still wait for others to join.
    missing = [f"rank {rank} never started" for rank in others if rank and rank not in after]
    silent = [
        f"rank {rank} {_SILENT}; last at {after[rank].place}"
        for rank in others
        if rank in before
        and rank in after
        and before[rank].beat == after[rank].beat
        and not after[rank].place.startswith(_GAVE_UP)
    ]
    if missing or silent:
        return missing + silent
    progress = max(sign.progress for sign in after.values())
    return [
        f"rank {rank} is behind: still at {sign.place}"
        for rank, sign in after.items()
        if rank != own and sign.progress < progress
    ]


def is_peer_failure(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank; gloo raises bare RuntimeError."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether memory, of the GPU or the host, was too small."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _CPU_ALLOCATOR)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
