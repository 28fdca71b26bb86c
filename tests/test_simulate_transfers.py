"""What libraries send, and that the evaluator alone prices it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.planner.cost import evaluate_layer, one_copy
from epplan.planner.model import ModelSpec, RouterSpec
from epplan.planner.simulate.copies import (
    Choices,
    Copies,
    Floats,
    hit_probability,
    sent_copies,
)
from epplan.planner.simulate.transfers import (
    library_routes,
    make_library,
    transfer_profile,
    transfer_profiles,
)
from epplan.planner.simulate.whatif import with_nics
from epplan.topologies.routes import find_routes
from epplan.topologies.sources import load_cluster
from epplan.topologies.transfer_cost import transfer_cost
from tests.tiny import random_counts, tiny_cluster, tiny_model, tiny_problem

NODE_CLUSTER = "2x4:h100,nic=4x400Gb/s"


def choices(
    model: ModelSpec, counts: Floats, ranks: int = 8, source: str = NODE_CLUSTER
) -> Choices:
    placement = np.arange(model.num_experts) * ranks // model.num_experts
    return Choices(
        model=model,
        counts=counts,
        shares=one_copy(placement.astype(np.intp), ranks),
        island=find_routes(load_cluster(source)).island,
    )


def grouped(experts: int, top_k: int, groups: int, picked: int) -> ModelSpec:
    router = RouterSpec(groups=groups, topk_groups=picked)
    return tiny_model(experts, top_k=top_k).model_copy(update={"router": router})


@pytest.mark.parametrize(("groups", "picked"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_hits_are_those_of_drawn_tokens(groups: int, picked: int) -> None:
    model = grouped(32, 4, groups, picked)
    counts = np.full((8, 32), 10.0)
    expected = hit_probability(choices(model, counts), choices(model, counts).shares)[0]
    random = np.random.default_rng(0)
    hits = np.zeros(8)
    for _ in range(4000):
        of = random.choice(groups, picked, replace=False)
        eligible = np.flatnonzero(np.isin(np.arange(32) * groups // 32, of))
        experts = random.choice(eligible, 4, replace=False)
        hits[np.unique(experts // 4)] += 1
    assert hits / 4000 == pytest.approx(expected, abs=0.03)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_copies_are_conserved(seed: int, top_k: int) -> None:
    """Every choice is sent once; whatever enters a node is at least what was meant for it."""
    model = tiny_model(16, top_k=top_k)
    counts = random_counts(seed, 1, 8, 16)[0]
    of = choices(model, counts)
    rows, to_rank, through = (sent_copies(of, c) for c in ("choice", "rank", "node"))
    assert rows.sum() == pytest.approx(counts.sum())
    assert (to_rank <= rows * (1 + 1e-9)).all()  # a rank gets a token at most once per choice
    assert (to_rank <= of.tokens[:, None] * (1 + 1e-9)).all()
    outside = of.island[:, None] != of.island
    # Ranks of a node together receive what they would without forwarding, wherever it enters.
    assert (through * ~outside).sum() == pytest.approx(to_rank.sum())
    assert (through * outside).sum() <= (to_rank * outside).sum() * (1 + 1e-9)


def test_one_expert_a_gpu_and_top_1_leave_nothing_to_deduplicate() -> None:
    model = tiny_model(8)
    counts = random_counts(3, 1, 8, 8)[0]
    of = choices(model, counts)
    assert sent_copies(of, "rank") == pytest.approx(sent_copies(of, "choice"))


def test_forwarding_goes_through_the_gpu_with_the_senders_index() -> None:
    model = tiny_model(8)
    counts = np.zeros((8, 8))
    counts[1, 6] = 10.0  # rank 1 of node 0 to expert 6 on rank 6 of node 1
    sent = sent_copies(choices(model, counts), "node")
    assert sent[1, 5] == pytest.approx(10)
    assert sent[5, 6] == pytest.approx(10)
    assert sent.sum() == pytest.approx(20)


@pytest.mark.parametrize("layer", range(3))
def test_the_profile_plan_takes_exactly_the_seconds_the_planner_prices(layer: int) -> None:
    counts = random_counts(layer, 3, 4, 4)
    problem = tiny_problem(counts)
    shares = one_copy(np.array([2, 0, 3, 1]), 4)
    priced = evaluate_layer(problem, layer, shares).worst
    dtype = problem.model.dtype
    library = make_library(transfer_profile("plan"), problem.routes, 1024, dtype, dtype)
    of = Choices(
        model=problem.model,
        counts=counts[layer],
        shares=shares,
        island=problem.routes.island,
    )
    assert library.dispatch(of).seconds == pytest.approx(priced.dispatch.seconds, rel=1e-12)
    assert library.combine(of).seconds == pytest.approx(priced.combine.seconds, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["nccl", "deepep-normal", "deepep-ll", "trtllm"]),
    st.floats(1.0, 8.0),
)
def test_more_bandwidth_is_never_slower(seed: int, name: str, times: float) -> None:
    cluster = tiny_cluster((2, 2), nic_rate="100Gb/s")
    faster = with_nics(cluster, 12.5e9 * times)
    model = tiny_model(4)
    seconds = []
    for each in (cluster, faster):
        routes = find_routes(each)
        of = Choices(
            model=model,
            counts=random_counts(seed, 1, 4, 4)[0],
            shares=one_copy(np.arange(4), 4),
            island=routes.island,
        )
        library = make_library(transfer_profile(name), routes, 1024, "bfloat16", "bfloat16")
        seconds.append(library.dispatch(of).seconds + library.combine(of).seconds)
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


def test_bytes_of_a_row_follow_each_librarys_definition() -> None:
    assert transfer_profile("deepep-normal").row_bytes(7168, "fp8") == 7392
    assert transfer_profile("deepep-ll").row_bytes(7168, "fp8") == 7408
    assert transfer_profile("deepep-ll").row_bytes(7168, "bfloat16") == 14336
    assert transfer_profile("trtllm").row_bytes(7168, "nvfp4") == 7168 * 0.5625


def test_a_port_carries_less_than_link_and_sms_alone() -> None:
    profile = transfer_profile("deepep-normal")
    assert profile.sm is not None
    routes = find_routes(load_cluster("1x8:b200,nic=8x400Gb/s"))
    port = next(n for n, r in enumerate(routes.resources) if r.link.kind == "nvlink")
    capacities = []
    for sms in (8, 24, 148):
        few = profile.model_copy(update={"sm": profile.sm.model_copy(update={"sms": sms})})
        limit = few.sm.bytes_per_s(7392, combine=False, forwarding=False) if few.sm else 0
        capacity = library_routes(few, routes, 7392, combine=False).capacity[port]
        assert profile.nvlink is not None
        assert capacity < min(limit, 900e9 * profile.nvlink)
        capacities.append(capacity)
    assert capacities == sorted(capacities)
    assert capacities[0] == pytest.approx(
        profile.sm.model_copy(update={"sms": 8}).bytes_per_s(7392, combine=False, forwarding=False),
        rel=0.02,
    )


def test_a_transfer_has_a_floor_and_then_grows_with_its_bytes() -> None:
    model, routes = tiny_model(8), find_routes(load_cluster("2x4:gb200,domain=2"))
    library = make_library(transfer_profile("trtllm"), routes, 7168, "bfloat16", "bfloat16")
    seconds = []
    for tokens in (1, 8, 4096, 8192):
        of = Choices(
            model=model,
            counts=np.full((8, 8), tokens / 8),
            shares=np.eye(8),
            island=routes.island,
        )
        seconds.append(library.dispatch(of).seconds)
    assert seconds[0] == seconds[1] == pytest.approx(17.5e-6 + 8 * 0.14e-6)
    assert seconds[3] > 1.5 * seconds[2]


def test_every_profile_prices_a_transfer() -> None:
    routes = find_routes(load_cluster(NODE_CLUSTER))
    sent = np.ones((8, 8))
    for profile in transfer_profiles().values():
        cost = transfer_cost(library_routes(profile, routes, 2048, combine=True), sent)
        assert 0 < cost.seconds < 1, profile.name


def test_an_unknown_library_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"^unknown transfer library: mpi\nhint: known: plan, nccl, nccl-padded, "
        r"deepep-normal, deepep-ll, deepep-v2, trtllm$",
    ):
        transfer_profile("mpi")


def test_padded_buffers_are_sent_whole() -> None:
    of = choices(tiny_model(16), np.full((8, 16), 2.0))
    copies: Copies = "padded"
    assert (sent_copies(of, copies) == 32 * 2).all()  # 32 tokens x 2 experts a rank
