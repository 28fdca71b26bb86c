"""The report of a check: lines of pass, warn and fail."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["pass", "warn", "fail"]
Problem = tuple[Literal["warn", "fail"], str, str, str]  # level, subject, message, remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the report."""

    level: Level
    check: str
    subject: str
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All lines, and the checks the source has no facts for."""

    lines: tuple[Line, ...]
    not_checked: tuple[str, ...]

    @property
    def has_findings(self) -> bool:
        """Tell whether anything did not pass."""
        return any(line.level != "pass" for line in self.lines)

    def counts(self) -> dict[Level, int]:
        """Return the number of lines of each level."""
        levels: tuple[Level, ...] = ("pass", "warn", "fail")
        return {level: sum(line.level == level for line in self.lines) for level in levels}

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "counts": self.counts(),
            "lines": [
                {
                    "level": line.level,
                    "check": line.check,
                    "subject": line.subject,
                    "message": line.message,
                    "remedy": line.remedy or None,
                }
                for line in self.lines
            ],
            "not_checked": list(self.not_checked),
        }


def joined(reports: Iterable[Report]) -> Report:
    """Return several reports as one; what any of them checked is checked."""
    reports = list(reports)
    lines = tuple(line for report in reports for line in report.lines)
    missing = dict.fromkeys(name for report in reports for name in report.not_checked)
    checked = {line.check for line in lines}
    return Report(lines=lines, not_checked=tuple(x for x in missing if x not in checked))


def report_lines(name: str, subject: str, passed: str, problems: Iterable[Problem]) -> list[Line]:
    """Return a check's problems as lines, or the one line that it passed."""
    lines = [
        Line(level=level, check=name, subject=where, message=message, remedy=remedy)
        for level, where, message, remedy in problems
    ]
    return lines or [Line(level="pass", check=name, subject=subject, message=passed)]
