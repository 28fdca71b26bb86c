"""Every rank says who it is before any of them computes; see epplan.launcher.identity.

Through the store in which ranks meet, not a collective: two ranks on one GPU would already fail in
NCCL, with another message. Restarted ranks come here again, under torchrun with a fresh prefix.
"""

import json
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

import epplan
from epplan.errors import InputError
from epplan.launcher.host_map import read_host_map
from epplan.launcher.identity import HOST_VARIABLE, Identity, compares_gpus, identity_report
from epplan.planner.plan import Plan

_ACKNOWLEDGED = timedelta(seconds=10)


def this_host(variables: Mapping[str, str]) -> str:
    """Return what this machine is called."""
    return variables.get(HOST_VARIABLE) or socket.gethostname()


def check_identity(
    store: Store, plan: Plan, rank: int, device: torch.device, host: str, host_map: Path | None
) -> None:
    """Compare all ranks with the plan; all of them call it, and go on together or not at all.

    Args:
        store: shared by all ranks, on rank 0 in its own process or in torchrun's agent.
        plan: this rank's.
        rank: this one.
        device: what it computes on.
        host: what its machine is called.
        host_map: file that names renamed hosts.

    Raises:
        InputError: on every rank; rank 0 has printed the table.
    """
    own = _identity(plan, device, host)
    store.set(f"identity/{rank}", json.dumps(asdict(own)))
    if rank == 0:
        names = read_host_map(host_map, {rank.host for rank in plan.ranks})
        found = [
            Identity(**json.loads(store.get(f"identity/{other}")))
            for other in range(plan.world_size)
        ]
        report = identity_report(plan, epplan.__version__, names, found)
        if report is None and device.type == "cuda" and not compares_gpus(plan):
            print_error("note: the plan names no GPU by UUID or bus id; only hosts were compared")
        if report is not None:
            # Before the others know: the first rank to end may have the rest stopped.
            print_error(report)
        store.set("identity/verdict", "wrong" if report else "right")
    is_right = store.get("identity/verdict") == b"right"
    if is_right:
        return
    store.set(f"identity/{rank}/read", "")
    if rank == 0:  # the store may be in this process, and would end with it
        with suppress(RuntimeError):  # a rank that was killed does not answer
            everyone = [f"identity/{other}/read" for other in range(plan.world_size)]
            store.wait(everyone, _ACKNOWLEDGED)
    raise InputError(f"rank {rank} stops: the ranks are not what the plan says (see rank 0)")


def print_error(text: str) -> None:
    """Print to stderr in one write, so that other ranks' lines do not come between."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _identity(plan: Plan, device: torch.device, host: str) -> Identity:
    uuid = bus_id = None
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        # Either may be missing: builds for other vendors, and torch before 2.8.
        uuid = getattr(properties, "uuid", None)
        bus = getattr(properties, "pci_bus_id", None)
        if bus is not None:
            bus_id = f"{properties.pci_domain_id:04x}:{bus:02x}:{properties.pci_device_id:02x}.0"
    return Identity(
        host=host,
        gpu_uuid=None if uuid is None else f"GPU-{uuid}",
        pci_bus_id=bus_id,
        plan=plan.sha256(),
        version=epplan.__version__,
    )
