"""Ranks that are not where the plan puts them are stopped, all of them, with one table."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

import epplan
from epplan.launcher.identity import Identity, compares_gpus, identity_report
from epplan.launcher.targets.local import free_port
from epplan.planner.plan import Plan, write_plan
from tests.fork_ranks import fork_ranks
from tests.launch_modules.plans import make_plan, uneven_plan
from tests.launch_modules.running import ROOT

pytest.importorskip("torch")
from torch.distributed import TCPStore  # type: ignore[attr-defined]


def planned(plan: Plan, **changes: Any) -> list[Identity]:
    """Return what every rank says when all is as planned, but for `changes`."""
    found = [
        Identity(
            host=rank.host,
            gpu_uuid=rank.gpu_uuid,
            pci_bus_id=rank.pci_bus_id,
            plan=plan.sha256(),
            version="1.0",
        )
        for rank in plan.ranks
    ]
    return [replace(own, **changes) for own in found]


def report(plan: Plan, found: list[Identity], **host_map: str) -> str | None:
    return identity_report(plan, "1.0", host_map, found)


def test_all_as_planned() -> None:
    plan = uneven_plan()
    assert report(plan, planned(plan)) is None
    assert compares_gpus(plan)
    assert not compares_gpus(make_plan({"a": [0]}))


def test_domains_and_ways_to_write_a_gpu_do_not_matter() -> None:
    plan = uneven_plan()
    found = planned(plan)
    for rank, own in enumerate(found):
        uuid = str(own.gpu_uuid).removeprefix("GPU-").upper()
        found[rank] = Identity(
            host=f"{own.host.upper()}.cluster.example",
            gpu_uuid=uuid,
            pci_bus_id="0000:01:00.0",
            plan=own.plan,
            version="1.0",
        )
    assert report(plan, found) is None
    ranks = [
        rank.model_copy(update={"gpu_uuid": None, "pci_bus_id": "00000000:0A:00.0"})
        for rank in plan.ranks
    ]
    by_bus = plan.model_copy(update={"ranks": tuple(ranks)})
    assert report(by_bus, planned(by_bus, pci_bus_id="0000:0a:00.0")) is None
    assert "GPU 00000000:0A:00.0" in str(report(by_bus, planned(by_bus, pci_bus_id="0000:0b:00.0")))


def test_hosts_in_the_order_of_their_names() -> None:
    plan = make_plan({"node10": [0, 1], "node2": [0, 1]})
    found = planned(plan)
    assert report(plan, [*found[2:], *found[:2]]) == (
        "error: 4 of 4 ranks are not what the plan says; no rank starts\n"
        "  rank  planned      actual\n"
        "  0     host node10  host node2\n"
        "  1     host node10  host node2\n"
        "  2     host node2   host node10\n"
        "  3     host node2   host node10\n"
        "remedies:\n"
        "  1. start the ranks with the files of `epplan launch PLAN --to ...`, which keep their "
        "order\n"
        "  2. or plan for the machines as they are: `epplan topo discover`, `epplan solve`\n"
        "  3. --no-identity runs all the same, and not as planned"
    )


def test_renamed_hosts_get_the_lines_of_a_host_map() -> None:
    plan = uneven_plan()
    found = planned(plan)
    found[3] = replace(found[3], host="rack7-12.example")
    text = str(report(plan, found))
    assert "1 of 4 ranks" in text
    assert (
        "  1. if hosts were renamed: --host-map FILE with the lines `node2: rack7-12.example`"
        in text
    )
    assert report(plan, found, node2="rack7-12") is None


def test_gpus_plan_and_version() -> None:
    plan = uneven_plan()
    found = planned(plan)
    found[0], found[1] = found[1], found[0]
    found[2] = replace(found[2], plan="f" * 64, version="0.9")
    lines = str(report(plan, found)).splitlines()
    uuids = [rank.gpu_uuid for rank in plan.ranks]
    assert lines[2].split() == ["0", "GPU", uuids[0], "GPU", uuids[1]]
    assert lines[4].split() == [
        *("2", "plan", f"{plan.sha256()[:12]},", "epplan", "1.0"),
        *("plan", "ffffffffffff,", "epplan", "0.9"),
    ]
    assert "  1. give all ranks the same plan file" in lines
    assert "  2. install the same epplan on all hosts" in lines


def test_a_long_table_is_cut() -> None:
    plan = make_plan({"a": list(range(100))})
    text = str(report(plan, planned(plan, host="b")))
    assert "\n... and 36 more\n" in text
    assert len(text.splitlines()) < 75


def start(rank: int, hosts: list[str], variables: dict[str, str], plan: Path) -> tuple[int, str]:
    """Be one rank of the worker, on a machine of this name."""
    from epplan.runtime.worker import main

    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "EPPLAN_HOST": hosts[rank]}
    # One thread: OpenMP's of a parent that has used them do not survive the fork.
    os.environ.update(variables | own | {"OMP_NUM_THREADS": "1"})
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        try:
            main([str(plan), "--backend=gloo", "--steps=1", "--sequence-length=8"])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return code, stderr.getvalue()


def launch(tmp_path: Path, hosts: list[str], **variables: str) -> list[tuple[int, str]]:
    plan = tmp_path / "plan.json"
    write_plan(plan, make_plan({"a": [0, 1], "b": [0]}))
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return fork_ranks(start, 3, hosts, meeting | variables, plan)


def test_the_worker_runs_where_it_is_planned(tmp_path: Path) -> None:
    assert launch(tmp_path, ["a", "a.example", "b"]) == [(0, "")] * 3


def test_one_rank_elsewhere_stops_all_with_one_table(tmp_path: Path) -> None:
    ended = launch(tmp_path, ["a", "a", "c"])
    assert [code for code, _ in ended] == [2, 2, 2]
    first, *others = (stderr for _, stderr in ended)
    assert first.startswith("error: 1 of 3 ranks are not what the plan says; no rank starts\n")
    assert "  2     host b   host c\n" in first
    assert "--host-map FILE with the lines `b: c`" in first
    assert others == [
        f"error: rank {rank} stops: the ranks are not what the plan says (see rank 0)\n"
        for rank in (1, 2)
    ]


@contextlib.contextmanager
def agents_store() -> Iterator[int]:
    """Serve a store as torchrun's agent does, and return its port.

    In a process of its own: ranks forked beside its busy thread could find a lock held for ever.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    is_up = context.Event()
    server = context.Process(target=serve_store, args=(port, is_up), daemon=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        server.start()
    try:
        assert is_up.wait(30)
        yield port
    finally:
        server.kill()
        server.join()


def serve_store(port: int, is_up: Event) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    is_up.set()
    signal.pause()
    del store


def test_answers_from_before_a_restart_do_not_count(tmp_path: Path) -> None:
    codes = []
    with agents_store() as port:
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
        for restarts, host in enumerate(["b", "c", "b"]):
            count = {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
            ended = launch(tmp_path, ["a", "a", host], **agent, **count)
            codes.append({code for code, _ in ended})
    assert codes == [{0}, {2}, {0}]


@pytest.mark.slow
def test_torchrun_asks_again_when_it_restarts(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(plan, make_plan({"a": [0, 1]}))
    agent = ["torch.distributed.run", "--nnodes=1", "--node-rank=0", "--nproc-per-node=2"]
    agent += ["--max-restarts=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    rank = ["tests.launch_modules.restarted", str(plan), "--backend=gloo"]
    done = subprocess.run(
        [sys.executable, "-m", *agent, "-m", *rank],
        cwd=ROOT,
        env={**os.environ, "EPPLAN_HOST": "a", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1
    assert "the ranks passed the check and fail now" in done.stderr
    assert done.stderr.count("error: 2 of 2 ranks are not what the plan says") == 1
    assert "  0     host a   host c\n" in done.stderr


def test_the_version_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epplan.runtime.identity._identity", other_version)
    ended = launch(tmp_path, ["a", "a", "b"])
    assert f"2     epplan {epplan.__version__}  epplan 0.0\n" in ended[0][1]


def other_version(plan: Plan, device: object, host: str) -> Identity:
    version = "0.0" if os.environ["RANK"] == "2" else epplan.__version__
    return Identity(host=host, gpu_uuid=None, pci_bus_id=None, plan=plan.sha256(), version=version)
