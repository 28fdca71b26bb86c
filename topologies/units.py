"""Text with units to SI base units, once, at the border.

Network figures are decimal (400 Gb/s = 50e9 bytes/s), memory is binary (141 GiB) or decimal (80 GB)
as written. A bare number is refused: it would be a guess.
"""

import re

_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_BANDWIDTH = re.compile(_NUMBER + r"([kMGT]?)(b|B)/s\s*")
_MEMORY = re.compile(_NUMBER + r"([KMGT]i|[kMGT]?)B\s*")
_FLOPS = re.compile(_NUMBER + r"([GTP])FLOP/s\s*")
_TIME = re.compile(_NUMBER + r"(s|ms|us|ns)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bandwidth(text: object) -> float:
    """Return bytes/s of `400Gb/s` (bits) or `450GB/s` (bytes).

    Raises:
        ValueError: not a number with such a unit.
    """
    match = _BANDWIDTH.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no bandwidth: write 400Gb/s (bits) or 50GB/s (bytes)")
    number, prefix, unit = match.groups()
    return float(number) * _PREFIX[prefix] / (8 if unit == "b" else 1)


def parse_memory(text: object) -> int:
    """Return bytes of `141GiB` (binary) or `80GB` (decimal).

    Raises:
        ValueError: not a number with such a unit.
    """
    match = _MEMORY.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no memory size: write 141GiB (binary) or 80GB (decimal)")
    number, prefix = match.groups()
    return round(float(number) * {**_PREFIX, **_BINARY}[prefix])


def parse_flops(text: object) -> float:
    """Return FLOP/s of `989TFLOP/s`.

    Raises:
        ValueError: not a number with such a unit.
    """
    match = _FLOPS.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no compute rate: write 989TFLOP/s")
    return float(match[1]) * _PREFIX[match[2]]


def parse_time(text: object) -> float:
    """Return seconds of `3.4us`.

    Raises:
        ValueError: not a number with such a unit.
    """
    match = _TIME.fullmatch(str(text))
    if not match:
        raise ValueError(f"{text!r} is no time: write 3.4us")
    return float(match[1]) * _SECONDS[match[2]]


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
