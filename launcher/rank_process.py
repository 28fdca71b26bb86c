"""One rank, from the fork to its exit code."""

import faulthandler
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from .linux import die_with_parent, flush_c_streams
from .supervise import FailureLog, SignalPipe

Main = Callable[[list[str]], object]


def run_rank(
    main: Main,
    arguments: list[str],
    *,
    environment: Mapping[str, str],
    outputs: tuple[int, int],
    inherited_fds: Iterable[int],
    parent: int,
    failures: FailureLog,
    signals: SignalPipe,
) -> NoReturn:
    """Be a rank, in a process forked a moment ago.

    Args:
        main: the rank's program; it returns or raises, as under `python -m`.
        arguments: its command-line arguments.
        environment: variables of this rank, on top of the common ones.
        outputs: file descriptors for its stdout and stderr.
        inherited_fds: file descriptors that are not this rank's business, `outputs` included.
        parent: the process that forked it.
        failures: where to note a failure.
        signals: the parent's.
    """
    code = 1
    try:
        signals.close()
        _detach(outputs, inherited_fds, parent)
        os.environ.update(environment)
        code = _call(main, arguments, lambda code: failures.note(int(environment["RANK"]), code))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _detach(outputs: tuple[int, int], inherited_fds: Iterable[int], parent: int) -> None:
    """Leave the parent's session and files, but not its fate."""
    os.setsid()  # a process group of its own, so that it can be stopped with its children
    die_with_parent(signal.SIGKILL, parent)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((null, *outputs)):
        os.dup2(source, target)
    for fd in (null, *inherited_fds):
        os.close(fd)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # a pipe, but somebody is watching
    faulthandler.enable()  # a traceback also for SIGSEGV and SIGABRT


def _call(main: Main, arguments: list[str], note_failure: Callable[[int], None]) -> int:
    """Return the exit code of `main`, with what it raised explained on stderr."""
    try:
        main(arguments)
    except BaseException as error:
        code = _exit_code(error)
        if code:
            note_failure(code)
        _explain(error)
        return code
    return 0


def _exit_code(error: BaseException) -> int:
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _explain(error: BaseException) -> None:
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    else:
        own_frame = error.__traceback__
        assert own_frame is not None
        traceback.print_exception(error.with_traceback(own_frame.tb_next))


def _leave(code: int) -> NoReturn:
    """End this process without unwinding.

    After a failed collective the destructors of CUDA and NCCL can hang, and the frames above
    belong to the parent.
    """
    try:
        sys.stderr.flush()
        flush_c_streams()
    finally:
        os._exit(code)
