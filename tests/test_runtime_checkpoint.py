"""Checkpoints: what a rank reads, quantised weights, other layouts, all that is wrong at once."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from epplan.errors import InputError
from epplan.planner.model import ModelSpec, load_model
from epplan.planner.plan import Plan
from epplan.runtime.checkpoints.checkpoint import (
    CheckpointWeights,
    checkpoint_problems,
    open_checkpoint,
)
from epplan.runtime.checkpoints.families import FAMILIES
from epplan.runtime.checkpoints.quantized import dequantize_fp8, dequantize_mxfp4
from epplan.runtime.layer.head import build_head
from epplan.runtime.layer.layers import build_layers
from tests.checkpoints import make_model, make_tokens, write_checkpoint
from tests.fork_ranks import run_ranks
from tests.runtime_cases import make_plan
from tests.test_runtime_families import assert_same_logits, reference_logits

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def open_folder(folder: Path, spec: ModelSpec | None = None) -> CheckpointWeights:
    spec = spec or load_model(str(folder))
    return open_checkpoint(folder, spec, device=CPU, dtype=torch.float32)


def alone(folder: Path) -> Plan:
    spec = load_model(str(folder))
    return make_plan(spec, 1, slots_per_rank=spec.num_experts, num_hosts=1)


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Replace a checkpoint's tensors, in two files, and some fields of its configuration."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file_name, held in halves.items():
        part = {name: tensors[name].contiguous() for name in held}
        save_file(part, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **config}))


# What is read


class SpiedFile:
    """A safetensors file that counts the bytes taken out of each tensor."""

    opened = staticmethod(safetensors.safe_open)
    read: ClassVar[Counter[str]] = Counter()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._file: Any = self.opened(*arguments, **options)

    def keys(self) -> list[str]:
        names: list[str] = self._file.keys()
        return names

    def get_tensor(self, name: str) -> Tensor:
        return self.count(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> "SpiedSlice":
        return SpiedSlice(self, name, self._file.get_slice(name))

    def count(self, name: str, tensor: Tensor) -> Tensor:
        self.read[name] += tensor.nbytes
        return tensor


class SpiedSlice:
    def __init__(self, file: SpiedFile, name: str, part: Any) -> None:
        self._file, self._name, self._part = file, name, part
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, where: Any) -> Tensor:
        return self._file.count(self._name, self._part[where])


def read_of_rank(rank: int, plan: Plan, folder: Path) -> Counter[str]:
    """Build this rank's part of the model; return the bytes read of each tensor."""
    with patch.object(safetensors, "safe_open", SpiedFile):
        weights = open_folder(folder, plan.model)
        checkpoint_problems(weights)
        build_layers(plan, rank, weights)
        build_head(weights)
    return SpiedFile.read


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("mixtral", {}),
        ("deepseek_v3", {}),
        ("qwen3_moe", {"save_original_format": False}),  # fused: a slice of each tensor
        ("gpt_oss", {}),
    ],
)
def test_a_rank_reads_its_own_experts_only(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_checkpoint(make_model(case), tmp_path, **options)
    spec = load_model(str(folder))
    plan = make_plan(spec, 16)
    stored = {name: tensor.nbytes for name, tensor in load_all(folder).items()}
    reads: list[Counter[str]] = run_ranks(read_of_rank, 16, plan, folder)
    for rank, read in enumerate(reads):
        num_own = [len(plan.experts_of_rank(layer, rank)) for layer in range(spec.num_moe_layers)]
        for name, size in stored.items():
            part = re.fullmatch(r"model\.layers\.(\d+)\..*\bexperts\.(?:(\d+)\.)?\w.*", name)
            if part is None:
                assert read[name] == size, f"rank {rank}, {name}"  # once, and whole
                continue
            ordinal = spec.moe_layers.index(int(part[1]))
            if part[2] is None:  # of all experts
                assert read[name] == size * num_own[ordinal] // spec.num_experts
            else:
                mine = int(part[2]) in plan.experts_of_rank(ordinal, rank)
                assert read[name] == size * mine, f"rank {rank}, {name}"
        assert set(read) <= set(stored)
    of_experts = [name for name in stored if ".experts." in name]
    assert of_experts
    for name in of_experts:
        assert sum(read[name] for read in reads) == stored[name]


# Other forms of the same weights


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v2, groups, yarn"])
def test_experts_fused_as_transformers_holds_them(case: str, tmp_path: Path) -> None:
    reference, tokens = make_model(case), make_tokens(2, 9)
    folder = write_checkpoint(reference, tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_all(folder))
    assert_same_logits(alone(folder), folder, tokens, reference_logits(reference, tokens))


def test_one_file_without_an_index(tmp_path: Path) -> None:
    reference, tokens = make_model("mixtral"), make_tokens(2, 9)
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / INDEX).exists()
    assert_same_logits(alone(tmp_path), tmp_path, tokens, reference_logits(reference, tokens))


def test_half_precision_on_disk(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("qwen3_moe").bfloat16(), tmp_path)
    assert load_model(str(folder)).dtype == "bfloat16"
    tokens = make_tokens(2, 9)
    assert_same_logits(alone(folder), folder, tokens, reread_logits(folder, tokens))


def test_names_are_known_for_every_family_the_planner_reads() -> None:
    from epplan.planner import huggingface

    assert set(FAMILIES) == set(huggingface._FAMILIES)


def test_fp8_blocks_are_multiplied_out() -> None:
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3)
    actual = dequantize_fp8(weight, scale, (2, 3))
    for row in range(5):
        for column in range(7):
            expected = float(weight[row, column].float() * scale[row // 2, column // 3])
            assert float(actual[row, column]) == expected


def test_deepseek_v3_in_fp8_as_published(tmp_path: Path) -> None:
    """All projections of attention and MLPs are fp8, in blocks that do not divide them."""
    reference, tokens, block = make_model("deepseek_v3"), make_tokens(2, 9), (16, 12)
    tensors = load_all(write_checkpoint(reference, tmp_path))
    for name in [n for n in tensors if re.search(r"_proj(_with_mqa)?\.weight$", n)]:
        weight = tensors[name]
        blocks = [math.ceil(size / of) for size, of in zip(weight.shape, block, strict=True)]
        scale = torch.rand(blocks) / 100 + 0.001
        ones = dequantize_fp8(torch.ones_like(weight), scale, block)
        stored = (weight / ones).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scale
    quantized = {"quant_method": "fp8", "weight_block_size": list(block)}
    rewrite(tmp_path, tensors, quantization_config=quantized)
    weights = open_folder(tmp_path)
    assert not checkpoint_problems(weights)
    assert weights.spec.weight_bytes == pytest.approx(1 + 4 / 128**2)
    exact = {
        name: dequantize_fp8(tensor, tensors[f"{name}_scale_inv"], block)
        if f"{name}_scale_inv" in tensors
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    expected = logits_of_tensors("deepseek_v3", exact, tmp_path / "exact", tokens)
    assert_same_logits(alone(tmp_path), tmp_path, tokens, expected)


def logits_of_tensors(
    case: str, tensors: dict[str, Tensor], folder: Path, tokens: Tensor
) -> Tensor:
    """Return the logits of transformers with other tensors than the case's own."""
    write_checkpoint(make_model(case), folder)
    rewrite(folder, tensors)
    return reread_logits(folder, tokens)


def reread_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of what transformers reads from a folder."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return reference_logits(model.eval(), tokens)


def make_mxfp4(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


def test_mxfp4_is_multiplied_out_number_by_number() -> None:
    blocks, scales = make_mxfp4(3, 2)
    actual = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    assert actual.shape == (3, 64)
    for row in range(3):
        for column in range(64):
            byte = int(blocks[row, column // 32, column % 32 // 2])
            bits = byte >> 4 if column % 2 else byte & 15
            exponent, mantissa = bits >> 1 & 3, bits & 1
            size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
            expected = (-1) ** (bits >> 3) * size * 2.0 ** (int(scales[row, column // 32]) - 127)
            assert float(actual[row, column]) == expected


def test_gpt_oss_in_mxfp4_as_published(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="its own unpacking")
    reference, tokens = make_model("gpt_oss"), make_tokens(2, 9)
    tensors = load_all(write_checkpoint(reference, tmp_path))
    config = reference.config
    shapes = {
        "gate_up": (config.num_local_experts, 2 * config.intermediate_size, 1),
        "down": (config.num_local_experts, config.hidden_size, 1),
    }
    state = reference.state_dict()
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        del tensors[name]
        blocks, scales = make_mxfp4(*shapes["gate_up" if "gate_up" in name else "down"])
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        unpacked = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        with torch.no_grad():
            state[name].copy_(unpacked)
    rewrite(tmp_path, tensors, quantization_config={"quant_method": "mxfp4"})
    weights = open_folder(tmp_path)
    assert not checkpoint_problems(weights)
    assert weights.spec.weight_bytes == pytest.approx(4.25 / 8)
    assert_same_logits(alone(tmp_path), tmp_path, tokens, reference_logits(reference, tokens))


# What is wrong


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    tensors = load_all(write_checkpoint(make_model("mixtral"), tmp_path))
    prefix = "model.layers.1.block_sparse_moe"
    del tensors["model.norm.weight"], tensors[f"{prefix}.experts.3.w2.weight"]
    tensors[f"{prefix}.gate.weight"] = torch.zeros(9, 32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(1)  # of a layer beyond: unused
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    rewrite(tmp_path, tensors)
    assert checkpoint_problems(open_folder(tmp_path)) == [
        "model.norm.weight: missing",
        f"{prefix}.experts.3.w2.weight: missing",
        "model.layers.0.self_attn.q_proj.weight: type I8, not one of F64, F32, F16, BF16, F8_E4M3",
        f"{prefix}.gate.weight: [9, 32], the model has [8, 32]",
        "model.layers.0.self_attn.q_proj.bias: not a tensor of this model",
    ]


def test_of_very_many_problems_the_first_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("deepseek_v3"), tmp_path)
    tensors = load_all(folder)
    rewrite(folder, {n: t for n, t in tensors.items() if ".experts." not in n})
    problems = checkpoint_problems(open_folder(folder))
    assert len(problems) == 21
    assert problems[-1] == f"... and {2 * 16 * 3 - 20} more like this: missing"


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("deepseek_v3"), tmp_path)
    tensors, name = load_all(folder), "model.layers.0.self_attn.o_proj.weight"
    rewrite(folder, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    assert checkpoint_problems(open_folder(folder)) == [f"{name}_scale_inv: missing"]


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("mixtral, window, tied, llama3"), tmp_path)
    tensors = load_all(folder)
    assert "lm_head.weight" not in tensors
    rewrite(folder, {**tensors, "lm_head.weight": torch.zeros(96, 32)})
    weights = open_folder(folder)
    assert not checkpoint_problems(weights)
    head = build_head(weights)
    assert head.output_VH is head.embedding_VH


def test_another_model_than_the_plans(tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("deepseek_v3"), tmp_path)
    spec = load_model(str(folder))
    other = spec.model_copy(
        update={
            "name": "other",  # is not compared
            "expert_ffn_size": 32,
            "attention": spec.attention.model_copy(update={"rope_scaling": None}),
            "router": spec.router.model_copy(update={"scale": 1.0}),
        }
    )
    with pytest.raises(InputError) as caught:
        open_folder(folder, other)
    assert caught.value.message == f"checkpoint {folder} is of another model than the plan"
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "expert_ffn_size",
        "attention.rope_scaling",
        "router.scale",
    ]
    assert caught.value.problems[2] == "router.scale: 1.0 in the plan, 2.5 in the checkpoint"
    assert caught.value.hints == (f"make the plan with `epplan solve --model {folder} ...`",)


def remove_shard(folder: Path) -> None:
    (folder / "a.safetensors").unlink()


def truncate_shard(folder: Path) -> None:
    shard = folder / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def mislead_index(folder: Path) -> None:
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"]["nowhere"] = "a.safetensors"
    (folder / INDEX).write_text(json.dumps(document))


def damage_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": 3}')


def leave_folder(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}')


def only_bin(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"not complete\n  - a\.safetensors: missing, holds \d+ tensors\nhint"),
        (truncate_shard, r"not complete\n  - b\.safetensors: Error while deserializing header"),
        (mislead_index, r"a\.safetensors: has no tensor nowhere"),
        (damage_index, r"index .* is damaged: it has no mapping weight_map"),
        (leave_folder, r"index .* puts x outside the folder: \.\./x\.safetensors"),
        (only_bin, r"neither model.*\nhint: convert pytorch_model\.bin to safetensors"),
    ],
)
def test_damaged_checkpoints(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write_checkpoint(make_model("mixtral"), tmp_path)
    rewrite(folder, load_all(folder))
    damage(folder)
    with pytest.raises(InputError) as caught:
        open_folder(folder)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(make_model("mixtral"), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="needs safetensors, which is not installed") as caught:
        open_folder(folder)
    assert caught.value.hints == ("pip install 'epplan[runtime]'",)


def test_no_configuration(tmp_path: Path) -> None:
    spec = load_model("mixtral-8x7b")
    with pytest.raises(InputError, match=r"configuration not found: .*config\.json"):
        open_folder(tmp_path, spec)
