"""What arrives keeps its memory until the computation that reads it has been waited for.

On a GPU a channel would otherwise write the next rows over those still to be read. Nothing is
overwritten on a CPU, but what is dropped too early is dropped there too.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from epplan.planner.plan import Plan, TransferMode
from epplan.runtime.build import build_model
from epplan.runtime.dispatchers.channel import Arriving, Channel
from epplan.runtime.options import Options
from epplan.runtime.pipeline import GPU_TURNS
from epplan.runtime.schedule import choose
from epplan.runtime.weights import SeededWeights, seeded_hidden
from tests.fork_ranks import run_ranks
from tests.runtime_cases import QWEN, make_plan

RANKS = 4
OPTIONS = Options(backend="gloo", sequences=4, sequence_length=6, steps=1, seed=0, verify=False)


def dropped_too_early(rank: int, plan: Plan, options: Options) -> tuple[int, list[str]]:
    """Run a step as on a GPU; returns exchanges, and those whose rows were dropped unreleased."""
    device = torch.device("cpu")
    dropped: list[str] = []
    arrived: dict[Channel, list[tuple[StorageWeakRef, str]]] = defaultdict(list)
    exchanges = 0
    exchange, release = Channel.exchange, Channel.release

    def watched_exchange(channel: Channel, *args: Any, name: str, **kwargs: Any) -> Arriving:
        nonlocal exchanges
        exchanges += 1
        for rows, old in arrived[channel]:
            if rows.expired():  # type: ignore[no-untyped-call]
                dropped.append(f"{old} before {name}")
        arriving = exchange(channel, *args, name=name, **kwargs)
        storage = StorageWeakRef(arriving.rows.untyped_storage())  # type: ignore[no-untyped-call]
        arrived[channel].append((storage, name))
        return arriving

    def watched_release(channel: Channel) -> None:
        arrived[channel].clear()
        release(channel)

    choice = choose(plan, options, device)
    choice = replace(choice, schedule=replace(choice.schedule, turns=GPU_TURNS))
    weights = SeededWeights(spec=plan.model, seed=0, device=device, dtype=torch.float32)
    shape = (options.sequences, options.positions, plan.model.hidden_size)
    x_BSH = seeded_hidden(0, rank, shape, device=device, dtype=torch.float32)
    with (
        patch.object(Channel, "exchange", watched_exchange),
        patch.object(Channel, "release", watched_release),
    ):
        build_model(plan, options, choice, weights, rank).forward(x_BSH)
    return exchanges, dropped


@pytest.mark.parametrize(
    ("dispatcher", "transfer", "hops"),
    [
        ("alltoall", None, 2),
        ("alltoall", "direct", 3),
        ("alltoall", "node-dedup", 6),
        ("padded", None, 2),
    ],
)
def test_rows_are_held_until_released(
    dispatcher: str, transfer: TransferMode | None, hops: int
) -> None:
    plan = make_plan(QWEN, RANKS, slots_per_rank=4)
    options = replace(OPTIONS, dispatcher=dispatcher, transfer=transfer, micro_batches=2)
    for exchanges, dropped in run_ranks(dropped_too_early, RANKS, plan, options):
        assert (exchanges, dropped) == (2 * hops * QWEN.num_layers, [])
