"""Rows on their way between ranks, with gradients that travel back the same way.

A flight is two nodes of the autograd graph: one starts the exchange, the other waits for it. In
the backward pass they come in reverse, so the second starts the exchange of the gradients and the
first waits for it: what overlapped forwards overlaps backwards too. Autograd runs nodes in the
reverse of the order in which the program made them, which is the same on all ranks, and so is the
order of the collectives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epplan.runtime.clock import Place

from .channel import Arriving, Channel


class Flight:
    """One exchange of rows.

    Args:
        channel: to travel by.
        send_rows: by destination.
        receive_rows: by source.
        name: in the trace.
        place: in the step.
    """

    def __init__(
        self,
        channel: Channel,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        *,
        name: str,
        place: Place,
    ) -> None:
        self._channel = channel
        self._send_rows = send_rows
        self._receive_rows = receive_rows
        self._name = name
        self._place = place
        self._arriving: Arriving
        self._under_way: Tensor

    def start(self, rows: Tensor, after: torch.Event | None = None) -> None:
        """Start the exchange of `rows`, which are ready at the point `after` (None: now)."""
        self._under_way = _Start.apply(rows, self, after)  # type: ignore[no-untyped-call]

    def finish(self) -> Tensor:
        """Return the rows that arrive; the computation waits for them."""
        arrived: Tensor = _Finish.apply(self._under_way, self)  # type: ignore[no-untyped-call]
        del self._under_way
        return arrived

    def _start(self, rows: Tensor, after: torch.Event | None) -> Tensor:
        return self._exchange(rows, self._send_rows, self._receive_rows, self._name, after)

    def _start_gradient(self, gradient: Tensor) -> None:
        name = f"{self._name} gradient"
        self._exchange(gradient.contiguous(), self._receive_rows, self._send_rows, name, None)

    def _finish(self) -> Tensor:
        self._arriving.wait()
        rows = self._arriving.rows
        del self._arriving
        return rows

    def _exchange(
        self,
        rows: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        name: str,
        after: torch.Event | None,
    ) -> Tensor:
        self._arriving = self._channel.exchange(
            rows, send_rows, receive_rows, name=name, place=self._place, after=after
        )
        return self._arriving.rows


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight, after: torch.Event | None) -> Tensor:
        ctx.flight = flight
        return flight._start(rows, after)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight._finish(), None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight._finish()
        return under_way.view_as(under_way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.flight._start_gradient(gradients[0])
        return gradients[0], None  # only to let `_Start.backward` run
