"""Everything epplan raises on purpose, with the exit code it ends in.

    EpplanError                1  internal error, or a failure nobody could foresee
    |-- InputError             2  what the user gave is wrong: file, option, plan
    |-- InfeasibleError        3  the question is sound and no placement answers it
    |-- LimitReachedError      5  the time limit came before any plan
    |-- FindingsError          6  a check ended with findings
    |-- PeerError              7  a rank ended because another rank failed or hangs
    `-- RankFailedError        *  a launched rank failed; its own exit code

A message names the object, its value, the rule and the remedy. Exit code 4 (limit hit, plan
written) and 130 (interrupted) are results, not exceptions.
"""

from collections.abc import Sequence
from typing import Any


class EpplanError(Exception):
    """Base of all deliberate errors.

    Args:
        message: what is wrong, in one sentence.
        problems: all the single problems, when there are several.
        hints: remedies, the most useful first.
    """

    exit_code: int = 1

    def __init__(
        self, message: str, *, problems: Sequence[str] = (), hints: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hints = tuple(hints)

    def __str__(self) -> str:
        """Return message, problems and numbered remedies as the user reads them."""
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if len(self.hints) == 1:
            lines.append(f"hint: {self.hints[0]}")
        elif self.hints:
            lines.append("remedies:")
            lines += [f"  {number}. {hint}" for number, hint in enumerate(self.hints, 1)]
        return "\n".join(lines)


class InputError(EpplanError):
    """What the user gave is wrong."""

    exit_code = 2


class InfeasibleError(EpplanError):
    """No placement satisfies the constraints."""

    exit_code = 3


class LimitReachedError(EpplanError):
    """The limit was reached without a plan."""

    exit_code = 5


class FindingsError(EpplanError):
    """A check ended with findings."""

    exit_code = 6


class PeerError(EpplanError):
    """This rank waited for another one that failed or hangs; never the cause of a failed run."""

    exit_code = 7


class RankFailedError(EpplanError):
    """A launched rank failed; `exit_code` is the rank's own.

    `result` is what the worker had written by then: a run that ended but differs from the dense
    model fails and still has its result.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int,
        hints: Sequence[str] = (),
        result: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hints=hints)
        self.exit_code = exit_code
        self.result = result
