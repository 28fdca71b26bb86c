"""Metrics: what Prometheus scrapes, what the file holds, and what the dashboard asks for."""

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
import torch

from epplan.errors import InputError
from epplan.runtime.balancing.metrics import PREFIX, LineLog, Metrics, Progress, served
from epplan.runtime.balancing.monitor import Monitor, Window
from epplan.runtime.balancing.waits import Waits
from tests.runtime_cases import REFERENCE, make_plan

PLAN = make_plan(REFERENCE.with_overrides(layers=2, experts=4), 4)
DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana-dashboard.json"
NOTHING = Progress(
    tokens=0, dropped_rows=0, rebalances=0, moved_experts=0, moved_bytes=0, layers_to_move=0
)
WAITS = Waits(
    seconds={"dispatch": [[0, 0.5, 0, 0], [0, 1, 0, 0]], "combine": [[0, 0, 0.25, 0]] * 2},
    last_share=[0.0, 0.0, 0.25, 0.75],
    straggler=3,
)


def one_window() -> Window:
    monitor = Monitor(window=2)
    counts_LWWP = torch.arange(32).view(2, 4, 4, 1)
    monitor.compare_with(torch.ones(2, 4, 4, dtype=torch.int64))
    assert not monitor.after_step(PLAN, counts_LWWP, 0.5)
    assert monitor.after_step(PLAN, counts_LWWP, 1.5)
    return monitor.close_window(PLAN, WAITS)[0]


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def samples(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix(PREFIX): float(value) for name, value in pairs}


def test_a_scrape_tells_the_window() -> None:
    metrics = Metrics({"model": "tiny"})
    window = one_window()
    with served(metrics, 0) as port:
        metrics.update(window, NOTHING)
        metrics.update(
            window,
            Progress(
                tokens=64,
                dropped_rows=3,
                rebalances=1,
                moved_experts=2,
                moved_bytes=100,
                layers_to_move=1,
            ),
        )
        found = samples(scrape(port))
    assert found['run_info{model="tiny"}'] == 1
    assert found["steps_total"] == 4
    assert found["step_seconds_count"] == 4
    assert found["step_seconds_sum"] == 4.0
    assert found["tokens_total"] == 64
    assert found["dropped_rows_total"] == 3
    assert found["moved_bytes_total"] == 100
    assert found["layers_to_move"] == 1
    for ordinal, balance in enumerate(window.load.balance):
        label = f'{{layer="{balance.layer}"}}'
        assert found[f"layer_rank_rows_max_over_mean{label}"] == balance.max_over_mean
        assert found[f"layer_rank_rows_jain{label}"] == balance.jain
        assert found[f"layer_cross_host_share{label}"] == balance.cross_host_share
        assert found[f"layer_drift{label}"] == window.drift[ordinal]
    rows = torch.arange(32).view(2, 4, 4).sum((0, 1)) * 2 * 2  # two steps, two windows
    for rank in range(4):
        assert found[f'rank_rows_total{{rank="{rank}"}}'] == rows[rank]
    assert found['rank_wait_seconds_total{rank="1",stage="dispatch"}'] == 3.0
    assert found['rank_last_share{rank="3"}'] == 0.75
    assert found["straggler_rank"] == 3


def test_labels_never_count_experts() -> None:
    """A thousand experts make no series more than four."""

    def num_series(experts: int, slots_per_rank: int) -> int:
        plan = make_plan(
            REFERENCE.with_overrides(layers=2, experts=experts), 4, slots_per_rank=slots_per_rank
        )
        monitor = Monitor(window=1)
        monitor.after_step(plan, torch.ones(2, 4, 4, slots_per_rank, dtype=torch.int64), 1.0)
        metrics = Metrics({})
        with served(metrics, 0) as port:
            metrics.update(monitor.close_window(plan, WAITS)[0], NOTHING)
            return len(samples(scrape(port)))

    assert num_series(4, 1) == num_series(1000, 250)


def test_a_taken_port_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"--metrics-port {port} cannot be listened on: "),
            served(Metrics({}), port),
        ):
            pass


def test_the_port_is_free_afterwards() -> None:
    with served(Metrics({}), 0) as port:
        pass
    with served(Metrics({}), port) as again:
        assert again == port


def test_every_metric_of_the_dashboard_exists() -> None:
    metrics = Metrics({"model": "tiny"})
    metrics.update(one_window(), NOTHING)
    with served(metrics, 0) as port:
        known = {re.split(r"[{ ]", name)[0] for name in samples(scrape(port))}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = set(re.findall(rf"{PREFIX}(\w+)", json.dumps(dashboard)))
    assert asked - {"runtime"} <= known
    parts = {"run_info", "step_seconds_count", "step_seconds_sum"}
    unseen = {name for name in known - asked - parts if not name.endswith("_created")}
    assert not unseen, "metrics that nobody looks at"
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in dashboard["panels"]:
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_a_line_per_window(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    window = one_window()
    for _ in range(2):  # continued, not overwritten
        log = LineLog(path)
        log.write(window, NOTHING)
        log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["step"] == 2
    assert lines[0]["steps"] == 2
    assert lines[0]["seconds"] == 2.0
    assert lines[0]["straggler"] == 3
    layer = lines[0]["layers"][1]
    assert layer["layer"] == 1
    assert sum(layer["expert_rows"]) == sum(layer["rank_rows"]) == sum(range(16, 32)) * 2
    assert layer["dispatch_wait_s"] == [0, 1, 0, 0]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "metrics.jsonl"
    with pytest.raises(InputError) as caught:
        LineLog(path)
    assert str(caught.value) == f"--metrics {path} cannot be written: No such file or directory"
