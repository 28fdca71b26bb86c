"""The decode step with this project's kernels, and as a CUDA graph, against torch's kernels."""

import pytest
import torch
from torch import Tensor

from epplan.launcher.bench_options import BenchOptions
from epplan.planner.model import AttentionSpec, ModelSpec, RouterSpec
from epplan.runtime.clock import PhaseClock
from epplan.runtime.decode import DecodeGraph
from epplan.runtime.dispatchers.one_rank import OneRank
from epplan.runtime.dispatchers.order import weighted_sum
from epplan.runtime.dispatchers.padding import pad
from epplan.runtime.layer.adjacent import adjacent
from epplan.runtime.layer.attend import attend_cached
from epplan.runtime.layer.attention import attention, attention_step, join_projections
from epplan.runtime.layer.filled_cache import filled_cache
from epplan.runtime.layer.kv_cache import KvCache
from epplan.runtime.layer.layers import build_layers
from epplan.runtime.layer.rope import Rotation, normalise_and_rotate
from epplan.runtime.model import ExpertParallelModel
from epplan.runtime.pipeline import NO_TURNS, Schedule
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.runtime_cases import REFERENCE, make_plan

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# As large as the kernels for short steps ask for, and no larger.
WIDE = ModelSpec(
    name="wide",
    hidden_size=4096,
    num_layers=2,
    moe_layers=(0, 1),
    num_experts=4,
    top_k=1,
    expert_ffn_size=8192,
    gated=False,
    attention=AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=512),
    router=RouterSpec(renormalize=False),
    dtype="float16",
    weight_bytes=2,
)
SEQUENCES, CONTEXT = 40, 50


def test_joined_projections_are_one_product() -> None:
    spec = REFERENCE.attention
    weights = SeededWeights(
        spec=REFERENCE, seed=0, device=torch.device("cpu"), dtype=torch.float32
    ).attention(0)
    names = ("query", "key", "value")
    joined = join_projections(weights)
    assert adjacent([weights[name] for name in names]) is None
    together = adjacent([joined[name] for name in names])
    assert together is not None
    assert torch.equal(together, torch.cat([weights[name] for name in names]))
    x_BSH = torch.randn(2, 3, REFERENCE.hidden_size)
    step = attention_step(REFERENCE, x_BSH)
    apart = attention(x_BSH, weights, spec, step, 0)
    torch.testing.assert_close(attention(x_BSH, joined, spec, step, 0), apart)


def make_step(device: torch.device) -> tuple[ExpertParallelModel, Tensor]:
    weights = SeededWeights(spec=WIDE, seed=0, device=device, dtype=torch.float16)
    schedule = Schedule(micro_batches=1, in_flight=1, turns=NO_TURNS, reason="test")
    layers = build_layers(make_plan(WIDE, 4), 1, weights)
    model = ExpertParallelModel(WIDE, layers, OneRank(), schedule, PhaseClock(device))
    shape = (SEQUENCES, 1, WIDE.hidden_size)
    return model, seeded_hidden(0, 0, shape, device=device, dtype=torch.float16)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_decode_step_and_its_graph_equal_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPPLAN_SHORT_STEP_KERNELS", "1")
    device = torch.device("cuda")
    model, x_B1H = make_step(device)
    torch.manual_seed(0)
    cache = filled_cache(
        WIDE.attention,
        num_layers=2,
        sequences=SEQUENCES,
        context=CONTEXT,
        device=device,
        dtype=torch.float16,
    )

    def step(x_B1H: Tensor) -> Tensor:
        batches = model.run(x_B1H, model.dispatcher, caches=[cache])
        cache.truncate(CONTEXT)
        return batches[0].hidden_BSH

    with torch.enable_grad():  # none of the kernels has a backward pass: torch's run
        expected = step(x_B1H).detach().float()
    with torch.inference_mode():
        actual = step(x_B1H).float()
    graph = DecodeGraph(step, torch.zeros_like(x_B1H))
    replayed = graph(x_B1H).float()
    scale = expected.norm()
    assert (actual - expected).norm() / scale < 2e-3
    assert (replayed - expected).norm() / scale < 2e-3
    assert not torch.equal(actual, expected)  # other kernels


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(8192, 8192), (24576, 8192), (32768, 8192), (8192, 32768)]
)
def test_skinny_products(rows: int, outputs: int, inputs: int) -> None:
    from epplan.runtime.kernels.skinny_linear import serves, skinny_linear

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float16)

    x, weight = random(rows, inputs), random(outputs, inputs) / inputs**0.5
    with torch.inference_mode():
        assert serves(x, weight)
        for _ in range(2):  # the second finds the first one's counters
            actual = skinny_linear(x, weight).float()
            expected = x.float() @ weight.float().T
            assert (actual - expected).norm() / expected.norm() < 1e-3
        actual = skinny_linear(x, weight, gelu=True).float()
    gelu = torch.nn.functional.gelu(expected)
    assert (actual - gelu).norm() / gelu.norm() < 1e-3


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("length", [0, 1, 8, 50, 129])
def test_one_position_joins_the_cache_and_reads_it(length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float16)

    query, key, value = (
        torch.unflatten(part, -1, (8, 512)).transpose(1, 2)
        for part in random(40, 1, 3 * 8 * 512).chunk(3, -1)
    )
    cached = random(2, 40, 8, max(length, 1), 512)[:, :, :, :length]
    with torch.inference_mode():
        caches = [KvCache(1), KvCache(1)]
        for cache in caches:
            cache.update(0, *cached)
        actual = attend_cached(query, key, value, caches[0], 0, scale=None)
        keys, values = caches[1].update(0, key, value)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.float(), keys.float(), values.float()
        )
        torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)
        assert caches[0].length == length + 1
        ours, torchs = (cache.update(0, key, key) for cache in caches)
    assert torch.equal(ours[0], torchs[0])
    assert torch.equal(ours[1], torchs[1])


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_between_products(top_k: int) -> None:
    from epplan.runtime.kernels import decode_rows
    from epplan.runtime.kernels.router_logits import router_logits

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(37, 384, generator=generator, device="cuda").half()
    delta = torch.randn(37, 384, generator=generator, device="cuda").half()
    gain = torch.rand(384, generator=generator, device="cuda").half()
    total, normed = decode_rows.add_rms_norm(x, delta, gain, 1e-5)
    assert torch.equal(total, x + delta)
    expected = torch.nn.functional.rms_norm((x + delta).float(), (384,), gain.float(), 1e-5)
    torch.testing.assert_close(normed.float(), expected, atol=2e-3, rtol=2e-3)
    slot_TK = torch.randint(0, 5, (37, top_k), generator=generator, device="cuda")
    rows, place = decode_rows.batch_rows(x, slot_TK.flatten(), top_k)
    order = slot_TK.flatten().argsort(stable=True)
    assert torch.equal(rows, x[order // top_k])
    assert torch.equal(place[order], torch.arange(37 * top_k, device="cuda"))
    weights_TK = torch.rand(37, top_k, generator=generator, device="cuda")
    place_TK = place.view(37, top_k)
    torch.testing.assert_close(
        decode_rows.add_up_rows(rows, place_TK, weights_TK),
        weighted_sum(rows.float(), place_TK, weights_TK).half(),
        atol=2e-3,
        rtol=2e-3,
    )
    table = torch.randperm(5, generator=generator, device="cuda")
    assert torch.equal(decode_rows.look_up(table, slot_TK), table[slot_TK])
    for num_experts in (5, 16, 40):
        router = torch.randn(num_experts, 384, generator=generator, device="cuda")
        for tokens in (x, x.repeat(60, 1)):  # many programs of a block, and few
            expected = tokens.double() @ router.double().T
            actual = router_logits(tokens, router).double()
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
    router = torch.randn(16, 384, generator=generator, device="cuda")
    weights_T1, experts_T1 = decode_rows.route_best(x, router)
    best = (x.float() @ router.T).softmax(-1).max(-1, keepdim=True)
    torch.testing.assert_close(weights_T1, best.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(experts_T1, best.indices)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("capacity", [1, 9, 64])
def test_padded_rows(capacity: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x_TH = torch.randn(64, 300, generator=generator, device="cuda").half()
    slot_TK = torch.rand(64, 24, generator=generator, device="cuda").topk(4).indices
    weights_TK = torch.rand(64, 4, generator=generator, device="cuda")
    expected = pad(x_TH, slot_TK, weights_TK, 24, capacity)  # no kernel has a backward pass
    with torch.inference_mode():
        actual = pad(x_TH, slot_TK, weights_TK, 24, capacity)
    for ours, torchs in zip(actual, expected, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "width", "pairs", "epsilon", "has_gain"),
    [(64, 128, 64, 1e-6, True), (4, 128, 64, 1e-6, True), (5, 80, 20, 1e-5, True),
     (8, 64, 32, None, False), (3, 96, 21, 1e-6, False)],
)  # fmt: skip
@pytest.mark.parametrize("positions", [1, 33])
def test_rotated_heads(
    heads: int,
    width: int,
    pairs: int,
    epsilon: float | None,
    has_gain: bool,
    positions: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x_BSO = torch.randn(3, positions, heads * width + 8, generator=generator, device="cuda")
    x_BSO = x_BSO.to(dtype)[..., 8:]  # a part of a joined projection
    x_BQSD = torch.unflatten(x_BSO, -1, (heads, width)).transpose(1, 2)
    angle_SP = 6 * torch.rand(positions, pairs, generator=generator, device="cuda")
    rotation = Rotation(cos_SP=angle_SP.cos(), sin_SP=angle_SP.sin())
    gain_D = torch.rand(width, generator=generator, device="cuda").to(dtype) if has_gain else None
    expected = normalise_and_rotate(x_BQSD, gain_D, epsilon, rotation)
    with torch.inference_mode():
        actual = normalise_and_rotate(x_BQSD, gain_D, epsilon, rotation)
    assert actual.is_contiguous()
    step = torch.finfo(dtype).eps  # of two roundings at most
    torch.testing.assert_close(actual, expected, atol=step, rtol=2 * step)


def test_bench_options_by_phase() -> None:
    options = BenchOptions(
        phase="both",
        baseline=None,
        one_rank=None,
        backend="auto",
        sequences=2,
        sequence_length=64,
        context=10,
        micro_batches=None,
        overlap=True,
        graph=True,
        steps=1,
        warm_up=1,
        seed=0,
    )
    assert options.phases == ("prefill", "decode")
    assert [options.positions(phase) for phase in options.phases] == [64, 1]
    assert [options.before(phase) for phase in options.phases] == [0, 10]
