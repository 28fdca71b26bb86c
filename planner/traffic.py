"""Traffic: how many token-to-expert assignments every source rank makes, per layer and step.

From a counts file (`.npz`, one integer array `counts[windows, layers, source_ranks, experts]`),
from recorded routing (`planner/routing_trace.py`), which also says which experts tokens choose
together, or made from a rule: `uniform`, `zipf[:s]`, `lognormal[:sigma[,skew]]`.
"""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError
from epplan.files import write_atomically

from .draw_sets import Router, draw_sets
from .model import ModelSpec
from .routing_trace import RoutingTrace, from_topk, read_json_lines
from .token_sets import TokenSets, mean_of

Floats = npt.NDArray[np.float64]

DEFAULT_TOKENS_PER_RANK = 4096  # the batch of published expert-parallel prefill benchmarks
MAX_WINDOWS = 8  # the program grows with every window; more are averaged in runs of equal length
RULES = "uniform, zipf[:s], lognormal[:sigma[,skew]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Assignments of one step.

    Attributes:
        counts: [windows, layers, ranks, experts].
        source: the rule or file.
        sha256: hash of what was read, or of the rule with its seed.
        windows: windows of the file; `counts` may hold means of several in a row.
        source_ranks: 1 if the same mix is taken on every rank.
        tokens_per_rank: mean tokens of a rank and step.
        assumptions: what was assumed, in words.
        sets: which experts tokens choose together, [windows][layers]; None where only counts are
            known. Their counts are `counts`.
    """

    counts: Floats
    source: str
    sha256: str
    windows: int
    source_ranks: int
    tokens_per_rank: int
    assumptions: tuple[str, ...] = ()
    sets: tuple[tuple[TokenSets, ...], ...] | None = None

    def from_ranks(self, ranks: Sequence[int]) -> "Traffic":
        """Return the traffic of some of the ranks only."""
        sets = self.sets
        if sets is not None:
            share = len(ranks) / self.counts.shape[2]
            sets = tuple(
                tuple(
                    layer.scaled(share) if layer.num_sources == 1 else layer.from_sources(ranks)
                    for layer in window
                )
                for window in sets
            )
        return replace(
            self,
            counts=self.counts[:, :, list(ranks)],
            source_ranks=len(ranks) if self.source_ranks > 1 else 1,
            sets=sets,
        )


def make_traffic(
    load: str, model: ModelSpec, num_ranks: int, tokens_per_rank: int | None, seed: int
) -> Traffic:
    """Return the traffic for `num_ranks` source ranks.

    Args:
        load: a rule, or the path of a counts file or of recorded routing.
        model: gives layers, experts and top-k.
        num_ranks: size of the EP group.
        tokens_per_rank: tokens a rank routes per step; None takes a counts file as it is and
            DEFAULT_TOKENS_PER_RANK for a rule.
        seed: of the rules that draw.

    Raises:
        InputError: unknown rule, or all problems of the file at once.
    """
    name, _, arguments = load.partition(":")
    if name in ("uniform", "zipf", "lognormal"):
        return _from_rule(name, arguments, model, num_ranks, tokens_per_rank, seed)
    path = Path(load)
    if not path.exists():
        raise InputError(
            f"unknown load: {load}",
            hints=[
                f"a rule ({RULES}), or the path of a counts file (.npz) or routing trace (.jsonl)"
            ],
        )
    return _from_file(path, model, num_ranks, tokens_per_rank)


def write_counts(path: Path, counts: npt.NDArray[np.integer]) -> None:
    """Write a counts file: integers [windows, layers, source_ranks, experts].

    Raises:
        InputError: the folder is missing or not writable.
    """
    content = io.BytesIO()
    np.savez_compressed(content, counts=counts)
    write_atomically(path, content.getvalue())


def with_sets(traffic: Traffic, model: ModelSpec, seed: int) -> Traffic:
    """Return the traffic with token sets: its own, or drawn ones with its counts.

    Args:
        traffic: the traffic.
        model: gives top-k and the groups of the router.
        seed: of the draw.

    Raises:
        InputError: an expert is chosen more often than there are tokens.
    """
    if traffic.sets is not None:
        return traffic
    router = Router(top_k=model.top_k, groups=model.router.groups, picked=model.router.topk_groups)
    counts = traffic.counts
    if traffic.source_ranks == 1:
        counts = counts.sum(axis=2, keepdims=True)
    _check_drawable(counts, model)
    sets, ungrouped = [], 0
    for window, of_window in enumerate(counts):
        row = []
        for layer, of_layer in enumerate(of_window):
            random = np.random.default_rng([seed, window, layer])
            drawn, failed = draw_sets(of_layer, router, random, len(counts))
            row.append(drawn)
            ungrouped += failed
        sets.append(tuple(row))
    assumptions = [
        "which experts a token chooses together is not in the traffic: token sets are drawn at "
        "random with its counts; real tokens choose some experts together more often"
    ]
    if ungrouped:
        assumptions.append(
            f"the router's {router.groups} groups, {router.picked} a token, do not fit the counts "
            f"in {ungrouped} of {counts.shape[0] * counts.shape[1] * counts.shape[2]} draws, which "
            "ignore them"
        )
    return replace(traffic, sets=tuple(sets), assumptions=(*traffic.assumptions, *assumptions))


def _check_drawable(counts: Floats, model: ModelSpec) -> None:
    tokens = counts.sum(axis=3, keepdims=True) / model.top_k
    excess = counts - tokens
    if (excess <= tokens * 1e-6).all():
        return
    window, layer, source, expert = np.unravel_index(int(excess.argmax()), counts.shape)
    raise InputError(
        f"no token sets have these counts: expert {expert} of layer "
        f"{model.moe_layers[layer]} has {counts[window, layer, source, expert]:.0f} assignments "
        f"from source {source} in window {window}, which has "
        f"{tokens[window, layer, source, 0]:.0f} tokens of {model.top_k} assignments",
        hints=[
            "take --transfer per-choice, which needs counts only",
            "or give the routing itself (array `topk`, or a routing trace)",
        ],
    )


def usual_tokens(load: str, model: ModelSpec, num_ranks: int) -> int:
    """Return the tokens of a rank and step where none are given; arguments of `make_traffic`."""
    return make_traffic(load, model, num_ranks, None, 0).tokens_per_rank


def _from_rule(
    name: str,
    arguments: str,
    model: ModelSpec,
    num_ranks: int,
    tokens_per_rank: int | None,
    seed: int,
) -> Traffic:
    numbers = _numbers(name, arguments)
    tokens = tokens_per_rank or DEFAULT_TOKENS_PER_RANK
    random = np.random.default_rng(seed)
    layers, experts = model.num_moe_layers, model.num_experts
    skew = 0.0
    if name == "uniform":
        popularity = np.ones((layers, 1, experts))
    elif name == "zipf":
        ranked = np.arange(1, experts + 1, dtype=float) ** -(numbers[0] if numbers else 1.0)
        popularity = np.stack([random.permutation(ranked) for _ in range(layers)])[:, None]
    else:
        sigma, skew = (*numbers, 1.0, 0.0)[:2] if not numbers else (*numbers, 0.0)[:2]
        popularity = random.lognormal(0.0, sigma, (layers, 1, experts))
    if skew:
        popularity = popularity * random.lognormal(0.0, skew, (layers, num_ranks, experts))
    shares = np.broadcast_to(_shares(popularity, model.top_k), (layers, num_ranks, experts))
    counts = shares * (tokens * model.top_k)
    assumptions = [f"traffic is the rule {name}{':' + arguments if arguments else ''}, not a trace"]
    if tokens_per_rank is None:
        assumptions.append(f"{tokens} tokens a rank and step (give --tokens)")
    if not skew:
        assumptions.append("every rank sends the same expert mix")
    rule = f"{name}:{arguments}" if arguments else name
    return Traffic(
        counts=counts[None],
        source=rule,
        sha256=hashlib.sha256(f"{rule} seed {seed}".encode()).hexdigest(),
        windows=1,
        source_ranks=num_ranks if skew else 1,
        tokens_per_rank=tokens,
        assumptions=tuple(assumptions),
    )


def _numbers(name: str, arguments: str) -> tuple[float, ...]:
    limit = {"uniform": 0, "zipf": 1, "lognormal": 2}[name]
    try:
        numbers = tuple(float(text) for text in arguments.split(",") if arguments)
    except ValueError:
        numbers = (-1.0,)
    if len(numbers) > limit or any(not 0 <= number < 100 for number in numbers):
        raise InputError(f"load {name}:{arguments} is not valid", hints=[f"rules: {RULES}"])
    return numbers


def _shares(popularity: Floats, top_k: int) -> Floats:
    """Return popularity as shares of the assignments, none above 1/top_k.

    A token picks top_k different experts, so an expert gets at most one of a token's top_k
    assignments; what is above is given to the others in proportion.
    """
    shares: Floats = popularity / popularity.sum(axis=-1, keepdims=True)
    limit = 1.0 / top_k
    for _ in range(popularity.shape[-1]):
        full = shares >= limit
        if not (shares > limit * (1 + 1e-12)).any():
            break
        shares = np.where(full, limit, shares)
        rest = 1.0 - limit * full.sum(axis=-1, keepdims=True)
        free = np.where(full, 0.0, shares)
        total = free.sum(axis=-1, keepdims=True)
        shares = np.where(full, limit, free * np.divide(rest, total, where=total > 0, out=total))
    return shares


def _from_file(
    path: Path, model: ModelSpec, num_ranks: int, tokens_per_rank: int | None
) -> Traffic:
    counts, trace = _read(path, model)
    what = f"{'routing trace' if trace else 'counts file'} {path}"
    problems = [*_trace_problems(trace, model), *_problems(counts, model, num_ranks)]
    if problems:
        raise InputError(f"{what} does not fit", problems=problems)
    windows, _, source_ranks, _ = counts.shape
    merged = _merged_windows(counts)
    sets = None if trace is None else _merged_sets(trace)
    assumptions = [] if trace is None else list(trace.remarks)
    if source_ranks == 1:
        merged = np.repeat(merged / num_ranks, num_ranks, axis=2)
        assumptions.append(
            f"the {what.removesuffix(f' {path}')} has one source rank: every rank is taken to send "
            "the same expert mix"
        )
    if windows > len(merged):
        assumptions.append(f"{windows} windows are averaged in {len(merged)} runs of equal length")
    mean_tokens = merged.sum() / (len(merged) * merged.shape[1] * num_ranks * model.top_k)
    if tokens_per_rank is None:
        assumptions.append(f"a step is one window: {mean_tokens:.0f} tokens a rank")
    else:
        factor = tokens_per_rank / mean_tokens
        merged = merged * factor
        if sets is not None:
            sets = tuple(tuple(layer.scaled(factor) for layer in window) for window in sets)
    return Traffic(
        counts=merged,
        source=str(path),
        sha256=_hash(path),
        windows=windows,
        source_ranks=source_ranks,
        tokens_per_rank=tokens_per_rank or max(1, round(mean_tokens)),
        assumptions=tuple(assumptions),
        sets=sets,
    )


def _read(path: Path, model: ModelSpec) -> tuple[npt.NDArray[np.integer], RoutingTrace | None]:
    """Return counts [windows, layers, sources, experts], and the routing if the file has it."""
    trace = None
    if path.is_dir() or path.suffix == ".jsonl":
        trace = read_json_lines(path)
    else:
        arrays = _read_arrays(path)
        if "topk" in arrays:
            trace = from_topk(arrays["topk"], f"traffic file {path}")
    if trace is None:
        return _checked_counts(path, arrays["counts"]), None
    experts = max(model.num_experts, trace.largest + 1)
    counts = np.array(
        [[np.rint(sets.counts(experts)) for sets in window] for window in trace.sets]
    ).astype(np.int64)
    return counts, trace


def _hash(path: Path) -> str:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _trace_problems(trace: RoutingTrace | None, model: ModelSpec) -> list[str]:
    if trace is None:
        return []
    problems = list(trace.problems)
    if trace.top_k != model.top_k:
        problems.append(
            f"{trace.top_k} experts a token, but model {model.name} has top_k {model.top_k}"
        )
    return problems


def _merged_sets(trace: RoutingTrace) -> tuple[tuple[TokenSets, ...], ...]:
    runs = np.array_split(np.arange(len(trace.sets)), min(len(trace.sets), MAX_WINDOWS))
    return tuple(
        tuple(
            mean_of([trace.sets[window][layer] for window in run.tolist()])
            for layer in range(len(trace.sets[0]))
        )
        for run in runs
    )


def _merged_windows(raw: npt.NDArray[np.integer]) -> Floats:
    """Return at most MAX_WINDOWS windows: means of runs, as equal in length as can be."""
    runs = np.array_split(raw, min(len(raw), MAX_WINDOWS))
    return np.stack([run.mean(axis=0, dtype=np.float64) for run in runs])


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.integer]]:
    if not zipfile.is_zipfile(path):
        raise InputError(f"counts file {path} is not a readable .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in ("counts", "topk") if name in archive}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        raise InputError(f"counts file {path} is not a readable .npz file") from None
    if not found:
        raise InputError(f"counts file {path} has no array `counts` and no array `topk`")
    if len(found) == 2:
        raise InputError(
            f"traffic file {path} has both `counts` and `topk`: counts follow from `topk`",
            hints=["leave one of them out"],
        )
    return found


def _checked_counts(path: Path, counts: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    if counts.ndim != 4 or not np.issubdtype(counts.dtype, np.integer):
        raise InputError(
            f"counts file {path}: `counts` is {counts.dtype}{list(counts.shape)}; it must be "
            "integers [windows, layers, source_ranks, experts]"
        )
    return counts


def _problems(counts: npt.NDArray[np.integer], model: ModelSpec, num_ranks: int) -> list[str]:
    windows, layers, source_ranks, experts = counts.shape
    problems = []
    if not windows:
        problems.append("it has no window")
    if layers != model.num_moe_layers:
        problems.append(
            f"{layers} layers, but model {model.name} has {model.num_moe_layers} MoE layers"
        )
    if experts != model.num_experts:
        problems.append(f"{experts} experts, but model {model.name} has {model.num_experts}")
    if source_ranks not in (1, num_ranks):
        problems.append(f"{source_ranks} source ranks; the EP group has {num_ranks} (1 also fits)")
    if counts.size and counts.min() < 0:
        problems.append(f"negative counts, the smallest is {counts.min()}")
    elif windows and not counts.sum(axis=(0, 2, 3)).all():
        empty = np.flatnonzero(counts.sum(axis=(0, 2, 3)) == 0).tolist()
        problems.append(f"layers {empty} have no assignment at all")
    return problems
