"""Predicted against published transfers of expert-parallel libraries.

    python benchmarks/published.py ROWS.csv [--fit] [--every-row]

ROWS.csv has the columns of `COLUMNS`: one published measurement a row, bandwidths by the library's
own definition (`bw_definition`). Each is built as a cluster, a routing and a library, and priced by
the evaluator the planner uses. Errors are of time: predicted / published - 1.

    used       the rows a profile's figures were fitted on (`FITTED`); --fit fits them again
    not used   all other rows of a library that has a profile
    no claim   libraries without a profile, priced as the nearest one, and kernels on more NVLink
               peers than they are built for
    left out   by what the row's own note or definition says, never by its error

A row is left out when its note calls it suspect, negative, stale or low; when a later version of
the same page gives the same case anew; when hardware, routing or bytes are not stated or contradict
each other; and when it is no all-to-all.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, cast

import click
import numpy as np
from scipy.optimize import least_squares

from epplan.planner.cost import one_copy
from epplan.planner.model import AttentionSpec, ModelSpec, RouterSpec
from epplan.planner.simulate.copies import Choices, sent_copies
from epplan.planner.simulate.transfers import (
    SmCopies,
    TransferProfile,
    WireDtype,
    make_library,
    transfer_profile,
)
from epplan.topologies.routes import Routes, find_routes
from epplan.topologies.sources import load_cluster

Row = dict[str, str]
COLUMNS = (
    *("source", "hardware", "ep_size", "gpus_per_node", "kernel", "tokens", "hidden", "topk"),
    *("dtype_dispatch", "dtype_combine", "dispatch_us", "combine_us", "algo_bandwidth_GBps"),
    *("combine_algo_bandwidth_GBps", "bw_definition", "num_experts", "source_version", "notes"),
)
WAYS = ("dispatch", "combine")
_GPUS = (  # first match in the hardware's text
    ("GB200", "gb200"),
    ("B200", "b200"),
    ("B300", "b300"),
    ("SM100", "b200"),
    ("H800", "h800"),
    ("H200", "h200"),
    ("H100", "h100"),
    ("SM90", "h100"),
    ("H20", "h20"),
    ("A100", "a100"),
    ("V100", "v100"),
    ("MI300X", "mi300x"),
    ("MI325X", "mi325x"),
    ("MI355X", "mi355x"),
)
_DTYPES = {
    "FP8": "fp8",
    "BF16": "bfloat16",
    "FP16": "float16",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
    "": "fp8",
}
_BAD_NOTES = ("suspect", "negative case", "stale", "low case")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One direction of one row, and what it is compared with."""

    row: Row
    way: str
    profile: str
    seconds: float  # published
    used: bool = False
    outside: str = ""  # why nothing is claimed, if so

    def predicted(self, profile: TransferProfile) -> float:
        """Return the seconds the model says."""
        return _seconds(self.row, self.way, profile)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for a figure that several rows repeat (a combine beside every dispatch)."""
        row, dtype = self.row, _wire_dtype(self.row, self.way)
        names = ("source", "hardware", "ep_size", "kernel", "tokens", "source_version")
        return (self.way, dtype, self.seconds, *(row[name] for name in names))

    @property
    def title(self) -> str:
        """What is compared, in words."""
        row = self.row
        dtype = row["dtype_combine"] if self.way == "combine" else row["dtype_dispatch"]
        return (
            f"{row['hardware'][:28]}, EP{row['ep_size']}, {row['kernel'][:34]}, "
            f"{row['tokens'] or '-'} tokens, {self.way} {dtype}"
        )


# --- which rows, and what they are


def _profile_of(row: Row) -> tuple[str | None, str]:
    """Return the profile of a row's kernel, or None and why there is none."""
    kernel, source = row["kernel"], row["source"]
    if "all_reduce" in kernel or row["bw_definition"] == "other":
        return None, "no all-to-all, or bytes of no stated definition"
    if "all_to_all_single" in kernel:
        return "nccl-padded", ""
    if "alltoall_perf" in kernel or row["bw_definition"] == "nccl_busbw":
        return "nccl", ""
    if "OneSided" in kernel:
        return "trtllm", ""
    deepep = "DeepEP" in source or "deepep" in source.lower() or "DeepEP" in kernel
    if not deepep or "hybrid-ep" in kernel or "PCIe kernel" in source or "Ascend" in kernel:
        return None, "a library without a profile"
    if "low_latency" in kernel:
        return "deepep-ll", ""
    return ("deepep-v2" if kernel.startswith("v2") else "deepep-normal"), ""


def _other_profile_of(row: Row) -> str | None:
    """Return the nearest profile for a library that has none: the same algorithm."""
    if "pplx-garden" in row["source"] and "CX-7" in row["hardware"]:
        return "deepep-ll"
    return None


def _superseded(rows: list[Row]) -> set[int]:
    """Return the rows that a later version of the same page gives anew."""
    last: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows):
        if row["source_version"].startswith("README 20"):
            key = tuple(row[name] for name in ("source", "hardware", "ep_size", "kernel", "tokens"))
            other = last.get(key)
            if other is None or row["source_version"] >= rows[other]["source_version"]:
                last[key] = number
    return {
        number
        for number, row in enumerate(rows)
        if row["source_version"].startswith("README 20") and number not in last.values()
    }


def _left_out(row: Row, profile: str, superseded: bool) -> str | None:
    """Return why a row of a profiled library is not compared."""
    for word in _BAD_NOTES:
        if word in row["notes"]:
            return f"its note says {word}"
    if superseded:
        return "a later version of the page gives this case anew"
    if "one figure for dispatch plus combine" in row["notes"]:
        return "one figure for two transfers"
    if _gpu(row) is None:
        return "hardware not stated"
    if not (row["ep_size"].isdecimal() and row["gpus_per_node"].isdecimal()):
        return "group not stated"
    sizes = [row[name] for name in ("tokens", "hidden", "topk")]
    if not profile.startswith("nccl") and not all(size.isdecimal() for size in sizes):
        return "tokens, hidden size or top-k not stated"
    if row["dtype_dispatch"] not in _DTYPES or row["dtype_combine"] not in _DTYPES:
        return "number format not stated"
    stated = re.search(r"(\d+) MB received per rank", row["notes"])
    if stated and row["tokens"]:
        most = int(row["ep_size"]) * int(row["tokens"]) * int(row["hidden"]) * 2 / 1e6
        if float(stated[1]) > most:
            return f"its note's {stated[1]} MB a rank exceed the {most:.0f} MB its sizes allow"
    return None


def _outside(row: Row, profile: str, other: bool) -> str:
    """Return why nothing is claimed about a row that is priced all the same."""
    if other:
        return f"{row['source'].split('/')[-1]}, as {profile}"
    limit = transfer_profile(profile).max_island
    if limit and int(row["ep_size"]) > limit and "NVL72" in row["hardware"]:
        return f"{profile}, more than its {limit} NVLink peers"
    return ""


def _gpu(row: Row) -> str | None:
    return next((name for text, name in _GPUS if text in row["hardware"]), None)


def _nic(row: Row) -> str:
    known = {"CX-6": "200Gb/s", "CX-8": "800Gb/s"}
    return next((rate for name, rate in known.items() if name in row["hardware"]), "400Gb/s")


def cases(rows: list[Row]) -> tuple[list[Case], dict[str, int]]:
    """Return what is compared, and how many rows are not, by reason."""
    compared: list[Case] = []
    reasons: dict[str, int] = defaultdict(int)
    superseded = _superseded(rows)
    for number, row in enumerate(rows):
        profile, why = _profile_of(row)
        other = profile is None
        profile = profile or _other_profile_of(row)
        if profile is None:
            reasons[why] += 1
            continue
        reason = _left_out(row, profile, number in superseded)
        if reason:
            reasons[f"{profile}: {reason}"] += 1
            continue
        outside = _outside(row, profile, other)
        found = [
            Case(
                row=row,
                way=way,
                profile=profile,
                seconds=seconds,
                used=not outside and FITTED[profile](row, way),
                outside=outside,
            )
            for way in WAYS
            if (seconds := _published_seconds(row, way)) is not None
        ]
        if not found:
            reasons["neither a time nor a bandwidth"] += 1
        compared += found
    return list({case.key: case for case in compared}.values()), dict(reasons)


# --- what a row describes


@cache
def _routes(source: str) -> Routes:
    return find_routes(load_cluster(source))


def _cluster(row: Row) -> str:
    ranks, per_host = int(row["ep_size"]), int(row["gpus_per_node"])
    per_host = min(ranks, per_host)
    hosts = -(-ranks // per_host)
    if "NVL72" in row["hardware"]:
        return f"{hosts}x{per_host}:gb200" + (f",domain={hosts}" if hosts > 1 else "")
    return f"{hosts}x{per_host}:{_gpu(row)},nic={per_host}x{_nic(row)}"


def _choices(row: Row, profile: TransferProfile) -> Choices:
    """Return the routing of the library's own benchmark: even, random."""
    routes = _routes(_cluster(row))
    ranks, top_k = len(routes.gpus), int(row["topk"] or 1)
    experts = ranks * max(1, round(int(row["num_experts"] or 256) / ranks))
    where = routes.island
    nodes = int(where.max()) + 1
    router = RouterSpec()
    if profile.copies == "node" and nodes > 1:  # DeepEP's test picks min(nodes, 4) nodes
        router = RouterSpec(groups=nodes, topk_groups=min(nodes, 4))
    if profile.copies == "rank":  # TensorRT-LLM deals every token to different ranks
        experts, top_k = ranks, min(ranks, top_k)
    if profile.name == "nccl":  # every pair the same
        experts, top_k = ranks, 1
    model = ModelSpec(
        name="published",
        hidden_size=int(row["hidden"] or 8192),
        num_layers=1,
        moe_layers=(0,),
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=1,
        attention=AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=1),
        router=router,
        weight_bytes=2,
    )
    tokens = _tokens(row)
    counts = np.full((ranks, experts), tokens * top_k / experts)
    placement = np.repeat(np.arange(ranks), experts // ranks)
    return Choices(model=model, counts=counts, shares=one_copy(placement, ranks), island=where)


def _tokens(row: Row) -> float:
    """Return tokens of a rank; nccl-tests state bytes instead."""
    if row["tokens"]:
        return float(row["tokens"])
    size = re.search(r"([0-9.]+) MiB", row["kernel"])
    return float(size[1]) * 2**20 / (8192 * 2) if size else 1.0 if "4 KiB" in row["kernel"] else 1e6


def _wire_dtype(row: Row, way: str) -> WireDtype:
    if row["bw_definition"].startswith("nccl"):
        return "bfloat16"
    text = row["dtype_combine"] or "BF16" if way == "combine" else row["dtype_dispatch"]
    return cast("WireDtype", _DTYPES[text])


def _seconds(row: Row, way: str, profile: TransferProfile) -> float:
    sms = re.search(r"(\d+) SM", row["kernel"])
    if profile.sm is not None and sms:
        profile = profile.model_copy(
            update={"sm": profile.sm.model_copy(update={"sms": int(sms[1])})}
        )
    if "all_to_all_single" not in row["kernel"]:
        profile = profile.model_copy(update={"host": 0.0})
    choices = _choices(row, profile)
    library = make_library(
        profile,
        _routes(_cluster(row)),
        choices.model.hidden_size,
        _wire_dtype(row, "dispatch"),
        _wire_dtype(row, "combine"),
    )
    cost = library.combine(choices) if way == "combine" else library.dispatch(choices)
    return cost.seconds


def _published_seconds(row: Row, way: str) -> float | None:
    """Return the published time, or the one its bandwidth means by its own definition."""
    if row[f"{way}_us"]:
        return float(row[f"{way}_us"]) / 1e6
    name = "algo_bandwidth_GBps" if way == "dispatch" else "combine_algo_bandwidth_GBps"
    if not row[name]:
        return None
    return _defined_bytes(row, way) / (float(row[name]) * 1e9)


def _defined_bytes(row: Row, way: str) -> float:
    """Return the bytes a row's bandwidth counts, of one rank."""
    kind = row["bw_definition"]
    library = {
        "deepep_ll": "deepep-ll",
        "trtllm_logical": "trtllm",
        "nccl_algbw": "nccl",
        "nccl_busbw": "nccl",
    }.get(kind, "deepep-normal")
    profile = transfer_profile(library)
    choices = _choices(row, profile)
    row_bytes = profile.row_bytes(choices.model.hidden_size, _wire_dtype(row, way))
    if library == "nccl":
        ranks = int(row["ep_size"])
        share = (ranks - 1) / ranks if kind == "nccl_busbw" else 1.0
        return _tokens(row) * choices.model.hidden_size * 2 * share
    if library != "deepep-normal":
        return _tokens(row) * choices.model.top_k * row_bytes
    if choices.island.max() == 0:
        return float(sent_copies(choices, "rank").sum(axis=1)[0]) * row_bytes
    nodes = np.eye(int(choices.island.max()) + 1)[choices.island]
    by_node = replace(choices, shares=choices.shares @ nodes)
    return float(sent_copies(by_node, "rank").sum(axis=1)[0]) * row_bytes


# --- fitting


def _fit_nccl(row: Row, way: str) -> bool:
    if "alltoall_perf 128 B" in row["kernel"] or "effective NVLink" in row["kernel"]:
        return True
    return row["ep_size"] in ("8", "64", "128")


def _fit_normal(row: Row, way: str) -> bool:
    if row["source_version"] == "README 2025-04-22 (final V1)":
        return row["ep_size"] == "8"
    return row["hardware"].startswith("B200") and bool(re.search("(16|48) SM", row["kernel"]))


def _fit_v2(row: Row, way: str) -> bool:
    return row["ep_size"] == "8"


def _fit_ll(row: Row, way: str) -> bool:
    return row["ep_size"] in ("8", "16", "64")


def _fit_trtllm(row: Row, way: str) -> bool:
    return row["ep_size"] in ("8", "64") and row["dtype_dispatch"] == "BF16"


FITTED: dict[str, Callable[[Row, str], bool]] = {
    "nccl": _fit_nccl,
    "nccl-padded": _fit_nccl,
    "deepep-normal": _fit_normal,
    "deepep-v2": _fit_v2,
    "deepep-ll": _fit_ll,
    "trtllm": _fit_trtllm,
}
# Figures fitted, by path in the profile, with the unit they are fitted in.
_FREE: dict[str, dict[str, float]] = {
    "nccl": {"nvlink": 1, "nic": 1, "start": 1e-6, "host": 1e-6, "network_start": 1e-6},
    "deepep-normal": {"nvlink": 1, "sm.rate": 1e9, "sm.dispatch_row": 1e-6, "sm.combine_row": 1e-6},
    "deepep-v2": {"nvlink": 1, "sm.rate": 1e9, "sm.dispatch_row": 1e-6},
    "deepep-ll": {"nvlink": 1, "nic": 1, "start": 1e-6},
    "trtllm": {
        "nvlink": 1,
        "start": 1e-6,
        "floor.dispatch": 1e-6,
        "floor.combine": 1e-6,
        "floor.per_rank": 1e-6,
    },
}


def fit(name: str, compared: Iterable[Case]) -> dict[str, float]:
    """Return a profile's free figures, least squares of log(predicted / published)."""
    profile, free = transfer_profile(name), _FREE[name]
    used = [case for case in compared if case.used and case.profile.removesuffix("-padded") == name]
    start = [_get(profile, path) / unit for path, unit in free.items()]

    def misses(figures: Any) -> list[float]:
        changed = {case.profile: transfer_profile(case.profile) for case in used}
        for (path, unit), figure in zip(free.items(), figures, strict=True):
            changed = {x: _with(each, path, float(figure) * unit) for x, each in changed.items()}
        return [float(np.log(c.predicted(changed[c.profile]) / c.seconds)) for c in used]

    found = least_squares(misses, start, bounds=(1e-6, np.inf), x_scale=np.maximum(start, 1e-3))
    return dict(zip(free, found.x.tolist(), strict=True))


def _get(profile: TransferProfile, path: str) -> float:
    value: Any = profile
    for name in path.split("."):
        value = getattr(value, name)
    return float(value)


def _with(profile: TransferProfile, path: str, value: float) -> TransferProfile:
    outer, _, inner = path.partition(".")
    if not inner:
        extra = {"network_start": value} if outer == "start" and profile.name == "deepep-ll" else {}
        return profile.model_copy(update={outer: value, **extra})
    part: SmCopies = getattr(profile, outer)
    return profile.model_copy(update={outer: part.model_copy(update={inner: value})})


# --- the report


def errors(compared: Iterable[Case]) -> list[tuple[Case, float]]:
    """Return predicted / published - 1 of every case."""
    return [
        (case, case.predicted(transfer_profile(case.profile)) / case.seconds - 1)
        for case in compared
    ]


def summary(judged: list[tuple[Case, float]]) -> Iterator[str]:
    """Yield the lines of the table: median and worst error by library, and of all."""
    yield "| library | rows | figures | median error | worst error | worst row |"
    yield "|---|---|---|---|---|---|"
    for title, used in (("not used", False), ("used", True)):
        of_group = [(c, error) for c, error in judged if c.used == used and not c.outside]
        for name in [*dict.fromkeys(case.profile for case, _ in of_group), ""]:
            yield _line(name or "all", title, [x for x in of_group if name in ("", x[0].profile)])
    for outside in dict.fromkeys(case.outside for case, _ in judged if case.outside):
        of_group = [(case, error) for case, error in judged if case.outside == outside]
        yield _line(outside, "no claim", of_group)


def _line(name: str, title: str, of: list[tuple[Case, float]]) -> str:
    worst, error = max(of, key=lambda item: abs(item[1]))
    middle = median(abs(error) for _, error in of)
    return f"| {name} | {title} | {len(of)} | {middle:.1%} | {error:+.1%} | {worst.title} |"


@click.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--fit", "fit_again", is_flag=True, help="Fit the free figures again and print them.")
@click.option("--every-row", is_flag=True, help="Print every figure.")
def main(rows: Path, fit_again: bool, every_row: bool) -> None:
    """Price all rows and print errors by library."""
    with rows.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    missing = [name for name in COLUMNS if table and name not in table[0]]
    if missing:
        raise click.ClickException(f"{rows} lacks columns {', '.join(missing)}")
    compared, reasons = cases(table)
    if fit_again:
        for name in _FREE:
            figures = ", ".join(f"{path} {x:.4g}" for path, x in fit(name, compared).items())
            click.echo(f"{name}: {figures}")
        return
    judged = errors(compared)
    if every_row:
        for case, error in sorted(judged, key=lambda item: (item[0].profile, item[0].used)):
            mark = "no claim" if case.outside else "used" if case.used else ""
            click.echo(
                f"{error:+7.1%} {case.seconds * 1e6:8.1f} us {case.profile:14} {mark:8} "
                f"{case.title}"
            )
    for line in summary(judged):
        click.echo(line)
    click.echo(f"\n{len(table)} rows, left out:")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        click.echo(f"- {count}: {reason}")


if __name__ == "__main__":
    main()
