"""Text with units to SI base units, once, at the border.

Network figures are decimal (400 Gb/s = 50e9 bytes/s), memory is binary (141 GiB) or decimal (80 GB)
as written. A bare number is refused: it would be a guess.
"""

import re

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SIZES = _DECIMAL | _BINARY
_BITS = {f"{prefix}b/s": size / 8 for prefix, size in _DECIMAL.items()}
_BANDWIDTHS = _BITS | {f"{prefix}B/s": size for prefix, size in _DECIMAL.items()}
_MEMORIES = {f"{prefix}B": size for prefix, size in _SIZES.items()}
_FLOPS = {"GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bandwidth(text: object) -> float:
    """Return bytes/s of `400Gb/s` (bits) or `450GB/s` (bytes).

    Raises:
        ValueError: not a number with such a unit.
    """
    return _parse(text, _BANDWIDTHS, "bandwidth: write 400Gb/s (bits) or 50GB/s (bytes)")


def parse_memory(text: object) -> int:
    """Return bytes of `141GiB` (binary) or `80GB` (decimal).

    Raises:
        ValueError: not a number with such a unit.
    """
    return round(_parse(text, _MEMORIES, "memory size: write 141GiB (binary) or 80GB (decimal)"))


def parse_flops(text: object) -> float:
    """Return FLOP/s of `989TFLOP/s`.

    Raises:
        ValueError: not a number with such a unit.
    """
    return _parse(text, _FLOPS, "compute rate: write 989TFLOP/s")


def parse_time(text: object) -> float:
    """Return seconds of `3.4us`.

    Raises:
        ValueError: not a number with such a unit.
    """
    return _parse(text, _TIMES, "time: write 3.4us")


def _parse(text: object, units: dict[str, float], what: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z/]*)\s*", str(text))
    if not match or match[2] not in units:
        raise ValueError(f"{text!r} is no {what}")
    return float(match[1]) * units[match[2]]


def format_bytes(count: float) -> str:
    """Return bytes as `1.00 GiB`, `512 MiB`, `12 B`."""
    for prefix, size in reversed(_BINARY.items()):
        if abs(count) >= size:
            return f"{count / size:.2f} {prefix}B"
    return f"{count:.0f} B"


def format_bandwidth(bytes_per_s: float) -> str:
    """Return bytes/s as `44.0 GB/s`."""
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def format_time(seconds: float) -> str:
    """Return seconds with three digits and a fitting unit: `1.23 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"
