"""Turns of micro-batches, what is chosen for which size, and the trace."""

import json
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epplan.errors import InputError
from epplan.planner.model import load_model
from epplan.planner.plan import Plan, RankMemory, TransferMode
from epplan.runtime.dispatchers.dispatch import DispatcherKind
from epplan.runtime.environment import Setting
from epplan.runtime.measure import run_rank
from epplan.runtime.options import Options
from epplan.runtime.pipeline import CPU_TURNS, GPU_TURNS, Point, Schedule, Turns, take_turns
from epplan.runtime.schedule import (
    Workload,
    choose_dispatcher,
    choose_schedule,
    choose_transfer,
    islands_of,
)
from tests.fork_ranks import run_ranks
from tests.plans import bare_plan
from tests.runtime_cases import MIXTRAL, REFERENCE, make_plan

POINTS: list[Point] = ["attended", "counted", "sent", "computed", "returned"]


def run_turns(number: int, in_flight: int, turns: Turns) -> tuple[list[str], list[int]]:
    """Return the order in which two layers of `number` micro-batches run, and the outcomes."""
    log: list[str] = []

    def batch(name: str) -> Generator[Point, None, int]:
        for layer in "01":
            for point in POINTS:
                log.append(name + layer + point[:2])
                yield point
        log.append(name + "end")
        return ord(name)

    schedule = Schedule(micro_batches=number, in_flight=in_flight, turns=turns, reason="test")
    return log, take_turns((batch(name) for name in "ABCD"[:number]), schedule)


def test_alone_is_a_plain_loop() -> None:
    log, outcomes = run_turns(1, 1, (frozenset(POINTS),))
    points = ["at", "co", "se", "co", "re"]
    assert log == [*(f"A0{point}" for point in points), *(f"A1{point}" for point in points), "Aend"]
    assert outcomes == [ord("A")]


def test_turns_with_gloo() -> None:
    """Rows of one micro-batch travel while the other computes."""
    log, outcomes = run_turns(2, 2, CPU_TURNS)
    assert [entry for entry in log if entry[2:] in ("se", "re", "d")] == [
        *["A0se", "B0se", "A0re", "B0re", "A1se", "B1se", "A1re", "B1re"],
    ]
    assert outcomes == [ord("A"), ord("B")]


def test_the_next_begins_where_one_ends() -> None:
    log, outcomes = run_turns(3, 2, (frozenset({"returned"}),))
    assert [entry for entry in log if entry[1:] == "end" or entry[2:] == "at"] == [
        *["A0at", "B0at", "A1at", "B1at", "Aend", "C0at", "Bend", "C1at", "Cend"],
    ]
    assert outcomes == [ord(name) for name in "ABC"]


@dataclass
class Queues:
    """What a host puts into the two queues of a GPU, and what it waits for meanwhile."""

    computation: list[str] = field(default_factory=list)
    transfers: list[str] = field(default_factory=list)
    read: list[tuple[str, list[str]]] = field(default_factory=list)  # counts, still queued behind

    def micro_batch(self, name: str, layers: int) -> Generator[Point, None, None]:
        """Queue what the model does, point by point."""
        for layer in range(layers):
            self.computation.append(f"attention{name}{layer}")
            yield "attended"
            self.transfers.append(f"counts{name}{layer}")
            yield "counted"
            at = self.computation.index(f"attention{name}{layer}")
            self.read.append((f"{name}{layer}", self.computation[at + 1 :]))
            self.transfers.append(f"rows{name}{layer}")
            yield "sent"
            self.computation.append(f"experts{name}{layer}")
            yield "computed"
            self.transfers.append(f"outputs{name}{layer}")
            yield "returned"


def test_no_transfer_on_a_gpu_stands_behind_what_it_should_hide_under() -> None:
    queues = Queues()
    schedule = Schedule(micro_batches=4, in_flight=2, turns=GPU_TURNS, reason="test")
    take_turns((queues.micro_batch(name, layers=2) for name in "ABCD"), schedule)
    expected = [
        *["countsA0", "rowsA0", "countsB0", "rowsB0", "outputsA0", "outputsB0"],
        *["countsA1", "rowsA1", "countsB1", "rowsB1", "outputsA1", "outputsB1"],
    ]
    assert queues.transfers[:12] == expected
    assert queues.transfers[12:] == [
        entry.translate(str.maketrans("AB", "CD")) for entry in expected
    ]
    assert queues.computation[:4] == ["attentionA0", "attentionB0", "expertsA0", "expertsB0"]
    # The host never waits for counts with nothing queued behind them.
    assert all(queued for _, queued in queues.read)


OPTIONS = Options(
    backend="gloo",
    sequences=2,
    sequence_length=48,
    steps=1,
    seed=0,
    verify=True,
    dispatcher="alltoall",
    micro_batches=2,
)
SETTING = Setting(
    backend="gloo",
    backend_reason="test",
    device=torch.device("cpu"),
    dtype=torch.float32,
    notes=(),
)


def run(rank: int, plan: Plan, options: Options) -> object:
    return run_rank(plan, options, SETTING, rank)


def events_of(trace: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if (event["pid"], event["ph"]) == (rank, "X")]


def find(events: list[dict[str, Any]], name: str, layer: int, **where: int) -> dict[str, Any]:
    place = {"layer": layer, "micro_batch": where["batch"]}
    found = [event for event in events if event["cat"] == name and event["args"] == place]
    return [event for event in found if event["tid"] == where["tid"]][-1]


def test_trace_shows_attention_under_transfers(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    plan = make_plan(REFERENCE, 16)
    run_ranks(run, 16, plan, replace(OPTIONS, trace=path))
    trace = json.loads(path.read_text())
    names = {
        (event["pid"], event.get("tid")): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] in ("process_name", "thread_name")
    }
    for rank in range(16):
        assert names[rank, None] == f"rank {rank}: {plan.ranks[rank].host}, GPU {rank}"
        assert (names[rank, 0], names[rank, 1]) == ("compute", "communication")
        events = events_of(trace, rank)
        for layer in range(4):
            # Order by what was begun and ended when, never by how long it took.
            sent = find(events, "dispatch", layer, batch=0, tid=1)
            attention = find(events, "attention", layer, batch=1, tid=0)
            taken = find(events, "dispatch", layer, batch=0, tid=0)
            end = attention["ts"] + attention["dur"]
            assert sent["ts"] <= attention["ts"] <= end <= taken["ts"] + taken["dur"]
            experts = find(events, "experts", layer, batch=0, tid=0)
            other = find(events, "dispatch", layer, batch=1, tid=1)
            assert other["ts"] <= experts["ts"] + experts["dur"]
            if layer < 3:
                back = find(events, "combine", layer, batch=1, tid=1)
                following = find(events, "attention", layer + 1, batch=0, tid=0)
                assert back["ts"] <= following["ts"] + following["dur"]


def reference_plan(*, free_gib: float = 60) -> Plan:
    spec = load_model("reference")
    plan = bare_plan(
        spec,
        [("a" if rank < 8 else "b", rank % 8) for rank in range(16)],
        [list(range(16))] * spec.num_moe_layers,
    )
    memory = tuple(
        RankMemory(
            rank=rank,
            experts=4 << 30,
            replicated=2 << 30,
            kv_cache=1 << 30,
            buffers=0,
            capacity=int((free_gib + 7) / 0.9 * 2**30),
        )
        for rank in range(16)
    )
    return plan.model_copy(update={"memory": memory})


def workload(sequences: int, positions: int, device_type: str = "cuda") -> Workload:
    return Workload(sequences=sequences, positions=positions, device_type=device_type)


@pytest.mark.parametrize(
    ("sequences", "positions", "number", "reason"),
    [
        (64, 1, 1, "decode step, 64 rows an expert: parts would take longer than transfers"),
        (2048, 1, 1, "decode step, 3.3e12 operations a layer: the host would take longer"),
        (4, 400, 1, "prefill step, 2.6e12 operations a layer: the host would take longer"),
        (8192, 1, 2, "decode step, 8192 rows an expert: one computes under the transfers"),
        (2, 4000, 2, "prefill step, 8000 rows an expert: one computes under the transfers"),
        (1, 10_000, 1, "a single sequence is not split"),
        (64, 10_000, 64, "activations of 2 at a time must fit into memory"),
    ],
)
def test_micro_batches_by_size(sequences: int, positions: int, number: int, reason: str) -> None:
    plan = reference_plan(free_gib=20)
    schedule = choose_schedule(None, plan, workload(sequences, positions), "alltoall")
    assert schedule.micro_batches == number
    assert schedule.reason.startswith(reason)
    assert schedule.in_flight == min(2, number)
    assert schedule.turns == GPU_TURNS


def test_micro_batches_elsewhere() -> None:
    plan = reference_plan()
    cpu = choose_schedule(None, plan, workload(64, 10_000, "cpu"), "alltoall")
    assert cpu.micro_batches == 1
    assert cpu.turns == CPU_TURNS
    assert cpu.reason == "on a CPU transfers and computation share the cores"
    local = choose_schedule(None, plan, workload(4, 1000), "local")
    assert (local.micro_batches, local.reason) == (1, "no transfers to hide")
    asked = choose_schedule(3, plan, workload(1, 1), "alltoall")
    assert (asked.micro_batches, asked.in_flight, asked.reason) == (3, 2, "asked for")


def test_dispatchers_by_size() -> None:
    plan = reference_plan()

    def chosen(size: Workload, transfer: TransferMode | None = None) -> tuple[str, str]:
        return choose_dispatcher("auto", plan, size, "share", transfer=transfer)

    assert chosen(workload(16, 1)) == (
        "padded",
        "short step: 1.5 MiB of padding cost less than waiting for counts",
    )
    assert chosen(workload(4, 64))[0] == "padded"
    assert chosen(workload(4, 100))[0] == "alltoall"  # experts would compute the padding
    assert chosen(workload(16, 1), "direct")[0] == "alltoall"
    assert chosen(workload(16, 1, "cpu"))[0] == "alltoall"
    assert chosen(workload(16, 1000)) == ("alltoall", "rows travel without padding")

    def of_a_graph(sequences: int) -> tuple[str, str]:
        size = workload(sequences, 1)
        return choose_dispatcher("auto", plan, size, "share", transfer=None, graph=True)

    assert of_a_graph(512) == (
        "padded",
        "short step: 8.5 MiB of padding cost less than starting kernels one by one",
    )
    assert of_a_graph(1024)[0] == "alltoall"  # its experts take longer than the host


@pytest.mark.parametrize(
    ("planned", "asked", "dispatcher", "transfer", "note"),
    [
        ("per-choice", None, "alltoall", "per-choice", None),
        ("per-choice", "direct", "alltoall", "direct", None),
        ("direct", None, "local", "per-choice", None),
        (
            "direct",
            None,
            "alltoall",
            "direct",
            "rows go once to a rank, as the plan prices them (direct)",
        ),
        (
            "direct",
            "per-choice",
            "alltoall",
            "per-choice",
            "the plan prices transfer direct, which was not taken: rows go once per choice",
        ),
        (
            "direct",
            None,
            "padded",
            "per-choice",
            "the plan prices transfer direct, which is nothing dispatcher padded can do: rows go "
            "once per choice",
        ),
        (
            "node-dedup",
            None,
            "alltoall",
            "node-dedup",
            "rows go once to a host, and on from there, as the plan prices them (node-dedup)",
        ),
        (
            "node-dedup",
            "direct",
            "alltoall",
            "direct",
            "the plan prices transfer node-dedup, which was not taken: rows go once to a rank",
        ),
    ],
)
def test_rows_travel_as_the_plan_prices_them(
    planned: TransferMode,
    asked: TransferMode | None,
    dispatcher: DispatcherKind,
    transfer: TransferMode,
    note: str | None,
) -> None:
    plan = planned_for(make_plan(MIXTRAL, 4, slots_per_rank=2), planned)
    assert choose_transfer(asked, plan, dispatcher) == (transfer, note)


def test_the_plainest_way_of_the_same_rows_is_taken() -> None:
    one_expert_a_rank = planned_for(reference_plan(), "direct")
    assert choose_transfer(None, one_expert_a_rank, "alltoall") == ("per-choice", None)
    one_host = planned_for(make_plan(MIXTRAL, 4, slots_per_rank=2, num_hosts=1), "node-dedup")
    assert choose_transfer(None, one_host, "alltoall") == (
        "direct",
        "rows go once to a rank, as the plan prices them (node-dedup)",
    )


def test_rows_go_once_to_an_nvlink_domain_over_hosts() -> None:
    def plan(hosts_an_island: int) -> Plan:
        gpus = make_plan(MIXTRAL, 4, slots_per_rank=2, num_hosts=4, hosts_an_island=hosts_an_island)
        return planned_for(gpus, "node-dedup")

    assert islands_of(plan(2)).tolist() == [0, 0, 1, 1]
    assert choose_transfer(None, plan(2), "alltoall") == (
        "node-dedup",
        "rows go once to an NVLink domain, and on from there, as the plan prices them (node-dedup)",
    )
    assert choose_transfer(None, plan(4), "alltoall")[0] == "direct"  # there is no network


def planned_for(plan: Plan, transfer: TransferMode) -> Plan:
    workload = plan.workload.model_copy(update={"transfer": transfer})
    return plan.model_copy(update={"workload": workload})


def test_dispatchers_that_cannot_run_the_plan() -> None:
    plan = make_plan(MIXTRAL, 8)
    with pytest.raises(InputError) as local:
        choose_dispatcher("local", plan, workload(1, 1), "share", transfer=None)
    assert str(local.value) == (
        "dispatcher local moves no rows, and the plan's experts are spread over 8 ranks\n"
        "remedies:\n"
        "  1. take --dispatcher auto\n"
        "  2. or a plan with every expert on every rank, and --replicas nearest"
    )
    with pytest.raises(InputError) as padded:
        choose_dispatcher("padded", plan, workload(1, 1), "share", transfer="direct")
    assert str(padded.value) == (
        "--transfer direct sends a row less often than it is chosen, which dispatcher padded "
        "cannot do\n"
        "hint: take --dispatcher alltoall"
    )
