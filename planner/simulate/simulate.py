"""Simulate a step and say how long it takes, what limits it, and what the hardware would allow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from epplan.errors import InputError

from .events import Timeline, in_one_stream, run
from .expert_parallel import expert_parallel
from .ledger import Ledger, Program
from .memory import Memory, memory
from .scene import Floats, Layout, Scene, Usage
from .tensor_parallel import tensor_parallel
from .transfers import TransferProfile

AUTOMATIC = (1, 2, 4, 8)  # micro-batches tried
_MOST_OF_A_KIND = 32  # links in the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One thing that takes time: a resource, a GPU's arithmetic or memory, a latency."""

    name: str
    seconds: float
    bytes: float
    floor_s: float  # what the rated figure would allow; 0 where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A simulated step.

    Attributes:
        usage: as simulated; `micro_batches` is the number chosen.
        layout: of the model.
        step_s: of the slowest window of the traffic: one token of every sequence, or all prompts.
        mean_step_s: mean over windows.
        tokens: that a step makes or reads.
        limits: what takes time, longest first; with overlap they run beside each other.
        floor_s: no schedule is faster on hardware of these rated figures.
        compute_s: computing of the busiest rank.
        transfer_s: transfers of the busiest rank.
        memory: of every rank.
        timeline: of the slowest window.
        num_windows: windows of the traffic.
    """

    usage: Usage
    layout: Layout
    num_gpus: int
    step_s: float
    mean_step_s: float
    tokens: float
    limits: tuple[Limit, ...]
    floor_s: float
    compute_s: float
    transfer_s: float
    memory: tuple[Memory, ...]
    timeline: Timeline
    num_windows: int

    @property
    def tps(self) -> float:
        """Tokens of the whole group per second."""
        return self.tokens / self.step_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token of a sequence; prompts have none."""
        return self.step_s if self.usage.phase == "decode" else None

    @property
    def bottleneck(self) -> Limit:
        """What takes most of the time."""
        return self.limits[0]

    @property
    def fullest(self) -> Memory:
        """The rank with least memory left."""
        return max(self.memory, key=lambda use: use.total / use.capacity)

    @property
    def fits(self) -> bool:
        """Whether all ranks have the memory."""
        return all(use.fits for use in self.memory)


def simulate(scene: Scene, usage: Usage, layout: Layout, *, automatic: bool = False) -> Outcome:
    """Return the outcome.

    Args:
        scene: what runs.
        usage: how.
        layout: expert parallel over all ranks, or tensor x pipeline parallel.
        automatic: choose the number of micro-batches that is fastest.

    Raises:
        InputError: the layout does not fit the group, or the batch the ranks.
    """
    check(scene, usage, layout)
    if not automatic:
        return _of_windows(scene, usage, layout)
    holders = scene.num_ranks if layout.is_expert_parallel else scene.num_ranks // layout.size
    sequences = -(-usage.batch // holders)
    least = 1 if layout.is_expert_parallel else layout.pp
    tried = [n * least for n in AUTOMATIC if n * least <= sequences] or [1]
    outcomes = [_of_windows(scene, replace(usage, micro_batches=n), layout) for n in tried]
    fitting = [outcome for outcome in outcomes if outcome.fits] or outcomes
    return min(fitting, key=lambda outcome: outcome.step_s)


def check(scene: Scene, usage: Usage, layout: Layout) -> None:
    """Refuse a layout that does not fit the group.

    Raises:
        InputError: with every problem at once.
    """
    ranks, model = scene.num_ranks, scene.model
    problems = []
    if layout.is_expert_parallel and layout.ep != ranks:
        problems.append(f"{layout} on {ranks} GPUs")
    if not layout.is_expert_parallel and ranks % layout.size:
        problems.append(f"{layout} needs a multiple of {layout.size} GPUs, not {ranks}")
    if layout.pp > model.num_layers:
        problems.append(f"{layout.pp} stages for {model.num_layers} layers")
    holders = ranks if layout.is_expert_parallel else max(1, ranks // layout.size)
    sequences = -(-usage.batch // holders)
    if usage.phase == "decode" and usage.micro_batches > sequences:
        problems.append(f"{usage.micro_batches} micro-batches of {sequences} sequences")
    for name, size in (
        ("attention heads", model.attention.num_heads),
        ("expert width", model.expert_ffn_size),
    ):
        if size % layout.tp:
            problems.append(f"{name} {size} cannot be cut in {layout.tp} shares")
    if layout.is_expert_parallel:
        problems += _library_problems(scene, usage.transfer)
    if problems:
        raise InputError(f"layout {layout} cannot be simulated", problems=problems)


def _library_problems(scene: Scene, library: TransferProfile) -> Iterator[str]:
    island = scene.island_size
    if library.max_island and island > library.max_island:
        yield f"{library.name} reaches {library.max_island} ranks by NVLink, not {island}"
    if not library.crosses_network and island < scene.num_ranks:
        yield f"{library.name} works inside one NVLink domain, not across {scene.gpus[0].host}'s"


def _of_windows(scene: Scene, usage: Usage, layout: Layout) -> Outcome:
    outcomes = [_of_window(scene, usage, layout, window) for window in range(len(scene.counts))]
    slowest = max(outcomes, key=lambda outcome: outcome.step_s)
    mean = float(np.mean([outcome.step_s for outcome in outcomes]))
    return replace(slowest, mean_step_s=mean, num_windows=len(outcomes))


def _of_window(scene: Scene, usage: Usage, layout: Layout, window: int) -> Outcome:
    overlapped = usage.overlap and usage.micro_batches > 1
    ways = []
    for program in _programs(scene, usage, layout, window):
        tasks = program.ledger.tasks
        timeline = run(tasks if overlapped else in_one_stream(tasks), scene.num_ranks)
        ways.append((_last_step_s(program, timeline), program, timeline))
    step_s, program, timeline = min(ways, key=lambda way: way[0])
    tasks = program.ledger.tasks
    steps = len(program.last_of_step)
    network = np.sum(
        [np.nan_to_num(task.seconds) for task in tasks if task.stream != "compute"]
        or [np.zeros(scene.num_ranks)],
        axis=0,
    )
    limits = _limits(scene, program)
    return Outcome(
        usage=usage,
        layout=layout,
        num_gpus=scene.num_ranks,
        step_s=step_s,
        mean_step_s=step_s,
        tokens=usage.batch * (usage.context if usage.phase == "prefill" else 1),
        limits=limits,
        floor_s=max(limit.floor_s for limit in limits),
        compute_s=float(program.ledger.work.seconds.max()) / steps * usage.compute_factor,
        transfer_s=float(network.max()) / steps,
        memory=tuple(memory(scene, usage, layout, window)),
        timeline=timeline,
        num_windows=1,
    )


def _programs(scene: Scene, usage: Usage, layout: Layout, window: int) -> Iterator[Program]:
    """Yield the orders in which the step can be issued; the fastest counts."""
    if layout.is_expert_parallel:
        yield expert_parallel(scene, usage, window)
        return
    yield tensor_parallel(scene, usage, layout, window, together=1)
    if usage.overlap and usage.micro_batches > 1 and layout.tp > 1:
        yield tensor_parallel(scene, usage, layout, window, together=2)


def _last_step_s(program: Program, timeline: Timeline) -> float:
    """Return the last step's seconds: the time from the end of the one before to its own."""
    ends = [float(np.nanmax(timeline.end[:last])) for last in program.last_of_step]
    return ends[-1] - (ends[-2] if len(ends) > 1 else 0.0)


def _limits(scene: Scene, program: Program) -> tuple[Limit, ...]:
    """Return what takes time in one step, longest first."""
    ledger, steps = program.ledger, len(program.last_of_step)
    work, names = ledger.work, [gpu.id for gpu in scene.gpus]
    rated_flops = np.array([d.flops_per_s(scene.model.weight_bytes) for d in scene.devices])
    rated_hbm = np.array([device.gpu.hbm for device in scene.devices])
    found = [
        _limit("FLOP/s of", names, work.arithmetic_s, np.zeros_like(rated_hbm),
               work.flops / rated_flops),
        _limit("HBM of", names, work.memory_s, work.hbm_bytes, work.hbm_bytes / rated_hbm),
        _limit("launching kernels on", names, work.launch_s, np.zeros_like(rated_hbm),
               np.zeros_like(rated_hbm)),
        Limit(name="latency of transfers", seconds=ledger.latency_s, bytes=0.0, floor_s=0.0),
    ]  # fmt: skip
    rated = np.array([resource.link.rated_bytes_per_s for resource in ledger.routes.resources])
    for number in _busiest(ledger):
        amount = float(ledger.resource_bytes[number])
        if amount > 0:
            found.append(
                Limit(
                    name=ledger.routes.resources[number].name,
                    seconds=float(ledger.resource_busy_s[number]),
                    bytes=amount,
                    floor_s=amount / float(rated[number]),
                )
            )
    per_step = [
        replace(x, seconds=x.seconds / steps, bytes=x.bytes / steps, floor_s=x.floor_s / steps)
        for x in found
    ]
    return tuple(sorted(per_step, key=lambda limit: -limit.seconds))


def _busiest(ledger: Ledger) -> list[int]:
    """Return the busiest resources of every kind of link."""
    left = dict.fromkeys((r.link.kind for r in ledger.routes.resources), _MOST_OF_A_KIND)
    chosen = []
    for number in np.argsort(-ledger.resource_busy_s, kind="stable").tolist():
        kind = ledger.routes.resources[number].link.kind
        if left[kind]:
            left[kind] -= 1
            chosen.append(number)
    return chosen


def _limit(what: str, names: list[str], seconds: Floats, amount: Floats, floor_s: Floats) -> Limit:
    worst = int(seconds.argmax())
    return Limit(
        name=f"{what} {names[worst]}",
        seconds=float(seconds[worst]),
        bytes=float(amount[worst]),
        floor_s=float(floor_s.max()),
    )
