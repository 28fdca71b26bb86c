"""Starting all ranks again after a failure.

Ranks of an expert-parallel group cannot go on without one of them, so that all are started again;
those that keep a progress file go on after the last finished step.

Errors that would come again end the job. Schedulers lose exit codes (srun gives that of the ranks
it killed, torchrun 1 whatever happened), so that a rank leaves such a code in a file.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from epplan.errors import RankFailedError

Run = TypeVar("Run")

_DELIBERATE = range(2, 7)  # exit codes of epplan's own errors: the same would come again
FINAL_VARIABLE = "EPPLAN_FINAL_ERROR"  # names the file


def run_with_restarts(
    run: Callable[[], Run], max_restarts: int, talk: Callable[[str], None]
) -> Run:
    """Return what `run` returns, after at most `max_restarts` further attempts.

    Args:
        run: starts all ranks and waits for their end.
        max_restarts: 0 for none.
        talk: told of every restart.

    Raises:
        RankFailedError: the last attempt's, or one that another attempt would not change.
    """
    for restart in range(1, max_restarts + 1):
        try:
            return run()
        except RankFailedError as error:
            if not _may_pass(error):
                raise
            talk(f"{error.message.splitlines()[0]}\nrestart {restart} of {max_restarts}")
    return run()


@contextmanager
def progress_file(path: Path | None, max_restarts: int) -> Iterator[Path | None]:
    """Yield the file in which ranks keep their progress: the user's, or one for the restarts."""
    if path is not None or not max_restarts:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="epplan-") as folder:
        yield Path(folder) / "progress.json"


def _may_pass(error: RankFailedError) -> bool:
    """Tell whether the failure may be gone at the next attempt.

    A run with a result came to its end and was wrong.
    """
    return error.result is None and error.exit_code not in _DELIBERATE


def note_final_error(exit_code: int, *, is_final: bool = False) -> None:
    """Leave the exit code for whoever would start this rank again, if the error would come again.

    Args:
        exit_code: of this rank.
        is_final: the code alone does not tell, but the error would.
    """
    path = os.environ.get(FINAL_VARIABLE)
    if path and (is_final or exit_code in _DELIBERATE):
        with suppress(OSError):
            Path(path).write_text(f"{exit_code}\n")


def final_error() -> int | None:
    """Return the exit code that the ranks of an earlier start have left, if they did."""
    path = os.environ.get(FINAL_VARIABLE)
    with suppress(OSError, ValueError):
        if path:
            return int(Path(path).read_text())
    return None
