"""The progress file: what it holds, who may go on with it, and who may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from epplan.errors import InputError
from epplan.planner.plan import Plan
from tests.launch_modules.plans import make_plan

pytest.importorskip("torch")

from epplan.runtime.progress import open_progress
from tests.fork_ranks import run_ranks


def run_steps(
    rank: int, path: Path | None, plan: Plan, steps: int, crash_after: int, seed: int
) -> list[int] | str:
    """Run some steps and return their numbers, or the error's text."""
    try:
        progress = open_progress(path, plan, rank, seed=seed, sequences=2)
    except InputError as error:
        return str(error)
    numbers = []
    for number in progress.remaining(steps):
        progress.finish(number)
        numbers.append(number)
        if len(numbers) == crash_after:
            break
    return numbers


def run(
    path: Path | None, ranks: int = 2, *, crash_after: int = 99, seed: int = 0, steps: int = 5
) -> list[Any]:
    plan = make_plan({"a": list(range(ranks))})
    plan = plan.model_copy(update={"model": make_plan({"a": [0, 1]}).model})
    return run_ranks(run_steps, ranks, path, plan, steps, crash_after, seed)


def test_without_a_file_every_step_is_run() -> None:
    assert run(None) == [[0, 1, 2, 3, 4]] * 2


def test_a_run_goes_on_where_it_stopped_with_fewer_ranks_too(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert run(path, 3, crash_after=2) == [[0, 1]] * 3
    assert run(path, 2, crash_after=1) == [[2]] * 2
    assert run(path, 2) == [[3, 4]] * 2
    record = json.loads(path.read_text())
    assert record["done"] == 5
    parts = [(part["ranks"], part["first"], part["done"]) for part in record["parts"]]
    assert parts == [(3, 0, 2), (2, 2, 3), (2, 3, 5)]
    # All done: the last step is run again, because a result needs one.
    assert run(path, 2) == [[4]] * 2
    assert run(path, 2, steps=7) == [[5, 6]] * 2


def test_another_runs_file_is_refused_on_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    run(path)
    text = path.read_text()
    assert (
        run(path, seed=1)
        == [
            f"progress file {path} is of another run\n"
            "  - seed was 0, is 1\n"
            "hint: give another file with --progress, or delete this one to begin anew"
        ]
        * 2
    )
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["{", "{}", '{"kind": "x"}'])
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "progress.json"
    path.write_text(text)
    told = run(path)
    assert all(isinstance(one, str) and one.startswith(f"progress file {path} is ") for one in told)
