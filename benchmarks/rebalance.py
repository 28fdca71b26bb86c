"""The fast rebalance: time and balance, beside DeepSeek's EPLB where it is given.

    python benchmarks/rebalance.py [--eplb PATH/eplb.py] [--traces counts.npz] [--anywhere N]

EPLB (github.com/deepseek-ai/EPLB, one file) is fetched by whoever runs this; without it its figures
are left out. One JSON line a case: balance is mean over max GPU load, mean and worst over layers
and seeds; milliseconds are minimum and median over seeds, ours five times each, and the minimum of
processor time, which other work on the machine disturbs less; bound is what no copies with any
shares exceed, of the first seed's layers (of the first start's). EPLB runs hierarchically (8
groups, 4 or 8 hosts) and globally. The trace is `counts` [iterations, source ranks, layers,
experts] with `iters`: planned at one iteration, judged there and later, mean of 21 starts.
`--anywhere` compares N random cases of three layers with EPLB: how many layers are below it.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from epplan.planner.chains import Floats, Ints
from epplan.planner.copies.balance_bound import least_maximum
from epplan.planner.rebalance import Rebalanced, rebalance

LAYERS, EXPERTS, SEEDS, REPEATS = 58, 256, 10, 5
GPU_HOSTS = {32: 4, 72: 8}
JUDGED_LATER = (0, 10, 100, 500)
# load, slots, GPUs -> expert of every slot, and its share of that expert
Plan = Callable[[Floats, int, int], tuple[Ints, Floats]]


@click.command()
@click.option("--eplb", type=click.Path(path_type=Path, exists=True), help="EPLB's eplb.py.")
@click.option("--traces", type=click.Path(path_type=Path, exists=True), help="Recorded counts.")
@click.option("--anywhere", type=int, help="Only this many random cases beside EPLB.")
def main(eplb: Path | None, traces: Path | None, anywhere: int | None) -> None:
    """Run all cases and print."""
    peer = None if eplb is None else _load_eplb(eplb)
    for name, option in (("--eplb", eplb), ("--traces", traces)):
        if option is None:
            click.echo(f"no {name} given: left out", err=True)
    if anywhere is not None:
        if peer is None:
            raise click.UsageError("--anywhere compares with EPLB: give --eplb")
        _anywhere(anywhere, peer)
        return
    for rule in ("uniform", "zipf", "lognormal"):
        for gpus in GPU_HOSTS:
            _case(rule, gpus, peer)
    if traces is not None:
        _trace(traces, peer)


def _print(line: dict[str, object]) -> None:
    click.echo(json.dumps({**line, "cores": os.cpu_count()}))


def _load(rule: str, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    if rule == "uniform":
        return random.integers(1, 1000, (LAYERS, EXPERTS)).astype(np.float64)
    if rule == "lognormal":
        return random.lognormal(0, 1, (LAYERS, EXPERTS))
    ranked = 1 / np.arange(1, EXPERTS + 1)
    return np.stack([random.permutation(ranked) for _ in range(LAYERS)])


def _case(rule: str, gpus: int, peer: Any) -> None:
    plans: dict[str, Plan] = {"free": _ours("free"), "equal": _ours("equal")}
    if peer is not None:
        plans |= {f"eplb {kind}": _eplb(peer, kind) for kind in ("global", "hierarchical")}
    line: dict[str, object] = {
        "case": f"{rule}-288-on-{gpus}",
        "bound": _bound(_load(rule, 0), 288, gpus),
    }
    for name, plan in plans.items():
        balances, times, cpu_times = [], [], []
        for seed in range(SEEDS):
            load = _load(rule, seed)
            for _ in range(1 if name.startswith("eplb") else REPEATS):
                began, cpu_began = time.perf_counter(), time.process_time()
                layout = plan(load, 288, gpus)
                times.append(1e3 * (time.perf_counter() - began))
                cpu_times.append(1e3 * (time.process_time() - cpu_began))
            balances.append(_balance(load, _on_gpus(*layout, EXPERTS, gpus)))
        line[name] = {
            "balance": float(np.mean(balances)),
            "worst_layer": float(np.min(balances)),
            "ms_min": min(times),
            "ms_median": float(np.median(times)),
            "cpu_ms_min": min(cpu_times),
        }
    _print(line)


def _bound(load: Floats, slots: int, gpus: int) -> float:
    """Return a balance that none exceeds, mean over layers."""
    falling = np.sort(load, axis=1)[:, ::-1]
    bounds = [
        layer.sum() / gpus / least_maximum(layer, gpus, slots // gpus, slots) for layer in falling
    ]
    return float(np.mean(bounds))


def _ours(shares: Literal["free", "equal"]) -> Plan:
    def plan(load: Floats, slots: int, gpus: int) -> tuple[Ints, Floats]:
        done: Rebalanced = rebalance(load, slots, gpus, shares=shares)
        return done.expert_of_slot, done.share_of_slot

    return plan


def _load_eplb(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _eplb(module: Any, kind: str) -> Plan:
    import torch

    def plan(load: Floats, slots: int, gpus: int) -> tuple[Ints, Floats]:
        hosts = GPU_HOSTS.get(gpus, 2)
        groups = (8, hosts) if kind == "hierarchical" else (1, 1)
        expert, _, count = module.rebalance_experts(torch.tensor(load), slots, *groups, gpus)
        return expert.numpy(), 1 / np.take_along_axis(count.numpy(), expert.numpy(), axis=1)

    return plan


def _on_gpus(expert: Ints, share: Floats, experts: int, gpus: int) -> Floats:
    """Return the share of every expert on every GPU, [layers, gpus, experts]."""
    layers, slots = expert.shape
    total = np.zeros((layers, gpus, experts))
    gpu = np.broadcast_to(np.arange(slots) * gpus // slots, expert.shape)
    np.add.at(total, (np.arange(layers)[:, None], gpu, expert), share)
    return total


def _balance(load: Floats, shares: Floats) -> Floats:
    on_gpu = (shares * load[:, None, :]).sum(axis=2)
    balance: Floats = on_gpu.mean(axis=1) / on_gpu.max(axis=1)
    return balance


def _anywhere(cases: int, peer: Any) -> None:
    """Compare on random sizes and loads of every skew, and print the layers below EPLB."""
    random = np.random.default_rng(0)
    lacking: dict[str, list[float]] = {"free": [], "equal": []}
    for _ in range(cases):
        gpus, each = int(random.integers(2, 97)), int(random.integers(2, 12))
        slots = gpus * each
        experts = slots - int(random.integers(0, min(slots // 2, 2 * gpus)))
        experts = min(max(experts, each), slots)
        load = _skewed(random, experts)
        eplb = _eplb(peer, "global")(load, slots, gpus)
        reached = _balance(load, _on_gpus(*eplb, experts, gpus))
        for shares in ("free", "equal"):
            ours = rebalance(load, slots, gpus, shares=shares).balance
            lacking[shares] += [float(x) for x in (1 - ours / reached)]
    line: dict[str, object] = {"case": "anywhere", "layers": len(lacking["free"])}
    for name, gaps in lacking.items():
        line[name] = {"below_eplb": sum(gap > 1e-9 for gap in gaps), "most": max(0.0, *gaps)}
    _print(line)


def _skewed(random: np.random.Generator, experts: int) -> Floats:
    """Return three layers of a random kind of load, [3, experts]."""
    kind, skew = random.integers(4), random.uniform(0.05, 2)
    if kind == 0:
        return random.lognormal(0, skew, (3, experts))
    if kind == 1:
        return random.dirichlet(np.full(experts, skew), 3) + 1e-12
    if kind == 2:
        return random.integers(1, 1000, (3, experts)).astype(np.float64)
    ranked = 1 / np.arange(1, experts + 1) ** skew
    return np.stack([random.permutation(ranked) for _ in range(3)])


def _trace(path: Path, peer: Any) -> None:
    with np.load(path) as archive:
        load = archive["counts"].sum(axis=1, dtype=np.float64)  # [iterations, layers, experts]
        iterations = archive["iters"].tolist()
    last = iterations[-1] - max(JUDGED_LATER)
    starts = [t for t in iterations if 101 <= t <= last][:: max(1, len(iterations) // 24)][:21]
    plans: dict[str, Plan] = {"free": _ours("free"), "equal": _ours("equal")}
    if peer is not None:
        plans["eplb global"] = _eplb(peer, "global")
    for slots in (48, 64):
        first = load[iterations.index(starts[0])]
        line: dict[str, object] = {
            "case": f"trace-{slots}-on-16",
            "starts": len(starts),
            "bound": _bound(first, slots, 16),
        }
        for name, plan in plans.items():
            judged = []
            for start in starts:
                layout = plan(load[iterations.index(start)], slots, 16)
                shares = _on_gpus(*layout, load.shape[2], 16)
                later = [load[iterations.index(start + steps)] for steps in JUDGED_LATER]
                judged.append([_balance(window, shares).mean() for window in later])
            means = np.mean(judged, axis=0)
            line[name] = {f"+{s}": float(x) for s, x in zip(JUDGED_LATER, means, strict=True)}
        _print(line)


if __name__ == "__main__":
    main()
