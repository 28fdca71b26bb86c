"""Rebalancing while running: drift, a question to the planner, a migration.

The planner needs a solver's libraries and some seconds, so rank 0 starts it as a process of its own
(`epplan rebalance`) while the model goes on; at the end of a window of steps all ranks learn
whether its answer is there. What a table was made for is the mix of experts that its counts had;
when the share of rows that go elsewhere passes the threshold in some layer, the planner is asked
again. For the first table nobody here knows the mix, so that the first window asks once.

Outputs do not change: experts move, and shares of replicas, not what an expert computes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan, read_plan, write_plan
from epplan.planner.traffic import write_counts

from .migrate import Migration, Moved
from .monitor import Monitor, Window

StartMigration = Callable[[Plan, Plan], Migration]  # from one plan to another


@dataclass(slots=True, kw_only=True)
class Rebalancing:
    """One rank's part; a collective: all ranks call the same methods after the same steps.

    Args:
        plan: the plan in use; replaced, layer by layer, by `installed`.
        rank: this process.
        threshold: drift of a layer from which the planner is asked.
        start: makes the migration.
    """

    plan: Plan
    rank: int
    threshold: float
    start: StartMigration
    tables: int = 0  # put into use so far
    problems: tuple[str, ...] = ()
    _moved: Moved = field(default_factory=Moved)
    _migration: Migration | None = None
    _asked: bool = False
    _question: "_Question | None" = None  # on rank 0, while it is open

    @property
    def moved(self) -> Moved:
        """What has been moved, by all ranks."""
        now = self._migration.moved if self._migration else Moved()
        return Moved(
            experts=self._moved.experts + now.experts,
            bytes=self._moved.bytes + now.bytes,
            layers=self._moved.layers + now.layers,
        )

    @property
    def layers_left(self) -> int:
        """Layers that have yet to change."""
        return self._migration.layers_left if self._migration else 0

    def between_layers(self) -> None:
        """Let the next chunk travel, if experts are moving."""
        if self._migration is not None:
            self._migration.between_layers()

    def settle(self) -> None:
        """Wait for what travels; nothing further will."""
        if self._migration is not None:
            self._migration.settle()

    def between_steps(self) -> None:
        """Put the next layer's table into use, if its experts are here."""
        if self._migration is not None and self._migration.between_steps():
            self._moved = self.moved
            self._migration = None
            self.tables += 1

    def after_window(self, monitor: Monitor, window: Window, counts_LWE: Tensor) -> None:
        """Ask the planner if the window drifted, or take its answer if it is there."""
        if self._migration is not None:
            return
        if self._asked:
            self._take_answer()
        elif self._has_drifted(window):
            self._asked = True
            monitor.compare_with(counts_LWE)
            if self.rank == 0:
                self._question = _Question(self.plan, counts_LWE)

    def installed(self, plan: Plan) -> None:
        """Note the plan from now on: a layer has changed."""
        self.plan = plan

    def close(self) -> None:
        """Give up an open question."""
        if self._question is not None:
            self._question.close()

    def _has_drifted(self, window: Window) -> bool:
        return any(drift is None or drift > self.threshold for drift in window.drift)

    def _take_answer(self) -> None:
        message: list[Plan | str | None] = [None]
        if self._question is not None:
            message = [self._question.answer()]
        dist.broadcast_object_list(message, src=0)
        (answer,) = message
        if answer is None:  # not yet
            return
        self._asked = False
        if self._question is not None:
            self._question.close()
            self._question = None
        if isinstance(answer, str):
            self.problems = (*self.problems, answer)
        elif answer.expert_of_slot != self.plan.expert_of_slot or any(
            answer.shares(layer) != self.plan.shares(layer)
            for layer in range(self.plan.model.num_moe_layers)
        ):
            self._migration = self.start(self.plan, answer)


class _Question:
    """`epplan rebalance` in a process of its own."""

    def __init__(self, plan: Plan, counts_LWE: Tensor) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="epplan-rebalance-")
        folder = Path(self._folder.name)
        self._answer = folder / "next.json"
        write_plan(folder / "plan.json", plan)
        write_counts(folder / "counts.npz", counts_LWE[None].numpy())
        command = [
            *(sys.executable, "-m", "epplan", "rebalance", str(folder / "plan.json")),
            *("--counts", str(folder / "counts.npz"), "-o", str(self._answer), "--json"),
        ]
        with (folder / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def answer(self) -> Plan | str | None:
        """Return the next plan, or what went wrong; None while the planner computes."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0:
            return read_plan(self._answer)
        said = (Path(self._folder.name) / "stderr").read_text(errors="replace").strip()
        return f"`epplan rebalance` exited with code {code}: {said}"

    def close(self) -> None:
        """End the process, if it still runs, and remove its files."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
