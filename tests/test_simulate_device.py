"""Device profiles: what was measured comes out again, what was not follows the stated rule."""

from pathlib import Path

import numpy as np
import pytest

from epplan.errors import InputError
from epplan.planner.model import load_model
from epplan.planner.simulate.device import device, read_device
from epplan.topologies.hardware import hardware

DATA = Path(__file__).parent.parent / "planner" / "simulate" / "data" / "h200-sxm.yaml"


def test_a_measured_point_comes_out_as_it_was_measured() -> None:
    h200 = device("h200-sxm")
    assert h200.provenance == "measured"
    for table in h200.tables.mlp:
        seconds = h200.mlp(table.hidden, table.ffn, table.gated, np.array(table.rows), 2).seconds
        assert seconds == pytest.approx(table.seconds, rel=1e-9)
    spec = load_model("reference").attention
    prefill = h200.prefill_attention(spec, np.ones(1), 10000)
    assert prefill.seconds[0] == pytest.approx(0.01235)
    decode = h200.decode_attention(spec, np.array([16.0]), 10000, 32768)
    assert decode.seconds[0] == pytest.approx(0.001167, rel=1e-6)


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm-80gb", "b200", "mi300x"])
def test_a_derived_gpu_reaches_the_shares_of_the_measured_one(name: str) -> None:
    derived, h200 = device(name), device("h200-sxm")
    assert derived.provenance == "profile"
    assert "h200-sxm" in derived.source
    rated, reference = hardware().gpus[name], hardware().gpus["h200-sxm"]
    rows = np.array([16384.0])
    product = [d.mlp(8192, 32768, False, rows, 2).seconds[0] for d in (derived, h200)]
    # Far above the ridge only arithmetic counts; the ridge of a derived GPU is at other rows.
    assert product[0] / product[1] == pytest.approx(reference.flops / rated.flops, rel=0.06)
    one = np.array([1.0])
    reading = [d.mlp(8192, 32768, False, one, 2).seconds[0] for d in (derived, h200)]
    assert reading[0] / reading[1] == pytest.approx(reference.hbm / rated.hbm, rel=0.06)


def test_no_work_is_faster_than_the_rated_figures() -> None:
    for name in hardware().gpus:
        each = device(name)
        for rows in (1.0, 64.0, 700.0, 5000.0):
            work = each.mlp(7168, 2048, True, np.array([rows]), 2)
            best = max(work.flops[0] / each.gpu.flops, work.hbm_bytes[0] / each.gpu.hbm)
            assert work.seconds[0] >= best, (name, rows)


def test_fp8_weights_halve_both_limits_where_the_gpu_has_them() -> None:
    rows = np.array([1.0, 16384.0])
    h100, a100 = device("h100-sxm"), device("a100-sxm-80gb")
    half = h100.mlp(7168, 2048, True, rows, 2).seconds / h100.mlp(7168, 2048, True, rows, 1).seconds
    assert half == pytest.approx(2, rel=0.1)
    assert a100.flops_per_s(1) == a100.flops_per_s(2)


def test_nothing_takes_no_time() -> None:
    h200 = device("h200-sxm")
    none = np.zeros(2)
    assert h200.mlp(64, 64, True, none, 2).seconds.tolist() == [0, 0]
    assert h200.move_rows(none, 16).hbm_bytes.tolist() == [0, 0]


def test_a_profile_file_is_refused_with_all_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    text = DATA.read_text().replace("schema_version: 1", "schema_version: 2")
    path.write_text(text.replace("graph_s: 1.091e-06", "graph_s: -1"))
    with pytest.raises(InputError) as caught:
        read_device(path, "h200-sxm")
    assert caught.value.problems == (
        "schema_version: Input should be 1",
        "launch.graph_s: Input should be greater than or equal to 0",
    )
    with pytest.raises(InputError, match=r"^unknown GPU model: h900"):
        read_device(DATA, "h900")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_calibration_writes_what_the_simulator_reads(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from epplan.runtime.calibrate import QUICK, calibrate, profile_text

    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    path = tmp_path / "device.yaml"
    profile = calibrate(torch.device(kind), QUICK, lambda line: None)
    path.write_text(profile_text(profile))
    read = read_device(path, "cpu-rank")
    table = read.tables.mlp[0]
    assert table.seconds == pytest.approx(profile["mlp"][0]["seconds"])
    again = read.mlp(table.hidden, table.ffn, table.gated, np.array([16.0]), 2).seconds
    assert 0 < again[0] < 1
