"""`epplan launch` from its arguments to stdout, stderr and exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from epplan.commands.launch import launch as command
from epplan.errors import EpplanError, InputError
from epplan.launcher.worker_options import option_arguments
from epplan.planner.plan import write_plan
from tests.launch_modules.plans import make_plan, write_ranks_plan
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
    own, workers = ({option.name for option in x.params} for x in (command, worker))
    assert own - workers == {"target", "as_json", "max_restarts"}
    assert workers - own == {"result"}


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
