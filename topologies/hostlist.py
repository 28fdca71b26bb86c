"""Host ranges in Slurm's notation: `dgx[01-02,7]` is dgx01, dgx02, dgx7."""

import re
from collections.abc import Sequence

from epplan.errors import InputError

MAX_NAMES = 100_000  # of one expression: a range is short to write and long to hold
MAX_FILE_NAMES = 500_000
_BRACKET = re.compile(r"([^\[\]]*)\[([^\[\]]*)\](.*)", re.DOTALL)
_RANGE = re.compile(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*")


def expand(names: str) -> list[str]:
    """Return the names of one range: `r[1-2]n[8,10]` is r1n8, r1n10, r2n8, r2n10.

    Raises:
        InputError: unbalanced brackets, no ascending range, or too many names.
    """
    expanded, rest = [""], names
    while match := _BRACKET.fullmatch(rest):
        head, ranges, rest = match.groups()
        numbers = _numbers(ranges, names)
        if len(expanded) * len(numbers) > MAX_NAMES:
            raise InputError(f"host range {names} has more than {MAX_NAMES} names")
        expanded = [before + head + number for before in expanded for number in numbers]
    if "[" in rest or "]" in rest:
        raise InputError(f"host range {names} is not valid: its brackets do not match")
    return [before + rest for before in expanded]


def expand_list(names: str) -> list[str]:
    """Return the names of ranges separated by commas: `a[1-2],b7` is a1, a2, b7.

    Raises:
        InputError: as `expand`.
    """
    parts = (part.strip() for part in re.split(r",(?![^\[\]]*\])", names))
    expanded: list[str] = []
    for part in parts:
        if part:
            expanded += expand(part)
        if len(expanded) > MAX_NAMES:
            raise InputError(f"the host list {names[:40]}... has more than {MAX_NAMES} names")
    return expanded


def fold(names: Sequence[str]) -> str:
    """Return names as a list that `expand_list` undoes: a1, a2, b07 is `a[1-2],b07`."""
    runs: list[tuple[str, str, str]] = []  # head, first and last number
    for name in names:
        head = name.rstrip("0123456789")
        number = name[len(head) :][-9:]
        head = name[: len(name) - len(number)]
        if runs and number and runs[-1][0] == head and runs[-1][2]:
            _, first, last = runs[-1]
            if number == str(int(last) + 1).zfill(len(first)) and len(number) == len(first):
                runs[-1] = head, first, number
                continue
        runs.append((head, number, number))
    return ",".join(
        head + (first if first == last else f"[{first}-{last}]") for head, first, last in runs
    )


class HostLists:
    """Expands the host lists of one file, up to a limit for all of them together."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.total = 0

    def expand(self, names: str | None) -> list[str]:
        """Return the names of a list; None has none.

        Raises:
            InputError: as `expand_list`, or too many names in the whole file.
        """
        expanded = expand_list(names or "")
        self.total += len(expanded)
        if self.total > MAX_FILE_NAMES:
            raise InputError(f"{self.what} has host lists of more than {MAX_FILE_NAMES} names")
        return expanded


def _numbers(ranges: str, names: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("", "")
        if not match or int(first) > int(last):
            raise InputError(
                f"host range {names} is not valid: {part.strip()} is no ascending range"
            )
        if len(numbers) + int(last) - int(first) >= MAX_NAMES:
            raise InputError(f"host range {names} has more than {MAX_NAMES} names")
        numbers += [str(x).zfill(len(first)) for x in range(int(first), int(last) + 1)]
    return numbers
