"""Recorded routing: which experts every token chose, from `topk` arrays and JSON lines.

    .npz        integers `topk[windows, layers, source_ranks, tokens, k]`, or without windows; -1
                is no expert, a token of -1 alone is padding
    Megatron    JSON lines of `--moe-routing-trace-path`: `step`, `layer`, `rank`, `top_indices`; a
                folder is all its *.jsonl; a window is a step; rows with `mtp_idx` are left out
    simllm      JSON lines with `routing: [{layer_index, expert_ids}]`, a token a line; one window,
                one source

Layers are taken in ascending order of their numbers.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epplan.errors import InputError

from .token_sets import Ints, TokenSets, aggregated

_REMEDY = "JSON lines of Megatron's --moe-routing-trace-path, or with `routing` (simllm)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """Tokens as recorded.

    Attributes:
        sets: [windows][layers], with `num_sources` source ranks each.
        num_sources: ranks that were recorded.
        top_k: experts of a token.
        problems: what is wrong in itself, whatever the model.
        remarks: what was left out, in words.
    """

    sets: tuple[tuple[TokenSets, ...], ...]
    num_sources: int
    top_k: int
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        """The largest expert id."""
        every = (sets.experts for window in self.sets for sets in window)
        return max((int(experts.max(initial=-1)) for experts in every), default=-1)


def from_topk(topk: npt.NDArray[np.integer], what: str) -> RoutingTrace:
    """Return an array [windows, layers, sources, tokens, k] (or without windows) as a trace.

    Raises:
        InputError: another shape.
    """
    if topk.ndim not in (4, 5) or not np.issubdtype(topk.dtype, np.integer) or not topk.size:
        raise InputError(
            f"{what}: `topk` is {topk.dtype}{list(topk.shape)}; it must be integers "
            "[windows, layers, source_ranks, tokens, k], or the same without windows"
        )
    topk = topk.reshape(-1, *topk.shape[-4:])
    _, _, num_sources, num_tokens, top_k = topk.shape
    source = np.repeat(np.arange(num_sources), num_tokens)
    problems: set[str] = set()
    sets = tuple(
        tuple(_sets(source, layer.reshape(-1, top_k), num_sources, problems) for layer in window)
        for window in topk.astype(np.intp)
    )
    return RoutingTrace(
        sets=sets, num_sources=num_sources, top_k=top_k, problems=tuple(sorted(problems))
    )


def read_json_lines(path: Path) -> RoutingTrace:
    """Return a file of JSON lines, or a folder of them, as a trace.

    Raises:
        InputError: no such rows, or rows that are broken, with file and line.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"folder {path} has no routing trace (*.jsonl)", hints=[_REMEDY])
    # Tokens of (window, layer, rank), in arrays of experts.
    chosen: dict[tuple[int, int, int], list[list[int]]] = defaultdict(list)
    left_out = 0
    for file in files:
        for where, row in _rows(file):
            if "mtp_idx" in row:
                left_out += 1
                continue
            for key, tokens in _tokens(row, where):
                chosen[key] += tokens
    if not chosen:
        raise InputError(f"{path} has no row of a routing trace", hints=[_REMEDY])
    trace = _from_tokens(chosen)
    if not left_out:
        return trace
    remark = f"{left_out} rows of multi-token prediction layers are left out"
    return RoutingTrace(
        sets=trace.sets,
        num_sources=trace.num_sources,
        top_k=trace.top_k,
        problems=trace.problems,
        remarks=(remark,),
    )


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file} line {number}"
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{where} is no JSON object", hints=[_REMEDY])
                    yield where, row
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg}", hints=[_REMEDY]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"routing trace {file} cannot be read: {error}") from None


def _tokens(
    row: dict[str, Any], where: str
) -> Iterator[tuple[tuple[int, int, int], list[list[int]]]]:
    """Yield (window, layer, rank) and tokens of a row; nothing for rows of other kinds."""
    try:
        if "top_indices" in row:
            key = int(row.get("step", 0)), int(row["layer"]), int(row["rank"])
            yield key, [_experts(token) for token in row["top_indices"]]
        elif "routing" in row:
            for layer in row["routing"]:
                yield (0, int(layer["layer_index"]), 0), [_experts(layer["expert_ids"])]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where} is no sound row of a routing trace: {type(error).__name__} {error}",
            hints=[_REMEDY],
        ) from None


def _experts(ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(expert) is int for expert in ids):
        raise ValueError(f"expert ids must be a list of integers, not {ids}")
    return ids


def _from_tokens(chosen: dict[tuple[int, int, int], list[list[int]]]) -> RoutingTrace:
    windows, layers, ranks = (sorted({key[axis] for key in chosen}) for axis in range(3))
    top_k = max(len(token) for tokens in chosen.values() for token in tokens)
    problems: set[str] = set()
    if ranks != list(range(len(ranks))):
        problems.add(f"ranks {ranks} are not 0 to {len(ranks) - 1}")
    sets = []
    for window in windows:
        of_window = []
        for layer in layers:
            source, experts = [], []
            for number, rank in enumerate(ranks):
                for token in chosen.get((window, layer, rank), []):
                    source.append(number)
                    experts.append(token + [-1] * (top_k - len(token)))
            table = np.array(experts, dtype=np.intp).reshape(-1, top_k)
            of_window.append(_sets(np.array(source, dtype=np.intp), table, len(ranks), problems))
        sets.append(tuple(of_window))
    return RoutingTrace(
        sets=tuple(sets), num_sources=len(ranks), top_k=top_k, problems=tuple(sorted(problems))
    )


def _sets(source: Ints, experts: Ints, num_sources: int, problems: set[str]) -> TokenSets:
    """Return the sets of one layer and window, and note what is wrong with its tokens."""
    ordered = np.sort(experts, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        token = experts[twice.any(axis=1)][0]
        problems.add(f"a token chooses an expert twice: {token.tolist()}")
    if experts.size and experts.min() < -1:
        problems.add(f"expert id {experts.min()}; -1 is none")
    tokens = (experts >= 0).any(axis=1)
    weight = np.ones(int(tokens.sum()))
    return aggregated(source[tokens], experts[tokens], weight, num_sources)
