"""The host file: what NVML and sysfs answered, raw, with where each value came from.

    {"schema_version": 1, "kind": "epplan-hosts",
     "sources": {"gpu.name": "nvmlDeviceGetName", ...},
     "hosts": [{"name": "node01", "gpus": [...], "nics": [...], "pci": {...}, ...}]}

Nothing in it is interpreted (host_graph.py does that), so that a file taken today can be read
better tomorrow. A question that was refused keeps the refusal.
"""

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import validate, write_atomically

KIND = "epplan-hosts"
_EXPANDED_LEVELS = 6  # of nested JSON that get a line an entry: one line for each NVLink


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Refusal(_Record):
    """A question that was not answered, and the reason given."""

    refused: str


Reading: TypeAlias = int | str | Refusal
Readings: TypeAlias = dict[str, Reading]


class GpuRecord(_Record):
    """One GPU; `replies` and `links` by question, as in `sources`.

    `links_refused` counts the NVLinks for which NVML did not even tell the state, by refusal.
    """

    pci_bus_id: str  # as sysfs writes it
    nvml_index: int | None = None  # None: seen in sysfs only
    replies: Readings = {}
    links: tuple[Readings, ...] = ()
    links_refused: dict[str, int] = {}


class NicRecord(_Record):
    """One NIC port, or one plain network interface."""

    name: str
    port: int = 1
    pci_bus_id: str | None = None  # None: no PCI device behind it
    readings: Readings = {}


class PciRecord(_Record):
    """One PCI device on the way to a GPU or NIC; `path` leads from the root port to it."""

    path: tuple[str, ...]
    readings: Readings = {}


class HostRecord(_Record):
    """Everything read on one host."""

    name: str
    boot_id: Reading = ""  # tells machines of the same name apart
    driver_version: Reading | None = None  # None: NVML cannot be used, `remarks` say why
    cpu: Readings = {}
    numa_nodes: dict[int, Readings] = {}
    gpus: tuple[GpuRecord, ...] = ()
    nics: tuple[NicRecord, ...] = ()
    pci: dict[str, PciRecord] = {}
    remarks: tuple[str, ...] = ()  # what could not be asked, and what was left out


class HostsFile(_Record):
    """The whole file: one host, or all hosts of a job."""

    schema_version: Literal[1] = 1
    kind: Literal["epplan-hosts"] = "epplan-hosts"
    epplan_version: str = ""
    sources: dict[str, str] = {}
    hosts: tuple[HostRecord, ...] = Field(min_length=1)


def is_host_file(document: Any) -> bool:
    """Tell whether a parsed document is a host file."""
    return isinstance(document, dict) and document.get("kind") == KIND


def parse_hosts(document: Any, what: str) -> HostsFile:
    """Return the records of a parsed document.

    Raises:
        InputError: all problems of the file at once.
    """
    file = validate(HostsFile, document, what)
    names = [host.name for host in file.hosts]
    problems = [
        f"host {name} is described {names.count(name)} times"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    for host in file.hosts:
        buses = [gpu.pci_bus_id for gpu in host.gpus]
        problems += [
            f"host {host.name}: two GPUs at {bus}" for bus in {*buses} if buses.count(bus) > 1
        ]
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    return file


def write_hosts(path: Path, file: HostsFile) -> None:
    """Write the host file, whole or not at all."""
    write_atomically(path, hosts_text(file))


def hosts_text(file: HostsFile) -> str:
    """Return the host file's text."""
    return _layout(file.model_dump(mode="json"), _EXPANDED_LEVELS, "") + "\n"


def normalise_guid(guid: str) -> str:
    """Return a GUID as 16 lower-case digits, from sysfs's, ibstat's or ibnetdiscover's form."""
    return guid.lower().removeprefix("0x").replace(":", "").zfill(16)


def _layout(value: Any, levels: int, indent: str) -> str:
    """Return JSON with a line an entry for the outer `levels`, inner values on one line."""
    if not levels or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        rows = [
            f"{inner}{json.dumps(key)}: {_layout(item, levels - 1, inner)}"
            for key, item in value.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    rows = [inner + _layout(item, levels - 1, inner) for item in value]
    return "[\n" + ",\n".join(rows) + f"\n{indent}]"
