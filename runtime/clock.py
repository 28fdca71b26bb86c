"""Seconds by phase and by transfer, without waiting for the device inside a step."""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Track = Literal["compute", "communication"]
_Moment = float | torch.Event


class Place(NamedTuple):
    """Where in a step something happens."""

    layer: int  # absolute
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something one rank did, in seconds since the step began."""

    track: Track
    name: str
    place: Place
    begin_s: float
    end_s: float


@dataclass(slots=True, kw_only=True)
class _Transfer:
    name: str
    place: Place
    begin: _Moment | None
    end: _Moment | None = None


class PhaseClock:
    """Collects marks at phase ends and around transfers.

    A phase begins where the one before ends, whatever micro-batch that was of, so that the phases
    of a step add up to the step: "dispatch" and "combine" are what the computation waited for
    transfers, not how long those took. On a GPU the marks are events on the current stream, so
    that a phase's time is the device's, and reading them afterwards is the only wait. While a
    CUDA graph is captured there is nothing to time, and marks are ignored.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Place, _Moment]] = []
        self._transfers: list[_Transfer] = []

    def start(self) -> None:
        """Forget everything and begin the first phase."""
        self._marks.clear()
        self._transfers.clear()
        self.mark("", Place(-1, -1))

    def mark(self, phase: str, place: Place) -> None:
        """End a phase; the next one begins here."""
        moment = self._now()
        if moment is not None:
            self._marks.append((phase, place, moment))

    def begin_transfer(self, name: str, place: Place) -> _Transfer:
        """Note that a transfer begins, on the current stream."""
        transfer = _Transfer(name=name, place=place, begin=self._now())
        if transfer.begin is not None:
            self._transfers.append(transfer)
        return transfer

    def end_transfer(self, transfer: _Transfer) -> None:
        """Note that a transfer has ended, on the current stream."""
        transfer.end = self._now()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since `start`; waits for the device."""
        total: dict[str, float] = defaultdict(float)
        for span in self.spans():
            if span.track == "compute":
                total[span.name] += span.end_s - span.begin_s
        return dict(total)

    def transfers(self) -> list[tuple[str, float]]:
        """Return name and seconds of each transfer in their order; waits for the device."""
        return [
            (span.name, span.end_s - span.begin_s)
            for span in self.spans()
            if span.track == "communication"
        ]

    def spans(self) -> list[Span]:
        """Return phases and finished transfers since `start`; waits for the device."""
        synchronize(self._device)
        if not self._marks:
            return []
        origin = self._marks[0][2]
        ends = [_between(origin, moment) for _, _, moment in self._marks]
        spans = [
            Span(track="compute", name=phase, place=place, begin_s=begin, end_s=end)
            for (phase, place, _), begin, end in zip(
                self._marks[1:], ends[:-1], ends[1:], strict=True
            )
        ]
        spans += [
            Span(
                track="communication",
                name=transfer.name,
                place=transfer.place,
                begin_s=_between(origin, transfer.begin),
                end_s=_between(origin, transfer.end),
            )
            for transfer in self._transfers
            if transfer.begin is not None and transfer.end is not None
        ]
        return spans

    def _now(self) -> _Moment | None:
        if self._device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _between(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
