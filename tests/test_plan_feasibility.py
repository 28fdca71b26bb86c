"""Infeasible problems: decided as by trying everything, explained minimally, remedies applied."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.commands.solve import solve
from epplan.errors import InfeasibleError
from epplan.planner.feasibility import PER_GPU, REPLICAS, SINGLE, SURVIVE, Constraint, Room
from epplan.planner.problem import Replication, make_problem
from epplan.planner.solve import solve_placement
from epplan.planner.traffic import make_traffic
from epplan.topologies.sources import load_cluster
from tests.tiny import random_counts, tiny_cluster, tiny_model, tiny_problem

LIMIT_WITH_PLAN = 4

ROOMS = st.builds(
    lambda layers, experts, replicas, survive, per_gpu, slots, hosts: Room(
        layers=layers,
        experts=experts,
        replicas=replicas,
        survive=survive,
        experts_per_gpu=per_gpu,
        slots=np.array(slots),
        host=np.array(sorted(hosts[: len(slots)])),
    ),
    layers=st.integers(1, 3),
    experts=st.integers(1, 3),
    replicas=st.integers(0, 5),
    survive=st.booleans(),
    per_gpu=st.integers(1, 4),
    slots=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    hosts=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)


def fits_by_trying(room: Room) -> bool:
    """Try every set of copies of a layer, and every sum of layers that memory allows."""
    gpus, hosts = len(room.slots), room.host
    layouts = set()
    for cells in product((0, 1), repeat=room.experts * gpus):
        copies = np.array(cells).reshape(room.experts, gpus)
        on_hosts = [len(set(hosts[of_expert > 0])) for of_expert in copies]
        held = copies.sum(axis=0)
        if (
            copies.sum() == room.experts + room.replicas
            and min(on_hosts) >= 1 + room.survive
            and held.max() <= room.experts_per_gpu
        ):
            layouts.add(tuple(held.tolist()))
    sums = {(0,) * gpus}
    for _ in range(room.layers):
        sums = {
            total
            for before, layout in product(sums, layouts)
            if (np.array(total := tuple(map(sum, zip(before, layout)))) <= room.slots).all()  # noqa: B905
        }
    return bool(sums)


@settings(max_examples=150, deadline=None)
@given(room=ROOMS)
def test_room_is_decided_as_by_trying_everything(room: Room) -> None:
    assert room.fits() == fits_by_trying(room)


@settings(max_examples=150, deadline=None)
@given(room=ROOMS)
def test_a_conflict_rules_out_everything_and_no_part_of_it_does(room: Room) -> None:
    conflict = room.conflict()
    assert bool(conflict) != room.fits()
    every: set[Constraint] = {SINGLE, PER_GPU, SURVIVE, REPLICAS, *range(len(room.kinds()))}
    others = frozenset(every - set(conflict))
    assert room.fits() or not room.fits(others)
    for constraint in conflict:
        assert room.fits(others | {constraint})


@settings(max_examples=20, deadline=None)
@given(
    gpus=st.sampled_from([(2, 1), (3, 1), (4, 1), (1, 1, 1)]),
    experts=st.integers(2, 5),
    extra=st.integers(0, 4),
    per_gpu=st.integers(2, 6),
)
def test_where_there_is_room_to_survive_a_host_a_plan_is_found(
    gpus: tuple[int, ...], experts: int, extra: int, per_gpu: int
) -> None:
    rule = Replication(extra=experts + extra, survive_hosts=1)
    counts = random_counts(extra, 1, sum(gpus), experts, skew=2)
    try:
        problem = tiny_problem(
            counts, cluster=tiny_cluster(gpus), experts_per_gpu=per_gpu, replication=rule
        )
    except InfeasibleError:
        return
    solution = solve_placement(problem, gap=1.0, time_limit_s=5, seed=0, progress=lambda line: None)
    hosts = np.array([gpu.host for gpu in problem.gpus])
    assert all(len(set(hosts[held > 0])) > 1 for held in solution.layers[0].shares)


CASES = [
    "--topology dgx-h100-2 --model reference --experts 32",
    "--topology dgx-h100-2 --model reference --replicas 30 --experts-per-gpu 2",
    "--topology mixed-h100-h200 --model reference --replicas 4 --survive 1-host"
    " --experts-per-gpu 3",
    "--topology mixed-h100-h200 --model reference --tokens 300000",
    "--topology cpu-16 --model reference",
]
LONG_CASES = [  # many remedies, each a command of its own
    "--topology dgx-h100-2 --model reference --ep 8 --groups 2",
    "--topology dgx-h100-2 --model reference --replicas 16 --survive 1-host --experts-per-gpu 2"
    " --ep 8",
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG_CASES)]
)
def test_every_remedy_helps_when_applied(tmp_path: Path, case: str) -> None:
    fixed = ["--time-limit", "0.1", "-o", str(tmp_path / "plan.json")]
    with pytest.raises(InfeasibleError) as caught:
        solve.main([*case.split(), *fixed], standalone_mode=False)
    assert caught.value.hints
    assert "--" in caught.value.hints[0]
    for hint in caught.value.hints:
        changed = case
        for option, value in re.findall(r"(--[a-z-]+)(?: ([\d.]+))?", hint):
            changed = re.sub(rf"{option} [\w.-]+", "", changed)
            changed += f" {option} {value}" if value else ""
        code = solve.main([*changed.split(), *fixed], standalone_mode=False)
        assert code in (0, LIMIT_WITH_PLAN), hint


def test_uneven_memory_is_explained_by_gpus_bytes_and_places() -> None:
    cluster = load_cluster("mixed-h100-h200")
    model = tiny_model(16, layers=3, ffn=2_000_000)
    gpus = (*cluster.gpus()[:2], *cluster.gpus()[-1:])
    with pytest.raises(InfeasibleError) as caught:
        make_problem(cluster, gpus, model, make_traffic("uniform", model, 3, 100, 0), 16)
    text = str(caught.value)
    assert "3 layers x 16 experts need 48 places; all 3 GPUs have " in text
    memory = re.findall(r"memory of (\d) GPUs? \(.*left for (\d+) experts of ", text)
    assert sum(int(gpus) * int(slots) for gpus, slots in memory) == int(
        re.search(r"all 3 GPUs have (\d+)", text)[1]  # type: ignore[index]
    )
    assert {int(gpus) for gpus, _ in memory} == {1, 2}


def test_hosts_too_uneven_to_survive() -> None:
    counts = random_counts(0, 1, 4, 4)
    rule = Replication(extra=4, survive_hosts=1)
    with pytest.raises(InfeasibleError) as caught:
        tiny_problem(counts, cluster=tiny_cluster((3, 1)), experts_per_gpu=3, replication=rule)
    assert str(caught.value) == (
        "the hosts are too uneven for every expert to be on two of them\n"
        "  - 1 layer x (4 experts + 4 replicas) need 8 places; all 4 GPUs have 12\n"
        "  - --survive 1-host: every expert on two hosts; 8 pairs of expert and host are needed, "
        "the 2 hosts have room for 7, host number 1 for 3\n"
        "  - --experts-per-gpu 3: 4 GPUs have 12 places a layer for 8 copies\n"
        "  - without any one of these constraints there would be a placement\n"
        "remedies:\n"
        "  1. allow more experts on a GPU: --experts-per-gpu 4\n"
        "  2. do without --survive"
    )
