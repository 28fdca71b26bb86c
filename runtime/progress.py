"""How far a run has come, so that one started again goes on after the last finished step.

Weights are seeded, a function of their names alone, and a step depends on no other: the number of
finished steps is the whole state. A new plan for fewer ranks (`epplan replan`) may go on where the
old one stopped, as long as model, seed and sequences are the same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text, validate, write_atomically
from epplan.planner.plan import Plan, content_hash


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """Steps in a row that one plan ran."""

    plan_sha256: str
    ranks: int
    first: int = Field(ge=0)
    done: int = Field(ge=0)  # steps finished, all parts together


class ProgressRecord(_Record):
    """The file; `run` names what must stay the same."""

    schema_version: Literal[1] = 1
    kind: Literal["epplan-progress"] = "epplan-progress"
    run: dict[str, int | str]
    done: int = Field(ge=0)
    parts: tuple[Part, ...] = ()


@dataclass(slots=True)
class Progress:
    """The progress of this run; rank 0 keeps the file.

    Attributes:
        first: steps that were finished before.
        is_kept: whether rank 0 keeps a file.
        path: the file, on rank 0.
        record: what rank 0 knows.
        plan: the plan that runs now.
    """

    first: int
    plan: Plan
    is_kept: bool = False
    path: Path | None = None
    record: ProgressRecord = field(default_factory=lambda: ProgressRecord(run={}, done=0))

    def remaining(self, steps: int) -> range:
        """Return the steps to run; the last one again where all are done, to have a result."""
        return range(min(self.first, steps - 1), steps)

    def finish(self, step: int) -> None:
        """Note that a step, and so all before it, is done on all ranks; a collective."""
        if self.is_kept:
            dist.barrier()
        if self.path is None:
            return
        part = Part(
            plan_sha256=self.plan.sha256(),
            ranks=self.plan.world_size,
            first=self.first,
            done=step + 1,
        )
        before = tuple(other for other in self.record.parts if other.done <= self.first)
        record = self.record.model_copy(update={"done": step + 1, "parts": (*before, part)})
        write_atomically(self.path, record.model_dump_json(indent=1) + "\n")

    def notes(self) -> tuple[str, ...]:
        """Return what a reader of the result should know."""
        if not self.first:
            return ()
        return (f"went on after {self.first} finished steps, as the progress file says",)


def open_progress(path: Path | None, plan: Plan, rank: int, **run: int) -> Progress:
    """Return the progress of a run; a collective.

    Args:
        path: the file, read by rank 0 alone and perhaps not there yet; None: none is kept.
        plan: the plan that runs now.
        rank: this rank.
        run: options that must be the same for steps to count as this run's.

    Raises:
        InputError: on all ranks, when the file is another run's.
    """
    if path is None:
        return Progress(first=0, plan=plan)
    told: list[int | str | None] = [None]
    record = ProgressRecord(run={"model": _model_hash(plan), **run}, done=0)
    if rank == 0:
        try:
            record = _read(path, record)
            told = [record.done]
        except InputError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0)
    first = told[0]
    if isinstance(first, str):
        raise InputError(first)
    assert first is not None
    own_path = path if rank == 0 else None
    return Progress(first=first, plan=plan, is_kept=True, path=own_path, record=record)


def _model_hash(plan: Plan) -> str:
    return content_hash(plan.model.model_dump(mode="json"))[:12]


def _read(path: Path, fresh: ProgressRecord) -> ProgressRecord:
    """Return the record in a file, or the fresh one where there is none.

    Raises:
        InputError: no record, or another run's.
    """
    if not path.exists():
        return fresh
    what = f"progress file {path}"
    record = validate(ProgressRecord, parse_yaml(read_text(path, "progress file"), what), what)
    if record.run != fresh.run:
        names = sorted({*record.run, *fresh.run})
        raise InputError(
            f"{what} is of another run",
            problems=[
                f"{name} was {record.run.get(name)}, is {fresh.run.get(name)}"
                for name in names
                if record.run.get(name) != fresh.run.get(name)
            ],
            hints=["give another file with --progress, or delete this one to begin anew"],
        )
    return record
