"""Planned placements on real sockets: faster than others, and as fast as predicted."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from epplan.launcher.request import request_from_plan
from epplan.launcher.targets.local import run_local
from epplan.planner.plan import Plan, write_plan
from epplan.topologies.sources import load_cluster
from tests.cluster import rank_on_host
from tests.cluster.fabric import Fabric, cluster_document
from tests.cluster.fabrics import FABRICS, UNEVEN
from tests.cluster.measured import write_measured_cluster
from tests.cluster.namespaces import Emulation, emulate, left_over, namespaces, why_not
from tests.cluster.proof import Proof, load_problem, prove, rule_counts, solve, write_inputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FABRIC = UNEVEN.scaled(2)
TOKENS = 320  # a rank: an all-to-all takes half a second and more


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The uneven fabric with its plan and what was measured on it."""

    emulation: Emulation
    cluster: Path
    plan: Plan
    proof: Proof


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with emulate(FABRIC) as emulation:
        cluster = write_measured_cluster(FABRIC, emulation, folder, repeats=1)
        counts = rule_counts("lognormal:1,1", layers=1, ranks=FABRIC.num_ranks, tokens=TOKENS)
        model, load = write_inputs(folder, counts, top_k=1)
        plan = solve(cluster, model, load, experts_per_gpu=1)
        problem = load_problem(cluster, model, load, experts_per_gpu=1)
        store = folder / "store"
        proof = prove(FABRIC, "lognormal:1,1", plan, problem, emulation, store, repeats=3)
        yield Run(emulation=emulation, cluster=cluster, plan=plan, proof=proof)


@pytest.mark.parametrize("fabric", FABRICS, ids=[fabric.name for fabric in FABRICS])
def test_cluster_files_describe_their_fabric(fabric: Fabric, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_document(fabric))
    cluster = load_cluster(str(path))
    assert [gpu.host for gpu in cluster.gpus()] == fabric.host_of_rank
    assert fabric.num_ranks == 16
    for host in fabric.hosts:
        for tail, head in ((f"{host.name}/eth0", host.leaf), (host.leaf, f"{host.name}/eth0")):
            assert cluster.link(tail, head).capacity_bytes_per_s == host.mbit_per_s * 1e6 / 8
    for leaf, rate in fabric.uplinks.items():
        assert cluster.link(leaf, "spine").capacity_bytes_per_s == rate * 1e6 / 8


@pytest.mark.root
def test_measured_capacities_are_the_shaped_rates(run: Run) -> None:
    cluster = load_cluster(str(run.cluster))
    for tail, head, link in cluster.links():
        if link.kind == "net" and {tail, head} != {"leaf1", "spine"}:  # no pair fills that one
            assert link.provenance == "measured"
            assert 0.95 < link.efficiency <= 1.0, (tail, head)


@pytest.mark.root
def test_the_plan_beats_other_placements(run: Run) -> None:
    assert run.plan.certificate.gap < 0.01
    assert run.proof.gain("contiguous") > 1.3
    assert run.proof.gain("random") > 1.3


@pytest.mark.root
def test_all_to_alls_take_as_long_as_predicted(run: Run) -> None:
    assert not [case for case in run.proof.cases if abs(case.error) > 0.15]
    assert len(run.proof.cases) == 6


@pytest.mark.root
def test_the_worker_on_the_emulated_hosts_is_the_dense_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path / "plan.json", run.plan)
    setting = tmp_path / "emulation.json"
    (tmp_path / "pids").mkdir()
    rank_on_host.write_setting(setting, run.emulation, tmp_path / "pids")
    monkeypatch.setenv(rank_on_host.VARIABLE, str(setting))
    options = ("--sequences=1", "--sequence-length=16", "--steps=1", "--backend=gloo")
    request = request_from_plan(
        tmp_path / "plan.json", options=options, module="tests.cluster.rank_on_host"
    )
    result = run_local(request, lambda line, is_error: None).result
    assert result is not None
    assert result["verified"] is True
    assert result["plan_sha256"] == run.plan.sha256()
    hosts = [path.name.partition("-")[0] for path in (tmp_path / "pids").iterdir()]
    assert sorted(hosts) == sorted(FABRIC.host_of_rank)


@pytest.mark.root
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(signum: signal.Signals) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    program = (
        "import time\n"
        "from tests.cluster.fabrics import UNEVEN\n"
        "from tests.cluster.namespaces import emulate\n"
        "with emulate(UNEVEN):\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert len(namespaces(process.pid)) == 5
        process.send_signal(signum)
        process.wait(timeout=20)
    if signum == signal.SIGKILL:  # nobody could clean up: the next one does
        assert set(namespaces(process.pid)) <= set(left_over())
        with emulate(UNEVEN):
            pass
    assert namespaces(process.pid) == []
