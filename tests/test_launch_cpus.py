"""A rank keeps to the CPUs of its GPU's NUMA node, as far as the machine lets it."""

import os
from pathlib import Path

import pytest

from tests.fork_ranks import fork_ranks

pytest.importorskip("torch")


def bound(_: int, numa: int | None, nodes: Path, given: set[int]) -> set[int]:
    """Return the CPUs a rank is left with; in a process of its own."""
    from epplan.runtime.environment import bind_cpus

    os.sched_setaffinity(0, given)
    bind_cpus(numa, nodes)
    return os.sched_getaffinity(0)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Return a folder like sysfs's: the first CPU here is on node 0, the others on node 1."""
    own = sorted(os.sched_getaffinity(0))
    others = ",".join(map(str, own[1:]))
    for index, cpus in enumerate((f"{own[0]}-{own[0]}", others, "100000-100003", "")):
        (tmp_path / f"node{index}").mkdir()
        (tmp_path / f"node{index}/cpulist").write_text(f"{cpus}\n")
    return tmp_path


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU cannot be divided")
def test_the_cpus_of_a_node(nodes: Path) -> None:
    own = os.sched_getaffinity(0)
    assert fork_ranks(bound, 1, 0, nodes, own) == [{min(own)}]
    assert fork_ranks(bound, 1, 1, nodes, own) == [own - {min(own)}]


@pytest.mark.parametrize("numa", [None, 2, 3, 7])
def test_what_cannot_be_done_is_left_alone(numa: int | None, nodes: Path) -> None:
    """No node in the plan, a node of CPUs this rank may not use, none at all, no such node."""
    own = os.sched_getaffinity(0)
    assert fork_ranks(bound, 1, numa, nodes, own) == [own]


def test_a_schedulers_choice_stands(nodes: Path) -> None:
    """Slurm gave the CPU of node 0 to a rank whose GPU is on node 1."""
    first = {min(os.sched_getaffinity(0))}
    assert fork_ranks(bound, 1, 1, nodes, first) == [first]
