"""The paper's comparison, reproduced: EP=16 with one expert a GPU against TP=8 x PP=2 on 16 GPUs.

    python benchmarks/paper.py -o docs/paper.md

Writes the whole page. Computing of a decode step is what one H200 was measured to take for one
rank's part (`planner/simulate/data/one-rank-h200.yaml`, by benchmarks/one_rank.py); prefill is put
together from the measured device profile; transfers between GPUs are modelled. H100 figures are the
H200's shares of the roofline at the H100's rated figures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import click
import yaml

from epplan.files import write_atomically
from epplan.planner.model import load_model
from epplan.planner.simulate.build import Load, scene_of_cluster
from epplan.planner.simulate.scene import Layout, Scene, Usage
from epplan.planner.simulate.simulate import Limit, Outcome, simulate
from epplan.planner.simulate.transfers import transfer_profile
from epplan.topologies.sources import load_cluster

CLUSTERS = {"H100": "dgx-h100-2", "H200": "hgx-h200-2"}
CONTEXTS = (0, 128, 1024, 4096, 10000)
BATCH, PROMPT = 1024, 10000
LL = "deepep-ll"
EP, TP = Layout(ep=16), Layout(tp=8, pp=2)
SPEC = load_model("reference")
CLAIMED_TPS, CLAIMED_TPOT_S = 450_000, 2.2e-3
CLAIMED_BASE_TPOT_S = 8.3e-3
CLAIMED_RATIO = 3.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a layout."""

    title: str
    layout: Layout
    micro_batches: int
    overlap: bool = True
    how: str = "graph"  # of benchmarks/one_rank.py
    transfer: str = "nccl"

    @property
    def measured(self) -> tuple[str, str, int]:
        """Layout, how and sequences of the one-rank measurement it rests on."""
        if self.layout.is_expert_parallel:
            return "ep16", self.how, BATCH // 16
        return "tp8pp2", self.how, BATCH // self.micro_batches


DECODE = (
    Way(title="EP16, added", layout=EP, micro_batches=1, overlap=False),
    Way(title="EP16, 2 micro-batches overlapped", layout=EP, micro_batches=2),
    Way(title="EP16, low-latency kernels", layout=EP, micro_batches=1, transfer=LL),
    Way(title="EP16, bare, low-latency", layout=EP, micro_batches=1, how="bare", transfer=LL),
    Way(title="TP8 x PP2, well run", layout=TP, micro_batches=2, overlap=False),
    Way(title="TP8 x PP2, bare", layout=TP, micro_batches=2, overlap=False, how="bare"),
    Way(title="TP8 x PP2, naive", layout=TP, micro_batches=1, overlap=False, how="naive"),
)
EP_RUN, EP_BARE = DECODE[:3], DECODE[3:4]
PREFILL = (
    Way(title="EP16, added", layout=EP, micro_batches=64, overlap=False),
    Way(title="EP16, overlapped", layout=EP, micro_batches=64),
    Way(title="TP8 x PP2, added", layout=TP, micro_batches=64, overlap=False),
    Way(title="TP8 x PP2, overlapped", layout=TP, micro_batches=64),
    Way(title="TP8 x PP2, naive", layout=TP, micro_batches=2, overlap=False, how="naive"),
)


# --- one figure


@cache
def _scene(gpu: str) -> Scene:
    cluster = load_cluster(CLUSTERS[gpu])
    return scene_of_cluster(cluster, SPEC, 16, Load(source="uniform", seed=0), {})


@cache
def _measured() -> dict[tuple[str, str, int, int], float]:
    file = resources.files("epplan.planner.simulate.data") / "one-rank-h200.yaml"
    text = file.read_text(encoding="utf-8")
    steps: list[dict[str, Any]] = yaml.safe_load(text)["steps"]
    return {(x["layout"], x["how"], x["sequences"], x["context"]): x["seconds"] for x in steps}


def _usage(way: Way, phase: str, context: int) -> Usage:
    return Usage(
        phase=phase,  # type: ignore[arg-type]
        batch=BATCH,
        context=context,
        micro_batches=way.micro_batches,
        overlap=way.overlap,
        naive=way.how == "naive",
        transfer=transfer_profile(way.transfer),
    )


def _is_measured(way: Way, context: int = 0) -> bool:
    """Tell whether there is a measurement; only bare ones may be missing at some contexts."""
    return (*way.measured, context) in _measured()


@cache
def _factor(way: Way, context: int) -> float:
    """Return measured over modelled computing on the H200, between measured contexts in a line."""
    known = [x for x in CONTEXTS if (*way.measured, x) in _measured()]
    if context not in known:
        below = max(x for x in known if x < context)
        above = min((x for x in known if x > context), default=below)
        part = (context - below) / (above - below) if above > below else 0.0
        return _factor(way, below) * (1 - part) + _factor(way, above) * part
    plain = replace(way, micro_batches=1) if way.layout.is_expert_parallel else way
    outcome = simulate(_scene("H200"), _usage(plain, "decode", context), way.layout)
    passes = 1 if way.layout.is_expert_parallel else way.micro_batches
    return _measured()[(*way.measured, context)] * passes / outcome.compute_s


@cache
def decode(gpu: str, way: Way, context: int) -> Outcome:
    """Return a decode step whose computing is the measured one."""
    usage = replace(_usage(way, "decode", context), compute_factor=_factor(way, context))
    return simulate(_scene(gpu), usage, way.layout)


@cache
def prefill(gpu: str, way: Way) -> Outcome:
    """Return reading all prompts."""
    return simulate(_scene(gpu), _usage(way, "prefill", PROMPT), way.layout)


# --- the page


def page() -> str:
    """Return the whole page."""
    return "\n".join([*_head(), *_decode(), *_prefill(), *_claims(), *_checks(), ""])


def _head() -> Iterator[str]:
    yield "# The paper's comparison"
    yield ""
    yield "Made by `python benchmarks/paper.py -o docs/paper.md`; do not edit."
    yield ""
    yield from _wrapped(
        "Reference model: 4 MoE layers of 16 experts, 8192 -> 32768 -> 8192 with GELU, attention "
        "of 16 heads x 512, top-1, FP16; 16 GPUs in 2 hosts, a 400 Gb/s NIC a GPU, even routing. "
        "EP16: attention data parallel, one expert of every layer a GPU. TP8 x PP2: every layer "
        "cut over a host, two stages. Claimed: 450,000 tokens/s and 2.2 ms against 120,000 and "
        "8.3 ms, 3.75x and 3.8x."
    )
    yield ""
    yield from _wrapped(
        "Computing of a decode step is measured on one H200 (one rank's part as a CUDA graph, "
        "benchmarks/one_rank.py); prefill is put together from the H200's measured profile; H100 "
        "figures are derived from it (`profile`); transfers are modelled. Nothing here ran on 16 "
        "GPUs."
    )
    yield ""
    yield from _wrapped(
        "Well run: a CUDA graph, all experts in one batched product, all-reduce in the switch, "
        "sequence parallel norms in prefill, both stages busy with two micro-batches (decode) or "
        "64 (prefill). Bare: attention and experts alone, measured without norms, router, sorting "
        "and gathering: the most that fused kernels could save. Naive: launched piece by piece, "
        "one expert after another, rings, no overlap, one micro-batch in flight in decode and two "
        "in prefill."
    )
    yield ""


def _wrapped(text: str, width: int = 100) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


def _decode() -> Iterator[str]:
    yield "## Decode of 1024 sequences"
    yield ""
    yield from _wrapped(
        "Time per output token, tokens/s, and beside them the floors by rated figures: bytes each "
        "GPU must read over HBM, FLOPs over FLOP/s, bytes through a NIC over its rate. Overlap "
        "does not pay here: two micro-batches read all weights twice. Low-latency kernels are "
        "DeepEP's; they take BF16 and FP8 only, priced here with FP16's bytes. NCCL inside a CUDA "
        "graph needs splits that do not change: even routing, or padded buffers."
    )
    for gpu in CLUSTERS:
        yield ""
        yield f"### 16 {gpu}"
        yield ""
        yield (
            "| context | way | TPOT ms | tokens/s | computing ms | transfers ms | HBM floor ms | "
            "FLOP floor ms | NIC floor ms | memory of a GPU | set by |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|---|"
        for context in CONTEXTS:
            for way in (way for way in DECODE if _is_measured(way, context)):
                yield _decode_line(context, way, decode(gpu, way, context))
    yield ""
    yield "EP16's best over the baseline, by context (TPOT ratio):"
    yield ""
    bases = {how: way for how, way in _BASES.items() if _is_measured(way)}
    yield "| context | " + " | ".join(f"{gpu}, {how}" for gpu in CLUSTERS for how in bases) + " |"
    yield "|---|" + "---|" * (len(bases) * len(CLUSTERS))
    for context in CONTEXTS:
        ratios = [_ratio(gpu, base, context) for gpu in CLUSTERS for base in bases.values()]
        yield f"| {context} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"
    yield ""


_BASES = {"well run": DECODE[4], "bare": DECODE[5], "naive": DECODE[6]}


def _best_ep(gpu: str, context: int, ways: tuple[Way, ...] = EP_RUN) -> Outcome:
    return min((decode(gpu, way, context) for way in ways), key=lambda x: x.step_s)


def _ratio(gpu: str, base: Way, context: int) -> float:
    best = _best_ep(gpu, context, EP_BARE if base.how == "bare" else EP_RUN)
    return decode(gpu, base, context).step_s / best.step_s


def _decode_line(context: int, way: Way, outcome: Outcome) -> str:
    cells = [
        str(context),
        way.title,
        f"{outcome.step_s * 1e3:.2f}",
        f"{outcome.tps:,.0f}",
        f"{outcome.compute_s * 1e3:.2f}",
        f"{outcome.transfer_s * 1e3:.2f}",
        *_floors(outcome),
        _memory(outcome),
        _set_by(outcome),
    ]
    return "| " + " | ".join(cells) + " |"


def _floors(outcome: Outcome) -> list[str]:
    def longest(matches: Callable[[Limit], bool]) -> str:
        return f"{max((x.floor_s for x in outcome.limits if matches(x)), default=0.0) * 1e3:.3g}"

    return [
        longest(lambda limit: limit.name.startswith("HBM")),
        longest(lambda limit: limit.name.startswith("FLOP/s")),
        longest(lambda limit: limit.name.startswith("net")),
    ]


def _memory(outcome: Outcome) -> str:
    use = outcome.fullest
    state = "" if use.fits else ": **does not fit**"
    return f"{use.total / 2**30:.0f} of {use.capacity / 2**30:.0f} GiB{state}"


def _set_by(outcome: Outcome) -> str:
    return outcome.bottleneck.name.split(" of ")[0].split(" on ")[0]


def _prefill() -> Iterator[str]:
    yield f"## Prefill of 1024 sequences of {PROMPT:,} tokens"
    yield ""
    yield (
        "| GPU | way | seconds | tokens/s | computing s | transfers s | FLOP floor s | "
        "HBM floor s | NIC floor s | share of FLOP floor | set by |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for gpu in CLUSTERS:
        for way in PREFILL:
            outcome = prefill(gpu, way)
            hbm, flop, nic = (float(x) / 1e3 for x in _floors(outcome))
            cells = [
                gpu,
                way.title,
                f"{outcome.step_s:.2f}",
                f"{outcome.tps:,.0f}",
                f"{outcome.compute_s:.2f}",
                f"{outcome.transfer_s:.2f}",
                f"{flop:.2f}",
                f"{hbm:.2f}",
                f"{nic:.2f}",
                f"{flop / outcome.step_s:.0%}",
                _set_by(outcome),
            ]
            yield "| " + " | ".join(cells) + " |"
    yield ""
    for gpu in CLUSTERS:
        ep = prefill(gpu, PREFILL[1]).step_s
        ratios = ", ".join(
            f"{prefill(gpu, way).step_s / ep:.2f} ({way.title.split(', ')[1]})"
            for way in PREFILL[2:]
        )
        yield f"{gpu}: TP8 x PP2 takes {ratios} of EP16 overlapped."
    kv = 64 * PROMPT * SPEC.kv_bytes_per_token / 2**30
    yield ""
    yield from _wrapped(
        f"The cache of all prompts would be {kv:.0f} GiB a GPU: more than an H100 has, so there "
        "the sequences have to come in portions; throughput is the same. A third of the computing "
        "is attention at the 133 TFLOP/s that SDPA reaches with heads of 512 (measured): "
        "attention, not transfers, is the larger lever."
    )
    yield ""


def _claims() -> Iterator[str]:
    yield "## Where the claims hold"
    yield ""
    yield "| claim | " + " | ".join(f"16 {gpu}" for gpu in CLUSTERS) + " |"
    yield "|---|" + "---|" * len(CLUSTERS)
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("EP16: 450,000 tokens/s", lambda g: _holds(g, EP_RUN, BATCH / CLAIMED_TPS)),
        ("the same, bare kernels", lambda g: _holds(g, EP_BARE, BATCH / CLAIMED_TPS)),
        ("EP16: 2.2 ms", lambda g: _holds(g, EP_RUN, CLAIMED_TPOT_S)),
        ("the same, bare kernels", lambda g: _holds(g, EP_BARE, CLAIMED_TPOT_S)),
        ("TP8 x PP2: 120,000 tokens/s, 8.3 ms", _baseline),
        ("3.75x, 3.8x: both well run", lambda g: _ratios(g, "well run")),
        ("3.75x, 3.8x: both bare", lambda g: _ratios(g, "bare")),
        ("3.75x, 3.8x: naive baseline", lambda g: _ratios(g, "naive")),
        ("any claim at context 10,000", _at_ten_thousand),
    ]
    for title, make in rows:
        needed = _BASES["bare"] if "both bare" in title else EP_BARE[0]
        if "bare" in title and not _is_measured(needed):
            continue
        yield f"| {title} | " + " | ".join(make(gpu) for gpu in CLUSTERS) + " |"
    yield ""


def _holds(gpu: str, ways: tuple[Way, ...], claimed_s: float) -> str:
    """Say up to which context a step is as short as claimed."""
    first = _best_ep(gpu, 0, ways)
    floor = f"{first.floor_s * 1e3:.2f} ms is the floor: reading weights"
    if first.step_s > claimed_s:
        return f"nowhere: {first.step_s * 1e3:.2f} ms without any context ({floor})"
    low, high = 0, PROMPT
    while high - low > 8:
        middle = (low + high) // 2
        fits = _best_ep(gpu, middle, ways).step_s <= claimed_s
        low, high = (middle, high) if fits else (low, middle)
    return f"up to context {low}; {first.step_s * 1e3:.2f} ms without any ({floor})"


def _baseline(gpu: str) -> str:
    parts = []
    for name in ("well run", "naive"):
        figures = [decode(gpu, _BASES[name], context) for context in CONTEXTS]
        near = min(figures, key=lambda x: abs(x.step_s - CLAIMED_BASE_TPOT_S))
        text = f"{name}: {figures[0].step_s * 1e3:.1f} ms at context 0"
        if near is not figures[0]:
            text += f", nearest at {near.usage.context}: {near.step_s * 1e3:.1f} ms"
        parts.append(text)
    return "; ".join(parts)


def _ratios(gpu: str, base: str) -> str:
    ratios = {context: _ratio(gpu, _BASES[base], context) for context in CONTEXTS}
    holding = [str(context) for context, ratio in ratios.items() if ratio >= CLAIMED_RATIO]
    spread = f"{max(ratios.values()):.2f}x at context {max(ratios, key=ratios.__getitem__)}, "
    spread += f"{ratios[10000]:.2f}x at 10000"
    return (f"at context {', '.join(holding)}: " if holding else "nowhere: ") + spread


def _at_ten_thousand(gpu: str) -> str:
    outcome = _best_ep(gpu, 10000)
    use = outcome.fullest
    read = use.kv_cache / _scene(gpu).devices[0].gpu.hbm * 1e3
    fits = "fits" if use.fits else "does not fit"
    return (
        f"no: the cache is {use.kv_cache / 2**30:.0f} GiB a GPU ({fits}); reading it takes "
        f"{read:.1f} ms at the rated HBM rate, {outcome.step_s * 1e3:.1f} ms is the step"
    )


def _checks() -> Iterator[str]:
    yield "## What the model makes of the measured steps"
    yield ""
    yield from _wrapped(
        "One rank's part of a decode step on one H200: measured, and what the device profile alone "
        "puts together. Above, the measured figure is used."
    )
    yield ""
    yield "| step | context | measured ms | model ms | error |"
    yield "|---|---|---|---|---|"
    errors = []
    for (layout, how, sequences, context), seconds in _measured().items():
        ways = [w for w in (*DECODE, _ONE_PASS) if w.measured == (layout, how, sequences)]
        if not ways:
            continue
        error = 1 / _factor(ways[0], context) - 1
        errors.append(abs(error))
        title = f"{layout}, {how}, {sequences} sequences"
        yield (
            f"| {title} | {context} | {seconds * 1e3:.2f} | {seconds * (1 + error) * 1e3:.2f} | "
            f"{error:+.0%} |"
        )
    errors.sort()
    yield ""
    yield f"Median error {errors[len(errors) // 2]:.0%}, worst {errors[-1]:.0%}."


_ONE_PASS = Way(title="one pass a stage", layout=TP, micro_batches=1, overlap=False)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
def main(output: Path) -> None:
    """Write the page."""
    write_atomically(output, page())


if __name__ == "__main__":
    main()
