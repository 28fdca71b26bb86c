"""Seconds by phase, without waiting for the device inside a step."""

import time
from collections import defaultdict

import torch


class PhaseClock:
    """Collects marks at phase ends and adds up the time between them.

    On a GPU the marks are events on the current stream, so that a phase's time is the device's,
    and reading them afterwards is the only wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.Event]] = []

    def start(self) -> None:
        """Forget all marks and begin the first phase."""
        self._marks.clear()
        self.mark("")

    def mark(self, phase: str) -> None:
        """End a phase; the next one begins here."""
        if self._device.type == "cuda":
            event = torch.Event(device=self._device, enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since `start`; waits for the device."""
        synchronize(self._device)
        total: dict[str, float] = defaultdict(float)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            total[phase] += _between(begin, end)
        return dict(total)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _between(begin: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
