"""`epplan launch` from its arguments to stdout, stderr and exit code."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from epplan.commands.launch import launch as command
from epplan.errors import EpplanError, InputError
from epplan.launcher.worker_options import option_arguments
from epplan.planner.plan import read_plan, write_plan
from tests.launch_modules.plans import even_plan, make_plan, write_ranks_plan
from tests.launch_modules.running import ROOT, Launch, finish

ECHO = """
def main(args):
    print("talk", *args[:-3])
    write_result(args, {"plan": args[-3]})
"""


def invoke(*arguments: str) -> None:
    """Run the command in this process."""
    command.main(list(arguments), standalone_mode=False)


def test_stdout_is_one_json_object(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ECHO, 2)
    exit_code, stdout, stderr = finish(launch.start("--json", "--steps=7", "--no-verify"))
    assert exit_code == 0, stderr
    assert json.loads(stdout) == {"plan": str(launch.plan)}
    assert stdout.count("\n") == 1
    flags = {"--backend=auto", "--sequences=2", "--steps=7", "--no-verify"}
    title, *talk = stderr.splitlines()
    assert title.startswith(f"plan {launch.plan} (")
    assert title.endswith("): 2 ranks on host a")
    assert sorted(line[:13] for line in talk) == ["[rank 0] talk", "[rank 1] talk"]
    assert all(flags < set(line.split()) for line in talk)
    launch.assert_nothing_left()


WRONG = """
def main(args):
    write_result(args, {"verified": False})
    sys.exit("differs from the dense model")
"""


def test_a_result_that_failed_verification_is_still_printed(tmp_path: Path) -> None:
    launch = Launch(tmp_path, WRONG, 1)
    exit_code, stdout, stderr = finish(launch.start("--json"))
    assert (exit_code, json.loads(stdout)) == (1, {"verified": False})
    assert "differs from the dense model" in stderr


def test_for_people_the_ranks_write_to_stdout(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ECHO, 1)
    exit_code, stdout, stderr = finish(launch.start())
    assert (exit_code, stdout.count("\n"), stderr.count("\n")) == (0, 1, 1)
    assert stdout.startswith("[rank 0] talk --")


def test_several_hosts_are_pointed_out(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ECHO, 2)
    write_plan(launch.plan, make_plan({"a": [0], "b": [0]}))
    exit_code, _, stderr = finish(launch.start())
    assert exit_code == 0
    assert stderr.splitlines()[1] == (
        "plan names 2 hosts; --to local runs all 2 ranks on this machine"
    )


def test_failure_is_the_last_word(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "def main(args):\n    sys.exit(17)\n", 2)
    exit_code, stdout, stderr = finish(launch.start("--json"))
    assert (exit_code, stdout) == (17, "")
    assert stderr.splitlines()[-1].startswith("error: rank ")
    assert "Traceback" not in stderr


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path,
        """
def main(args):
    announce()
    while True:
        print("more")
""",
        2,
    )
    process = launch.start()
    launch.wait_until_running(2)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert finish(process)[0] == 1
    launch.assert_nothing_left()


@pytest.mark.parametrize(
    "name",
    ["a b.json", "it's.json", 'a"b.json', "$HOME.json", "a\nb.json", "--json", "\u00e4;&.json"],
)
def test_any_plan_file_name_works(tmp_path: Path, name: str) -> None:
    launch = Launch(tmp_path, ECHO, 1)
    launch.plan = launch.plan.rename(tmp_path / name)
    exit_code, stdout, stderr = finish(launch.start("--json"))
    assert exit_code == 0, stderr
    assert json.loads(stdout) == {"plan": str(launch.plan)}


def test_a_truncated_plan(tmp_path: Path) -> None:
    plan = write_ranks_plan(tmp_path / "plan.json", 2)
    plan.write_text(plan.read_text()[:500])
    with pytest.raises(
        InputError, match=r"plan .*plan\.json is (truncated|not valid JSON) at line"
    ):
        invoke(str(plan))


def test_an_edited_plan(tmp_path: Path) -> None:
    plan = write_ranks_plan(tmp_path / "plan.json", 2)
    plan.write_text(plan.read_text().replace('"gap": 0.0', '"gap": 0.1'))
    with pytest.raises(InputError, match="was changed after it was made"):
        invoke(str(plan))


def test_a_missing_plan_in_words_and_code(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ECHO, 1)
    launch.plan.unlink()
    exit_code, stdout, stderr = finish(launch.start())
    assert (exit_code, stdout) == (2, "")
    assert stderr == f"error: plan not found: {launch.plan}\n"


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_ranks_plan(tmp_path / "plan.json", 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EpplanError) as caught:
        invoke(str(plan))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "running a plan needs torch, which is not installed\nhint: pip install 'epplan[runtime]'"
    )


def test_launching_does_not_import_torch_into_the_launcher(tmp_path: Path) -> None:
    code = (
        "import sys; import epplan.commands.launch; assert 'pydantic' not in sys.modules; "
        "import epplan.launcher.targets.local; "
        "print({'torch', 'pulp', 'networkx', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert shown.stdout == b"set()\n"


def test_options_are_the_workers() -> None:
    worker = pytest.importorskip("epplan.runtime.worker").command
    own, workers = ({option.name: option for option in x.params} for x in (command, worker))
    assert workers.keys() - own.keys() == {"result"}
    shared = (workers.keys() & own.keys()) - {"plan"}
    assert {"backend", "sequences", "steps", "verify", "identity", "host_map"} <= shared
    assert all(own[name].to_info_dict() == workers[name].to_info_dict() for name in shared)


def test_options_as_the_worker_reads_them() -> None:
    given = {"sequence_length": 3, "verify": True, "checkpoint": None, "folder": Path("a b")}
    assert option_arguments(given) == (
        "--sequence-length=3",
        "--verify",
        f"--folder={Path.cwd()}/a b",
    )


def test_the_real_worker(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plan = write_ranks_plan(tmp_path / "plan.json", 4)
    options = ["--json", "--backend=gloo", "--steps=1", "--sequence-length=8"]
    run = subprocess.run(
        [sys.executable, "-m", "epplan", "launch", str(plan), *options],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    result = json.loads(run.stdout)
    assert result["ranks"] == 4
    assert result["backend"] == "gloo"
    assert result["verified"] is True
    assert result["max_abs_error"] < 1e-3
    assert result["tokens_per_s"] > 0
    assert sum(result["expert_load"][0]) == 4 * 2 * 8


def epplan_launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "epplan", "launch", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_a_dry_run_writes_what_it_prints_and_starts_nothing(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", make_plan({"b": [0, 1], "a": [0]}))
    command = ["plan.json", "--to", "slurm", "--output-dir", "a job", "--dry-run", "--steps=7"]
    done = epplan_launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = tmp_path / "a job"
    for name in ("job.sbatch", "hosts.txt", "rank.sh"):
        text = (job / name).read_text()
        assert f"==> {job / name}\n{text}" in done.stdout
        assert "epplan launch plan.json --to slurm --output-dir 'a job' --dry-run" in text
    assert done.stdout.splitlines()[-1] == f"run here: sbatch '{job}/job.sbatch'"
    assert "--steps=7" in (job / "rank.sh").read_text()
    assert read_plan(job / "plan.json") == read_plan(tmp_path / "plan.json")


def test_a_job_as_json(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", make_plan({"b": [0, 1], "a": [0]}))
    command = ["plan.json", "--to", "torchrun", "--dry-run", "--json", "--env=A=b c"]
    done = epplan_launch(*command, cwd=tmp_path)
    job = json.loads(done.stdout)
    folder = tmp_path / "plan-torchrun"
    assert [file["name"] for file in job["files"]] == ["plan.json", "host-0.sh", "host-1.sh"]
    assert job["commands"] == [
        {"host": host, "arguments": ["bash", f"{folder}/host-{index}.sh"]}
        for index, host in enumerate("ba")
    ]
    assert job["result"] == f"{folder}/result.json"
    assert {"name": "A", "value": "b c", "for": "all ranks", "replaces": True} in [
        {key: row[key] for key in ("name", "value", "for", "replaces")}
        for row in job["environment"]
    ]


def test_show_env_gives_every_variable_its_reason_and_writes_nothing(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", make_plan({"b": [0, 1]}))
    for target in ("local", "slurm"):
        done = epplan_launch("plan.json", "--to", target, "--show-env", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for part in ("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "NCCL_DEBUG", "NCCL does not say why"):
            assert part in done.stdout
    write_plan(tmp_path / "plan.json", even_plan())
    shown = epplan_launch("plan.json", "--to", "ssh", "--show-env", cwd=tmp_path).stdout
    assert "NUMA node 1 0" in shown
    assert "NUMA node 0 1" in shown
    rows = json.loads(epplan_launch("plan.json", "--show-env", "--json", cwd=tmp_path).stdout)
    assert all(row["reason"] for row in rows["environment"])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_epplan_becomes_the_command_of_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path / "plan.json", make_plan({"b": [0, 1]}))
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho submitted $1\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = epplan_launch("plan.json", "--to", "slurm", cwd=tmp_path)
    as_json = epplan_launch("plan.json", "--to", "slurm", "--json", cwd=tmp_path)
    submitted = f"submitted {tmp_path}/plan-slurm/job.sbatch"
    assert (done.returncode, done.stdout.splitlines()) == (3, [submitted])
    assert json.loads(as_json.stdout)["folder"] == f"{tmp_path}/plan-slurm"
    assert as_json.stderr.splitlines()[-1] == submitted


def test_a_target_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(tmp_path / "plan.json", make_plan({"b": [0]}))
    monkeypatch.setenv("PATH", "/nowhere")
    done = epplan_launch("plan.json", "--to", "kubernetes", "--image=x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: `kubectl` is not on this machine",
        "hint: write the files with --dry-run, and run the command where it is",
    ]
    done = epplan_launch("plan.json", "--to", "torchrun", cwd=tmp_path)
    assert done.returncode == 2
    assert "is none of the plan's hosts: b" in done.stderr


def test_the_identity_check_is_on_where_the_plan_is_for_this_machine(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ECHO, 1)
    exit_code, stdout, _ = finish(launch.start())
    assert exit_code == 0
    assert "--no-identity" in stdout
    write_plan(launch.plan, make_plan({socket.gethostname(): [0]}))
    exit_code, stdout, _ = finish(launch.start())
    assert exit_code == 0
    assert "--no-identity" not in stdout
    (tmp_path / "map.yaml").write_text(f"a: {socket.gethostname()}\n")
    write_plan(launch.plan, make_plan({"a": [0]}))
    exit_code, stdout, _ = finish(launch.start(f"--host-map={tmp_path}/map.yaml"))
    assert exit_code == 0
    assert "--no-identity" not in stdout
