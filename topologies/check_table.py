"""A check's report as a table."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .check_report import Report

_STYLES = {"pass": "green", "warn": "yellow", "fail": "red"}


def report_table(report: Report) -> RenderableType:
    """Return the lines as a table, and below it what could not be checked."""
    table = Table()
    for heading in ("", "check", "where", "what", "remedy"):
        table.add_column(heading, overflow="fold")
    for line in report.lines:
        level = Text(line.level, style=_STYLES[line.level])
        table.add_row(level, line.check, line.subject, line.message, line.remedy)
    if not report.not_checked:
        return table
    missing = ", ".join(report.not_checked)
    return Group(table, Text(f"not checked, because the source does not tell: {missing}"))
