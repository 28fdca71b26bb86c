"""Plans for the survivors of a lost host: least bytes moved, true bounds, honest errors."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from epplan.errors import InfeasibleError, InputError
from epplan.planner.cost import one_copy
from epplan.planner.groups.neighbours import Neighbours
from epplan.planner.moves.repair import align, improve, least_moved
from epplan.planner.moves.replan import Effort, Replanned, replan
from epplan.planner.moves.survivors import surviving_gpus, surviving_ranks, surviving_traffic
from epplan.planner.objective import Objective
from epplan.planner.placement.row_builder import RowBuilder
from epplan.planner.plan import Plan, plan_problems, read_plan
from epplan.planner.problem import make_problem
from epplan.planner.traffic import Floats, make_traffic
from epplan.topologies.graph import Cluster
from epplan.topologies.sources import load_cluster
from tests.plans import bare_plan
from tests.tiny import (
    all_placements,
    brute_force,
    price,
    random_counts,
    tiny_cluster,
    tiny_model,
    tiny_problem,
    tiny_traffic,
)

ROOT = Path(__file__).parent.parent
CLUSTER = tiny_cluster((2, 2, 2), nic_rate="25Gb/s")
EFFORT = Effort(gap=0.0, time_limit_s=60, progress=lambda line: None)


def plan_of(slots: list[list[int | None]], experts: int, cluster: Cluster = CLUSTER) -> Plan:
    """Return a plan with these experts in the slots of each layer."""
    places = [(gpu.host, gpu.index) for gpu in cluster.gpus()]
    return bare_plan(tiny_model(experts, layers=len(slots)), places, slots)


def random_plan(seed: int, layers: int = 1, experts: int = 6) -> Plan:
    random = np.random.default_rng(seed)
    slots = [[*random.permutation(experts).tolist()] for _ in range(layers)]
    return plan_of([[e if e < experts else None for e in row] for row in slots], experts)


def run(
    plan: Plan,
    counts: Floats,
    lost: str,
    *,
    experts_per_gpu: int = 2,
    extra: int | None = 0,
    cluster: Cluster = CLUSTER,
) -> Replanned:
    survivors = surviving_ranks(plan, [lost], cluster)
    return replan(
        plan,
        cluster,
        "tiny",
        tiny_traffic(counts[:, survivors]),
        survivors,
        experts_per_gpu=experts_per_gpu,
        extra_loads=extra,
        objective=Objective(),
        effort=EFFORT,
        command="epplan replan",
    )


def places(plan: Plan) -> dict[tuple[int, int], set[tuple[str, int]]]:
    """Return the GPUs of every (layer, expert)."""
    found: dict[tuple[int, int], set[tuple[str, int]]] = {}
    for layer in range(len(plan.expert_of_slot)):
        for rank in plan.ranks:
            for expert in plan.experts_of_rank(layer, rank.rank):
                found.setdefault((layer, expert), set()).add((rank.host, rank.gpu_index))
    return found


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))]
)
def test_only_lost_experts_move_and_as_well_as_can_be(seed: int) -> None:
    plan, counts = random_plan(seed), random_counts(seed, 1, 6, 6)
    found = run(plan, counts, "h1")
    assert plan_problems(found.plan) == []
    assert [rank.host for rank in found.plan.ranks] == ["h0", "h0", "h2", "h2"]
    before, after = places(plan), places(found.plan)
    lost = {key for key, gpus in before.items() if all(host == "h1" for host, _ in gpus)}
    assert {key for key in before if before[key] != after[key]} == lost
    assert {(0, transfer.expert) for transfer in found.transfers} == lost
    assert all(transfer.source is None for transfer in found.transfers)
    # Of all placements that keep the others where they are, this is the best.
    problem = tiny_problem(
        counts[:, [0, 1, 4, 5]], cluster=tiny_cluster((2, 2), nic_rate="25Gb/s"), experts_per_gpu=2
    )
    new = [(rank.host, rank.gpu_index) for rank in found.plan.ranks]
    keeping = [
        price(problem, placement)
        for placement in all_placements(problem)
        if all(new[placement[e]] in before[0, e] for e in range(6) if (0, e) not in lost)
    ]
    assert found.plan.certificate.objective_s == pytest.approx(min(keeping))
    assert found.plan.certificate.bound_s == pytest.approx(brute_force(problem), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("overlap", [False, True])
def test_neighbours_cost_what_the_evaluator_says(seed: int, overlap: bool) -> None:
    windows = np.stack([random_counts(seed + n, 1, 6, 9) for n in range(2)])
    problem = tiny_problem(
        windows,
        cluster=CLUSTER,
        experts_per_gpu=2,
        ffn=4096,
        objective=Objective(overlap=overlap),
    )
    rows = RowBuilder(problem).layer(0)
    placement = np.random.default_rng(seed).permutation(np.repeat(np.arange(6), 2))[:9]
    neighbours = Neighbours(rows, placement)
    for expert in range(9):
        moves, swaps = neighbours.moves(expert), neighbours.swaps(expert)
        for rank in range(6):
            moved = placement.copy()
            moved[expert] = rank
            assert moves[rank] == pytest.approx(price(problem, moved), rel=1e-9)
        for other in set(range(9)) - {expert}:
            swapped = placement.copy()
            swapped[[expert, other]] = placement[[other, expert]]
            assert swaps[other] == pytest.approx(price(problem, swapped), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_buys_time(seed: int) -> None:
    plan, counts = random_plan(seed, layers=3), random_counts(seed, 3, 6, 6)
    least, some, any_ = (run(plan, counts, "h2", extra=extra) for extra in (0, 2, None))
    times = [found.plan.certificate.objective_s for found in (least, some, any_)]
    assert times == sorted(times, reverse=True)
    assert len(least.transfers) == 6
    assert len(some.transfers) <= 8
    assert any_.plan.certificate.gap == pytest.approx(0, abs=1e-5)
    assert any_.plan.certificate.status == "optimal"
    bounds = {round(found.plan.certificate.bound_s, 9) for found in (least, some, any_)}
    assert len(bounds) == 1


@pytest.mark.parametrize("seed", range(4))
def test_aligning_costs_no_time_and_saves_bytes(seed: int) -> None:
    counts, random = random_counts(seed, 1, 6, 9), np.random.default_rng(seed)
    problem = tiny_problem(counts, cluster=CLUSTER, experts_per_gpu=2)
    slots = np.repeat(np.arange(6), 2)
    held = np.zeros((1, 9, 6), dtype=bool)
    held[0, np.arange(9), random.permutation(slots)[:9]] = True
    placement = random.permutation(slots)[:9]
    aligned = align(problem, held, [one_copy(placement, 6)])[0].argmax(axis=1)
    assert price(problem, aligned) <= price(problem, placement) * (1 + 1e-9)
    assert held[0, np.arange(9), aligned].sum() >= held[0, np.arange(9), placement].sum()
    hosts = np.array([gpu.host for gpu in problem.gpus])
    assert (hosts[aligned] == hosts[placement]).all()


def test_transfers_make_the_new_plan_out_of_the_old() -> None:
    plan, counts = random_plan(1, layers=3), random_counts(1, 3, 6, 6)
    found = run(plan, counts, "h0", extra=None)
    held = {key: {gpu for gpu in gpus if gpu[0] != "h0"} for key, gpus in places(plan).items()}
    for transfer in found.transfers:
        key, rank = (transfer.layer, transfer.expert), found.plan.ranks[transfer.rank]
        if transfer.source is None:
            assert not held[key]
        else:
            source = found.plan.ranks[transfer.source]
            assert (source.host, source.gpu_index) in held[key]
        held[key] = {(rank.host, rank.gpu_index)}
    assert held == places(found.plan)


def test_a_surviving_replica_needs_no_transfer() -> None:
    slots: list[list[int | None]] = [[0, 3, 1, 2, 2, 3, None, None, 4, None, 5, None]]
    shares = [[1, 0.3, 1, 0.5, 0.5, 0.7, 0, 0, 1, 0, 1, 0]]
    gpus = [(gpu.host, gpu.index) for gpu in CLUSTER.gpus()]
    plan = bare_plan(tiny_model(6), gpus, slots, shares)
    found = run(plan, random_counts(3, 1, 6, 6), "h1")
    assert found.transfers == ()
    after = places(found.plan)
    assert after[0, 2] == {("h0", 1)}
    assert after[0, 3] == {("h0", 0)}
    assert any("2 of 8 copies are not made again" in reason for reason in found.plan.reasons)


def test_lost_experts_find_room_where_memory_couples_layers() -> None:
    counts = random_counts(5, 2, 6, 6)
    plan = random_plan(5, layers=2)
    problem = tiny_problem(
        counts[:, :4], cluster=tiny_cluster((2, 2), nic_rate="25Gb/s"), experts_per_gpu=2
    )
    held = np.zeros((2, 6, 4), dtype=bool)
    for layer in range(2):
        for rank in range(4):
            held[layer, plan.experts_of_rank(layer, rank), rank] = True
    # Rank 0 has no room for more than it holds; the other three share the four lost experts.
    tight = replace(problem, slots_of_gpu=np.array([2, 4, 3, 3]))
    assert tight.layers_coupled
    placed = least_moved(tight, held)
    assert placed is not None
    used = np.sum([np.bincount(placement, minlength=4) for placement in placed], axis=0)
    assert (used <= tight.slots_of_gpu).all()
    for layer, placement in enumerate(placed):
        kept = np.flatnonzero(held[layer].any(axis=1))
        assert (placement[kept] == held[layer][kept].argmax(axis=1)).all()
    better = improve(tight, held, placed, 4)
    again = np.sum([np.bincount(placement, minlength=4) for placement in better], axis=0)
    assert (again == used).all()
    assert least_moved(replace(problem, slots_of_gpu=np.array([2, 2, 2, 2])), held) is None


def test_survivors_that_may_not_keep_all_are_planned_from_scratch() -> None:
    slots: list[list[int | None]] = [[0, 1, 2, None, 3, None, None, None, None, None, None, None]]
    plan = plan_of(slots, 4)
    found = run(plan, random_counts(0, 1, 6, 4), "h1", experts_per_gpu=1)
    assert all(len(found.plan.experts_of_rank(0, rank)) == 1 for rank in range(4))
    assert len(found.options) == 1
    assert any("cannot keep all they hold" in reason for reason in found.plan.reasons)
    assert {transfer.source for transfer in found.transfers} <= {None, 0, 1}


def test_too_few_slots_are_told_with_numbers() -> None:
    with pytest.raises(InfeasibleError) as caught:
        run(random_plan(0), random_counts(0, 1, 6, 6), "h1", experts_per_gpu=1)
    assert str(caught.value) == (
        "6 experts a layer do not fit on the 4 ranks that are left with at most 1 expert of a "
        "layer on a GPU: 4 slots, 2 too few\n"
        "remedies:\n"
        "  1. allow --experts-per-gpu 2\n"
        "  2. replace the lost GPUs: 6 are needed, then solve again"
    )
    assert caught.value.exit_code == 3


def test_hosts_that_are_not_there() -> None:
    plan = random_plan(0)
    with pytest.raises(InputError, match="the plan has no host h9\nhint: its hosts are h0, h1, h2"):
        surviving_ranks(plan, ["h9", "h1"], CLUSTER)
    with pytest.raises(InputError, match="no rank is left without h0, h1, h2"):
        surviving_ranks(plan, ["h0", "h1", "h2"], CLUSTER)
    with pytest.raises(InputError, match="tiny has no h2/gpu0, h2/gpu1, which ranks of the plan"):
        surviving_ranks(plan, ["h1"], tiny_cluster((2, 2)))


def test_a_topology_with_its_hosts_in_another_order_numbers_ranks_so() -> None:
    places = [(host, gpu) for host in ("h2", "h1", "h0") for gpu in range(2)]
    plan = bare_plan(tiny_model(6), places, [[0, 1, 2, 3, 4, 5]])
    counts = random_counts(2, 1, 6, 6)
    survivors = surviving_ranks(plan, ["h1"], CLUSTER)
    assert survivors == [4, 5, 0, 1]
    found = run(plan, counts, "h1")
    assert [rank.host for rank in found.plan.ranks] == ["h0", "h0", "h2", "h2"]
    assert 4 in found.plan.experts_of_rank(0, 0)
    assert 1 in found.plan.experts_of_rank(0, 3)


def epplan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epplan", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )


TOPOLOGY = "4x2:h100,nic=1x100Gb/s"


@pytest.fixture
def solved(tmp_path: Path) -> Path:
    options = ["--model", "reference", "--experts", "12", "--scale", "0.1", "--layers", "2"]
    options += ["--experts-per-gpu", "2", "--load", "lognormal:1,1", "--tokens", "64"]
    done = epplan("solve", "--topology", TOPOLOGY, *options, "-o", "plan.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_command_twice_in_a_row(solved: Path) -> None:
    before = read_plan(solved / "plan.json")
    hosts = list(dict.fromkeys(rank.host for rank in before.ranks))
    done = epplan(
        "replan", "plan.json", "--without", hosts[1], "-o", "second.json", "--json", cwd=solved
    )
    assert done.returncode == 0, done.stderr
    result, second = json.loads(done.stdout), read_plan(solved / "second.json")
    assert result["sha256"] == second.sha256()
    assert second.inputs.traffic.source == "lognormal:1,1@0-1,4-7/8"
    listed = json.loads((solved / "second.transfers.json").read_text())
    assert listed["plan"] == second.sha256()
    assert listed["from_plan"] == before.sha256()
    assert listed["total_bytes"] == result["moved_bytes"]
    assert listed["total_bytes"] == len(listed["transfers"]) * before.model.expert_bytes
    assert listed["transfers"] == result["transfers"]
    assert {row["from"] for row in listed["transfers"]} == {"checkpoint"}
    # Another host goes: the traffic of those left is still the first plan's.
    done = epplan(
        "replan",
        *("second.json", "--without", hosts[0], "--experts-per-gpu", "3", "-o", "third.json"),
        cwd=solved,
    )
    assert done.returncode == 0, done.stderr
    assert "what ranks load before the plan can run" in done.stdout
    third = read_plan(solved / "third.json")
    assert third.inputs.traffic.source == "lognormal:1,1@4-7/8"
    counts = make_traffic("lognormal:1,1", before.model, 8, 64, 0).counts
    left = surviving_traffic(third, [0, 1, 2, 3], None, None)
    np.testing.assert_array_equal(left.counts, counts[:, :, 4:])
    problem = make_problem(
        load_cluster(TOPOLOGY),
        surviving_gpus(third, [0, 1, 2, 3], load_cluster(TOPOLOGY)),
        third.model,
        left,
        3,
    )
    placement = [
        [third.expert_of_slot[layer].index(e) // third.slots_per_rank for e in range(12)]
        for layer in range(2)
    ]
    total = sum(price(problem, np.array(of), layer) for layer, of in enumerate(placement))
    assert third.certificate.objective_s == pytest.approx(total)


def test_command_refuses_inputs_that_changed(solved: Path) -> None:
    (solved / "tiny.yaml").write_text(
        "schema_version: 1\nname: t\nhost_types: {t: {gpu: h100-sxm, gpus: 2, nic: connectx-7, "
        "nics: 1}}\nhosts: [{names: 'h[0-3]', type: t, leafs: [l]}]\nswitches: [{names: l}]\n"
    )
    options = ["--model", "reference", "--experts", "8", "--scale", "0.1", "--layers", "1"]
    np.savez(solved / "counts.npz", counts=np.ones((1, 1, 8, 8), dtype=np.int64))
    options += ["--load", "counts.npz", "--topology", "tiny.yaml", "-o", "p.json"]
    assert epplan("solve", *options, cwd=solved).returncode == 0
    arguments = ["replan", "p.json", "--without", "h1", "--experts-per-gpu", "2"]
    np.savez(solved / "counts.npz", counts=np.full((1, 1, 8, 8), 2, dtype=np.int64))
    done = epplan(*arguments, cwd=solved)
    assert done.returncode == 2
    assert re.search(
        r"error: counts.npz was changed since the plan was made from it: its sha256 was \w{12}, it "
        r"is \w{12}\nhint: give traffic with --load",
        done.stderr,
    )
    assert epplan(*arguments, "--load", "uniform", cwd=solved).returncode == 0
    with (solved / "tiny.yaml").open("a") as file:
        file.write("# changed\n")
    done = epplan(*arguments, "--load", "uniform", cwd=solved)
    assert done.returncode == 2
    assert "topology tiny.yaml was changed since the plan was made for it" in done.stderr
    (solved / "tiny.yaml").unlink()
    done = epplan(*arguments, "--load", "uniform", cwd=solved)
    assert done.returncode == 2
    assert "the topology the plan was made for cannot be read: unknown topology" in done.stderr
    done = epplan(*arguments, "--extra", "20", cwd=solved)
    assert done.returncode == 2
    assert "--extra: '20' is no memory size" in done.stderr
