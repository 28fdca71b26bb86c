"""Checkpoints on one GPU, as a world of one NCCL rank: the logits and tokens of transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epplan.launcher.targets.local import free_port
from epplan.planner.model import load_model
from epplan.planner.plan import write_plan
from epplan.runtime import worker
from tests.checkpoints import CASES, make_model, make_tokens, write_checkpoint
from tests.runtime_cases import make_plan
from tests.test_runtime_checkpoint_run import PROMPT, continuation
from tests.test_runtime_families import LENGTH, SEQUENCES, logits_of_rank, reference_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA GPU"),
]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    store = tmp_path_factory.mktemp("store") / "store"
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device
    )
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path, device: torch.device) -> None:
    """Rows travel through NCCL from the rank to itself; float32, without the kernels of ours."""
    reference, tokens = make_model(case), make_tokens(SEQUENCES, LENGTH)
    folder = write_checkpoint(reference, tmp_path)
    expected = reference_logits(reference, tokens)
    spec = load_model(str(folder))
    plan = make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1)
    largest = float(expected.abs().max())
    for dispatcher in ("alltoall", "padded", "local"):
        for logits in logits_of_rank(0, plan, folder, tokens, dispatcher, device):
            assert float((logits.cpu() - expected).abs().max()) < 1e-5 * largest, dispatcher


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("deepseek_v3", "float32"), ("gpt_oss", "float32"), ("qwen3_moe", "bfloat16")],
)
def test_a_prompt_through_the_worker(case: str, dtype: str, tmp_path: Path) -> None:
    """As it is launched: NCCL, and the dtype of the checkpoint."""
    reference = make_model(case).to(getattr(torch, dtype))
    checkpoint = write_checkpoint(reference, tmp_path / "checkpoint")
    plan, result = tmp_path / "plan.json", tmp_path / "result.json"
    spec = load_model(str(checkpoint))
    write_plan(plan, make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", worker.__name__, str(plan), "--no-identity"),
            *("--backend=nccl", "--dispatcher=alltoall", "--sequences=2", "--new-tokens=6"),
            *("--checkpoint", str(checkpoint), "--prompt-tokens", ",".join(map(str, PROMPT))),
            *("--result", str(result)),
        ],
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(result.read_text())
    assert found["verified"] is True
    assert found["backend"] == "nccl"
    assert found["dtype"] == dtype
    if dtype == "float32":  # else two tokens may be closer than rounding
        new = continuation(reference, PROMPT, 6)
        assert found["generated"] == [new, new]
