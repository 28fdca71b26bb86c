"""The model against published transfers: benchmarks/published.py."""

import csv
import importlib.util
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT.parent / "shared" / "reference" / "a2a-published.csv"


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    return module


def row(published: ModuleType, **fields: str) -> dict[str, str]:
    return {**dict.fromkeys(published.COLUMNS, ""), **fields}


def h800(published: ModuleType, ep: str, **fields: str) -> dict[str, str]:
    common = {
        "source": "deepseek-ai/DeepEP",
        "hardware": "H800 + CX-7 400G IB",
        "gpus_per_node": "8",
        "hidden": "7168",
        "topk": "8",
        "dtype_dispatch": "FP8",
        "dtype_combine": "BF16",
        "source_version": "README 2025-06-05",
    }
    return row(published, ep_size=ep, **{**common, **fields})


def test_readme_rows_that_nothing_was_fitted_on(published: ModuleType) -> None:
    """DeepEP's README: EP32 normal 58 GB/s, EP128 low latency 192 and 369 us."""
    normal = {"kernel": "normal", "tokens": "4096", "bw_definition": "deepep_v1_normal"}
    few = {"kernel": "low_latency", "tokens": "128", "bw_definition": "deepep_ll"}
    rows = [
        h800(published, "32", algo_bandwidth_GBps="58", num_experts="256", **normal),
        h800(published, "128", dispatch_us="192", combine_us="369", num_experts="288", **few),
    ]
    compared, reasons = published.cases(rows)
    assert not reasons
    errors = [error for _, error in published.errors(compared)]
    assert len(errors) == 3
    assert max(map(abs, errors)) < 0.12
    # 4096 tokens x 3.6 of 4 nodes x 7392 bytes
    assert compared[0].seconds == pytest.approx(4096 * 3.6 * 7392 / 58e9, rel=0.01)


def test_rows_are_left_out_by_what_they_say(published: ModuleType) -> None:
    few = {"kernel": "low_latency", "tokens": "128", "bw_definition": "deepep_ll"}
    times = {"dispatch_us": "1", "num_experts": "288"}
    rows = [
        h800(published, "8", notes="negative case", **few, **times),
        h800(published, "16", **{**few, **times, "source_version": "README 2025-02-24"}),
        h800(published, "16", **few, **times),
        h800(published, "16", **{**few, **times, "hardware": "not read"}),
        h800(published, "8", **{**few, **times, "source": "other/lib", "kernel": "fast"}),
    ]
    rows += [
        h800(published, "", **few, **times),
        h800(published, "8", **{**few, **times, "tokens": ""}),
        h800(published, "8", **{**few, **times, "dtype_dispatch": "INT4"}),
    ]
    compared, reasons = published.cases(rows)
    assert len(compared) == 1
    assert reasons == {
        "deepep-ll: its note says negative case": 1,
        "deepep-ll: a later version of the page gives this case anew": 1,
        "deepep-ll: hardware not stated": 1,
        "a library without a profile": 1,
        "deepep-ll: group not stated": 1,
        "deepep-ll: tokens, hidden size or top-k not stated": 1,
        "deepep-ll: number format not stated": 1,
    }


@pytest.mark.skipif(not ROWS.exists(), reason="the published rows are not shipped")
def test_rows_not_used_for_fitting_are_met(published: ModuleType) -> None:
    with ROWS.open(newline="", encoding="utf-8") as file:
        compared, _ = published.cases(list(csv.DictReader(file)))
    errors = [
        abs(e) for case, e in published.errors(compared) if not case.used and not case.outside
    ]
    assert len(errors) > 80
    assert median(errors) < 0.10
    assert max(errors) < 0.20
