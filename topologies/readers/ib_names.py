"""InfiniBand words: node descriptions to host and switch names, link rates to bytes/s.

A channel adapter's description is `<host> <device>` when its driver has set it, and a product name
when not; a switch's is `MF0;<name>:<model>/U1` or free text.
"""

import re
from collections import Counter
from collections.abc import Mapping

# Gb/s of data a lane carries: of SDR to QDR a fifth is coding
_LANE_GBITS = {
    "SDR": 2.0,
    "DDR": 4.0,
    "QDR": 8.0,
    "FDR10": 10.0,
    "FDR": 13.64,
    "EDR": 25.0,
    "HDR": 50.0,
    "NDR": 100.0,
    "XDR": 200.0,
}
# what iblinkinfo prints for a lane
_SIGNAL_GBITS = {
    "2.5": "SDR",
    "5.0": "DDR",
    "10.0": "QDR",
    "10.3125": "FDR10",
    "14.0625": "FDR",
    "25.78125": "EDR",
    "53.125": "HDR",
    "106.25": "NDR",
    "212.5": "XDR",
}
_GENERIC = re.compile(r"MT[0-9]{4,}|Mellanox|InfiniHost|ConnectX|Technologies|Infiniscale|^\s*$")


def link_rate(width: str, speed: str) -> float | None:
    """Return bytes/s of `4x` and `NDR` (or `106.25`, iblinkinfo's Gb/s a lane); None if unknown."""
    lanes = re.match(r"[0-9]{1,2}", width)
    name = _SIGNAL_GBITS.get(speed if "." in speed else f"{speed}.0", speed)
    if not lanes or name not in _LANE_GBITS:
        return None
    return int(lanes[0]) * _LANE_GBITS[name] * 1e9 / 8


def host_and_device(description: str, guid: str) -> tuple[str, str, bool]:
    """Return host, device and whether the description told them; a GUID names the rest."""
    words = description.replace("'", " ").split()
    if not words or _GENERIC.search(description):
        return f"guid-{guid}", "hca", False
    return words[0], "-".join(words[1:]).replace("/", "-") or "hca", True


def is_aggregation_node(description: str) -> bool:
    """Tell whether an adapter is a SHARP engine inside a switch, which is no host."""
    return "Aggregation Node" in description


def switch_names(descriptions: Mapping[str, str]) -> dict[str, str]:
    """Return a name for every switch (by key); chips of one name get their key behind it."""
    names = {key: _switch_name(text) or key for key, text in descriptions.items()}
    often = Counter(names.values())
    return {key: name if often[name] == 1 else f"{name}-{key}" for key, name in names.items()}


def _switch_name(description: str) -> str:
    match = re.search(r";([^:]+):", description)
    return (match[1] if match else description).strip()
