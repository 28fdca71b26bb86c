"""The GPUs of this machine before a launch: driver, CUDA, NCCL, peer access, clocks, wiring, plan.

torch is asked in a process of its own: it takes a CUDA context, and a broken driver can end it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from epplan.planner.plan import Plan
from epplan.topologies.check_report import Line, Problem, report_lines

_TIMEOUT_S = 120
# Reasons for which a GPU runs below its clocks, as NVML's bits: these are faults, others are not.
_SLOWDOWNS = {
    0x08: "hardware slowdown (temperature or power)",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake of the power supply",
}
_ASK_TORCH = """
import json, torch
cuda = torch.cuda
count = cuda.device_count() if cuda.is_available() else 0
blocked = [
    [one, other] for one in range(count) for other in range(count)
    if one != other and not cuda.can_device_access_peer(one, other)
]
gpus = []
for index in range(count):
    free, total = cuda.mem_get_info(index)
    gpus.append({"uuid": str(cuda.get_device_properties(index).uuid), "free_bytes": free})
nccl = list(cuda.nccl.version()) if count and torch.distributed.is_nccl_available() else None
print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus, "blocked": blocked, "nccl": nccl}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """What torch says.

    Args:
        cuda: the CUDA it was built for; None is a build for CPUs.
        gpus: of each visible GPU its uuid and its free bytes.
        blocked: pairs of GPUs without peer access.
        nccl: version of its NCCL.
        error: why it could not be asked.
    """

    cuda: str | None = None
    gpus: Sequence[dict[str, Any]] = ()
    blocked: Sequence[Sequence[int]] = ()
    nccl: Sequence[int] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """What NVML says: the reasons for slow clocks by GPU, or why it cannot be asked."""

    version: str | None = None
    num_gpus: int = 0
    slowdowns: dict[int, int] = field(default_factory=dict)
    error: str | None = None


def gpu_lines(plan: Plan | None) -> Iterator[Line]:
    """Yield the report on this machine's GPUs."""
    facts, driver = ask_torch(), ask_driver()
    yield from check_cuda(facts, driver)
    yield from check_peers(facts)
    yield from check_slowdowns(driver)
    yield from check_memory(facts, plan)
    if driver.num_gpus:
        yield from _wiring()


def check_cuda(facts: TorchFacts, driver: DriverFacts) -> Iterator[Line]:
    """Yield whether torch, driver and NCCL find each other."""
    if facts.error is not None:
        yield _line("warn", "GPUs", f"torch cannot be asked: {facts.error}", "repair torch")
        return
    if driver.version is None and not facts.gpus:
        yield _line("pass", "GPUs", f"none: ranks compute on the CPU ({driver.error})")
        return
    if facts.cuda is None:
        remedy = "install torch from the index for this CUDA: https://pytorch.org"
        yield _line("fail", "GPUs", "torch is a build for CPUs, and this machine has GPUs", remedy)
        return
    text = f"{len(facts.gpus)} visible to torch (CUDA {facts.cuda}), driver {driver.version}"
    if driver.num_gpus and not facts.gpus:
        remedy = "compare `nvidia-smi` with torch's CUDA; on NVSwitch hosts is fabricmanager up?"
        yield _line("fail", "GPUs", f"{driver.num_gpus} GPUs, but {text}", remedy)
        return
    yield _line("pass", "GPUs", text)
    if facts.nccl is None:
        yield _line("fail", "NCCL", "torch has none", "install a CUDA build of torch")
    else:
        yield _line("pass", "NCCL", ".".join(map(str, facts.nccl)))


def check_peers(facts: TorchFacts) -> Iterator[Line]:
    """Yield whether every GPU can read every other's memory."""
    if len(facts.gpus) < 2:
        return
    remedy = "NVLink hosts need fabricmanager; virtual machines and ACS on bridges block PCIe peers"
    pairs = ", ".join(f"{one}->{other}" for one, other in facts.blocked[:8])
    message = f"{len(facts.blocked)} pairs have no peer access: {pairs}"
    problems: list[Problem] = [("fail", "this machine", message, remedy)] if facts.blocked else []
    yield from report_lines("peer access", "this machine", "between all GPUs", problems)


def check_slowdowns(driver: DriverFacts) -> Iterator[Line]:
    """Yield GPUs that run below their clocks because something is wrong."""
    if not driver.num_gpus:
        return
    problems: list[Problem] = []
    for gpu, bits in driver.slowdowns.items():
        for bit, reason in _SLOWDOWNS.items():
            if bits & bit:
                remedy = "look at `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`"
                problems.append(("fail", f"GPU {gpu}", reason, remedy))
    yield from report_lines("GPU clocks", "this machine", "no GPU is slowed down", problems)


def check_memory(facts: TorchFacts, plan: Plan | None) -> Iterator[Line]:
    """Yield whether the plan's memory is free on the GPUs it names, as far as it names them."""
    if plan is None or not facts.gpus:
        return
    free = {gpu["uuid"].removeprefix("GPU-").lower(): gpu["free_bytes"] for gpu in facts.gpus}
    problems: list[Problem] = []
    for rank, use in zip(plan.ranks, plan.memory, strict=True):
        needed = use.experts + use.replicated + use.kv_cache + use.buffers
        own = free.get((rank.gpu_uuid or "").removeprefix("GPU-").lower())
        if own is not None and own < needed:
            message = f"rank {rank.rank} needs {needed / 2**30:.1f} GiB, {own / 2**30:.1f} are free"
            problems.append(("fail", f"GPU {rank.gpu_index}", message, "end what runs on it"))
    named = sum(str(rank.gpu_uuid).removeprefix("GPU-").lower() in free for rank in plan.ranks)
    passed = f"enough is free on the {named} GPUs the plan names here"
    yield from report_lines("GPU memory", "this machine", passed, problems)


def ask_torch() -> TorchFacts:
    """Return what torch says of this machine."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return TorchFacts(error=f"no answer within {_TIMEOUT_S} s")
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        return TorchFacts(error=last[-1])
    return TorchFacts(**json.loads(done.stdout.splitlines()[-1]))


def ask_driver() -> DriverFacts:
    """Return what NVML says of this machine."""
    try:
        import pynvml
    except ImportError:
        return DriverFacts(error="nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return DriverFacts(error=f"NVML: {error}")
    try:
        count = int(pynvml.nvmlDeviceGetCount())
        slowdowns = {}
        for index in range(count):
            try:
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                slowdowns[index] = int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
            except pynvml.NVMLError:  # some virtual machines refuse it
                continue
        version = str(pynvml.nvmlSystemGetDriverVersion())
        return DriverFacts(version=version, num_gpus=count, slowdowns=slowdowns)
    finally:
        pynvml.nvmlShutdown()


def _wiring() -> Iterator[Line]:
    """Yield what `epplan topo check local` finds: NVLinks, NIC distance, slots, MIG."""
    try:
        from epplan.topologies.check import check_cluster
        from epplan.topologies.sources import LOCAL, load_cluster
    except ImportError as error:
        yield _line("warn", "topology", f"cannot be read: {error}", "pip install epplan")
        return
    yield from check_cluster(load_cluster(LOCAL)).lines


def _line(level: Any, check: str, message: str, remedy: str = "") -> Line:
    return Line(level=level, check=check, subject="this machine", message=message, remedy=remedy)
