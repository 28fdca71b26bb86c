"""Moving experts while running: what arrives, in which rounds, and what the model computes."""

import random
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.model import ModelSpec
from epplan.planner.moves.slot_transfers import Transfer, layer_transfers
from epplan.planner.plan import Plan
from epplan.runtime.balancing import migrate
from epplan.runtime.balancing.migrate import (
    Experts,
    Migration,
    Moved,
    empty_like,
    schedule,
    with_layer_of,
)
from epplan.runtime.layer.experts import MlpWeights, fingerprint
from epplan.runtime.weights import SeededWeights
from tests.fork_ranks import RankError, run_ranks
from tests.plans import bare_plan
from tests.runtime_cases import MIXTRAL, REFERENCE, make_plan

CHUNK_BYTES = 1000  # an expert of MIXTRAL has 3 x 32 x 48 x 4 bytes


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[Transfer], int]:
    """Return the transfers between two random tables, and slots per rank."""
    ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    experts = draw(st.integers(1, ranks * per_rank))
    generator = random.Random(seed)
    tables = [_random_slots(generator, experts, ranks, per_rank) for _ in range(2)]
    hosts = [f"h{rank // 2}" for rank in range(ranks)]
    return layer_transfers(0, tables[0], tables[1], per_rank, hosts), per_rank


def _random_slots(
    generator: random.Random, experts: int, ranks: int, per_rank: int
) -> list[int | None]:
    """Return every expert once, in random slots, and copies in some of the others."""
    slots: list[int | None] = [*range(experts), *[None] * (ranks * per_rank - experts)]
    generator.shuffle(slots)
    for slot in range(len(slots)):
        first = slot // per_rank * per_rank
        extra = generator.randrange(experts)
        if slots[slot] is None and extra not in slots[first : first + per_rank]:
            slots[slot] = generator.choice([None, extra])
    return slots


@settings(max_examples=200, deadline=None)
@given(moves(), st.integers(1, 4))
def test_no_rank_sends_or_receives_two_chunks_at_a_time(
    case: tuple[list[Transfer], int], num_chunks: int
) -> None:
    transfers, per_rank = case
    rounds = schedule(transfers, num_chunks, per_rank)
    pieces = [(piece.transfer, piece.chunk) for pieces in rounds for piece in pieces]
    assert Counter(pieces) == Counter(
        (transfer, chunk) for transfer in transfers for chunk in range(num_chunks)
    )
    for transfer in transfers:  # chunks in order: the fingerprint is the last
        assert [chunk for at, chunk in pieces if at == transfer] == list(range(num_chunks))
    for pieces_of_round in rounds:
        for slot in ("source_slot", "target_slot"):
            ranks = [getattr(piece.transfer, slot) // per_rank for piece in pieces_of_round]
            assert len(set(ranks)) == len(ranks)


class Recorder:
    """A rank's experts of all layers, and what happens to them, in order."""

    def __init__(self, plan: Plan, new: Plan, rank: int) -> None:
        self.weights = SeededWeights(
            spec=plan.model, seed=0, device=torch.device("cpu"), dtype=torch.float32
        )
        self.plan, self.rank = plan, rank
        self.layers: list[Experts] = [
            self._held(plan, layer) for layer in range(plan.model.num_moe_layers)
        ]
        self.events: list[str] = []
        self.migration = Migration(
            plan,
            new,
            rank,
            experts_of=lambda layer: self.layers[layer],
            empty_expert=self._empty,
            install=self._install,
            chunk_bytes=CHUNK_BYTES,
        )

    def _held(self, plan: Plan, layer: int) -> Experts:
        first = self.rank * plan.slots_per_rank
        number = plan.model.moe_layers[layer]
        slots = plan.expert_of_slot[layer][first : first + plan.slots_per_rank]
        return tuple(None if e is None else self.weights.expert(number, e) for e in slots)

    def _empty(self) -> MlpWeights:
        return empty_like(self.weights.expert(self.plan.model.moe_layers[0], 0))

    def _install(self, plan: Plan, layer: int, experts: Experts) -> None:
        self.events.append(f"layer {layer} changes")
        self.plan, self.layers[layer] = plan, experts

    def assert_holds(self, plan: Plan) -> None:
        for layer, held in enumerate(self.layers):
            for expert, expected in zip(held, self._held(plan, layer), strict=True):
                if expected is None:
                    assert expert is None
                    continue
                assert expert is not None
                assert torch.equal(expert.up_FH, expected.up_FH)
                assert torch.equal(expert.down_HF, expected.down_HF)


def two_plans(model: ModelSpec, ranks: int, per_rank: int, seed: int) -> tuple[Plan, Plan]:
    generator = random.Random(seed)
    gpus = [(f"node{rank * 2 // ranks}", rank) for rank in range(ranks)]
    plans = []
    for _ in range(2):
        tables = [
            _random_slots(generator, model.num_experts, ranks, per_rank) for _ in model.moe_layers
        ]
        copies = [Counter(table) for table in tables]
        shares = [
            [0.0 if e is None else 1 / count[e] for e in table]
            for table, count in zip(tables, copies, strict=True)
        ]
        plans.append(bare_plan(model, gpus, tables, shares))
    return plans[0], plans[1]


def move_everything(rank: int, ranks: int, per_rank: int, seed: int) -> Moved:
    old, new = two_plans(MIXTRAL, ranks, per_rank, seed)
    recorder = Recorder(old, new, rank)
    layers, steps = len(old.expert_of_slot), 0
    while not recorder.migration.between_steps():
        steps += 1
        assert steps < 1000
        for _ in range(layers):
            recorder.migration.between_layers()
            dist.all_reduce(torch.ones(1))  # the model's own collectives go on meanwhile
    recorder.assert_holds(new)
    assert recorder.plan.expert_of_slot == new.expert_of_slot
    assert all(recorder.plan.shares(layer) == new.shares(layer) for layer in range(layers))
    return recorder.migration.moved


@pytest.mark.parametrize(("ranks", "per_rank"), [(4, 2), (4, 3), (16, 1)])
def test_every_expert_arrives_bit_by_bit(ranks: int, per_rank: int) -> None:
    old, new = two_plans(MIXTRAL, ranks, per_rank, 1)
    hosts = [rank.host for rank in old.ranks]
    transfers = [
        transfer
        for layer in range(2)
        for transfer in layer_transfers(
            layer, old.expert_of_slot[layer], new.expert_of_slot[layer], per_rank, hosts
        )
    ]
    assert transfers
    moved = Moved(experts=len(transfers), bytes=len(transfers) * 3 * 32 * 48 * 4, layers=2)
    assert run_ranks(move_everything, ranks, ranks, per_rank, 1) == [moved] * ranks


def record_events(rank: int, old: Plan, new: Plan) -> list[str]:
    """Return what one rank does, in order, in a model of three layers a step."""
    recorder = Recorder(old, new, rank)
    batch = dist.batch_isend_irecv

    def recorded(operations: list[Any]) -> Any:
        recorder.events += [
            f"{'send' if operation.op is dist.isend else 'receive'} {operation.tensor.nbytes}"
            for operation in operations
        ]
        return batch(operations)

    with patch.object(dist, "batch_isend_irecv", recorded):
        for step in range(20):
            for _ in range(3):
                recorder.events.append("layer")
                recorder.migration.between_layers()
            recorder.events.append(f"step {step}")
            if recorder.migration.between_steps():
                break
    return recorder.events


def test_a_chunk_per_layer_and_tables_change_between_steps() -> None:
    """Ranks 0 and 1 exchange their experts of layer 0; ranks 2 and 3 have nothing to do."""
    spec = REFERENCE.with_overrides(layers=2, experts=4)
    old = make_plan(spec, 4).model_copy(update={"expert_of_slot": ((0, 1, 2, 3),) * 2})
    new = old.model_copy(update={"expert_of_slot": ((1, 0, 2, 3), (0, 1, 2, 3))})
    events = run_ranks(record_events, 4, old, new)
    expert_bytes, chunks = 2 * 32 * 64 * 4, [1000] * 8 + [192]
    sizes = [*chunks, *chunks, 8]  # two matrices, then the fingerprint
    assert sum(sizes) - 8 == expert_bytes
    for rank in (0, 1):
        own = events[rank]
        sent = [int(event.split()[1]) for event in own if event.startswith("send")]
        assert sent == sizes
        at_layers = [index for index, event in enumerate(own) if event == "layer"]
        for begin, end in zip(at_layers, [*at_layers[1:], len(own)], strict=True):
            within = [event.split()[0] for event in own[begin:end]]
            assert within.count("send") <= 1
            assert within.count("receive") <= 1
    rounds = len(sizes)
    steps = -(-rounds // 3)
    for own in events:  # all at the same step, those without transfers too
        assert own[-2:] == [f"step {steps - 1}", "layer 0 changes"]
        assert own.count("layer") == 3 * steps


def share_only(rank: int) -> int:
    gpus = [("a", 0), ("a", 1)]
    spec = REFERENCE.with_overrides(layers=1, experts=3)
    old = bare_plan(spec, gpus, [(0, 1, 0, 2)], [(0.5, 1, 0.5, 1)])
    new = bare_plan(spec, gpus, [(0, 1, 0, 2)], [(0.2, 1, 0.8, 1)])
    recorder = Recorder(old, new, rank)
    assert recorder.migration.between_steps()
    assert recorder.plan.shares(0) == (0.2, 1, 0.8, 1)
    return recorder.migration.moved.bytes


def test_other_shares_alone_move_nothing() -> None:
    assert run_ranks(share_only, 2) == [0, 0]


def test_a_table_between_two_is_a_sound_plan() -> None:
    old, new = two_plans(MIXTRAL, 4, 3, 5)
    between = with_layer_of(old, new, 1)
    assert between.expert_of_slot == (old.expert_of_slot[0], new.expert_of_slot[1])
    assert between.shares(0) == old.shares(0)
    assert between.shares(1) == new.shares(1)


def damage(rank: int) -> None:
    old = make_plan(REFERENCE.with_overrides(layers=1, experts=2), 2)
    new = old.model_copy(update={"expert_of_slot": (old.expert_of_slot[0][::-1],)})
    recorder = Recorder(old, new, rank)
    wrong = 1 if rank == 0 else 0
    with patch.object(migrate, "fingerprint", lambda expert: fingerprint(expert) + wrong):
        while not recorder.migration.between_steps():
            recorder.migration.between_layers()


def test_a_damaged_expert_is_an_error_that_names_it() -> None:
    with pytest.raises(RankError, match=r"expert \d of layer 0 arrived damaged at rank \d"):
        run_ranks(damage, 2)
