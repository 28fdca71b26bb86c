"""What `epplan env` prints."""

import os
from typing import Any

import epplan
from epplan.topologies.live.nvml import NvmlUnavailableError, open_nvml
from epplan.topologies.live.sysfs import Sysfs

from . import machine
from .doctor_gpus import ask_torch


def bug_report() -> dict[str, Any]:
    """Return all facts as JSON values, None for what is not there."""
    facts = ask_torch()
    return {
        "epplan": epplan.__version__,
        "system": machine.system(),
        "packages": machine.package_versions(),
        "torch": {
            "cuda": facts.cuda,
            "visible_gpus": len(facts.gpus),
            "nccl": ".".join(map(str, facts.nccl)) if facts.nccl else None,
            "error": facts.error,
        },
        "gpus": _gpus(),
        "nics": [
            {"name": nic.name, "rate": _text(nic.readings.get("rate") or nic.readings.get("speed"))}
            for nic in Sysfs().nics()
        ],
        "launchers": machine.launcher_versions(),
        "variables": machine.variables(os.environ),
    }


def bug_report_text(report: dict[str, Any]) -> str:
    """Return the same for people: one fact per line, in Markdown's code block."""
    lines = ["```"]
    for section, facts in report.items():
        if isinstance(facts, dict):
            lines += [f"{section}: {name}: {_shown(value)}" for name, value in facts.items()]
        elif isinstance(facts, list):
            texts = [" ".join(_shown(value) for value in fact.values()) for fact in facts]
            lines += [f"{section}: {text}" for text in texts] or [f"{section}: none"]
        else:
            lines.append(f"{section}: {_shown(facts)}")
    return "\n".join([*lines, "```"])


def _gpus() -> list[dict[str, Any]]:
    try:
        with open_nvml() as nvml:
            driver = _text(nvml.driver_version())
            names = [_text(nvml.ask_gpu(index, "name")) for index in range(nvml.gpu_count())]
    except NvmlUnavailableError:
        return []
    return [{"name": name, "driver": driver} for name in names]


def _text(value: object) -> str:
    return str(value) if isinstance(value, str | int) else "unknown"


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
