"""What every target writes: golden files, schemas, and names that a shell would take apart."""

import json
import os
import subprocess
from pathlib import Path
from textwrap import indent

import pytest
import yaml

from epplan.errors import InputError
from epplan.launcher.job import PLAN_FILE
from epplan.launcher.submit import command_here, job_text, write_job
from epplan.launcher.targets.registry import TARGETS, render
from tests.launch_modules.golden import FOLDER, check_golden
from tests.launch_modules.jobs import MADE_BY, files_of, make_job, make_rendering
from tests.launch_modules.plans import even_plan, uneven_plan

JOB_TARGETS = TARGETS[1:]


@pytest.mark.parametrize("target", JOB_TARGETS)
def test_golden_files(target: str) -> None:
    files = files_of(uneven_plan(), target, options=["--steps=3"])
    names = {name for name in files if name != PLAN_FILE}
    for name in names:
        text = files[name].text
        if target in ("kubernetes", "kubeflow"):
            plan = indent(files_of(uneven_plan(), "slurm")[PLAN_FILE].text, "    ")
            assert plan in text
            text = text.replace(plan, "    (the plan)\n")
        check_golden(f"{target}/{name}", text)
    assert names == {path.name for path in (FOLDER / target).iterdir()}


def test_golden_batch_for_equal_hosts() -> None:
    check_golden("slurm-equal-hosts.sbatch", files_of(even_plan(), "slurm")["job.sbatch"].text)


@pytest.mark.parametrize("target", JOB_TARGETS)
def test_every_file_begins_with_the_version_and_the_command(target: str) -> None:
    for name, file in files_of(uneven_plan(), target).items():
        if name == PLAN_FILE:
            assert json.loads(file.text)["command"] == "epplan solve"
            continue
        first, second, *_ = file.text.splitlines()
        assert MADE_BY in (second if first.startswith("#!") else first), name


@pytest.mark.parametrize("target", JOB_TARGETS)
def test_scripts_are_valid_bash(target: str) -> None:
    for file in files_of(uneven_plan(), target).values():
        if file.is_executable:
            subprocess.run(["bash", "-n"], input=file.text, text=True, check=True)


def test_the_rank_script_of_every_rank(tmp_path: Path) -> None:
    [script] = [x for x in make_rendering(uneven_plan(), "mpich").files if x.name == "rank.sh"]
    text = script.text.replace("exec /opt/venv/bin/python", "exec env")
    shown = [
        run_script(text.partition("exec env")[0] + "env", PMI_RANK=str(rank)) for rank in range(4)
    ]
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR")
    assert [[each[name] for name in names] for each in shown] == [
        ["0", "0", "3", "0", "4", "node10"],
        ["1", "1", "3", "0", "4", "node10"],
        ["2", "2", "3", "0", "4", "node10"],
        ["3", "0", "1", "1", "4", "node10"],
    ]
    uuids = [rank.gpu_uuid for rank in uneven_plan().ranks]
    assert [each["CUDA_VISIBLE_DEVICES"].split(",") for each in shown] == [
        *[uuids[:3]] * 3,
        uuids[3:],
    ]


def run_script(text: str, **variables: str) -> dict[str, str]:
    """Return the environment that a script prints with `env`."""
    done = subprocess.run(
        ["bash", "-c", text],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_what_the_user_has_set_wins_except_which_gpu_is_whose() -> None:
    script = files_of(uneven_plan(), "mpich")["rank.sh"].text.partition("exec ")[0] + "env"
    own = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    shown = run_script(script, PMI_RANK="3", TORCHELASTIC_USE_AGENT_STORE="True", **own)
    assert "TORCHELASTIC_USE_AGENT_STORE" not in shown
    assert shown["NCCL_DEBUG"] == "INFO"
    assert shown["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert shown["CUDA_VISIBLE_DEVICES"] == str(uneven_plan().ranks[3].gpu_uuid)


def test_a_rank_too_many() -> None:
    script = files_of(uneven_plan(), "mpich")["rank.sh"].text
    done = subprocess.run(
        ["bash", "-c", script], env={"PMI_RANK": "4"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "rank 4: the plan has 4 ranks\n")


# --- host map -------------------------------------------------------------------------------------


def test_renamed_hosts_are_addressed_by_their_real_names(tmp_path: Path) -> None:
    renamed = tmp_path / "map.yaml"
    renamed.write_text("node10: rack3-07\n")
    files = files_of(uneven_plan(), "slurm", host_map=renamed)
    assert files["hosts.txt"].text.splitlines()[2:] == [*["rack3-07"] * 3, "node2"]
    assert "MASTER_ADDR=rack3-07" in files["rank.sh"].text
    assert "--host-map=/shared/job/host-map.yaml" in files["rank.sh"].text
    assert yaml.safe_load(files["host-map.yaml"].text) == {"node10": "rack3-07"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "is not a mapping"),
        ("node3: a", "node3 is no host of the plan, which has node10, node2"),
        ("node2: 7", "node2: 7: put names in quotes"),
        ("node2: node10", "2 hosts of the plan are on node10"),
        ("node2: a b", "the host map names hosts that no launcher can address"),
    ],
)
def test_host_maps_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        make_job(uneven_plan(), "slurm", host_map=path)
    assert message in str(caught.value)


# --- the command each machine runs ----------------------------------------------------------------


def test_each_host_runs_its_own_script() -> None:
    rendering = make_rendering(uneven_plan(), "torchrun")
    command = command_here(rendering, "node2.cluster.example")
    assert command.arguments == ("bash", "/shared/job/host-1.sh")
    with pytest.raises(InputError) as caught:
        command_here(rendering, "node1")
    assert caught.value.message == (
        "this machine, node1, is none of the plan's hosts: node10, node2"
    )
    assert command_here(make_rendering(uneven_plan(), "slurm"), "login").host is None


def test_what_a_dry_run_prints_is_what_is_written(tmp_path: Path) -> None:
    job = make_job(uneven_plan(), "slurm", output=tmp_path / "job")
    rendering = render(job, "slurm")
    write_job(job, rendering)
    shown = job_text(job, rendering)
    for path in (tmp_path / "job").iterdir():
        assert f"==> {path}\n" in shown
        if path.name != PLAN_FILE:
            assert path.read_text() in shown
    assert shown.endswith(f"run here: sbatch {tmp_path}/job/job.sbatch")
