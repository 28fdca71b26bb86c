"""What ranks print, read from many pipes at once and handed on in whole lines."""

import os
import selectors
from collections import deque
from collections.abc import Callable

CHUNK_BYTES = 1 << 16  # what a pipe holds at most: one read empties it
TAIL_LINES = 60

Emit = Callable[[bytes, bool], None]  # a line without its end; whether it is for stderr


class LinePump:
    """Reads pipes and calls back with each line.

    Lines are bytes from end to end: whatever a rank prints, valid UTF-8 or not, comes out as it
    went in.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytearray] = {}  # begun lines
        self._on_line: dict[int, Callable[[bytes], None]] = {}

    def add(self, pipe: int, on_line: Callable[[bytes], None]) -> None:
        """Read `pipe`, a file descriptor that now belongs to this object."""
        self._selector.register(pipe, selectors.EVENT_READ)
        self._rest[pipe] = bytearray()
        self._on_line[pipe] = on_line

    def run_until_closed(self, pipe: int) -> None:
        """Read everything until nobody can write to `pipe` any more."""
        while pipe in self._rest:
            self._read_ready(timeout=None)
        self._read_ready(timeout=0)  # what was written elsewhere before that

    def close(self) -> None:
        """Hand on the begun lines and close all pipes."""
        for pipe in list(self._rest):
            self._end(pipe)
        self._selector.close()

    def _read_ready(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            chunk = os.read(key.fd, CHUNK_BYTES)
            if chunk:
                self._take(key.fd, chunk)
            else:
                self._end(key.fd)

    def _take(self, pipe: int, chunk: bytes) -> None:
        *lines, begun = chunk.split(b"\n")
        rest = self._rest[pipe]
        for line in lines:
            whole = bytes(rest) + line
            rest.clear()
            self._on_line[pipe](whole)
        rest += begun

    def _end(self, pipe: int) -> None:
        self._selector.unregister(pipe)
        os.close(pipe)
        rest = self._rest.pop(pipe)
        on_line = self._on_line.pop(pipe)
        if rest:
            on_line(bytes(rest))


class RankOutput:
    """The stdout and stderr of all ranks, each line with its rank in front.

    Args:
        num_ranks: number of ranks.
        pump: reads the pipes.
        emit: receives each line.
    """

    def __init__(self, num_ranks: int, pump: LinePump, emit: Emit) -> None:
        self._emit = emit
        self._width = len(str(num_ranks - 1))
        self._tails: list[deque[bytes]] = [deque(maxlen=TAIL_LINES) for _ in range(num_ranks)]
        self.write_ends = [
            (self._open(pump, rank, is_error=False), self._open(pump, rank, is_error=True))
            for rank in range(num_ranks)
        ]  # (stdout, stderr) of each rank

    def close_write_ends(self) -> None:
        """Close this process's copies, so that a pipe ends with the rank that writes to it."""
        for pipe in self.write_ends:
            os.close(pipe[0])
            os.close(pipe[1])

    def tail(self, rank: int) -> list[str]:
        """Return the last lines `rank` wrote on stderr."""
        return [line.decode(errors="backslashreplace") for line in self._tails[rank]]

    def _open(self, pump: LinePump, rank: int, *, is_error: bool) -> int:
        prefix = f"[rank {rank:>{self._width}}] ".encode()

        def on_line(line: bytes) -> None:
            if is_error:
                self._tails[rank].append(line)
            self._emit(prefix + line, is_error)

        read_end, write_end = os.pipe()
        pump.add(read_end, on_line)
        return write_end
