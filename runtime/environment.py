"""What a rank learns from its environment, and the backend, device and dtype chosen from it.

The variables are torchrun's, so that any launcher which sets them can start a rank. Every choice
comes with the reason for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from epplan.errors import InputError
from epplan.planner.model import ModelSpec
from epplan.planner.plan import Plan

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMA_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """Who this process is among the ranks.

    `num_local_ranks` is None where the launcher does not say it; `restarts` counts how often
    torchrun has started the ranks again.
    """

    rank: int
    local_rank: int
    world_size: int
    num_local_ranks: int | None
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how this process computes and communicates."""

    backend: str
    backend_reason: str
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...]


def read_environment(variables: Mapping[str, str]) -> RankEnvironment:
    """Return the rank's place from torchrun's variables.

    Raises:
        InputError: all missing or senseless variables at once.
    """
    missing = [name for name in REQUIRED if not variables.get(name)]
    if missing:
        raise InputError(
            f"not started as a rank: {', '.join(missing)} not set in the environment",
            hints=["start the ranks with `epplan launch PLAN`, or with torchrun"],
        )
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"]
    if variables.get("LOCAL_WORLD_SIZE"):
        names.append("LOCAL_WORLD_SIZE")
    problems = [
        f"{name} is {variables[name]!r}, not a whole number"
        for name in names
        if not variables[name].isdecimal()
    ]
    if not problems and int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        problems = [f"RANK is {variables['RANK']}, WORLD_SIZE is {variables['WORLD_SIZE']}"]
    if problems:
        raise InputError("the environment of this rank is not valid", problems=problems)
    return RankEnvironment(
        rank=int(variables["RANK"]),
        local_rank=int(variables["LOCAL_RANK"]),
        world_size=int(variables["WORLD_SIZE"]),
        num_local_ranks=int(variables.get("LOCAL_WORLD_SIZE") or 0) or None,
        restarts=int(variables.get("TORCHELASTIC_RESTART_COUNT") or 0),
    )


def num_local_ranks(environment: RankEnvironment, plan: Plan) -> int:
    """Return how many ranks share this machine: what the launcher says, else what the plan says."""
    if environment.num_local_ranks is not None:
        return environment.num_local_ranks
    host = plan.ranks[environment.rank].host
    return sum(rank.host == host for rank in plan.ranks)


def choose_setting(backend: str, model: ModelSpec, local_rank: int, local_ranks: int) -> Setting:
    """Return the setting of this rank.

    Args:
        backend: "auto", "gloo" or "nccl".
        model: its dtype is used on GPUs.
        local_rank: the GPU's number among the visible ones.
        local_ranks: ranks on this machine; each needs a GPU of its own for NCCL.

    Raises:
        InputError: NCCL was asked for and there are too few GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{gpus} visible CUDA GPUs for {local_ranks} ranks on this machine"
    if backend == "nccl" and gpus < local_ranks:
        raise InputError(
            f"backend nccl needs a GPU for every rank: {found}",
            hints=["take --backend gloo, which computes on the CPU"],
        )
    chosen = ("nccl" if gpus >= local_ranks else "gloo") if backend == "auto" else backend
    reason = found if backend == "auto" else "asked for"
    if chosen == "nccl":
        dtype: torch.dtype = getattr(torch, model.dtype)
        device = torch.device("cuda", local_rank)
        return Setting(
            backend=chosen,
            backend_reason=reason,
            device=device,
            dtype=dtype,
            notes=_weight_notes(model, dtype),
        )
    return Setting(
        backend=chosen,
        backend_reason=reason,
        device=torch.device("cpu"),
        dtype=torch.float32,
        notes=_cpu_notes(model),
    )


def num_threads(local_ranks: int) -> int:
    """Return the CPU threads of one rank, so that the ranks of a machine share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def bind_cpus(numa: int | None, nodes: Path = NUMA_NODES) -> None:
    """Keep this process, and all threads it starts from now on, near its GPU.

    Memory follows: Linux takes it from the node of the CPU that first writes to it.

    Args:
        numa: the GPU's NUMA node; None where the plan does not know.
        nodes: the kernel's folder of NUMA nodes.
    """
    try:
        text = (nodes / f"node{numa}/cpulist").read_text()
    except OSError:  # no such node: a virtual machine or container that hides them
        return
    # A scheduler may have given other CPUs; then its choice stands.
    cpus = _cpu_numbers(text) & os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)


def _cpu_numbers(text: str) -> set[int]:
    """Return the CPUs in a list such as `0-3,8`."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _cpu_notes(model: ModelSpec) -> tuple[str, ...]:
    if model.dtype == "float32":
        return ()
    return (
        f"computed in float32, not in the plan's {model.dtype}: half-precision matrix products "
        "can be 65 to 150 times slower on a CPU",
    )


def _weight_notes(model: ModelSpec, dtype: torch.dtype) -> tuple[str, ...]:
    if round(model.weight_bytes) == dtype.itemsize:
        return ()
    return (
        f"weights take {dtype.itemsize} bytes each, not the plan's {model.weight_bytes:g}: "
        "the runtime does not quantize",
    )
