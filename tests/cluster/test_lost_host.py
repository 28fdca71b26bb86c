"""A host is lost in the middle of a run: stop, plan for the others, go on there, be right."""

import json
import os
import re
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
from tests.cluster.namespaces import Emulation, cut_cable, emulate, why_not
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
    emulation: Emulation

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

    def solve(self, *options: str) -> None:
        """Make the plan."""
        inputs = ("--topology", "cluster.yaml", "--model", "model.yaml", "--load", "counts.npz")
        done = self.epplan("solve", *inputs, *options, "-o", "plan.json")
        assert done.returncode == 0, done.stderr

    def lose_a_host(self) -> int:
        """Run the plan, kill a host in the middle, and return the finished steps."""
        killer = threading.Thread(target=self.kill_host, args=[LOST, 3])
        killer.start()
        killed = rf"rank \d+ \(host {LOST}, GPU \d\) was killed"
        with pytest.raises(RankFailedError, match=killed) as caught:
            self.launch("plan.json", [])
        killer.join()
        assert caught.value.exit_code == 128 + signal.SIGKILL
        assert 3 <= self.done() < STEPS
        return self.done()

    def go_on(self, finished: int) -> None:
        """Run the survivors' plan, and check that it goes on where the first one stopped."""
        lines: list[str] = []
        survivors = read_plan(self.folder / "survivors.json")
        assert [rank.host for rank in survivors.ranks] == ["a"] * 4 + ["c"] * 4 + ["d"] * 4
        result = self.launch("survivors.json", lines).result
        assert result is not None, lines
        assert result["verified"] is True
        assert result["ranks"] == 12
        assert result["steps"] == STEPS - finished
        assert result["plan_sha256"] == survivors.sha256()
        parts = json.loads((self.folder / "progress.json").read_text())["parts"]
        assert [(part["ranks"], part["first"], part["done"]) for part in parts] == [
            (16, 0, finished),
            (12, finished, STEPS),
        ]

    def launch(self, plan: str, lines: list[str], timeout_s: float = 600) -> LocalRun:
        """Run the real worker on the hosts, from the last finished step on."""
        options = ["--sequences=1", "--sequence-length=16", f"--steps={STEPS}", "--backend=gloo"]
        options += [f"--progress={self.folder / 'progress.json'}", f"--timeout={timeout_s}"]
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

    def wait_for_steps(self, steps: int) -> None:
        """Wait until so many steps are finished, but not for ever."""
        deadline = time.monotonic() + 40
        while self.done() < steps and time.monotonic() < deadline:
            time.sleep(0.02)

    def cut_off(self, host: str, after_steps: int) -> None:
        """Take down the cable of a host, which neither end is told, after so many steps."""
        self.wait_for_steps(after_steps)
        cut_cable(self.emulation, host)

    def kill_host(self, host: str, after_steps: int) -> None:
        """Kill every process of a host, as soon as so many steps are finished."""
        self.wait_for_steps(after_steps)
        for entry in (self.folder / "pids").glob(f"{host}-*"):
            with suppress(ProcessLookupError):
                os.kill(int(entry.name.partition("-")[2]), signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    (tmp_path / "pids").mkdir()
    (tmp_path / "cluster.yaml").write_text(cluster_document(FABRIC))
    counts = rule_counts("lognormal:1,1", layers=2, ranks=FABRIC.num_ranks, tokens=64)
    write_inputs(tmp_path, counts, top_k=1)
    with emulate(FABRIC) as emulation:
        setting = tmp_path / "emulation.json"
        rank_on_host.write_setting(setting, emulation, tmp_path / "pids")
        monkeypatch.setenv(rank_on_host.VARIABLE, str(setting))
        yield Site(folder=tmp_path, emulation=emulation)


REPLAN = ("replan", "plan.json", "--without", LOST, "-o", "survivors.json")


@pytest.mark.root
def test_a_run_goes_on_without_a_lost_host(site: Site) -> None:
    site.solve()
    finished = site.lose_a_host()
    refused = site.epplan(*REPLAN)
    assert refused.returncode == 3
    assert "16 experts a layer do not fit on the 12 ranks that are left" in refused.stderr
    assert not (site.folder / "survivors.json").exists()
    done = site.epplan(*REPLAN, "--experts-per-gpu", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["transfers"]) == 2 * 4  # what b's ranks held, no more
    site.go_on(finished)


@pytest.mark.root
def test_replicas_keep_the_lost_hosts_experts_alive(site: Site) -> None:
    site.solve("--experts-per-gpu", "2", "--replicas", "16", "--survive", "1-host")
    finished = site.lose_a_host()
    done = site.epplan(*REPLAN, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["transfers"] == []
    survivors = read_plan(site.folder / "survivors.json")
    assert survivors.share_of_slot is not None
    assert "experts have copies on one host only now" in "\n".join(survivors.reasons)
    site.go_on(finished)


@pytest.mark.root
def test_ranks_behind_a_cut_cable_are_named(site: Site) -> None:
    site.solve()
    cutter = threading.Thread(target=site.cut_off, args=[LOST, 3])
    cutter.start()
    lines: list[str] = []
    with pytest.raises(RankFailedError):
        site.launch("plan.json", lines, timeout_s=6)
    cutter.join()
    said = "\n".join(lines)
    assert re.search(r"rank [4-7] does not respond: .* the network to it", said), said
