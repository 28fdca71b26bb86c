"""The preflight: every check passes and fails on the facts it is about, and the command adds up."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest

from epplan.commands.doctor import doctor as doctor_command
from epplan.commands.env import env as env_command
from epplan.launcher import doctor, machine
from epplan.launcher.doctor_gpus import (
    DriverFacts,
    TorchFacts,
    ask_torch,
    check_cuda,
    check_memory,
    check_peers,
    check_slowdowns,
    gpu_lines,
)
from epplan.planner.plan import write_plan
from epplan.topologies.check_report import Line
from epplan.topologies.sources import load_cluster
from tests.launch_modules.plans import make_plan, uneven_plan

VERSIONS = {name: "1.0" for name in machine.PACKAGES} | {"highspy": "1.16.0", "torch": "2.13.0"}


def levels(lines: object) -> list[str]:
    found = [lines] if isinstance(lines, Line) else list(lines)  # type: ignore[call-overload]
    return [line.level for line in found]


@pytest.mark.parametrize(
    ("changes", "must_run", "expected"),
    [
        ({}, True, ["pass"]),
        ({"highspy": "1.14.0"}, False, ["fail", "pass"]),
        ({"highspy": None}, False, ["fail", "pass"]),
        ({"torch": None}, False, ["warn"]),
        ({"torch": None}, True, ["fail"]),
        ({"networkx": None, "pulp": None}, False, ["fail", "fail", "pass"]),
    ],
)
def test_packages(changes: dict[str, str | None], must_run: bool, expected: list[str]) -> None:
    assert levels(doctor.check_packages(VERSIONS | changes, must_run=must_run)) == expected


def test_the_solver_is_really_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(x.level, x.message) for x in doctor.check_solver()] == [
        ("pass", "PuLP and HiGHS find 3 where 3 is the optimum")
    ]
    monkeypatch.setattr("epplan.launcher.doctor._OPTIMUM", 1)  # then it is the other variable's 2
    assert levels(doctor.check_solver()) == ["fail"]
    monkeypatch.setitem(sys.modules, "pulp", None)
    [line] = doctor.check_solver()
    assert line.level == "fail"
    assert line.message.startswith("does not solve: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("target", "versions", "message"),
    [
        ("slurm", {"sbatch": None}, "--to slurm needs `sbatch`, which is not here"),
        (
            "openmpi",
            {"mpirun": "Hydra 4.0.2"},
            "--to openmpi needs Open MPI's `mpirun`, and here it is Hydra 4.0.2",
        ),
    ],
)
def test_the_launcher_that_is_needed(
    target: str, versions: dict[str, str | None], message: str
) -> None:
    first, last = doctor.check_launchers(versions, target)
    assert (first.level, first.message, last.level) == ("fail", message, "pass")
    assert levels(doctor.check_launchers(versions, None)) == ["pass"]
    assert levels(doctor.check_launchers({"mpirun": "Open MPI 5.0.1"}, "openmpi")) == ["pass"]


GIB = 1 << 30


@pytest.mark.parametrize(
    ("line", "level"),
    [
        (doctor.check_shared_memory(None), "fail"),
        (doctor.check_shared_memory(64 << 20), "fail"),
        (doctor.check_shared_memory(512 << 20), "warn"),
        (doctor.check_shared_memory(8 * GIB), "pass"),
        (doctor.check_open_files(1024, 64), "fail"),
        (doctor.check_open_files(1024, 16), "warn"),
        (doctor.check_open_files(None, 4096), "pass"),
        (doctor.check_open_files(1 << 20, 4096), "pass"),
        (doctor.check_locked_memory(8 << 20, True), "fail"),
        (doctor.check_locked_memory(8 << 20, False), "pass"),
        (doctor.check_locked_memory(None, True), "pass"),
        (doctor.check_clock("hpet"), "warn"),
        (doctor.check_clock("tsc"), "pass"),
        (doctor.check_clock(None), "pass"),
        (doctor.check_name("a", [], 2), "fail"),
        (doctor.check_name("a", ["127.0.1.1", "::1"], 2), "fail"),
        (doctor.check_name("a", ["127.0.1.1"], 1), "warn"),
        (doctor.check_name("a", ["127.0.1.1", "fe80::1%eth0", "10.0.0.1"], 2), "pass"),
    ],
)
def test_limits_of_the_system(line: Line, level: str) -> None:
    assert line.level == level
    assert bool(line.remedy) == (level != "pass")


def test_variables_that_spoil_a_run() -> None:
    bad = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_P2P_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    assert levels(doctor.check_variables(bad)) == ["warn"] * 3
    assert levels(doctor.check_variables({name: "0" for name in bad})) == []


def test_this_host_and_the_plans() -> None:
    assert levels(doctor.check_plan_host(uneven_plan(), "node2.example")) == ["pass"]
    [line] = doctor.check_plan_host(uneven_plan(), "login")
    assert (line.level, line.message) == ("warn", "login is none of its hosts node10, node2")


GPUS = TorchFacts(
    cuda="12.9",
    gpus=[
        {"uuid": f"0000000{index}-aaaa-bbbb-cccc-000000000000", "free_bytes": 80 * GIB}
        for index in range(2)
    ],
    nccl=(2, 28, 9),
)
DRIVER = DriverFacts(version="570.86", num_gpus=2, slowdowns={0: 0x1, 1: 0x4})


def test_gpus_driver_and_nccl() -> None:
    lines = list(check_cuda(GPUS, DRIVER))
    assert [(line.level, line.message) for line in lines] == [
        ("pass", "2 visible to torch (CUDA 12.9), driver 570.86"),
        ("pass", "2.28.9"),
    ]
    none = TorchFacts(cuda="12.9")
    assert levels(check_cuda(none, DRIVER)) == ["fail"]
    assert levels(check_cuda(TorchFacts(), DRIVER)) == ["fail"]  # a build for CPUs
    assert levels(check_cuda(TorchFacts(), DriverFacts(error="no driver"))) == ["pass"]
    assert levels(check_cuda(replace(GPUS, nccl=None), DRIVER)) == ["pass", "fail"]
    assert levels(check_cuda(TorchFacts(error="libcudart is missing"), DRIVER)) == ["warn"]


def test_peer_access_of_all_pairs() -> None:
    assert levels(check_peers(GPUS)) == ["pass"]
    [line] = check_peers(replace(GPUS, blocked=[(0, 1), (1, 0)]))
    assert (line.level, line.message) == ("fail", "2 pairs have no peer access: 0->1, 1->0")
    assert levels(check_peers(TorchFacts(gpus=GPUS.gpus[:1]))) == []


def test_clocks_that_something_wrong_slows_down() -> None:
    assert levels(check_slowdowns(DRIVER)) == ["pass"]  # idle, and the power limit
    lines = list(check_slowdowns(replace(DRIVER, slowdowns={1: 0x40 | 0x80 | 0x1})))
    assert [line.level for line in lines] == ["fail", "fail"]
    assert {line.subject for line in lines} == {"GPU 1"}
    assert levels(check_slowdowns(DriverFacts(error="none"))) == []


def test_memory_the_plan_needs_on_the_gpus_it_names() -> None:
    plan = uneven_plan()
    use = [x.model_copy(update={"experts": 70 * GIB, "buffers": 5 * GIB}) for x in plan.memory]
    plan = plan.model_copy(update={"memory": tuple(use)})
    [line] = check_memory(GPUS, plan)
    assert (line.level, line.message) == (
        "pass",
        "enough is free on the 2 GPUs the plan names here",
    )
    full = [dict(gpu) for gpu in GPUS.gpus]
    full[1]["free_bytes"] = 60 * GIB
    [line] = check_memory(replace(GPUS, gpus=full), plan)
    assert (line.level, line.message) == ("fail", "rank 1 needs 75.0 GiB, 60.0 are free")
    assert levels(check_memory(GPUS, None)) == []


def test_on_hosts_with_gpus_their_nics_and_links_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = load_cluster("hgx-h100-4nic-4")  # two GPUs a NIC
    monkeypatch.setattr("epplan.topologies.sources.load_cluster", lambda source: cluster)
    monkeypatch.setattr("epplan.launcher.doctor_gpus.ask_torch", lambda: GPUS)
    monkeypatch.setattr("epplan.launcher.doctor_gpus.ask_driver", lambda: DRIVER)
    lines = list(gpu_lines(None))
    assert {"GPUs", "NCCL", "peer access", "GPU clocks", "near NIC", "NVLinks"} <= {
        line.check for line in lines
    }
    assert "warn" in [line.level for line in lines if line.check == "shared NICs"]


def test_torch_is_asked_in_a_process_that_may_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epplan.launcher.doctor_gpus._ASK_TORCH", "import no_such_torch")
    assert ask_torch().error == "ModuleNotFoundError: No module named 'no_such_torch'"


def run(command: click.Command, *arguments: str) -> tuple[int, str]:
    """Return exit code and stdout of a command, run in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command.main(list(arguments), standalone_mode=False)
    return code or 0, output.getvalue()


def test_the_command_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("PATH", "/nowhere")  # launchers may take long to tell their version
    code, text = run(doctor_command, "--json")
    report = json.loads(text)
    assert code == (6 if report["counts"]["fail"] else 0)
    checks = {line["check"] for line in report["lines"]}
    assert {"packages", "solver", "launchers", "/dev/shm", "open files", "GPUs"} <= checks
    assert all(line["remedy"] for line in report["lines"] if line["level"] == "fail")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("doctor_gpus", "bug_report"):
        monkeypatch.setattr(f"epplan.launcher.{module}.ask_torch", lambda: GPUS)


@pytest.mark.usefixtures("no_torch")
def test_a_launcher_that_is_not_here_ends_in_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    write_plan(tmp_path / "plan.json", make_plan({"a": [0], "b": [0]}))
    code, text = run(doctor_command, str(tmp_path / "plan.json"), "--to", "slurm")
    assert code == 6
    assert "--to slurm needs `sbatch`" in text


@pytest.mark.usefixtures("no_torch")
def test_a_bug_report_has_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "hunter2" if "NCCL" not in name else "INFO")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/home/somebody/lib")
    monkeypatch.setenv("PATH", "/nowhere")
    code, text = run(env_command, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["packages"]["highspy"]
    assert report["torch"] == {"cuda": "12.9", "visible_gpus": 2, "nccl": "2.28.9", "error": None}
    assert report["variables"]["NCCL_DEBUG"] == "INFO"
    assert report["variables"]["LD_LIBRARY_PATH"] == "~/lib"
    shown = run(env_command)[1]
    assert shown.startswith("```\nepplan: ")
    assert "packages: torch: " in shown
    assert "hunter2" not in shown + text
    assert "somebody" not in shown + text
