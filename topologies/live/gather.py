"""All hosts of a job in one file: every rank leaves its host in a folder, rank 0 collects them.

    srun --ntasks-per-node=1 epplan topo discover -o hosts.json
    torchrun --nproc-per-node=1 --no-python epplan topo discover -o hosts.json
    mpirun -N 1 epplan topo discover -o hosts.json

`hosts.json.parts/` beside the output has to be a folder that all hosts share. No address or port
is needed, which Slurm and MPI do not give and torchrun's agent occupies. Rank 0 writes a random
word into it and accepts only parts that repeat it: what an earlier, broken run left does not
count, and a rank that has answered the old word answers again.
"""

import json
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from epplan.errors import EpplanError, InputError
from epplan.files import write_atomically

from .host_file import HostRecord

# Rank and number of ranks, as torchrun, Slurm, Open MPI and MPICH name them.
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_WORD = "word"
_POLL_S = 0.05
TIMEOUT_S = 120.0  # a network file system may show a new file a minute late


@dataclass(frozen=True, slots=True)
class Place:
    """Who this process is among the ranks that discover together."""

    rank: int
    count: int


def find_place(variables: Mapping[str, str]) -> Place:
    """Return this process's rank, or 0 of 1 outside a job.

    A batch script has rank 0 and the job's number of tasks, but is one process alone: only `srun`
    sets the number of tasks of a step.
    """
    for rank, count in _VARIABLES:
        if variables.get(rank, "").isdecimal() and variables.get(count, "").isdecimal():
            return Place(int(variables[rank]), int(variables[count]))
    return Place(0, 1)


def gather(
    own: HostRecord, place: Place, output: Path, timeout_s: float = TIMEOUT_S
) -> list[HostRecord] | None:
    """Return all hosts on rank 0, None on the others; all ranks have to call it.

    Args:
        own: this rank's host; ranks on the same host count once.
        place: this rank's.
        output: names the folder in which the ranks meet.
        timeout_s: how long to wait for the others.

    Raises:
        InputError: a rank did not come.
    """
    folder = output.with_name(f"{output.name}.parts")
    if place.rank == 0:
        return _collect(own, place.count, folder, timeout_s)
    _answer(own, place.rank, folder, timeout_s)
    return None


def _collect(own: HostRecord, count: int, folder: Path, timeout_s: float) -> list[HostRecord]:
    word = secrets.token_hex(8)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from None
    write_atomically(folder / _WORD, word)
    found = {0: own}
    deadline = time.monotonic() + timeout_s
    while len(found) < count:
        for rank in range(1, count):
            if rank not in found and (host := _part(folder / str(rank), word)):
                found[rank] = host
        if len(found) < count and time.monotonic() > deadline:
            missing = [rank for rank in range(count) if rank not in found]
            raise InputError(
                f"ranks {missing} of {count} left no host in {folder} within {timeout_s:.0f} s",
                hints=[
                    "give an output in a folder that all hosts share",
                    "or run `epplan topo discover` on every host by itself",
                ],
            )
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)  # NFS keeps what another rank reads just now
    return _one_of_each(found[rank] for rank in range(count))


def _one_of_each(records: Iterable[HostRecord]) -> list[HostRecord]:
    """Return each host once, as the rank that sees most of its GPUs describes it."""
    hosts: dict[str, HostRecord] = {}
    for record in records:
        known = hosts.setdefault(record.name, record)
        if known.boot_id != record.boot_id:
            raise InputError(
                f"two machines are called {record.name}",
                hints=["run `epplan topo discover` on each and change a name in its file"],
            )
        if len(record.gpus) > len(known.gpus):
            hosts[record.name] = record
    return list(hosts.values())


def _answer(own: HostRecord, rank: int, folder: Path, timeout_s: float) -> None:
    """Leave this rank's part, again for every new word, until rank 0 removes the folder."""
    answered = None
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        word = _read(folder / _WORD)
        if word is None and answered is not None:
            return
        if word is not None and word != answered:
            part = {"word": word, "host": own.model_dump(mode="json")}
            with suppress(InputError):  # removed meanwhile: the folder of an earlier run
                write_atomically(folder / str(rank), json.dumps(part))
                answered = word
        time.sleep(_POLL_S)
    state = "was not removed" if answered else "did not appear"
    raise EpplanError(
        f"rank {rank} waited {timeout_s:.0f} s for rank 0: {folder} {state}",
        hints=["give an output in a folder that all hosts share"],
    )


def _part(file: Path, word: str) -> HostRecord | None:
    text = _read(file)
    part = json.loads(text) if text else {}
    return HostRecord.model_validate(part["host"]) if part.get("word") == word else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
