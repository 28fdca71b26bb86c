"""Traffic: rules, counts files, and everything a counts file can get wrong."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.errors import InputError
from epplan.planner.draw_sets import Router, draw_sets
from epplan.planner.traffic import Traffic, make_traffic, with_sets
from tests.tiny import tiny_model


def traffic(load: str, *, ranks: int = 4, tokens: int | None = 100, seed: int = 0) -> Traffic:
    return make_traffic(load, tiny_model(8, layers=2, top_k=2), ranks, tokens, seed)


def counts_file(folder: Path, counts: npt.NDArray[Any]) -> str:
    path = folder / "counts.npz"
    np.savez(path, counts=counts)
    return str(path)


@pytest.mark.parametrize("rule", ["uniform", "zipf", "zipf:2", "lognormal", "lognormal:1,0.5"])
def test_rules_make_top_k_assignments_of_every_token(rule: str) -> None:
    counts = traffic(rule).counts
    assert counts.shape == (1, 2, 4, 8)
    assert counts.sum(axis=3) == pytest.approx(200.0)  # 100 tokens x top-2
    assert counts.max() <= 100.0 + 1e-9  # an expert gets a token at most once


def test_seed_draws_and_repeats() -> None:
    assert (traffic("zipf", seed=1).counts == traffic("zipf", seed=1).counts).all()
    assert (traffic("zipf", seed=1).counts != traffic("zipf", seed=2).counts).any()
    assert traffic("zipf", seed=1).sha256 != traffic("zipf", seed=2).sha256


def test_only_a_skewed_rule_differs_between_ranks() -> None:
    same = traffic("lognormal:1")
    assert same.source_ranks == 1
    assert "every rank sends the same expert mix" in same.assumptions
    assert np.ptp(same.counts, axis=2).max() == 0
    assert traffic("lognormal:1,0.5").source_ranks == 4


def test_default_tokens_are_said() -> None:
    made = traffic("uniform", tokens=None)
    assert made.tokens_per_rank == 4096
    assert "4096 tokens a rank and step (give --tokens)" in made.assumptions


def test_counts_file_with_source_ranks(tmp_path: Path) -> None:
    raw = np.arange(3 * 2 * 4 * 8).reshape(3, 2, 4, 8)
    made = traffic(counts_file(tmp_path, raw), tokens=None)
    assert made.counts == pytest.approx(raw)
    assert (made.windows, made.source_ranks) == (3, 4)
    assert made.tokens_per_rank == round(raw.mean(axis=0).sum() / (2 * 4 * 2))


def test_many_windows_are_averaged_in_runs(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(1, 50, (18, 2, 4, 8))
    made = traffic(counts_file(tmp_path, raw), tokens=None)
    assert len(made.counts) == 8
    assert made.counts[0] == pytest.approx(raw[:3].mean(axis=0))
    assert made.counts[7] == pytest.approx(raw[16:].mean(axis=0))
    assert made.windows == 18
    assert "18 windows are averaged in 8 runs of equal length" in made.assumptions


def test_one_source_rank_is_said_and_spread(tmp_path: Path) -> None:
    raw = np.full((1, 2, 1, 8), 40)
    made = traffic(counts_file(tmp_path, raw), tokens=None)
    assert made.source_ranks == 1
    assert made.counts == pytest.approx(10.0)
    assert "every rank is taken to send the same expert mix" in made.assumptions[0]


def test_tokens_rescale_a_counts_file(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(1, 50, (1, 2, 4, 8))
    made = traffic(counts_file(tmp_path, raw), tokens=1000)
    assert made.counts.sum() == pytest.approx(2 * 4 * 1000 * 2)


@pytest.mark.parametrize(
    ("counts", "problems"),
    [
        (np.ones((1, 3, 3, 7), int), ("3 layers, but model tiny has 2", "7 experts", "3 source")),
        (-np.ones((1, 2, 4, 8), int), ("negative counts, the smallest is -1",)),
        (np.zeros((1, 2, 4, 8), int), ("layers [0, 1] have no assignment at all",)),
        (np.ones((0, 2, 4, 8), int), ("it has no window",)),
    ],
)
def test_all_problems_of_a_counts_file_at_once(
    tmp_path: Path, counts: npt.NDArray[np.int64], problems: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        traffic(counts_file(tmp_path, counts))
    for problem in problems:
        assert problem in str(caught.value)


def test_counts_must_be_integers_of_four_axes(tmp_path: Path) -> None:
    message = "`counts` is float64[2, 8]; it must be integers [windows, layers, source_ranks, expe"
    with pytest.raises(InputError, match=re.escape(message)):
        traffic(counts_file(tmp_path, np.ones((2, 8))))


def test_files_that_are_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(InputError, match=r"is not a readable \.npz file"):
        traffic(str(path))
    np.savez(path, loads=np.ones(3))
    with pytest.raises(InputError, match="has no array `counts`"):
        traffic(str(path))
    np.save(tmp_path / "plain.npy", np.ones(3))
    with pytest.raises(InputError, match=r"is not a readable \.npz file"):
        traffic(str(tmp_path / "plain.npy"))


@pytest.mark.parametrize("load", ["zipf:x", "zipf:1,2", "lognormal:-1", "uniform:3", "nowhere"])
def test_unknown_rules_name_the_known_ones(load: str) -> None:
    with pytest.raises(InputError, match=r"zipf\[:s\], lognormal\[:sigma\[,skew\]\]"):
        traffic(load)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def megatron_row(layer: int, rank: int, tokens: list[list[int]], **more: Any) -> dict[str, Any]:
    return {
        "step": 0,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(tokens),
        "topk": 2,
        "top_indices": tokens,
        **more,
    }


def test_topk_gives_sets_and_their_counts(tmp_path: Path) -> None:
    topk = np.argsort(np.random.default_rng(0).random((2, 2, 4, 10, 8)))[..., :2]
    topk[0, 0, 0, 0] = -1  # padding
    np.savez(tmp_path / "tokens.npz", topk=topk)
    made = traffic(str(tmp_path / "tokens.npz"), tokens=None)
    assert made.counts.shape == (2, 2, 4, 8)
    assert made.counts[1, 1, 2] == pytest.approx(np.bincount(topk[1, 1, 2].ravel(), minlength=8))
    assert made.counts[0, 0, 0].sum() == 18
    assert made.sets is not None
    for window, layer in np.ndindex(2, 2):
        assert made.sets[window][layer].counts(8) == pytest.approx(made.counts[window, layer])
    scaled = traffic(str(tmp_path / "tokens.npz"), tokens=1000)
    assert scaled.sets is not None
    assert scaled.sets[1][0].num_tokens == pytest.approx(4 * 1000, rel=0.02)
    some = made.from_ranks([3, 1])
    assert some.sets is not None
    assert some.sets[1][1].counts(8) == pytest.approx(made.counts[1, 1][[3, 1]])


def test_megatron_traces_keep_ranks_steps_and_what_is_chosen_together(tmp_path: Path) -> None:
    for rank in range(4):
        rows = [
            megatron_row(layer, rank, [[rank, 7], [0, 5], [5, 0]], step=step)
            for step in range(2)
            for layer in (3, 5)
        ]
        rows.append(megatron_row(9, rank, [[0, 1]], mtp_idx=0))
        write_lines(tmp_path / f"rank{rank}.jsonl", rows)
    made = traffic(str(tmp_path), tokens=None)
    assert made.counts.shape == (2, 2, 4, 8)
    assert made.counts[0, 1, 2].tolist() == [2, 0, 1, 0, 0, 2, 0, 1]
    assert made.source_ranks == 4
    assert "4 rows of multi-token prediction layers are left out" in made.assumptions
    assert made.sets is not None
    sets = made.sets[0][0]
    assert sets.experts[sets.source == 2].tolist() == [[0, 5], [2, 7]]
    assert sets.weight[sets.source == 2].tolist() == [2.0, 1.0]


def test_simllm_traces_are_one_source(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"row_type": "header"}]
    for token in range(5):
        routing = [{"layer_index": layer, "expert_ids": [token, 7]} for layer in range(2)]
        rows.append({"row_type": "observed-dispatch", "routing": routing})
    made = traffic(write_lines(tmp_path / "trace.jsonl", rows), tokens=None)
    assert made.source_ranks == 1
    assert made.counts[0, 0, 0].tolist() == [0.25] * 5 + [0, 0, 1.25]
    assert made.sets is not None
    assert made.sets[0][1].num_sources == 1
    assert "the routing trace has one source rank" in made.assumptions[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"top_indices": [[0, 1]], "layer": 0}', "line 1 is no sound row of a routing trace"),
        ('{"top_indices": [[0, "a"]], "layer": 0, "rank": 0}', "must be a list of integers"),
        ("[1]", "line 1 is no JSON object"),
        ("{", "line 1 is not valid JSON"),
        ('{"other": 1}', "has no row of a routing trace"),
    ],
)
def test_broken_traces_name_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        traffic(str(path))


def test_all_problems_of_a_trace_at_once(tmp_path: Path) -> None:
    rows = [megatron_row(0, rank, [[4, 4, 9]]) for rank in (1, 2)]
    with pytest.raises(InputError) as caught:
        traffic(write_lines(tmp_path / "trace.jsonl", rows))
    for problem in (
        "ranks [1, 2] are not 0 to 1",
        "a token chooses an expert twice: [4, 4, 9]",
        "3 experts a token, but model tiny has top_k 2",
        "1 layers, but model tiny has 2 MoE layers",
        "10 experts, but model tiny has 8",
        "2 source ranks; the EP group has 4",
    ):
        assert problem in str(caught.value)
    both = tmp_path / "both.npz"
    np.savez(both, counts=np.ones((1, 2, 4, 8), int), topk=np.zeros((1, 2, 4, 1, 2), int))
    with pytest.raises(InputError, match="has both `counts` and `topk`"):
        traffic(str(both))
    np.savez(both, topk=np.zeros((4, 2), int))
    with pytest.raises(InputError, match=r"`topk` is int64\[4, 2\]; it must be integers"):
        traffic(str(both))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rule=st.sampled_from([(2, 1, 1), (3, 1, 1), (4, 4, 2), (2, 8, 2)]),
    sigma=st.floats(0, 1),
)
def test_drawn_sets_have_exactly_the_counts(
    seed: int, rule: tuple[int, int, int], sigma: float
) -> None:
    top_k, groups, picked = rule
    random = np.random.default_rng(seed)
    counts = random.lognormal(0, sigma, (3, 16))
    counts[1] = 0.0  # a source without tokens
    for _ in range(60):  # no expert above all tokens
        counts = np.minimum(counts, counts.sum(axis=1, keepdims=True) / top_k)
    router = Router(top_k=top_k, groups=groups, picked=picked)
    sets, ungrouped = draw_sets(counts, router, random)
    assert sets.counts(16) == pytest.approx(counts, rel=1e-6, abs=1e-9)
    assert (np.diff(sets.experts, axis=1) > 0).all()
    if not ungrouped:
        of_group = sets.experts * groups // 16
        assert max(len(set(row)) for row in of_group.tolist()) <= picked


def test_counts_that_no_tokens_have_are_refused() -> None:
    model = tiny_model(8, layers=2, top_k=2)
    made = traffic("lognormal:0.5,0.5")
    counts = made.counts.copy()
    counts[0, 1, 2] = [150, 10, 10, 10, 10, 10, 0, 0]
    with pytest.raises(InputError) as caught:
        with_sets(replace(made, counts=counts), model, 0)
    assert (
        "expert 0 of layer 1 has 150 assignments from source 2 in window 0, which has 100 tokens"
        in str(caught.value)
    )
    drawn = with_sets(made, model, 0)
    assert "token sets are drawn at random with its counts" in drawn.assumptions[-1]
    assert drawn.sets is not None
    assert with_sets(drawn, model, 1) is drawn


def test_a_recorded_trace() -> None:
    path = Path(os.environ.get("EPPLAN_TRACES", ".")) / "simllm_granite_sglang_routing.jsonl"
    if not path.exists():
        pytest.skip("recorded traces are not here: set EPPLAN_TRACES to their folder")
    made = make_traffic(str(path), tiny_model(32, layers=24, top_k=8), 4, None, 0)
    assert made.counts.shape == (1, 24, 4, 32)
    assert made.counts.sum() == pytest.approx(216 * 24 * 8)
