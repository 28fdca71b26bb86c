"""Transfer profiles: how a communication library moves a layer's tokens over the evaluator's links.

A profile says what is sent (`copies`, bytes a row), what a link gives the library, and what a
transfer costs beside bytes. Seconds come from `topologies.transfer_cost` alone:

    t = max(floor, start + max over resources of bytes / capacity)

A link's capacity is rated x the library's efficiency on that kind of link. A kernel that copies
with n SMs cannot fill a link with few of them: a remote row costs an SM `row_s + bytes / rate`, and
a port then carries (port^-4 + SMs^-4)^(-1/4), which is the smaller of both except where they meet.
Between nodes only some of the SMs forward.

The figures and the rows they were fitted on are in `data/transfers.yaml`; `benchmarks/published.py`
fits them again and prices every published row.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from epplan.errors import InputError
from epplan.planner.forwarding import path_latency
from epplan.planner.model import DTYPE_BYTES
from epplan.planner.plan import TransferMode
from epplan.topologies.hardware import hardware
from epplan.topologies.host_paths import PATH_TYPES
from epplan.topologies.routes import Routes
from epplan.topologies.transfer_cost import TransferCost, transfer_cost
from epplan.topologies.units import parse_bandwidth, parse_time

from .copies import Choices, Copies, Floats, sent_copies

Bandwidth = Annotated[float, BeforeValidator(parse_bandwidth)]
Seconds = Annotated[float, BeforeValidator(parse_time)]
WireDtype = Literal["float32", "bfloat16", "float16", "fp8", "mxfp8", "nvfp4"]
# Bytes of one element with its share of the block scales: fp8 has a float32 per 128, mxfp8 a byte
# per 32, nvfp4 a byte per 16.
_ELEMENT_BYTES = {"fp8": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
_MEETING = 4  # how sharp the smaller of link and SMs wins


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SmCopies(_Record):
    """A kernel that moves rows with streaming multiprocessors."""

    sms: int = Field(gt=0)
    rate: Bandwidth  # of one SM
    dispatch_row: Seconds  # beside the bytes
    combine_row: Seconds  # reducing is more work than copying
    forwarding: float = Field(gt=0, le=1)  # share of the SMs that forward rows inside a node

    def bytes_per_s(self, row_bytes: float, *, combine: bool, forwarding: bool) -> float:
        """Return what a GPU's SMs move."""
        row_s = self.combine_row if combine else self.dispatch_row
        sms = self.sms * self.forwarding if forwarding else self.sms
        return sms * row_bytes / (row_s + row_bytes / self.rate)


class Floor(_Record):
    """No transfer is shorter: synchronising the ranks takes that long."""

    dispatch: Seconds
    combine: Seconds
    per_rank: Seconds


class TransferProfile(_Record):
    """One library."""

    name: str = ""
    title: str
    moves: Literal["tokens", "tensors"] = "tokens"
    copies: Copies = "choice"
    nvlink: float | None = None  # share of the rated bandwidth; None: the evaluator's
    nic: float | None = None
    start: Seconds | None  # of a transfer inside an island; None: the evaluator's
    network_start: Seconds | None  # of one that crosses the network
    host: Seconds = 0.0  # what launching it from the host framework adds
    metadata_bytes: int = 0  # sent along with an fp8 row
    sm: SmCopies | None = None
    floor: Floor | None = None
    max_island: int | None = None  # ranks that reach each other by NVLink; None: any
    crosses_network: bool = True
    source: str

    def for_plan(self, planned: TransferMode) -> "TransferProfile":
        """Return the profile that prices like the planner with the plan's copies; others as is."""
        if self.name != "plan":
            return self
        copies: dict[TransferMode, Copies] = {
            "per-choice": "choice",
            "direct": "rank",
            "node-dedup": "node",
        }
        return self.model_copy(update={"copies": copies[planned]})

    def row_bytes(self, hidden: int, dtype: WireDtype) -> float:
        """Return the bytes of one row on the wire."""
        if dtype in DTYPE_BYTES:
            return float(hidden * DTYPE_BYTES[dtype])
        return hidden * _ELEMENT_BYTES[dtype] + (self.metadata_bytes if dtype == "fp8" else 0)


@cache
def transfer_profiles() -> dict[str, TransferProfile]:
    """Return all profiles by name, read once."""
    text = (resources.files("epplan.planner.simulate.data") / "transfers.yaml").read_text("utf-8")
    document: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {
        name: TransferProfile.model_validate({"name": name, **row})
        for name, row in document.items()
    }


def token_libraries() -> list[str]:
    """Return the names of the libraries that move tokens to experts."""
    return [name for name, profile in transfer_profiles().items() if profile.moves == "tokens"]


def transfer_profile(name: str) -> TransferProfile:
    """Return the profile of a library.

    Raises:
        InputError: unknown name, with the known ones.
    """
    profile = transfer_profiles().get(name)
    if profile is None:
        known = ", ".join(token_libraries())
        raise InputError(f"unknown transfer library: {name}", hints=[f"known: {known}"])
    return profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A profile on a group of GPUs, ready to price layers.

    Attributes:
        profile: the library.
        dispatch_routes: the group's routes with what the links give it one way.
        combine_routes: and the other way.
        dispatch_row_bytes: bytes of a row.
        combine_row_bytes: bytes of a result.
    """

    profile: TransferProfile
    dispatch_routes: Routes
    combine_routes: Routes
    dispatch_row_bytes: float
    combine_row_bytes: float

    def dispatch(self, choices: Choices) -> TransferCost:
        """Return what sending a layer's tokens to their experts costs."""
        return self.scaled(self.price(choices, combine=False), 1.0, combine=False)

    def combine(self, choices: Choices) -> TransferCost:
        """Return what bringing a layer's results home costs."""
        return self.scaled(self.price(choices, combine=True), 1.0, combine=True)

    def price(self, choices: Choices, *, combine: bool) -> TransferCost:
        """Return what the bytes of a dispatch or combine cost, however short it is."""
        copies = sent_copies(choices, self.profile.copies)
        start_s = None if self.profile.start is None else self.profile.host
        paths_s = self._forwarded_paths(choices, combine=combine)
        if combine:
            sent = copies.T * self.combine_row_bytes
            return transfer_cost(self.combine_routes, sent, start_s, paths_s)
        sent = copies * self.dispatch_row_bytes
        return transfer_cost(self.dispatch_routes, sent, start_s, paths_s)

    def _forwarded_paths(self, choices: Choices, *, combine: bool) -> Floats | None:
        """Return both hops' latency of used paths where the evaluator's latencies are taken.

        A library's own start of a network transfer was fitted with forwarding in it.
        """
        if self.profile.start is not None or self.profile.copies != "node":
            return None
        latency_s = self.dispatch_routes.latency_s
        paths_s = path_latency(latency_s.T if combine else latency_s, choices.island)
        used = choices.counts @ choices.shares > 0
        return paths_s[used & ~np.eye(len(used), dtype=bool)]

    def scaled(self, cost: TransferCost, times: float, *, combine: bool) -> TransferCost:
        """Return the cost of `times` the tokens: as many times the bytes, the same latency.

        Args:
            cost: of a dispatch or combine, as `price` returns it.
            times: factor of the tokens.
            combine: which of both: they differ in how long they take at least.
        """
        busy_s = cost.busy_s * times
        floor = self.profile.floor
        latency_s = cost.latency_s
        if floor is not None:
            least = floor.combine if combine else floor.dispatch
            least += floor.per_rank * len(self.dispatch_routes.gpus)
            latency_s = max(latency_s, least - float(busy_s.max(initial=0.0)))
        return replace(cost, bytes=cost.bytes * times, busy_s=busy_s, latency_s=latency_s)


def make_library(
    profile: TransferProfile,
    routes: Routes,
    hidden: int,
    dispatch_dtype: WireDtype,
    combine_dtype: WireDtype,
) -> Library:
    """Return a library on a group of GPUs.

    Args:
        profile: the library.
        routes: between the GPUs.
        hidden: elements of a row.
        dispatch_dtype: of what is sent to the experts.
        combine_dtype: of what comes back.
    """
    dispatch_bytes = profile.row_bytes(hidden, dispatch_dtype)
    combine_bytes = profile.row_bytes(hidden, combine_dtype)
    return Library(
        profile=profile,
        dispatch_routes=library_routes(profile, routes, dispatch_bytes, combine=False),
        combine_routes=library_routes(profile, routes, combine_bytes, combine=True),
        dispatch_row_bytes=dispatch_bytes,
        combine_row_bytes=combine_bytes,
    )


def library_routes(
    profile: TransferProfile, routes: Routes, row_bytes: float, *, combine: bool
) -> Routes:
    """Return the routes with capacities and latencies as the library sees them."""
    network = routes.path_type == PATH_TYPES.index("NET")
    apart = ~np.eye(len(routes.gpus), dtype=bool)
    latency_s = routes.latency_s
    if profile.start is not None and profile.network_start is not None:
        latency_s = np.where(network, profile.network_start, profile.start) * apart
    capacity = routes.capacity.copy()
    limit = np.inf
    if profile.sm is not None:
        limit = profile.sm.bytes_per_s(row_bytes, combine=combine, forwarding=bool(network.any()))
    for number, resource in enumerate(routes.resources):
        link = resource.link
        share = profile.nvlink if link.kind == "nvlink" else profile.nic
        if share is not None and link.kind in ("nvlink", "nic", "net"):
            # A measured link keeps its own figure, scaled by what this library makes of a link.
            capacity[number] *= (
                share / hardware().efficiency["nvlink" if link.kind == "nvlink" else "nic"]
            )
        if link.kind == "nvlink":
            capacity[number] = (capacity[number] ** -_MEETING + limit**-_MEETING) ** (-1 / _MEETING)
    return replace(routes, capacity=capacity, latency_s=latency_s)
