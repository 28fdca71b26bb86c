"""The plan file: read back whole, and refused when truncated, edited or inconsistent."""

import json
import re
from pathlib import Path

import pytest
import yaml

from epplan.errors import InputError
from epplan.planner.plan import Plan, content_hash, plan_problems, read_plan, write_plan
from tests.plans import bare_plan
from tests.tiny import tiny_model, tiny_plan


@pytest.fixture
def plan() -> Plan:
    return tiny_plan()


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", plan)
    return tmp_path / "plan.json"


def test_round_trip(plan: Plan, path: Path) -> None:
    assert read_plan(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]  # no temporary file


def test_yaml_is_accepted(plan: Plan, path: Path) -> None:
    path.write_text(yaml.safe_dump(json.loads(path.read_text())))
    assert read_plan(path) == plan


def test_layout_is_readable_and_ends_in_the_hash(plan: Plan, path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[-2] == f'"sha256": "{plan.sha256()}"'
    assert max(map(len, lines)) < 2000


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_truncated(path: Path, share: float) -> None:
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(InputError, match=r"plan .*plan.json is (truncated|not valid JSON) at line"):
        read_plan(path)


def edit(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def rehash(path: Path) -> None:
    document = json.loads(path.read_text())
    document.pop("sha256")
    edit(path, sha256=content_hash(document))


def test_edited(path: Path) -> None:
    slots = json.loads(path.read_text())["expert_of_slot"]
    slots[0][0], slots[0][1] = slots[0][1], slots[0][0]
    edit(path, expert_of_slot=slots)
    with pytest.raises(InputError, match="was changed after it was made: its sha256 says"):
        read_plan(path)


def test_all_inconsistencies_at_once(path: Path) -> None:
    document = json.loads(path.read_text())
    slots, ranks = document["expert_of_slot"], document["ranks"]
    slots[0][0] = slots[0][1]
    slots[1] = slots[1][:-1]
    ranks[1]["rank"] = 7
    ranks[1]["island"] = 5
    ranks[-1]["host"] = ranks[0]["host"]
    ranks[-1]["gpu_index"] = ranks[0]["gpu_index"]
    edit(path, expert_of_slot=slots, ranks=ranks)
    rehash(path)
    with pytest.raises(InputError) as caught:
        read_plan(path)
    text = "\n".join(caught.value.problems)
    for part in (
        "ranks must be numbered 0..",
        "returns to host",
        "are on islands [0, 5]; a host is on one",
        "has 2 ranks; a GPU has exactly one",
        "layer 0 has no slot for experts",
        "layer 0 places experts",
        "layer 1 has",
    ):
        assert part in text


def test_unknown_fields_and_wrong_types_are_named(path: Path) -> None:
    edit(path, colour="red", slots_per_rank="many")
    with pytest.raises(InputError) as caught:
        read_plan(path)
    assert any(problem.startswith("colour: Extra inputs") for problem in caught.value.problems)
    assert any(problem.startswith("slots_per_rank: ") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no epplan plan: it has no schema_version"),
        ('{"schema_version": 9}', "has schema_version 9; this epplan reads 2"),
        ("", "is no epplan plan"),
        ("a: [", "is not valid YAML at line 1"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_plan(path)


def test_missing_and_binary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan not found: .*nothing.json"):
        read_plan(tmp_path / "nothing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text: byte 0 is not UTF-8"):
        read_plan(tmp_path / "binary")


def test_slot_table_gives_ranks_and_back(plan: Plan) -> None:
    assert plan_problems(plan) == []
    for layer in range(plan.model.num_moe_layers):
        for expert, (slot,) in enumerate(plan.slots_of_expert(layer)):
            assert expert in plan.experts_of_rank(layer, slot // plan.slots_per_rank)


TWO_LAYERS = ((0, 1, 2, 3, 0, None), (0, 1, 2, 3, None, 3))
SHARES = ((0.25, 1.0, 1.0, 1.0, 0.75, 0.0), (1.0, 1.0, 1.0, 0.5, 0.0, 0.5))


def replicated(**changes: object) -> Plan:
    gpus = [("a", 0), ("a", 1), ("b", 0)]
    return bare_plan(tiny_model(4, layers=2), gpus, TWO_LAYERS, SHARES).model_copy(update=changes)


def test_replicas_and_their_shares(tmp_path: Path) -> None:
    plan = replicated()
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.slots_of_expert(0) == [[0, 4], [1], [2], [3]]
    assert plan.shares(0) == SHARES[0]


def test_one_copy_each_has_shares_of_one() -> None:
    plan = replicated(
        share_of_slot=None, expert_of_slot=((0, 1, 2, 3, None, None), (0, None, 1, 2, 3, None))
    )
    assert plan_problems(plan) == []
    assert plan.shares(1) == (1.0, 0.0, 1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"share_of_slot": None}, "layer 0 places experts [0] more than once, without share"),
        ({"share_of_slot": SHARES[:1]}, "share_of_slot has not the shape of expert_of_slot"),
        (
            {"share_of_slot": ((0.5, *SHARES[0][1:]), SHARES[1])},
            "layer 0 gives the slots of expert 0 shares that add up to 1.25",
        ),
        (
            {"share_of_slot": ((*SHARES[0][:5], 0.1), SHARES[1])},
            "layer 0 gives slot 5 (empty) the share 0.1",
        ),
        (
            {"expert_of_slot": ((0, 0, 2, 3, 1, None), TWO_LAYERS[1])},
            "layer 0 places expert 0 2 times on rank 0",
        ),
    ],
)
def test_wrong_replicas(changes: dict[str, object], problem: str) -> None:
    assert any(found.startswith(problem) for found in plan_problems(replicated(**changes)))
