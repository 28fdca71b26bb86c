"""Names and paths that a shell, a comment or a rank file would take apart."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.launcher.quoting import check_hosts, label, parse_variable
from epplan.launcher.submit import write_job
from epplan.launcher.targets.registry import render
from epplan.quoting import comment, shell
from tests.launch_modules.jobs import make_job, make_rendering
from tests.launch_modules.plans import make_plan, uneven_plan

NCCL_XML = Path(__file__).parent / "data/nccl-2gpu.xml"
SLURM = {"SLURMD_NODENAME": "x"}
HOSTILE = [
    "a b",
    "it's",
    'a"b',
    "$HOME",
    "`id`",
    "$(id)",
    "a\nid #",
    "-rf",
    "a;id",
    "\u00e4&",
    "a\\",
    "*",
]


@pytest.fixture
def printer(tmp_path: Path) -> Path:
    """Return an interpreter with a hostile name that prints its arguments and a variable."""
    program = tmp_path / "py 'thon$"
    program.write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" "$HOSTILE"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("target", ["mpich", "torchrun", "slurm"])
def test_hostile_paths_reach_the_worker_whole(
    target: str, name: str, printer: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    job = make_job(
        uneven_plan(),
        target,
        output=output,
        python=str(printer),
        environment=[("HOSTILE", name)],
        options=[f"--checkpoint={name}"],
    )
    rendering = render(job, target)
    write_job(job, rendering)
    script = output / ("host-1.sh" if target == "torchrun" else "rank.sh")
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": os.environ["PATH"],
            "PMI_RANK": "0",
            "SLURM_PROCID": "0",
            "SLURMD_NODENAME": "x",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\0")[:-1]
    assert words[-4:] == [
        f"--checkpoint={name}",
        f"--result={output}/result.json",
        f"{output}/plan.json",
        name,
    ]
    assert os.access(script, os.X_OK)


def test_a_hostile_folder_in_a_variable_of_one_host(tmp_path: Path) -> None:
    output = tmp_path / "a\n  b\n'c"
    plan = make_plan({"host0": [0, 1]})
    job = make_job(plan, "mpich", output=output, topology=str(NCCL_XML), python="/usr/bin/env")
    [script] = [x for x in render(job, "mpich").files if x.name == "rank.sh"]
    done = subprocess.run(
        ["bash", "-c", script.text.partition("exec ")[0] + "printenv NCCL_TOPO_FILE"],
        env={"PATH": os.environ["PATH"], "PMI_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{output}/nccl-topology-0.xml\n"


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_shells_read_back_what_was_quoted(words: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {shell(*words)} end"], capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == [*words, "end"]


@given(st.text())
def test_a_comment_is_one_line_whatever_is_in_it(text: str) -> None:
    assert len(f"# {comment(text)}".splitlines()) == 1


BAD_HOSTS = [
    "",
    "-oProxyCommand=id",
    "a b",
    "a,b",
    "a;id",
    "n[1-3]",
    "a\nb",
    "$(id)",
    "a=b",
    "a:2",
    "#a",
]


def test_host_names_that_nothing_can_quote() -> None:
    with pytest.raises(InputError) as caught:
        check_hosts(["ok-1.example.org", *BAD_HOSTS, "node_7"], "the plan")
    assert caught.value.message == "the plan names hosts that no launcher can address"
    assert len(caught.value.problems) == len(BAD_HOSTS)
    plan = make_plan({"a b": [0]})
    with pytest.raises(InputError, match="'a b': host names have letters"):
        make_job(plan, "slurm")


def test_job_names() -> None:
    assert label("Plan_v2.json", 40) == "plan-v2-json"
    assert label("2x8", 40) == "epplan-2x8"
    assert label("ab" * 40, 5) == "ababa"
    with pytest.raises(InputError, match="job name 'Bad' is not valid"):
        make_rendering(uneven_plan(), "kubernetes", name="Bad")


def test_variables_on_the_command_line() -> None:
    assert parse_variable("A_1=x=y z") == ("A_1", "x=y z")
    for text in ("A", "=1", "1A=2", "A B=1", "A;id=1"):
        with pytest.raises(InputError, match="is not NAME=VALUE"):
            parse_variable(text)
