"""The plan file: the only thing that passes from planner to launcher and runtime.

One JSON document (YAML is accepted too) with a hash over everything else in it: a truncated or
edited plan is refused, with all its problems at once. Light on imports: every rank reads it.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text, validate, write_atomically

from .model import ModelSpec

SCHEMA_VERSION = 2
Status = Literal["optimal", "feasible", "limit"]
TransferMode = Literal["per-choice", "direct", "node-dedup"]  # planner/forwarding.py
_SHARE_ROUNDING = 1e-6


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rank(_Record):
    """One process and the GPU it owns."""

    rank: int = Field(ge=0)
    host: str
    island: int = Field(ge=0)  # of ranks that reach each other without the network
    gpu_index: int = Field(ge=0)  # among the host's GPUs, in PCI bus order
    gpu_model: str
    gpu_uuid: str | None = None
    pci_bus_id: str | None = None
    numa: int | None = None
    nics: tuple[str, ...] = ()
    memory_bytes: int = Field(gt=0)


class Source(_Record):
    """Where an input came from, and the hash of what was read."""

    source: str
    sha256: str


class Inputs(_Record):
    """What the plan was made from."""

    topology: Source
    model: Source
    traffic: Source
    seed: int


class Workload(_Record):
    """One step of one layer, as priced."""

    tokens_per_rank: int = Field(gt=0)
    source_ranks: int = Field(gt=0)  # 1: the same expert mix was assumed on every rank
    windows: int = Field(gt=0)  # averaged
    transfer: TransferMode = "per-choice"  # how a token's copies travel
    keep_groups: bool = False  # every routing group sits on one host


class LayerCost(_Record):
    """Predicted cost of one MoE layer, in seconds."""

    layer: int
    dispatch_s: float
    compute_s: float
    combine_s: float
    total_s: float
    bound_s: float  # no placement of this layer is faster
    binding: str  # the resource or expert that sets the time
    verdict: str  # whether placement can help, in words


class Certificate(_Record):
    """What is proven about the plan; all times are sums over the MoE layers."""

    status: Status
    objective_s: float
    bound_s: float
    gap: float  # (objective - bound) / objective
    seconds: float
    binding: str
    contiguous_s: float  # the same traffic with experts in id order
    solver: str
    scope: str  # which problem the bound is proven for
    choice_bound_s: float | None = None  # the same over all choices of GPUs; None: no choice
    choice_gap: float | None = None


class RankMemory(_Record):
    """Predicted memory of one rank, in bytes."""

    rank: int
    experts: int
    replicated: int
    kv_cache: int
    buffers: int
    capacity: int


class Plan(_Record):
    """A placement of all experts of all MoE layers on ranks, with its certificate.

    `expert_of_slot[layer][slot]`: layer is the ordinal among the model's MoE layers, slots are in
    rank order, `slots_per_rank` each; None is an empty slot. An expert may have replicas, on
    different ranks; `share_of_slot[layer][slot]` is then the share of its expert's tokens, from
    every source rank, that a slot takes (0 for an empty slot). None: every expert has one copy.
    """

    schema_version: Literal[2] = 2
    epplan_version: str
    command: str
    inputs: Inputs
    model: ModelSpec
    workload: Workload
    ranks: tuple[Rank, ...] = Field(min_length=1)
    slots_per_rank: int = Field(gt=0)
    expert_of_slot: tuple[tuple[int | None, ...], ...]
    share_of_slot: tuple[tuple[float, ...], ...] | None = None
    cost: tuple[LayerCost, ...]
    memory: tuple[RankMemory, ...]
    certificate: Certificate
    assumptions: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def experts_of_rank(self, layer: int, rank: int) -> list[int]:
        """Return the experts of `rank` in MoE layer `layer` (ordinal), in slot order."""
        first = rank * self.slots_per_rank
        slots = self.expert_of_slot[layer][first : first + self.slots_per_rank]
        return [expert for expert in slots if expert is not None]

    def slots_of_expert(self, layer: int) -> list[list[int]]:
        """Return, for MoE layer `layer` (ordinal), the slots of every expert, in slot order."""
        slots: list[list[int]] = [[] for _ in range(self.model.num_experts)]
        for slot, expert in enumerate(self.expert_of_slot[layer]):
            if expert is not None:
                slots[expert].append(slot)
        return slots

    def shares(self, layer: int) -> tuple[float, ...]:
        """Return, for MoE layer `layer` (ordinal), every slot's share of its expert's tokens."""
        if self.share_of_slot is not None:
            return self.share_of_slot[layer]
        return tuple(float(expert is not None) for expert in self.expert_of_slot[layer])

    def sha256(self) -> str:
        """Return the hash over the whole plan in canonical JSON."""
        return content_hash(self.model_dump(mode="json"))


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of key order and layout."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plan_text(plan: Plan) -> str:
    """Return the plan file's text: one JSON document ending in its own hash."""
    document = {**plan.model_dump(mode="json"), "sha256": plan.sha256()}
    lines = [f"{json.dumps(key)}: {_value_text(value)}" for key, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_plan(path: Path, plan: Plan) -> None:
    """Write the plan whole or not at all."""
    assert not (problems := plan_problems(plan)), problems
    write_atomically(path, plan_text(plan))


def read_plan(path: Path) -> Plan:
    """Return the plan in `path`, checked.

    Raises:
        InputError: missing, truncated, edited after it was made, or inconsistent.
    """
    what = f"plan {path}"
    document = _parse(read_text(path, "plan"), what)
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(f"{what} is no epplan plan: it has no schema_version")
    if document["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{what} has schema_version {document['schema_version']}; this epplan reads "
            f"{SCHEMA_VERSION}",
            hints=["make the plan again with `epplan solve`"],
        )
    stated = document.pop("sha256", None)
    plan = validate(Plan, document, what)
    problems = plan_problems(plan)
    if problems:
        raise InputError(f"{what} is inconsistent", problems=problems)
    actual = plan.sha256()
    if stated != actual:
        raise InputError(
            f"{what} was changed after it was made: its sha256 says {str(stated)[:12]}, its "
            f"content is {actual[:12]}; cost and certificate no longer belong to the placement",
            hints=["make the plan again with `epplan solve`; do not edit plan files"],
        )
    return plan


def plan_problems(plan: Plan) -> list[str]:
    """Return every inconsistency between ranks, slots and model; none in a sound plan."""
    return [*_rank_problems(plan.ranks), *_slot_problems(plan)]


def _parse(text: str, what: str) -> Any:
    if not text.lstrip().startswith("{"):
        return parse_yaml(text, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ended = "is truncated" if error.pos >= len(text.rstrip()) else "is not valid JSON"
        raise InputError(
            f"{what} {ended} at line {error.lineno}: {error.msg}",
            hints=["make the plan again with `epplan solve`"],
        ) from None


def _value_text(value: Any) -> str:
    """Return a value with one list or mapping item per line: readable, and diffs stay small."""
    if isinstance(value, list) and value and isinstance(value[0], list | dict | str):
        items = [f"  {json.dumps(item)}" for item in value]
        return "[\n" + ",\n".join(items) + "\n]"
    if isinstance(value, dict):
        items = [f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    return json.dumps(value)


def _rank_problems(ranks: tuple[Rank, ...]) -> Iterator[str]:
    numbers = [rank.rank for rank in ranks]
    if numbers != list(range(len(ranks))):
        yield f"ranks must be numbered 0..{len(ranks) - 1} in order, not {numbers}"
    finished: set[str] = set()
    for previous, rank in pairwise(ranks):
        if rank.host != previous.host:
            finished.add(previous.host)
        if rank.host in finished:
            yield f"rank {rank.rank} returns to host {rank.host}: ranks of a host are contiguous"
    for host, of_host in groupby(ranks, key=lambda rank: rank.host):
        islands = sorted({rank.island for rank in of_host})
        if len(islands) > 1:
            yield f"ranks of host {host} are on islands {islands}; a host is on one"
    gpus = Counter((rank.host, rank.gpu_index) for rank in ranks)
    for (host, gpu), count in gpus.items():
        if count > 1:
            yield f"GPU {gpu} of host {host} has {count} ranks; a GPU has exactly one"


def _slot_problems(plan: Plan) -> Iterator[str]:
    model, num_slots = plan.model, plan.world_size * plan.slots_per_rank
    for name in ("expert_of_slot", "cost"):
        if len(getattr(plan, name)) != model.num_moe_layers:
            yield (
                f"{name} has {len(getattr(plan, name))} layers, the model has "
                f"{model.num_moe_layers} MoE layers"
            )
    for layer, slots in enumerate(plan.expert_of_slot):
        if len(slots) != num_slots:
            yield (
                f"layer {layer} has {len(slots)} slots, not {plan.world_size} ranks x "
                f"{plan.slots_per_rank} slots = {num_slots}"
            )
        count = Counter(expert for expert in slots if expert is not None)
        missing = sorted(set(range(model.num_experts)) - set(count))
        if missing:
            yield f"layer {layer} has no slot for experts {missing}"
        unknown = sorted(set(count) - set(range(model.num_experts)))
        if unknown:
            yield f"layer {layer} names experts {unknown}, the model has {model.num_experts}"
        twice = sorted(expert for expert, times in count.items() if times > 1)
        if twice and plan.share_of_slot is None:
            yield f"layer {layer} places experts {twice} more than once, without share_of_slot"
        on_rank = Counter(
            (slot // plan.slots_per_rank, expert)
            for slot, expert in enumerate(slots)
            if expert is not None
        )
        for (rank, expert), times in on_rank.items():
            if times > 1:
                yield f"layer {layer} places expert {expert} {times} times on rank {rank}"
    yield from _share_problems(plan)


def _share_problems(plan: Plan) -> Iterator[str]:
    if plan.share_of_slot is None:
        return
    if [len(row) for row in plan.share_of_slot] != [len(row) for row in plan.expert_of_slot]:
        yield "share_of_slot has not the shape of expert_of_slot"
        return
    for layer, (experts, shares) in enumerate(
        zip(plan.expert_of_slot, plan.share_of_slot, strict=True)
    ):
        total: dict[int, float] = defaultdict(float)
        for slot, (expert, share) in enumerate(zip(experts, shares, strict=True)):
            if not 0 <= share <= 1 + _SHARE_ROUNDING or (expert is None and share):
                held = "empty" if expert is None else f"expert {expert}"
                yield f"layer {layer} gives slot {slot} ({held}) the share {share}"
            if expert is not None:
                total[expert] += share
        for expert, share in sorted(total.items()):
            if abs(share - 1) > _SHARE_ROUNDING:
                yield (
                    f"layer {layer} gives the slots of expert {expert} shares that add up to "
                    f"{share}"
                )
