"""Model specs: sizes of known models, Hugging Face configurations, overrides, bad files."""

import json
from pathlib import Path
from typing import Any

import pytest

from epplan.errors import InputError
from epplan.planner.model import bundled_models, load_model

MODELS = Path(__file__).parent.parent / "planner" / "models"


def parameters(name: str) -> float:
    spec = load_model(name)
    total = spec.replicated_bytes + spec.expert_bytes * spec.num_experts * spec.num_moe_layers
    return total / spec.weight_bytes


@pytest.mark.parametrize(
    ("name", "published"),
    [("mixtral-8x7b", 46.7e9), ("qwen3-235b-a22b", 235e9), ("deepseek-v3", 671e9)],
)
def test_parameter_counts_are_the_published_ones(name: str, published: float) -> None:
    assert parameters(name) == pytest.approx(published, rel=2e-3)


def test_reference_model_is_that_of_the_method() -> None:
    spec = load_model("reference")
    assert spec.expert_bytes == 2 * 8192 * 32768 * 2
    assert spec.expert_flops_per_row == 4 * 8192 * 32768
    assert spec.row_bytes == 16384
    assert spec.attention.num_heads * spec.attention.head_dim == spec.hidden_size
    assert (spec.num_moe_layers, spec.num_experts, spec.top_k) == (4, 16, 1)


def test_deepseek_has_its_dense_layers_groups_and_latent_cache() -> None:
    spec = load_model("deepseek-v3")
    assert spec.moe_layers == tuple(range(3, 61))
    assert (spec.router.groups, spec.router.topk_groups, spec.router.scale) == (8, 4, 2.5)
    assert spec.router.correction_bias
    assert spec.kv_bytes_per_token == 61 * (512 + 64) * 2
    assert spec.weight_bytes == pytest.approx(1 + 4 / 128**2)


def test_every_bundled_model_loads() -> None:
    assert bundled_models() == ["deepseek-v3", "mixtral-8x7b", "qwen3-235b-a22b", "reference"]
    for name in bundled_models():
        assert load_model(name).name == name


def config(tmp_path: Path, name: str, **changes: Any) -> Path:
    document = json.loads((MODELS / f"{name}.json").read_text())
    document.update(changes)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))
    return file


def test_folder_of_a_checkpoint(tmp_path: Path) -> None:
    config(tmp_path, "mixtral-8x7b")
    assert load_model(str(tmp_path)).num_experts == 8


def test_qwen_layers_without_experts(tmp_path: Path) -> None:
    file = config(
        tmp_path, "qwen3-235b-a22b", num_hidden_layers=6, mlp_only_layers=[1], decoder_sparse_step=2
    )
    assert load_model(str(file)).moe_layers == (3, 5)


def test_multimodal_configuration_keeps_its_model_under_text_config(tmp_path: Path) -> None:
    inner = json.loads((MODELS / "mixtral-8x7b.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llava", "text_config": inner}))
    assert load_model(str(file)).num_experts == 8


def test_missing_fields_are_named_at_once(tmp_path: Path) -> None:
    file = config(tmp_path, "mixtral-8x7b", num_local_experts="gone", hidden_size="gone")
    with pytest.raises(InputError) as caught:
        load_model(str(file))
    assert caught.value.problems == ("hidden_size: missing", "num_local_experts: missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "of an unknown architecture: model_type gpt2"),
        ({"num_experts_per_tok": 9}, "top_k 9 exceeds num_experts 8"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is no integer"),
        ({"torch_dtype": "int8"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_bad_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(str(config(tmp_path, "mixtral-8x7b", **changes)))
    assert message in str(caught.value)


def test_scale_keeps_the_placement_problem() -> None:
    full, small = load_model("reference"), load_model("reference").with_overrides(scale=1 / 32)
    assert (small.hidden_size, small.expert_ffn_size, small.attention.head_dim) == (256, 1024, 16)
    assert (small.num_experts, small.num_layers, small.top_k) == (16, 4, 1)
    assert full.expert_bytes == 32**2 * small.expert_bytes


def test_overrides() -> None:
    small = load_model("deepseek-v3").with_overrides(experts=16, layers=5)
    assert small.moe_layers == (3, 4)
    assert small.num_experts == 16
    with pytest.raises(InputError, match="the first 3 layers of model deepseek-v3 have no experts"):
        load_model("deepseek-v3").with_overrides(layers=3)
    with pytest.raises(InputError, match="with overrides is not valid"):
        load_model("deepseek-v3").with_overrides(experts=4)


def test_unknown_model_lists_the_bundled_ones() -> None:
    with pytest.raises(InputError, match="unknown model: nope") as caught:
        load_model("nope")
    assert "deepseek-v3, mixtral-8x7b, qwen3-235b-a22b, reference" in str(caught.value)
