"""What is simulated: GPUs, model, traffic, placement, and how they are used."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.planner.plan import TransferMode
from epplan.planner.token_sets import TokenSets
from epplan.topologies.graph import Gpu
from epplan.topologies.routes import Routes
from epplan.topologies.transfer_cost import TransferCost

from .device import Device
from .transfers import TransferProfile, WireDtype
from .work import Work

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A group of GPUs that runs a model.

    Attributes:
        model: the model.
        gpus: in rank order.
        devices: how each computes.
        routes: between them.
        counts: assignments of one token of every rank, [windows, layers, ranks, experts].
        shares: share of an expert's rows on each rank, by MoE layer, [experts, ranks] each.
        sets: the same tokens with what they choose together, [windows][layers]; None: not known.
        planned: how the plan's rows travel.
        prices: dispatch and combine of layers priced before, for one token a rank.
    """

    model: ModelSpec
    gpus: tuple[Gpu, ...]
    devices: tuple[Device, ...]
    routes: Routes
    counts: Floats
    shares: tuple[Floats, ...]
    sets: tuple[tuple[TokenSets, ...], ...] | None = None
    planned: TransferMode = "per-choice"
    prices: dict[object, tuple[TransferCost, TransferCost]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def island_size(self) -> int:
        """Ranks that the first one reaches without the network, itself included."""
        island = self.routes.island
        return int((island == island[0]).sum())

    @property
    def num_ranks(self) -> int:
        """Number of GPUs."""
        return len(self.gpus)

    @cached_property
    def kinds(self) -> tuple[tuple[Device, Ints], ...]:
        """The different devices with their ranks."""
        ranks: dict[str, list[int]] = {}
        for rank, device in enumerate(self.devices):
            ranks.setdefault(device.gpu.name, []).append(rank)
        return tuple((self.devices[of[0]], np.array(of, dtype=np.intp)) for of in ranks.values())

    def work(self, make: Callable[[Device, Ints], Work]) -> Work:
        """Return work on all ranks, made for the ranks of each kind of device."""
        total = Work.nothing(self.num_ranks)
        for device, ranks in self.kinds:
            total += make(device, ranks).on(ranks, self.num_ranks)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How the GPUs are used.

    Attributes:
        phase: decode makes one token of every sequence, prefill reads whole prompts.
        batch: sequences in the whole group.
        context: positions of a sequence: cached ones in decode, the prompt in prefill.
        micro_batches: parts of a rank's (or pipeline's) sequences that run one after another.
        overlap: transfers of one micro-batch run beside the computing of another.
        naive: experts one after another, launched piece by piece.
        transfer: the library that moves tokens.
        dispatch_dtype: of rows on their way to experts; None is the model's.
        compute_factor: measured over modelled computing, where the same step was measured whole.
    """

    phase: Phase
    batch: int
    context: int
    micro_batches: int = 1
    overlap: bool = True
    naive: bool = False
    transfer: TransferProfile
    dispatch_dtype: WireDtype | None = None
    compute_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is spread: `ep` ranks share its experts, or `tp` x `pp` its layers."""

    ep: int = 0
    tp: int = 1
    pp: int = 1

    @property
    def is_expert_parallel(self) -> bool:
        """Whether experts are spread whole."""
        return self.ep > 0

    @property
    def size(self) -> int:
        """GPUs of one copy of the model."""
        return self.ep or self.tp * self.pp

    def __str__(self) -> str:
        """Return the layout as it is written."""
        return f"ep{self.ep}" if self.ep else f"tp{self.tp}pp{self.pp}"


def parse_layout(text: str) -> Layout:
    """Return `ep16`, `tp8pp2`, `tp8` or `pp4` as a layout.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"ep([0-9]{1,5})|(?:tp([0-9]{1,4}))?(?:pp([0-9]{1,4}))?", text)
    numbers = [int(number) for number in match.groups() if number] if match else []
    if match is None or not numbers or min(numbers) < 1:
        raise InputError(
            f"unknown layout: {text}",
            hints=["ep16 (experts spread over 16 GPUs) or tp8pp2 (8 GPUs a layer, 2 stages)"],
        )
    if match[1]:
        return Layout(ep=int(match[1]))
    return Layout(tp=int(match[2] or 1), pp=int(match[3] or 1))
