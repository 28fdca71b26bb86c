"""Collectives beside the computation.

On a GPU they are launched on a stream of their own, each after the point of the computation that
made its input, and whoever needs the output makes the computation wait on the device; the host
does not wait. With gloo they are work handles. A channel is one process group and one stream:
collectives run in the order in which the program issues them, which therefore must be the same on
all its ranks.

Memory without `record_stream`, which lets freed blocks pile up: inputs belong to the computation's
stream, which would give them to its next kernel, so what is under way holds them until somebody has
waited for it; outputs belong to the transfers' stream, and `release` makes that stream wait for the
computation before they are dropped.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.runtime.clock import PhaseClock, Place


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows under way; only to be read after `wait`, which makes the computation wait for them."""

    rows: Tensor
    sent: Tensor  # held until the computation has waited
    wait: Callable[[], object]


@dataclass(frozen=True, slots=True)
class ToHost:
    """Numbers on their way to the CPU."""

    sources: tuple[Tensor, ...]  # held until they are there
    copy: Tensor
    arrived: Callable[[], object]

    def wait(self) -> Tensor:
        """Make the host wait for the numbers, not the computation, and return them."""
        self.arrived()
        return self.copy


class Channel:
    """Where a rank's transfers run.

    Args:
        rank: this process.
        world_size: number of ranks.
        device: of the computation.
        clock: notes when each transfer ran.
        group: of these ranks; None is the default one, of all.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        clock: PhaseClock,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._clock, self._group = clock, group
        self._stream = _stream(device) if device.type == "cuda" else None
        # torch 2.13 renamed the collective and warns about the old name.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def among(self, parts: Sequence[Sequence[int]]) -> "Channel":
        """Return a channel among the ranks of this one's part; a collective of all ranks.

        It is a queue of its own: what runs there does not wait for what is under way here.

        Args:
            parts: every rank is in one of them, where ranks are numbered in this order.
        """
        lists = [list(part) for part in parts]
        group, _ = dist.new_subgroups_by_enumeration(lists)  # type: ignore[no-untyped-call]
        own = next(part for part in parts if self.rank in part)
        return Channel(
            rank=own.index(self.rank),
            world_size=len(own),
            device=self.device,
            clock=self._clock,
            group=group,
        )

    def point(self) -> torch.Event | None:
        """Return this point of the computation, for transfers to begin after."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    def release(self) -> None:
        """Let further transfers wait for the computation so far, which used outputs dropped now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def exchange(
        self,
        rows: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        *,
        name: str,
        place: Place,
        after: torch.Event | None = None,
    ) -> Arriving:
        """Send `send_rows[rank]` rows to every rank, in rank order, and receive from every rank.

        Args:
            rows: what to send, contiguous, rank after rank.
            send_rows: by destination.
            receive_rows: by source.
            name: in the trace.
            place: in the step.
            after: a point of the computation where `rows` are ready; None is now.

        Raises:
            ValueError: the splits are not the rows; gloo would not notice.
        """
        if sum(send_rows) != rows.shape[0]:
            raise ValueError(
                f"splits {list(send_rows)} add up to {sum(send_rows)} of {rows.shape[0]} rows"
            )
        with self._beside(after):
            received = rows.new_empty(sum(receive_rows), *rows.shape[1:])
            wait = self._start(
                name,
                place,
                lambda is_async: dist.all_to_all_single(
                    received,
                    rows,
                    list(receive_rows),
                    list(send_rows),
                    group=self._group,
                    async_op=is_async,
                ),
            )
        return Arriving(received, rows, wait)

    def gather_to_host(self, numbers: Tensor, place: Place) -> ToHost:
        """Gather `numbers` [n] of all ranks to [W + 1, n] on the CPU, the own ones last.

        The own ones come along so that the gathered ones can be checked.
        """
        with self._beside(None):
            everything = numbers.new_empty(self.world_size + 1, len(numbers))
            everything[-1] = numbers
            gathered = everything[:-1].view(-1)  # flat, as gloo wants it
            wait = self._start(
                "counts",
                place,
                lambda is_async: self._all_gather(
                    gathered, numbers, group=self._group, async_op=is_async
                ),
            )
            return self._copy_to_host(everything, wait, numbers)

    def to_host(self, numbers: Tensor) -> ToHost:
        """Bring `numbers` to the CPU."""
        with self._beside(None):
            return self._copy_to_host(numbers, lambda: None)

    def _copy_to_host(
        self, numbers: Tensor, wait: Callable[[], object], *sources: Tensor
    ) -> ToHost:
        """Bring numbers, made from `sources`, to the CPU; `wait` is for those that are there.

        Inside `_beside`.
        """
        copy = numbers.to("cpu", non_blocking=True)  # of a GPU's: pinned memory
        if self._stream is not None:
            wait = self._stream.record_event().synchronize
        return ToHost((numbers, *sources), copy, wait)

    def _beside(self, after: torch.Event | None) -> AbstractContextManager[object]:
        """Return the transfers' stream as a context, after that point of the computation."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_event(after or torch.cuda.current_stream().record_event())
        return torch.cuda.stream(self._stream)

    def _start(
        self, name: str, place: Place, collective: Callable[[bool], dist.Work | None]
    ) -> Callable[[], object]:
        """Start a collective, inside `_beside`; returns how the computation waits for it."""
        transfer = self._clock.begin_transfer(name, place)
        if self._stream is not None:
            collective(False)  # in order on this stream; the host does not wait
            self._clock.end_transfer(transfer)
            done = self._stream.record_event()
            return lambda: torch.cuda.current_stream().wait_event(done)
        work = collective(True)
        assert work is not None
        work.get_future().add_done_callback(lambda _: self._clock.end_transfer(transfer))
        return work.wait


def _stream(device: torch.device) -> torch.cuda.Stream:
    # Of high priority: otherwise a transfer's few blocks queue behind all blocks of the kernel that
    # the computation has just launched, and begin when that ends.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
