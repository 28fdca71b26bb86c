"""What may be done inside a model's step beside its own work; by default nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from epplan.runtime.checks.finite import FiniteCheck

from .clock import Place


def _nothing(place: Place) -> None:
    """Do nothing."""


@dataclass(slots=True, kw_only=True)
class Hooks:
    """Called by a model's forward pass.

    Attributes:
        rows_under_way: called after a MoE layer's rows have been sent and before its experts wait
            for theirs: what travels now travels beside the experts' computation. All ranks come by
            in the same order.
        finite: told the rows of every layer.
        capacity_factor: drop an expert's rows beyond this many times its even share of a rank's.
    """

    rows_under_way: Callable[[Place], None] = _nothing
    finite: FiniteCheck | None = None
    capacity_factor: float | None = None
