"""Turns of layers within a time limit: what one spares, later ones get."""

import time
from dataclasses import replace

import numpy as np
import pytest

from epplan.planner.placement.levels import Effort, LayerPlacement, Report
from epplan.planner.turns import each_in_turn

NOTHING = LayerPlacement(
    placement=np.zeros(1, dtype=np.intp), seconds=1.0, bound_s=0.0, found_by="", floor_s=0.0
)


def spend(task: float, effort: Effort, budget_s: float, report: Report) -> LayerPlacement:
    """Take a part of the turn, and return how long that was."""
    report(NOTHING)
    time.sleep(task * budget_s)
    return replace(NOTHING, seconds=budget_s)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_spared_time_goes_to_later_layers(side_by_side: bool) -> None:
    got: dict[int, list[float]] = {7: [], 8: [], 9: []}
    took: dict[int, float] = dict.fromkeys(got, 0.0) | {9: 0.0}
    effort = Effort(gap=0.0, deadline=time.monotonic() + 6, seed=0)
    each_in_turn(
        spend,
        took,
        effort,
        lambda layer, placed: got[layer].append(placed.seconds),
        side_by_side=side_by_side,
    )
    assert all(len(found) == 2 and found[0] == 1.0 for found in got.values())
    first, second, third = (got[layer][-1] for layer in (7, 8, 9))
    assert first < 0.9 * third
    if not side_by_side:
        assert first == pytest.approx(2, rel=0.1)
        assert second == pytest.approx(3, rel=0.1)
        assert third == pytest.approx(6, rel=0.1)


def test_layers_that_take_their_time_leave_a_turn_to_each() -> None:
    got = []
    effort = Effort(gap=0.0, deadline=time.monotonic() + 0.6, seed=0)
    tasks = dict.fromkeys(range(3), 1.0)
    each_in_turn(spend, tasks, effort, lambda layer, placed: got.append(placed), side_by_side=False)
    turns = [placed.seconds for placed in got[1::2]]
    assert len(turns) == 3
    assert min(turns) > 0.1
