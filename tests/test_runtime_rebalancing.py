"""Rebalancing while running: when the planner is asked, and that all ranks follow its answer."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.balancing.migrate import Experts, Migration, empty_like
from epplan.runtime.balancing.monitor import Monitor, Window, measure_load
from epplan.runtime.balancing.rebalancing import Rebalancing
from epplan.runtime.layer.experts import MlpWeights
from epplan.runtime.weights import SeededWeights
from tests.fork_ranks import run_ranks
from tests.plans import bare_plan
from tests.runtime_cases import MIXTRAL

RANKS, PER_RANK = 4, 2
PLAN = bare_plan(MIXTRAL, [("a", 0), ("a", 1), ("b", 0), ("b", 1)], [tuple(range(8))] * 2)
FIRST_TWO_HOT = torch.tensor([40, 40, 1, 1, 1, 1, 1, 1])
LAST_TWO_HOT = FIRST_TWO_HOT.flip(0)


class Run:
    """One rank's model, reduced to its tables and experts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        weights = SeededWeights(
            spec=MIXTRAL, seed=0, device=torch.device("cpu"), dtype=torch.float32
        )
        self.empty: MlpWeights = weights.expert(0, 0)
        self.experts: list[Experts] = [
            tuple(weights.expert(layer, e) for e in PLAN.experts_of_rank(layer, rank))
            for layer in range(2)
        ]
        self.monitor = Monitor(window=2)
        self.rebalancing = Rebalancing(plan=PLAN, rank=rank, threshold=0.2, start=self._migration)
        self.windows: list[Window] = []

    def _migration(self, old: Plan, new: Plan) -> Migration:
        return Migration(
            old,
            new,
            self.rank,
            experts_of=lambda layer: self.experts[layer],
            empty_expert=lambda: empty_like(self.empty),
            install=self._install,
        )

    def _install(self, plan: Plan, layer: int, experts: Experts) -> None:
        self.experts[layer] = experts
        self.rebalancing.installed(plan)

    def steps(self, number: int, mix_E: Tensor) -> None:
        """Run steps in which every rank sends each expert `mix_E` rows."""
        for _ in range(number):
            self.rebalancing.between_layers()
            self.rebalancing.between_layers()
            plan = self.rebalancing.plan
            full = self.monitor.after_step(plan, counts(plan, mix_E), 0.01)
            self.rebalancing.between_steps()
            if full:
                window, counts_LWE = self.monitor.close_window(plan)
                self.windows.append(window)
                self.rebalancing.after_window(self.monitor, window, counts_LWE)

    def until_tables(self, number: int, mix_E: Tensor) -> None:
        """Run until so many tables have been put into use."""
        deadline = time.monotonic() + 40
        while self.rebalancing.tables < number:
            assert time.monotonic() < deadline, self.rebalancing.problems
            self.steps(1, mix_E)
            dist.barrier()
            time.sleep(0.01)


def counts(plan: Plan, mix_E: Tensor) -> Tensor:
    """Return the rows that a dispatcher would count, [L, W, W, P]."""
    shares = torch.tensor([plan.shares(layer) for layer in range(2)])
    expert_LS = torch.tensor([[0 if e is None else e for e in row] for row in plan.expert_of_slot])
    rows_LS = (mix_E[expert_LS] * shares).round().long()
    return rows_LS.view(2, 1, RANKS, PER_RANK).expand(2, RANKS, RANKS, PER_RANK)


def is_asking(run: Run) -> bool:
    return run.rebalancing._asked


def follow_drift(rank: int) -> tuple[list[tuple[tuple[int | None, ...], ...]], int, int]:
    run = Run(rank)
    tables = []
    run.until_tables(1, FIRST_TWO_HOT)  # the first window asks
    tables.append(run.rebalancing.plan.expert_of_slot)
    balance = measure_load(run.rebalancing.plan, counts(run.rebalancing.plan, FIRST_TWO_HOT))
    assert all(layer.max_over_mean < 2 for layer in balance.balance)  # was 3.7
    moved = run.rebalancing.moved.experts
    run.steps(12, FIRST_TWO_HOT)  # the same mix: nobody asks again
    assert not is_asking(run)
    assert run.windows[-1].drift == (0.0, 0.0)
    run.steps(2, LAST_TWO_HOT)
    assert run.windows[-1].drift[0] == 78 / 86
    assert is_asking(run)
    run.steps(40, LAST_TWO_HOT)
    run.rebalancing.close()
    tables.append(run.rebalancing.plan.expert_of_slot)
    return tables, moved, run.rebalancing.layers_left


def test_drift_leads_to_a_new_table_on_all_ranks() -> None:
    outcomes = run_ranks(follow_drift, RANKS)
    assert outcomes == [outcomes[0]] * RANKS
    (tables, moved, _) = outcomes[0]
    assert tables[0] != PLAN.expert_of_slot
    assert moved >= 4  # a swap in each layer


def fail(rank: int) -> list[str]:
    run = Run(rank)
    idle = torch.zeros(8, dtype=torch.int64)  # the planner refuses layers without rows
    deadline = time.monotonic() + 40
    while not run.rebalancing.problems:
        assert time.monotonic() < deadline
        run.steps(2, idle)
        dist.barrier()
        time.sleep(0.05)
    assert run.rebalancing.plan is PLAN
    return list(run.rebalancing.problems)


def test_a_planner_that_fails_leaves_the_table_and_is_reported() -> None:
    outcomes = run_ranks(fail, RANKS)
    assert outcomes == [outcomes[0]] * RANKS
    (problem,) = outcomes[0]
    assert problem.startswith("`epplan rebalance` exited with code 2: error: counts file ")
    assert "have no assignment at all" in problem
