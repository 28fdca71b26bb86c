"""Traffic: rules, counts files, and everything a counts file can get wrong."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from epplan.errors import InputError
from epplan.planner.traffic import Traffic, make_traffic
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
