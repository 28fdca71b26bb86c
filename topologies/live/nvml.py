"""NVML behind a small protocol: every question has an answer or a refusal, never an exception.

Virtual machines, MIG, containers and old drivers refuse a different question each; what could not
be answered is data that the reader of a host file decides about. The table of questions is also
the list of sources that a host file quotes.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref
from typing import Any, Protocol

from .host_file import Reading, Refusal

MAX_LINKS = 36  # NVML_NVLINK_MAX_LINKS
_FIELD_REMOTE_LINK, _FIELD_SPEED, _FIELD_STATE = 146, 164, 165

_Ask = Callable[[Any, Any], Any]  # pynvml, device handle

_GPU_QUESTIONS: dict[str, tuple[str, _Ask]] = {
    "name": ("nvmlDeviceGetName", lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu)),
    "uuid": ("nvmlDeviceGetUUID", lambda nvml, gpu: nvml.nvmlDeviceGetUUID(gpu)),
    "pci_bus_id": (
        "nvmlDeviceGetPciInfo_v3 busId",
        lambda nvml, gpu: nvml.nvmlDeviceGetPciInfo_v3(gpu).busId,
    ),
    "pci_device_id": (
        "nvmlDeviceGetPciInfo_v3 pciDeviceId",
        lambda nvml, gpu: nvml.nvmlDeviceGetPciInfo_v3(gpu).pciDeviceId,
    ),
    "memory_bytes": (
        "nvmlDeviceGetMemoryInfo total",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    "compute_capability": (
        "nvmlDeviceGetCudaComputeCapability",
        lambda nvml, gpu: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(gpu)),
    ),
    "mig_mode": (
        "nvmlDeviceGetMigMode current",
        lambda nvml, gpu: nvml.nvmlDeviceGetMigMode(gpu)[0],
    ),
    "virtualization_mode": (
        "nvmlDeviceGetVirtualizationMode",
        lambda nvml, gpu: nvml.nvmlDeviceGetVirtualizationMode(gpu),
    ),
    "memory_numa_node": (
        "nvmlDeviceGetNumaNodeId",
        lambda nvml, gpu: nvml.nvmlDeviceGetNumaNodeId(gpu),
    ),
    "pcie_max_generation": (
        "nvmlDeviceGetMaxPcieLinkGeneration",
        lambda nvml, gpu: nvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu),
    ),
    "pcie_max_width": (
        "nvmlDeviceGetMaxPcieLinkWidth",
        lambda nvml, gpu: nvml.nvmlDeviceGetMaxPcieLinkWidth(gpu),
    ),
    "fabric_state": (
        "nvmlDeviceGetGpuFabricInfoV state",
        lambda nvml, gpu: _fabric(nvml, gpu).state,
    ),
    "fabric_status": (
        "nvmlDeviceGetGpuFabricInfoV status",
        lambda nvml, gpu: _fabric(nvml, gpu).status,
    ),
    "fabric_cluster_uuid": (
        "nvmlDeviceGetGpuFabricInfoV clusterUuid",
        lambda nvml, gpu: str(uuid.UUID(bytes=bytes(_fabric(nvml, gpu).clusterUuid))),
    ),
    "fabric_clique": (
        "nvmlDeviceGetGpuFabricInfoV cliqueId",
        lambda nvml, gpu: _fabric(nvml, gpu).cliqueId,
    ),
    "fabric_health_mask": (
        "nvmlDeviceGetGpuFabricInfoV healthMask",
        lambda nvml, gpu: _fabric(nvml, gpu).healthMask,
    ),
}

_AskLink = Callable[[Any, Any, int], Any]  # pynvml, device handle, link

_LINK_QUESTIONS: dict[str, tuple[str, _AskLink]] = {
    "state": (
        "nvmlDeviceGetNvLinkState",
        lambda nvml, gpu, link: nvml.nvmlDeviceGetNvLinkState(gpu, link),
    ),
    "state_field": (
        "nvmlDeviceGetFieldValues NVML_FI_DEV_NVLINK_GET_STATE",
        lambda nvml, gpu, link: _field(nvml, gpu, _FIELD_STATE, link),
    ),
    "version": (
        "nvmlDeviceGetNvLinkVersion",
        lambda nvml, gpu, link: nvml.nvmlDeviceGetNvLinkVersion(gpu, link),
    ),
    "p2p": (
        "nvmlDeviceGetNvLinkCapability NVML_NVLINK_CAP_P2P_SUPPORTED",
        lambda nvml, gpu, link: nvml.nvmlDeviceGetNvLinkCapability(gpu, link, 0),
    ),
    "remote_bus_id": (
        "nvmlDeviceGetNvLinkRemotePciInfo_v2 busId",
        lambda nvml, gpu, link: nvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, link).busId,
    ),
    "remote_type": (
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        lambda nvml, gpu, link: nvml.nvmlDeviceGetNvLinkRemoteDeviceType(gpu, link),
    ),
    "remote_link": (
        "nvmlDeviceGetFieldValues NVML_FI_DEV_NVLINK_REMOTE_NVLINK_ID",
        lambda nvml, gpu, link: _field(nvml, gpu, _FIELD_REMOTE_LINK, link),
    ),
    "speed": (
        "nvmlDeviceGetFieldValues NVML_FI_DEV_NVLINK_GET_SPEED",
        lambda nvml, gpu, link: _field(nvml, gpu, _FIELD_SPEED, link),
    ),
}

GPU_SOURCES = {name: source for name, (source, _) in _GPU_QUESTIONS.items()}
LINK_SOURCES = {name: source for name, (source, _) in _LINK_QUESTIONS.items()}


class Nvml(Protocol):
    """Answers about the GPUs of this machine, by NVML's index."""

    def driver_version(self) -> Reading:
        """Return the driver's version."""

    def gpu_count(self) -> int:
        """Return the number of GPUs NVML shows."""

    def ask_gpu(self, gpu: int, question: str) -> Reading:
        """Return the answer to one of `GPU_SOURCES`."""

    def ask_link(self, gpu: int, link: int, question: str) -> Reading:
        """Return the answer to one of `LINK_SOURCES`."""


class NvmlUnavailableError(Exception):
    """NVML cannot be used here at all; the message says why."""


@contextmanager
def open_nvml() -> Iterator[Nvml]:
    """Yield this machine's NVML.

    Raises:
        NvmlUnavailableError: no library, no driver or no permission.
    """
    try:
        import pynvml  # here, because planning needs no GPU and no driver
    except ImportError:
        raise NvmlUnavailableError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(str(error)) from None
    try:
        yield _Library(pynvml)
    finally:
        pynvml.nvmlShutdown()


class _Library:
    """The real NVML."""

    def __init__(self, pynvml: Any) -> None:
        self._nvml = pynvml

    def driver_version(self) -> Reading:
        return self._answer(self._nvml.nvmlSystemGetDriverVersion)

    def gpu_count(self) -> int:
        count = self._answer(self._nvml.nvmlDeviceGetCount)
        return count if isinstance(count, int) else 0

    def ask_gpu(self, gpu: int, question: str) -> Reading:
        ask = _GPU_QUESTIONS[question][1]
        return self._answer(lambda: ask(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(gpu)))

    def ask_link(self, gpu: int, link: int, question: str) -> Reading:
        ask = _LINK_QUESTIONS[question][1]
        return self._answer(
            lambda: ask(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(gpu), link)
        )

    def _answer(self, ask: Callable[[], Any]) -> Reading:
        try:
            value = ask()
        except self._nvml.NVMLError as error:
            return Refusal(refused=str(error))
        return value if isinstance(value, str) else int(value)


def _fabric(nvml: Any, gpu: Any) -> Any:
    info = nvml.c_nvmlGpuFabricInfo_v2_t()
    info.version = nvml.nvmlGpuFabricInfo_v2
    nvml.nvmlDeviceGetGpuFabricInfoV(gpu, byref(info))
    return info


def _field(nvml: Any, gpu: Any, field: int, link: int) -> int:
    """Return a field of one link; each field has a return code of its own."""
    reply = nvml.nvmlDeviceGetFieldValues(gpu, [(field, link)])[0]
    if reply.nvmlReturn != 0:
        raise nvml.NVMLError(reply.nvmlReturn)
    return int(reply.value.uiVal)
