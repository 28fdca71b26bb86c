"""A host is lost in the middle of a run: stop, plan for the others, go on there, be right."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from epplan.errors import RankFailedError
from epplan.launcher.request import request_from_plan
from epplan.launcher.targets.local import LocalRun, run_local
from epplan.planner.plan import read_plan
from tests.cluster import rank_on_host
from tests.cluster.fabric import cluster_document
from tests.cluster.fabrics import UNEVEN
from tests.cluster.namespaces import emulate, why_not
from tests.cluster.proof import rule_counts, write_inputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FABRIC = UNEVEN.scaled(8)
LOST = "b"
STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An emulated cluster with a plan for it, and the folder all files are in."""

    folder: Path

    def epplan(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return subprocess.run(
            [sys.executable, "-m", "epplan", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def launch(self, plan: str, lines: list[str]) -> LocalRun:
        """Run the real worker on the hosts, from the last finished step on."""
        options = ["--sequences=1", "--sequence-length=16", f"--steps={STEPS}", "--backend=gloo"]
        options.append(f"--progress={self.folder / 'progress.json'}")
        request = request_from_plan(
            self.folder / plan, options=tuple(options), module="tests.cluster.rank_on_host"
        )
        return run_local(request, lambda line, is_error: lines.append(line.decode()))

    def done(self) -> int:
        """Return the finished steps."""
        with suppress(FileNotFoundError):
            done: int = json.loads((self.folder / "progress.json").read_text())["done"]
            return done
        return 0

    def kill_host(self, host: str, after_steps: int) -> None:
        """Kill every process of a host, as soon as so many steps are finished."""
        deadline = time.monotonic() + 40
        while self.done() < after_steps and time.monotonic() < deadline:
            time.sleep(0.02)
        for entry in (self.folder / "pids").glob(f"{host}-*"):
            with suppress(ProcessLookupError):
                os.kill(int(entry.name.partition("-")[2]), signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    site = Site(folder=tmp_path)
    (tmp_path / "pids").mkdir()
    (tmp_path / "cluster.yaml").write_text(cluster_document(FABRIC))
    counts = rule_counts("lognormal:1,1", layers=2, ranks=FABRIC.num_ranks, tokens=64)
    write_inputs(tmp_path, counts, top_k=1)
    done = site.epplan(
        *("solve", "--topology", "cluster.yaml", "--model", "model.yaml", "--load", "counts.npz"),
        *("-o", "plan.json"),
    )
    assert done.returncode == 0, done.stderr
    with emulate(FABRIC) as emulation:
        setting = tmp_path / "emulation.json"
        rank_on_host.write_setting(setting, emulation, tmp_path / "pids")
        monkeypatch.setenv(rank_on_host.VARIABLE, str(setting))
        yield site


@pytest.mark.root
def test_a_run_goes_on_without_a_lost_host(site: Site) -> None:
    lines: list[str] = []
    killer = threading.Thread(target=site.kill_host, args=[LOST, 3])
    killer.start()
    with pytest.raises(RankFailedError, match=rf"rank \d+ \(host {LOST}, GPU \d\) was killed") as e:
        site.launch("plan.json", lines)
    killer.join()
    assert e.value.exit_code == 128 + signal.SIGKILL
    finished = site.done()
    assert 3 <= finished < STEPS

    replan = ["replan", "plan.json", "--without", LOST, "-o", "survivors.json"]
    refused = site.epplan(*replan)
    assert refused.returncode == 3
    assert "16 experts a layer do not fit on the 12 ranks that are left" in refused.stderr
    assert not (site.folder / "survivors.json").exists()
    done = site.epplan(*replan, "--experts-per-gpu", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["transfers"]) == 2 * 4  # what b's ranks held, no more
    survivors = read_plan(site.folder / "survivors.json")
    assert [rank.host for rank in survivors.ranks] == ["a"] * 4 + ["c"] * 4 + ["d"] * 4

    result = site.launch("survivors.json", lines).result
    assert result is not None, lines
    assert result["verified"] is True
    assert result["ranks"] == 12
    assert result["steps"] == STEPS - finished
    assert result["plan_sha256"] == survivors.sha256()
    parts = json.loads((site.folder / "progress.json").read_text())["parts"]
    assert [(part["ranks"], part["first"], part["done"]) for part in parts] == [
        (16, 0, finished),
        (12, finished, STEPS),
    ]
