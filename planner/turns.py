"""Layers one after the other, or side by side in processes, each with its turn within the time.

A turn is a share of what is left when it begins: what one layer does not need, later ones get.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from epplan.planner.placement.levels import Effort, LayerPlacement, Report
from epplan.planner.placement.processes import run_in_processes

_SHARE_OF_TURN = 0.9  # layers end a little after their time, and the last must have a turn too
_GRACE_S = 3.0  # a solver that has not looked at the clock for so long is ended

Within = Callable[..., LayerPlacement]  # of a task, effort, seconds for it and a report
Take = Callable[[int, LayerPlacement], None]


def each_in_turn(
    function: Within, tasks: dict[int, Any], effort: Effort, take: Take, *, side_by_side: bool
) -> None:
    """Call a function for layers, each in its turn, and take the results.

    Args:
        function: importable by name; tasks and results are pickled.
        tasks: by layer.
        effort: for all of them.
        take: takes a layer's results, those on the way included.
        side_by_side: in processes, as many as there are cores.
    """
    layers = list(tasks)
    if not side_by_side or not effort.left_s:
        for number, layer in enumerate(layers):
            report = partial(take, layer)
            turn = 1 / (len(layers) - number)
            take(layer, _in_turn(function, turn, tasks[layer], effort, report))
        return
    workers = min(len(layers), os.cpu_count() or 1)
    turns = [
        min(1.0, _SHARE_OF_TURN * workers / (len(layers) - number)) for number in range(len(layers))
    ]
    arguments = [
        (function, turn, tasks[layer], effort) for layer, turn in zip(layers, turns, strict=True)
    ]

    def patience_s(number: int) -> float:
        return turns[number] * effort.left_s + _GRACE_S

    for number, better in run_in_processes(_in_turn, arguments, workers, patience_s):
        take(layers[number], better)
        if time.monotonic() > effort.deadline + _GRACE_S:
            return  # layers that were not begun keep what they have


def _in_turn(
    function: Within, turn: float, task: Any, effort: Effort, report: Report
) -> LayerPlacement:
    """Call the function with its part of the time that is left now."""
    return function(task, effort, turn * effort.left_s, report)
