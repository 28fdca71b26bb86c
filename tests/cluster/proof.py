"""Planned, contiguous and random placements of the same traffic: predicted, then measured.

What epplan is given are three files, as a user would give them: a cluster file with measured
capacities, a model and recorded counts. All-to-alls are then replayed on the emulated cluster.
"""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import yaml

from epplan.planner.cost import Phase, Shares, evaluate_layer, one_copy, rows_between_ranks
from epplan.planner.groups.group import choose_groups, group_size
from epplan.planner.model import AttentionSpec, ModelSpec, load_model
from epplan.planner.plan import Plan, read_plan
from epplan.planner.problem import Problem, make_problem
from epplan.planner.traffic import make_traffic
from epplan.topologies.sources import load_cluster
from tests.fork_ranks import fork_ranks

from .fabric import Fabric
from .namespaces import Emulation
from .replay_rank import MOST_TRIES, Round, Rows, replay

Counts = npt.NDArray[np.int64]  # [layers, source ranks, experts]
PLACEMENTS = ("planned", "contiguous", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One all-to-all: dispatch or combine of one layer under one placement."""

    placement: str
    layer: int
    phase: str
    predicted_s: float
    measured_s: float  # median over repeats
    spread: float  # (slowest - fastest) / median of the repeats
    spoiled: int  # rounds thrown away and repeated, because a rank waited for a processor
    kept_spoiled: int  # repeats that count although one did: it was never calm
    limit: str  # the link that sets the predicted time

    @property
    def error(self) -> float:
        """How far the prediction is off, of the measured time."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """All cases of one fabric and one traffic."""

    fabric: Fabric
    traffic: str
    cases: tuple[Case, ...]

    def of(self, placement: str, phase: str | None = None) -> list[Case]:
        """Return the cases of a placement, of one phase or of both."""
        own = [case for case in self.cases if case.placement == placement]
        return [case for case in own if phase in (None, case.phase)]

    def seconds(self, placement: str, *, predicted: bool = False) -> float:
        """Return dispatch and combine of all layers, added; of random placements their mean."""
        cases = self.of(placement)
        total = sum(case.predicted_s if predicted else case.measured_s for case in cases)
        return total / len(cases) * len(self.of("planned"))

    def gain(self, placement: str, *, predicted: bool = False) -> float:
        """Return how much faster than `placement` the plan is."""
        planned = self.seconds("planned", predicted=predicted)
        return self.seconds(placement, predicted=predicted) / planned


def replay_model(counts: Counts, top_k: int) -> ModelSpec:
    """Return the model of the counts: rows of 4 KiB, experts that cost nothing to compute."""
    layers, _, experts = counts.shape
    return ModelSpec(
        name="replay",
        hidden_size=1024,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=16,
        attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8),
        dtype="float32",
        weight_bytes=4,
    )


def rule_counts(rule: str, *, layers: int, ranks: int, tokens: int, seed: int = 0) -> Counts:
    """Return whole counts by one of epplan's traffic rules, an expert a rank, top-1."""
    model = replay_model(np.zeros((layers, ranks, ranks), dtype=np.int64), top_k=1)
    counts: Counts = np.rint(make_traffic(rule, model, ranks, tokens, seed).counts[0]).astype(int)
    return counts


def write_inputs(folder: Path, counts: Counts, top_k: int) -> tuple[Path, Path]:
    """Write model and counts as files that `epplan solve` reads, and return their paths."""
    model, load = folder / "model.yaml", folder / "counts.npz"
    model.write_text(yaml.safe_dump(replay_model(counts, top_k).model_dump(mode="json")))
    np.savez_compressed(load, counts=counts[None])
    return model, load


def solve(cluster: Path, model: Path, load: Path, experts_per_gpu: int) -> Plan:
    """Return the plan `epplan solve` makes of these files, written beside the cluster file."""
    output = cluster.with_suffix(".plan.json")
    command = [sys.executable, "-m", "epplan", "solve", "--topology", cluster, "--model", model]
    command += ["--load", load, "--experts-per-gpu", experts_per_gpu, "-o", output]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return read_plan(output)


def prove(
    fabric: Fabric,
    traffic: str,
    plan: Plan,
    problem: Problem,
    emulation: Emulation,
    store: Path,
    *,
    repeats: int,
    seeds: Sequence[int] = (0,),
) -> Proof:
    """Predict and measure every all-to-all of every placement.

    Args:
        fabric: the cluster.
        traffic: its name.
        plan: the planned placement.
        problem: what it was planned for.
        emulation: the running cluster.
        store: a file that does not exist yet.
        repeats: rounds of every all-to-all.
        seeds: of the random placements.
    """
    cases: list[tuple[str, int, str, Phase]] = []
    exchanges: list[Rows] = []
    for name, layers in _placements(plan, problem, seeds):
        for layer, shares in enumerate(layers):
            rows = np.rint(rows_between_ranks(problem, 0, layer, shares)).astype(np.int64)
            window = evaluate_layer(problem, layer, shares).worst
            cases += [
                (name, layer, phase.name, phase) for phase in (window.dispatch, window.combine)
            ]
            exchanges += [rows, rows.T.copy()]
    predicted_s = sum(phase.seconds for *_, phase in cases)
    context = multiprocessing.get_context("fork")
    rounds, *_ = fork_ranks(
        replay,
        fabric.num_ranks,
        emulation,
        store,
        context.Barrier(fabric.num_ranks),
        context.RawArray("d", 3 * fabric.num_ranks),
        exchanges,
        problem.model.row_bytes,
        repeats,
        timeout_s=60 + 3 * MOST_TRIES * repeats * predicted_s,
    )
    return Proof(
        fabric=fabric,
        traffic=traffic,
        cases=tuple(_case(*case, of_case) for case, of_case in zip(cases, rounds, strict=True)),
    )


def _case(
    placement: str, layer: int, phase_name: str, phase: Phase, rounds: Sequence[Round]
) -> Case:
    times = [each.seconds for each in rounds]
    return Case(
        placement=placement,
        layer=layer,
        phase=phase_name,
        predicted_s=phase.seconds,
        measured_s=median(times),
        spread=(max(times) - min(times)) / median(times),
        spoiled=sum(each.spoiled for each in rounds),
        kept_spoiled=sum(not each.is_calm for each in rounds),
        limit=phase.worst,
    )


def load_problem(cluster: Path, model: Path, load: Path, experts_per_gpu: int) -> Problem:
    """Return the problem that `solve` solves."""
    graph, spec = load_cluster(str(cluster)), load_model(str(model))
    size = group_size(graph, spec, None, experts_per_gpu)
    traffic = make_traffic(str(load), spec, size, None, 0)
    group = choose_groups(graph, spec, traffic, experts_per_gpu).gpus[0]
    return make_problem(graph, group, spec, traffic, experts_per_gpu)


def _placements(
    plan: Plan, problem: Problem, seeds: Sequence[int]
) -> Iterator[tuple[str, list[Shares]]]:
    """Yield the placements to compare, each with the shares of every layer."""
    ranks, layers = problem.num_ranks, range(problem.model.num_moe_layers)
    slots = np.repeat(np.arange(ranks), problem.experts_per_gpu)
    experts = problem.model.num_experts
    yield "planned", [_shares(plan, layer) for layer in layers]
    in_order = np.arange(experts) * ranks // experts
    yield "contiguous", [one_copy(in_order, ranks) for _ in layers]
    for seed in seeds:
        random = np.random.default_rng(seed)
        yield "random", [one_copy(random.permutation(slots)[:experts], ranks) for _ in layers]


def _shares(plan: Plan, layer: int) -> Shares:
    shares = np.zeros((plan.model.num_experts, plan.world_size))
    slots = zip(plan.expert_of_slot[layer], plan.shares(layer), strict=True)
    for slot, (expert, share) in enumerate(slots):
        if expert is not None:
            shares[expert, slot // plan.slots_per_rank] = share
    return shares
