"""Plans run with a checkpoint's weights, through the worker and the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epplan.planner.model import load_model
from epplan.planner.plan import write_plan
from tests.checkpoints import make_model, write_checkpoint
from tests.runtime_cases import make_plan
from tests.test_runtime_checkpoint import load_all, rewrite
from tests.test_runtime_worker import RANKS, launch

ROOT = Path(__file__).parent.parent
PROMPT = [5, 77, 31, 8, 8, 60, 2]


def make_run(case: str, folder: Path) -> tuple[Any, Path, Path]:
    """Return a transformers model, its checkpoint and a plan for it."""
    reference = make_model(case)
    checkpoint, plan = write_checkpoint(reference, folder / "checkpoint"), folder / "plan.json"
    spec = load_model(str(checkpoint))
    write_plan(plan, make_plan(spec, RANKS, slots_per_rank=spec.num_experts // RANKS))
    return reference, checkpoint, plan


def next_token(reference: Any, prompt: list[int]) -> int:
    with torch.inference_mode():
        return int(reference(torch.tensor([prompt])).logits[0, -1].argmax())


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_a_prompt_through_the_worker(case: str, tmp_path: Path) -> None:
    reference, checkpoint, plan = make_run(case, tmp_path)
    path, prompt = tmp_path / "result.json", ",".join(map(str, PROMPT))
    ended = launch(
        *(plan, "--checkpoint", checkpoint, "--prompt-tokens", prompt),
        *("--sequences", 2, "--result", path),
    )
    assert [code for code, _, _ in ended] == [0] * RANKS, ended
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["verified"] is True
    assert result["sequence_length"] == len(PROMPT)
    assert result["checkpoint"] == str(checkpoint)
    token = next_token(reference, PROMPT)
    assert result["next_tokens"] == [token, token]
    assert not any("seed" in note for note in result["notes"])
    lines = ended[0][1].splitlines()
    assert f"weights of {checkpoint}" in lines
    assert f"likeliest next token of each of rank 0's sequences: {token}, {token}" in lines


def test_seeded_tokens_differ_by_sequence_and_rank(tmp_path: Path) -> None:
    _, checkpoint, plan = make_run("mixtral", tmp_path)
    path = tmp_path / "result.json"
    ended = launch(
        *(plan, "--checkpoint", checkpoint, "--sequences", 8, "--sequence-length", 5),
        *("--result", path),
    )
    assert [code for code, _, _ in ended] == [0] * RANKS, ended
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["verified"] is True
    assert len(set(result["next_tokens"])) > 1
    assert "tokens are drawn from the seed: the load is not that of text" in result["notes"]


def test_every_rank_names_all_wrong_tensors(tmp_path: Path) -> None:
    _, checkpoint, plan = make_run("mixtral", tmp_path)
    tensors = load_all(checkpoint)
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(95, 32)
    rewrite(checkpoint, tensors)
    for code, stdout, stderr in launch(plan, "--checkpoint", checkpoint):
        assert (code, stdout) == (2, "")
        assert stderr == (
            f"error: checkpoint {checkpoint} has not the tensors of model mixtral\n"
            "  - model.norm.weight: missing\n"
            "  - model.embed_tokens.weight: [95, 32], the model has [96, 32]\n"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "1,96"], "error: --prompt-tokens holds [96]; the model's 96 tokens"),
        (["--prompt-tokens", "1,-2"], "'1,-2' is no list of token ids such as 12,7,400"),
        (["--prompt-tokens", ""], "'' is no list of token ids"),
    ],
)
def test_prompts_that_are_none(arguments: list[str], message: str, tmp_path: Path) -> None:
    _, checkpoint, plan = make_run("mixtral", tmp_path)
    for code, _, stderr in launch(plan, "--checkpoint", checkpoint, *arguments):
        assert code == 2
        assert message in stderr


def test_a_prompt_needs_a_checkpoint(tmp_path: Path) -> None:
    _, _, plan = make_run("mixtral", tmp_path)
    for code, _, stderr in launch(plan, "--prompt-tokens", "1,2"):
        assert code == 2
        assert "--prompt-tokens needs --checkpoint" in stderr


def test_solve_and_launch_a_checkpoint(tmp_path: Path) -> None:
    """The whole way, as a user goes it."""
    checkpoint = write_checkpoint(make_model("qwen3_moe"), tmp_path / "my model")
    plan = tmp_path / "plan.json"

    def epplan(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "epplan", *map(str, arguments)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    epplan(
        *("solve", "--topology", "2x2:h100,nic=2x400Gb/s", "--model", checkpoint),
        *("--ep", "4", "--experts-per-gpu", "4", "--load", "lognormal:1", "-o", plan),
    )
    result = json.loads(
        epplan("launch", plan, "--json", "--checkpoint", checkpoint, "--prompt-tokens", "3,1,4")
    )
    assert result["verified"] is True
    assert result["ranks"] == 4
    assert len(result["next_tokens"]) == 2
