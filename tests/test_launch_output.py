"""Lines of many pipes, each with its rank in front."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from epplan.launcher.output import TAIL_LINES, LinePump, RankOutput


@pytest.fixture
def pump() -> Iterator[LinePump]:
    with closing(LinePump()) as pump:
        yield pump


def read_ready(pump: LinePump) -> None:
    """Read what has been written so far."""
    pump.run_until_closed(-1)  # no such pipe: nothing to wait for


def read_all(pump: LinePump, *chunks: bytes) -> list[bytes]:
    """Return the lines that come out when `chunks` are written one by one."""
    lines: list[bytes] = []
    read_end, write_end = os.pipe()
    pump.add(read_end, lines.append)
    for chunk in chunks:
        os.write(write_end, chunk)
        read_ready(pump)
    os.close(write_end)
    pump.run_until_closed(read_end)
    return lines


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], [b"one", b"two"]),
        ([b"on", b"e\ntw", b"o\n"], [b"one", b"two"]),
        ([b"\n\n"], [b"", b""]),
        ([b"no end"], [b"no end"]),
        ([b"\xff\xfe\n\xe4", b"\n"], [b"\xff\xfe", b"\xe4"]),
        ([b"10%\r20%\r\n"], [b"10%\r20%\r"]),
        ([], []),
    ],
)
def test_lines_come_out_whole(pump: LinePump, chunks: list[bytes], lines: list[bytes]) -> None:
    assert read_all(pump, *chunks) == lines


def test_a_line_longer_than_the_pipe(pump: LinePump) -> None:
    chunk = b"x" * 60_000
    assert read_all(pump, *[chunk] * 50, b"\n", b"next\n") == [chunk * 50, b"next"]


def test_closing_hands_on_what_was_begun() -> None:
    lines: list[bytes] = []
    read_end, write_end = os.pipe()
    with closing(LinePump()) as pump:
        pump.add(read_end, lines.append)
        os.write(write_end, b"whole\nbegun")
        read_ready(pump)
    os.close(write_end)
    assert lines == [b"whole", b"begun"]


def test_prefixes_are_aligned_and_streams_told_apart(pump: LinePump) -> None:
    emitted: list[tuple[bytes, bool]] = []
    output = RankOutput(11, pump, lambda line, is_error: emitted.append((line, is_error)))
    os.write(output.write_ends[3][0], b"out\n")
    read_ready(pump)
    os.write(output.write_ends[10][1], b"err\n")
    read_ready(pump)
    output.close_write_ends()
    assert emitted == [(b"[rank  3] out", False), (b"[rank 10] err", True)]


def test_tail_keeps_the_last_lines_of_stderr(pump: LinePump) -> None:
    output = RankOutput(1, pump, lambda line, is_error: None)
    stdout, stderr = output.write_ends[0]
    os.write(stdout, b"not this\n")
    os.write(stderr, b"".join(b"%d\n" % number for number in range(TAIL_LINES + 5)) + b"\xff\n")
    read_ready(pump)
    output.close_write_ends()
    tail = output.tail(0)
    assert len(tail) == TAIL_LINES
    assert tail[-2:] == [str(TAIL_LINES + 4), "\\xff"]
