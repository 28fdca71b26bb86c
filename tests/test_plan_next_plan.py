"""`epplan rebalance`: from a plan and counts to the next plan and the list of transfers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from epplan.cli import cli
from epplan.errors import EpplanError
from epplan.planner.plan import Plan, read_plan, write_plan
from tests.runtime_cases import MIXTRAL, REFERENCE, make_plan

Counts = np.typing.NDArray[np.int64]


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_counts(path: Path, plan: Plan, seed: int = 0) -> Path:
    """Write counts of two windows, far from even."""
    random = np.random.default_rng(seed)
    shape = (2, plan.model.num_moe_layers, plan.world_size, plan.model.num_experts)
    popularity = random.lognormal(0, 1.5, (1, shape[1], 1, shape[3]))
    counts: Counts = random.poisson(50 * np.broadcast_to(popularity, shape))
    np.savez(path, counts=counts)
    return path


def spacious(plan: Plan, experts: int) -> Plan:
    """Return the plan on GPUs with room for this many experts each."""
    room = experts * plan.model.expert_bytes
    memory = tuple(use.model_copy(update={"capacity": room}) for use in plan.memory)
    return plan.model_copy(update={"memory": memory})


def rebalanced(tmp_path: Path, plan: Plan, *options: str) -> tuple[Plan, dict[str, Any]]:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_plan(old, plan)
    counts = write_counts(tmp_path / "counts.npz", plan)
    said = invoke("rebalance", old, "--counts", counts, "-o", new, "--json", *options)
    return read_plan(new), json.loads(said)


def test_the_transfers_lead_from_the_old_table_to_the_new(tmp_path: Path) -> None:
    old = spacious(make_plan(MIXTRAL, 4, slots_per_rank=2), 99)
    new, said = rebalanced(tmp_path, old)
    tables = [list(map(set, _by_rank(old, layer))) for layer in range(2)]
    for move in said["transfers"]:
        layer = old.model.moe_layers.index(move["layer"])
        assert move["expert"] in _by_rank(old, layer)[move["from_rank"]]
        assert new.ranks[move["to_rank"]].host == move["to_host"]
        tables[layer][move["to_rank"]].add(move["expert"])
    for layer in range(2):
        for rank, held in enumerate(_by_rank(new, layer)):
            assert held <= tables[layer][rank]
            stays = held & _by_rank(old, layer)[rank]
            for expert in stays:
                assert _slot(new, layer, rank, expert) == _slot(old, layer, rank, expert)
    assert said["bytes_moved"] == said["experts_moved"] * old.model.expert_bytes > 0
    pairs = list(zip(said["max_over_mean_before"], said["max_over_mean_after"], strict=True))
    assert all(after <= before for before, after in pairs)
    assert any(after < 0.95 * before for before, after in pairs)


def _by_rank(plan: Plan, layer: int) -> list[set[int]]:
    return [set(plan.experts_of_rank(layer, rank)) for rank in range(plan.world_size)]


def _slot(plan: Plan, layer: int, rank: int, expert: int) -> int:
    return plan.expert_of_slot[layer].index(expert, rank * plan.slots_per_rank)


def test_one_expert_a_gpu_never_moves(tmp_path: Path) -> None:
    """Ranks' loads are the experts': placement cannot even them out."""
    old = spacious(make_plan(REFERENCE, 16), 99)
    new, said = rebalanced(tmp_path, old, "--min-gain", "0")
    assert said["transfers"] == []
    assert new.expert_of_slot == old.expert_of_slot
    assert new.share_of_slot is None


def test_empty_slots_take_replicas_where_memory_allows(tmp_path: Path) -> None:
    bare = make_plan(MIXTRAL, 4, slots_per_rank=3)
    new, said = rebalanced(tmp_path, spacious(bare, 6))
    assert new.share_of_slot is not None
    assert None not in new.expert_of_slot[0]
    assert "8 empty slots may take replicas: they fit into every GPU's memory" in said["notes"]
    for layer in range(2):
        assert sum(new.shares(layer)) == pytest.approx(8)
    assert [use.experts for use in new.memory] == [6 * new.model.expert_bytes] * 4


def test_empty_slots_stay_empty_where_it_does_not(tmp_path: Path) -> None:
    bare = spacious(make_plan(MIXTRAL, 4, slots_per_rank=3), 6)
    tight = bare.memory[2].model_copy(update={"buffers": 1})
    memory = (*bare.memory[:2], tight, bare.memory[3])
    old = bare.model_copy(update={"memory": memory})
    new, said = rebalanced(tmp_path, old)
    assert new.share_of_slot is None
    assert (
        "8 empty slots stay empty: with replicas in them rank 2 would be over its memory"
        in said["notes"]
    )


def test_a_table_beyond_the_memory_is_refused(tmp_path: Path) -> None:
    bare = make_plan(MIXTRAL, 4, slots_per_rank=4)
    old = tmp_path / "old.json"
    held = [sum(len(bare.experts_of_rank(layer, rank)) for layer in range(2)) for rank in range(4)]
    memory = tuple(
        use.model_copy(update={"capacity": count * bare.model.expert_bytes})
        for use, count in zip(bare.memory, held, strict=True)
    )
    write_plan(old, bare.model_copy(update={"memory": memory}))
    counts = write_counts(tmp_path / "counts.npz", bare)
    with pytest.raises(
        EpplanError, match=r"puts \d experts \(.*\) on rank \d, which has"
    ) as caught:
        invoke("rebalance", old, "--counts", counts, "-o", tmp_path / "new.json")
    assert caught.value.exit_code == 3


def test_cost_and_certificate_belong_to_the_new_table(tmp_path: Path) -> None:
    old_path, new_path = tmp_path / "old.json", tmp_path / "new.json"
    invoke(
        *("solve", "--topology", "2x4:h100,nic=4x400Gb/s", "--model", "mixtral-8x7b"),
        *("--experts", "16", "--layers", "2", "--experts-per-gpu", "2", "-o", old_path),
    )
    old = read_plan(old_path)
    counts = write_counts(tmp_path / "counts.npz", old)
    said = json.loads(invoke("rebalance", old_path, "--counts", counts, "-o", new_path, "--json"))
    assert said["notes"][-1] == "priced again on the plan's topology"
    new = read_plan(new_path)
    assert new.certificate.objective_s == pytest.approx(sum(c.total_s for c in new.cost)) != 0
    assert new.certificate.bound_s == 0
    assert new.inputs.traffic.source == str(counts)
    shown = invoke("explain", new_path)
    assert "nothing is proven: made by `epplan rebalance`" in shown
    again = json.loads(invoke("rebalance", new_path, "--counts", counts, "-o", new_path, "--json"))
    assert again["transfers"] == []  # the same traffic has nothing more to gain
    assert len(read_plan(new_path).reasons) == len(new.reasons)


def test_without_the_topology_the_plan_says_that_it_has_no_price(tmp_path: Path) -> None:
    new, said = rebalanced(tmp_path, spacious(make_plan(MIXTRAL, 4, slots_per_rank=2), 99))
    assert said["notes"][-1].startswith("not priced: ")
    assert new.certificate.objective_s == 0
    assert "not priced" in invoke("explain", tmp_path / "new.json")


def test_the_printed_tables(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    write_plan(old, spacious(make_plan(MIXTRAL, 4, slots_per_rank=2), 99))
    counts = write_counts(tmp_path / "counts.npz", read_plan(old))
    said = invoke("rebalance", old, "--counts", counts, "-o", tmp_path / "new.json")
    assert "busiest rank / mean" in said
    assert "from rank" in said
    assert "(node0)" in said


def test_counts_of_another_model_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    write_plan(plan, make_plan(MIXTRAL, 4, slots_per_rank=2))
    counts = write_counts(tmp_path / "counts.npz", make_plan(REFERENCE, 16))
    with pytest.raises(EpplanError) as caught:
        invoke("rebalance", plan, "--counts", counts, "-o", tmp_path / "new.json")
    assert caught.value.exit_code == 2
    assert "16 experts, but model mixtral-tiny has 8" in str(caught.value)
    assert not (tmp_path / "new.json").exists()
