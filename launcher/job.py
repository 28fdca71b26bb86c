"""One job of several hosts: everything a target needs to render its files and commands.

    plan, options, settings --> Job --render--> Rendering --write--> folder --start--> ranks

A target only translates: which rank is where, on which GPU and with which variables is decided
before, and is the same under every scheduler.
"""

from dataclasses import dataclass
from pathlib import Path

from epplan.planner.plan import Rank
from epplan.quoting import comment

from .environment import Variable
from .request import LaunchRequest

PLAN_FILE = "plan.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.json"
FINAL_ERROR_FILE = "final-error"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHost:
    """A host and its consecutive ranks.

    Args:
        index: of the host, in rank order.
        name: what the host is called now.
        ranks: as planned, in order.
        variables: those of this host's ranks only.
    """

    index: int
    name: str
    ranks: tuple[Rank, ...]
    variables: tuple[Variable, ...]

    @property
    def first_rank(self) -> int:
        """Number of its first rank."""
        return self.ranks[0].rank

    @property
    def num_gpus(self) -> int:
        """How many GPUs a scheduler has to give, so that the planned ones are among them."""
        return 1 + max(rank.gpu_index for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the job, relative to its folder."""

    name: str
    text: str
    is_executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Variables and files from the topology.

    Args:
        variables: of all ranks.
        of_host: variables of the ranks of one host, by planned name.
        files: what the variables name; relative to the job's folder.
        notes: what was left alone, and why.
    """

    variables: tuple[Variable, ...]
    of_host: dict[str, tuple[Variable, ...]]
    files: tuple[File, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A launch over hosts.

    Args:
        request: plan and worker options.
        made_by: version and command line, for the head of every file.
        name: of the job, for schedulers.
        output: where the files are written.
        folder: where the ranks find them, the same absolute path on all hosts.
        result: file for rank 0's result; None where the ranks cannot write one.
        python: the interpreter that has epplan, on all hosts.
        master_address: where rank 0 listens.
        master_port: the port it listens on.
        hosts: in rank order.
        variables: of all ranks.
        files: what the variables refer to.
        image: the container image, for Kubernetes.
        notes: what was left alone, and why.
        max_restarts: how often all ranks are started again after a crash.
        forgotten: files that restarts need, and that are deleted when the job is started anew.
    """

    request: LaunchRequest
    made_by: str
    name: str
    output: Path
    folder: Path
    result: Path | None
    python: str
    master_address: str
    master_port: int
    hosts: tuple[JobHost, ...]
    variables: tuple[Variable, ...]
    files: tuple[File, ...]
    image: str | None
    notes: tuple[str, ...]
    max_restarts: int
    forgotten: tuple[Path, ...]

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return self.request.num_ranks

    def path(self, name: str) -> str:
        """Return the absolute path of a file of the job."""
        return str(self.folder / name)

    def head(self, what: str) -> str:
        """Return the comment lines every file begins with: who made it, and what it is."""
        return f"# {comment(self.made_by)}\n# {comment(what)}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command line; `host` is where to run it, None where the job was rendered."""

    arguments: tuple[str, ...]
    host: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A job in a target's words.

    Args:
        files: of the job's folder.
        commands: that start the job; all of them are needed.
    """

    files: tuple[File, ...]
    commands: tuple[Command, ...]
