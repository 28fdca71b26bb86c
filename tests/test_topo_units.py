"""Text with units becomes SI base units once, and a bare number is refused."""

import pytest

from epplan.topologies.hardware import hardware
from epplan.topologies.units import (
    format_bytes,
    format_time,
    parse_bandwidth,
    parse_flops,
    parse_memory,
    parse_time,
)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("400Gb/s", 50e9), ("450GB/s", 450e9), ("0.5 TB/s", 0.5e12), ("100 Mb/s", 12.5e6)],
)
def test_bandwidth_tells_bits_from_bytes(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "size"), [("141GiB", 141 * 2**30), ("80GB", 80_000_000_000), ("12 B", 12)]
)
def test_memory_tells_binary_from_decimal(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["400", 400, "400Gbit", "400G", "-1GB/s", "GB/s", "400Gib/s"])
def test_bandwidth_refuses_a_bare_number(text: object) -> None:
    with pytest.raises(ValueError, match="is no bandwidth: write 400Gb/s"):
        parse_bandwidth(text)


def test_other_units() -> None:
    assert parse_flops("989TFLOP/s") == 989e12
    assert parse_time("3.4us") == pytest.approx(3.4e-6)
    with pytest.raises(ValueError, match="is no memory size"):
        parse_memory("80")


def test_numbers_read_well() -> None:
    assert format_bytes(3 * 2**30) == "3.00 GiB"
    assert format_bytes(17) == "17 B"
    assert format_time(0.00123) == "1.23 ms"
    assert format_time(0) == "0 s"


def test_a_processor_older_than_the_table_gets_its_oldest_row() -> None:
    assert hardware().numa_bytes_per_s("GenuineIntel", -1) == 6e9
    assert hardware().numa_bytes_per_s("GenuineIntel", 143) == 22e9
