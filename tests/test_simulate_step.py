"""Whole steps: closed forms, properties, memory and what-ifs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.planner.model import load_model
from epplan.planner.simulate.build import Load, scene_of_cluster, scene_of_plan, with_replicas
from epplan.planner.simulate.perfetto import write_trace
from epplan.planner.simulate.scene import Layout, Scene, Usage, parse_layout
from epplan.planner.simulate.simulate import simulate
from epplan.planner.simulate.transfers import transfer_profile
from epplan.planner.simulate.whatif import with_nics, with_oversubscription, without_hosts
from epplan.topologies.graph import Cluster
from epplan.topologies.sources import load_cluster
from tests.tiny import tiny_cluster, tiny_plan

REFERENCE = load_model("reference")


def reference_scene(cluster: Cluster | None = None, load: str = "uniform") -> Scene:
    cluster = cluster or load_cluster("dgx-h100-2")
    return scene_of_cluster(cluster, REFERENCE, 16, Load(source=load, seed=0), {})


def decode(**changes: object) -> Usage:
    usage = Usage(phase="decode", batch=1024, context=1024, transfer=transfer_profile("nccl"))
    return replace(usage, **changes)  # type: ignore[arg-type]


def test_one_micro_batch_is_the_sum_of_its_parts() -> None:
    scene = reference_scene()
    outcome = simulate(scene, decode(), Layout(ep=16))
    one_layer = [task for task in outcome.timeline.tasks if task.layer == 0]
    assert [task.name for task in one_layer] == [
        *("attention", "route", "dispatch", "experts", "combine", "unsort")
    ]
    summed = 4 * sum(float(task.seconds[0]) for task in one_layer)
    assert outcome.step_s == pytest.approx(summed)
    assert outcome.step_s == pytest.approx(outcome.compute_s + outcome.transfer_s)
    assert outcome.tps == pytest.approx(1024 / outcome.step_s)


def test_bytes_are_those_of_the_evaluator() -> None:
    """Half of 64 rows of 16 KiB leave each host: over 4 layers, both ways."""
    outcome = simulate(reference_scene(), decode(), Layout(ep=16))
    port = next(x for x in outcome.limits if x.name.startswith("net dgx01/nic0 ->"))
    assert port.bytes == pytest.approx(64 / 2 * 16384 * 4 * 2)
    assert port.floor_s == pytest.approx(port.bytes / 50e9)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["decode", "prefill"]),
    st.integers(1, 4),
    st.integers(256, 2000),
    st.sampled_from(["nccl", "deepep-ll", "deepep-normal"]),
)
def test_overlap_lies_between_the_longer_part_and_the_sum(
    phase: str, parts: int, batch: int, transfer: str
) -> None:
    usage = decode(
        phase=phase, micro_batches=parts, batch=batch, transfer=transfer_profile(transfer)
    )
    scene = reference_scene(load="lognormal:1,0.5")
    overlapped = simulate(scene, usage, Layout(ep=16))
    added = simulate(scene, replace(usage, overlap=False), Layout(ep=16))
    assert overlapped.step_s <= added.step_s * (1 + 1e-9)
    assert overlapped.step_s >= max(overlapped.compute_s, overlapped.transfer_s) * (1 - 1e-9)
    assert overlapped.step_s >= overlapped.floor_s * (1 - 1e-9)


@pytest.mark.parametrize("layout", ["tp8pp2", "tp4pp4", "tp2pp4"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_overlap_in_a_pipeline_is_never_slower(layout: str, parts: int) -> None:
    scene = reference_scene()
    for phase in ("decode", "prefill"):
        usage = decode(phase=phase, micro_batches=parts)
        overlapped = simulate(scene, usage, parse_layout(layout))
        added = simulate(scene, replace(usage, overlap=False), parse_layout(layout))
        assert overlapped.step_s <= added.step_s * (1 + 1e-9)
        assert overlapped.step_s >= overlapped.compute_s * (1 - 1e-9)


@pytest.mark.parametrize("layout", ["ep16", "tp8pp2", "tp4pp4"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_faster_nics_are_never_slower(layout: str, phase: str) -> None:
    cluster = load_cluster("2x8:h100,nic=8x200Gb/s")
    steps = [
        simulate(
            reference_scene(each),
            decode(phase=phase, micro_batches=4),
            parse_layout(layout),
        ).step_s
        for each in (cluster, with_nics(cluster, 50e9), with_nics(cluster, 100e9))
    ]
    assert steps == sorted(steps, reverse=True)


def test_a_pipeline_keeps_every_stage_busy_once_it_is_full() -> None:
    """Two stages, two micro-batches: a step takes both passes of a stage and the way on."""
    outcome = simulate(reference_scene(), decode(micro_batches=2), parse_layout("tp8pp2"))
    assert outcome.compute_s < outcome.step_s < 1.2 * (outcome.compute_s + outcome.transfer_s)
    alone = simulate(reference_scene(), decode(micro_batches=1), parse_layout("tp8pp2"))
    assert alone.step_s > 1.9 * alone.compute_s  # one micro-batch leaves the other stage idle


def test_naive_is_slower_than_well_run() -> None:
    layout = parse_layout("tp8pp2")
    well = simulate(reference_scene(), decode(micro_batches=2), layout)
    naive = simulate(reference_scene(), decode(micro_batches=2, naive=True), layout)
    assert naive.step_s > 1.5 * well.step_s


def test_automatic_takes_the_fastest_number_of_micro_batches() -> None:
    scene, usage = reference_scene(), decode(phase="prefill", batch=256, context=4096)
    chosen = simulate(scene, usage, Layout(ep=16), automatic=True)
    tried = [
        simulate(scene, replace(usage, micro_batches=n), Layout(ep=16)).step_s for n in (1, 2, 4, 8)
    ]
    assert chosen.step_s == min(tried)
    assert chosen.usage.micro_batches > 1


def test_memory_is_the_arithmetic_of_the_model() -> None:
    outcome = simulate(reference_scene(), decode(context=10000), Layout(ep=16))
    use = outcome.fullest
    assert use.experts == 4 * 2 * 8192 * 32768 * 2
    assert use.kv_cache == 64 * 10000 * 2 * 16 * 512 * 2 * 4
    assert use.largest == "KV cache"
    assert not use.fits
    assert not outcome.fits
    shares = simulate(reference_scene(), decode(context=10000), parse_layout("tp8pp2")).fullest
    assert shares.experts == use.experts
    assert shares.kv_cache == use.kv_cache
    assert shares.replicated == pytest.approx(REFERENCE.replicated_bytes / 16)


def test_layers_that_are_not_moe_and_vocabulary_count() -> None:
    model = load_model("deepseek-v3").with_overrides(layers=5)
    scene = scene_of_cluster(
        load_cluster("hgx-h200-2"), model, 16, Load(source="uniform", seed=0), {}
    )
    names = [task.name for task in simulate(scene, decode(), Layout(ep=16)).timeline.tasks]
    assert names.count("dense MLP") == 3
    assert names.count("shared experts") == names.count("dispatch") == 2
    assert names.count("output head") == 1


def test_the_slowest_window_is_reported_with_the_mean() -> None:
    scene = reference_scene(load="zipf:1")
    calm = reference_scene().counts
    windows = replace(scene, counts=np.concatenate([calm, scene.counts]), prices={})
    outcome = simulate(windows, decode(phase="prefill"), Layout(ep=16))
    slow = simulate(scene, decode(phase="prefill"), Layout(ep=16))
    fast = simulate(reference_scene(), decode(phase="prefill"), Layout(ep=16))
    assert outcome.num_windows == 2
    assert outcome.step_s == pytest.approx(slow.step_s)
    assert outcome.mean_step_s == pytest.approx((slow.step_s + fast.step_s) / 2)


def test_a_lost_host_leaves_its_experts_to_the_others() -> None:
    plan, cluster = tiny_plan(), tiny_cluster()
    load = Load(source="uniform", seed=0)
    whole, remarks = scene_of_plan(plan, cluster, load, {})
    assert whole.num_ranks == 4
    assert not remarks
    left, remarks = scene_of_plan(plan, without_hosts(cluster, ["h1"]), load, {})
    assert remarks == [
        "without h1: 2 GPUs fewer, 4 expert copies moved to the GPUs with fewest rows"
    ]
    for before, after in zip(whole.shares, left.shares, strict=True):
        assert after.sum(axis=1) == pytest.approx(np.ones(4))
        stayed = before[:, :2].sum(axis=1) > 0
        assert (after[stayed] == before[stayed][:, :2]).all()
        assert np.count_nonzero(after, axis=0).tolist() == [2, 2]


def test_replicas_even_out_a_skewed_load() -> None:
    scene = reference_scene(load="zipf:1")
    replicated = replace(scene, shares=with_replicas(scene.counts, REFERENCE, 16), prices={})
    usage = decode(phase="prefill", context=4096)
    before, after = (simulate(x, usage, Layout(ep=16)).step_s for x in (scene, replicated))
    assert after < 0.8 * before
    with pytest.raises(InputError, match=r"do not fill 16 GPUs evenly\nhint: --replicas 16 gives"):
        with_replicas(scene.counts, REFERENCE, 5)


def test_oversubscription_divides_what_leafs_send_up() -> None:
    cluster = load_cluster("4x8:h100,nic=8x400Gb/s,leafs=2")
    halved = with_oversubscription(cluster, 2)
    up = [(a, b) for a, b, _ in cluster.links() if {a, b} == {"leaf1", "spine1"}]
    for tail, head in up:
        before, after = cluster.link(tail, head), halved.link(tail, head)
        assert after.rated_bytes_per_s == before.rated_bytes_per_s / 2
    assert halved.link("host1/nic0", "leaf1") == cluster.link("host1/nic0", "leaf1")
    with pytest.raises(InputError, match="has an uplink: there is nothing to oversubscribe"):
        with_oversubscription(load_cluster("dgx-h100-2"), 2)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("ep16", Layout(ep=16)),
        ("tp8pp2", Layout(tp=8, pp=2)),
        ("tp8", Layout(tp=8)),
        ("pp4", Layout(pp=4)),
    ],
)
def test_layouts_are_read_as_written(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout


@pytest.mark.parametrize("text", ["", "ep", "ep0", "tp8ep2", "16", "pp2tp8"])
def test_other_layouts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"^unknown layout: {text}\nhint: ep16"):
        parse_layout(text)


def test_more_micro_batches_than_sequences_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        simulate(reference_scene(), decode(batch=32, micro_batches=4), Layout(ep=16))
    assert caught.value.problems == ("4 micro-batches of 2 sequences",)


def test_a_layout_that_does_not_fit_is_refused_with_every_reason() -> None:
    with pytest.raises(InputError) as caught:
        simulate(reference_scene(), decode(), Layout(tp=3, pp=5))
    assert caught.value.problems == (
        "tp3pp5 needs a multiple of 15 GPUs, not 16",
        "5 stages for 4 layers",
        "attention heads 16 cannot be cut in 3 shares",
        "expert width 32768 cannot be cut in 3 shares",
    )


@pytest.mark.parametrize(
    ("source", "library", "problem"),
    [
        ("4x4:gb200,domain=4", "deepep-normal", "deepep-normal reaches 8 ranks by NVLink, not 16"),
        ("dgx-h100-2", "trtllm", "trtllm works inside one NVLink domain, not across dgx01's"),
    ],
)
def test_a_library_is_refused_where_it_does_not_run(
    source: str, library: str, problem: str
) -> None:
    usage = decode(transfer=transfer_profile(library))
    with pytest.raises(InputError) as caught:
        simulate(reference_scene(load_cluster(source)), usage, Layout(ep=16))
    assert caught.value.problems == (problem,)


def test_a_trace_has_every_task_of_every_rank_in_order(tmp_path: Path) -> None:
    scene = reference_scene()
    outcome = simulate(scene, decode(micro_batches=2), Layout(ep=16))
    path = tmp_path / "trace.json"
    write_trace(path, outcome.timeline, [gpu.id for gpu in scene.gpus])
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 16 * len(outcome.timeline.tasks)
    for rank in range(16):
        for thread in (0, 1):
            own = [e for e in spans if e["pid"] == rank and e["tid"] == thread]
            ends = [e["ts"] + e["dur"] for e in own]
            assert all(e["ts"] >= end - 0.01 for e, end in zip(own[1:], ends, strict=False))
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {gpu.id for gpu in scene.gpus}
