"""`epplan simulate`: what a plan or a layout will run at, and what limits it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from epplan.planner.model import ModelSpec
    from epplan.planner.plan import Plan
    from epplan.planner.simulate.device import Device
    from epplan.planner.simulate.scene import Layout, Scene
    from epplan.planner.simulate.simulate import Outcome
    from epplan.topologies.graph import Cluster

SWEPT = ("batch", "context", "ep", "hosts", "transfer", "load")
_SEQUENCES_PER_GPU = {"decode": 64, "prefill": 1}


@click.command()
@click.argument(
    "plan", required=False, type=click.Path(path_type=Path, exists=False, dir_okay=False)
)
@click.option("--topology", metavar="SOURCE", help="The cluster; the plan's own by default.")
@click.option("--model", metavar="MODEL", help="Bundled name, config.json or YAML, without PLAN.")
@click.option("--experts", type=click.IntRange(1), help="Override the model's experts per layer.")
@click.option("--layers", type=click.IntRange(1), help="Keep only the model's first N layers.")
@click.option("--layout", metavar="LAYOUT", help="ep16, tp8pp2, ...; without PLAN.")
@click.option(
    "--phase",
    type=click.Choice(["decode", "prefill", "both"]),
    default="both",
    show_default=True,
    help="One token of every sequence, or reading all prompts.",
)
@click.option("--batch", type=click.IntRange(1), help="Sequences in all; 64 a GPU, prompts 1.")
@click.option(
    "--context", type=click.IntRange(0), default=1024, show_default=True, help="Tokens a sequence."
)
@click.option("--micro-batches", type=click.IntRange(1), help="By default the fastest of 1 to 8.")
@click.option("--no-overlap", is_flag=True, help="Add transfers and computing.")
@click.option("--naive", is_flag=True, help="Experts one after another, launched piece by piece.")
@click.option(
    "--transfer", metavar="LIBRARY", default="nccl", show_default=True, help="Moves tokens."
)
@click.option(
    "--dispatch-dtype",
    type=click.Choice(["bfloat16", "float16", "fp8", "mxfp8", "nvfp4"]),
    help="Of rows on their way to experts; the model's by default.",
)
@click.option(
    "--load", help="Traffic (as in solve): uniform, zipf[:s], lognormal[:s[,skew]], .npz."
)
@click.option("--seed", type=int, help="Of traffic that is drawn; the plan's, or 0.")
@click.option(
    "--device-profile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Measured by epplan.runtime.calibrate, for the GPUs of the cluster.",
)
@click.option("--without-host", multiple=True, metavar="HOST", help="What if this host is gone.")
@click.option("--nic", metavar="RATE", help="What if every NIC port runs at, for example, 200Gb/s.")
@click.option(
    "--leaf-oversubscription",
    type=click.FloatRange(0, min_open=True),
    metavar="RATIO",
    help="What if leafs have 1/RATIO of their NICs' bandwidth upwards.",
)
@click.option(
    "--replicas", type=click.IntRange(0), default=0, help="What if a layer has N more copies."
)
@click.option(
    "--price",
    type=click.FloatRange(0),
    metavar="MONEY",
    help="Of a GPU and hour: adds the price of a million tokens.",
)
@click.option(
    "--sweep",
    multiple=True,
    metavar="NAME=A,B,...",
    help=f"A table over {', '.join(SWEPT)}; several make all combinations.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a timeline of every rank and stream for ui.perfetto.dev (.json or .json.gz).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def simulate(as_json: bool, trace: Path | None, price: float | None, **options: Any) -> int:
    """Simulate a step of a plan, or of a layout of a model on a cluster.

    \b
    Examples:
      epplan simulate plan.json
      epplan simulate --topology dgx-h100-2 --model reference --layout ep16 --batch 1024
      epplan simulate --topology dgx-h100-2 --model reference --layout tp8pp2 --phase decode
      epplan simulate plan.json --without-host dgx02 --nic 200Gb/s
      epplan simulate plan.json --sweep context=1024,4096,16384 --sweep batch=256,1024
    """
    from epplan.errors import InputError
    from epplan.output import print_json, print_tables, talk
    from epplan.planner.simulate.perfetto import write_trace
    from epplan.planner.simulate.report import result, sweep_table, tables
    from epplan.topologies.units import format_bytes

    sweep = _parse_sweep(options.pop("sweep"))
    if trace is not None and sweep:
        raise InputError("--trace writes one step, --sweep simulates many: give one of them")
    if trace is not None and options["phase"] == "both":
        options["phase"] = "decode"
        talk("--trace writes one phase: decode (give --phase prefill for the other)")
    asked = _Asked(**options)
    if sweep:
        names = list(sweep)
        rows = [
            ([str(value) for value in values], outcome)
            for values, runs in _swept(asked, sweep)
            for outcome in runs.outcomes
        ]
        if as_json:
            lines = [
                {**dict(zip(names, values, strict=True)), **result(outcome, price)}
                for values, outcome in rows
            ]
            print_json({"sweep": lines})
        else:
            print_tables(sweep_table(names, rows, price))
        return 0
    runs = _run(asked)
    if trace is not None:
        names = [gpu.id for gpu in runs.scene.gpus]
        write_trace(trace, runs.outcomes[0].timeline, names)
        talk(f"wrote {trace}")
    if as_json:
        by_phase = {run.usage.phase: result(run, price) for run in runs.outcomes}
        print_json({**result(runs.outcomes[0], price), "phases": by_phase, "remarks": runs.remarks})
    else:
        print_tables(tables(runs.scene, runs.outcomes, price, runs.remarks))
    for outcome in runs.outcomes:
        if not outcome.fits:
            use = outcome.fullest
            talk(
                f"warning: {outcome.usage.phase} does not fit: rank {use.rank} needs "
                f"{format_bytes(use.total)} of {format_bytes(use.capacity)}, most of it "
                f"{use.largest}"
            )
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The options as given."""

    plan: Path | None
    topology: str | None
    model: str | None
    experts: int | None
    layers: int | None
    layout: str | None
    phase: str
    batch: int | None
    context: int
    micro_batches: int | None
    no_overlap: bool
    naive: bool
    transfer: str
    dispatch_dtype: str | None
    load: str | None
    seed: int | None
    device_profile: Path | None
    without_host: tuple[str, ...]
    nic: str | None
    leaf_oversubscription: float | None
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """A scene, its outcomes by phase (decode first), and remarks."""

    scene: "Scene"
    outcomes: list["Outcome"]
    remarks: list[str]


def _parse_sweep(texts: tuple[str, ...]) -> dict[str, list[str]]:
    from epplan.errors import InputError

    sweep: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        parts = [part for part in values.split(",") if part]
        if name not in SWEPT or not parts or name in sweep:
            raise InputError(
                f"--sweep {text} is not valid",
                hints=[f"NAME=A,B,... with NAME one of {', '.join(SWEPT)}, each once"],
            )
        wrong = [part for part in parts if not (name in ("transfer", "load") or part.isdecimal())]
        if wrong:
            raise InputError(f"--sweep {name}: {wrong[0]!r} is no whole number")
        sweep[name] = parts
    return sweep


def _swept(asked: _Asked, sweep: dict[str, list[str]]) -> Iterator[tuple[tuple[str, ...], _Runs]]:
    for values in product(*sweep.values()):
        changed = asked
        for name, value in zip(sweep, values, strict=True):
            changed = _with(changed, name, value)
        yield values, _run(changed)


def _with(asked: _Asked, name: str, value: str) -> _Asked:
    from epplan.errors import InputError

    if name == "ep":
        return replace(asked, layout=f"ep{value}")
    if name == "hosts":
        if asked.topology is None or not re.match(r"[0-9]+x[0-9]+:", asked.topology):
            raise InputError(
                "--sweep hosts needs a cluster in a line",
                hints=["for example --topology 2x8:h100,nic=8x400Gb/s"],
            )
        return replace(asked, topology=re.sub(r"^[0-9]+", value, asked.topology))
    change: dict[str, Any] = {name: value if name in ("transfer", "load") else int(value)}
    return replace(asked, **change)


def _run(asked: _Asked) -> _Runs:
    from epplan.planner.simulate.scene import Layout, Usage, parse_layout
    from epplan.planner.simulate.simulate import simulate as run
    from epplan.planner.simulate.transfers import transfer_profile

    scene, remarks = _scene(asked)
    layout = Layout(ep=scene.num_ranks)
    if asked.layout and not asked.plan:
        layout = parse_layout(asked.layout)
    outcomes = []
    for phase in ("decode", "prefill") if asked.phase == "both" else (asked.phase,):
        usage = Usage(
            phase=phase,
            batch=asked.batch or _SEQUENCES_PER_GPU[phase] * scene.num_ranks,
            context=asked.context if phase == "decode" else max(asked.context, 1),
            micro_batches=asked.micro_batches or 1,
            overlap=not asked.no_overlap,
            naive=asked.naive,
            transfer=transfer_profile(asked.transfer),
            dispatch_dtype=asked.dispatch_dtype,  # type: ignore[arg-type]
        )
        automatic = asked.micro_batches is None
        outcomes.append(run(scene, usage, layout, automatic=automatic))
    return _Runs(scene=scene, outcomes=outcomes, remarks=remarks)


def _scene(asked: _Asked) -> tuple["Scene", list[str]]:
    from epplan.errors import InputError

    if asked.plan is not None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("model", "experts", "layers", "layout")
            if getattr(asked, name) is not None
        ]
        if given:
            raise InputError(
                f"{', '.join(given)}: PLAN says this already",
                hints=["leave PLAN out to simulate --layout of a --model on a --topology"],
            )
        return _planned_scene(asked, asked.plan)
    if asked.topology is None or asked.model is None:
        raise InputError(
            "nothing to simulate",
            hints=["give a PLAN", "or --topology SOURCE --model MODEL [--layout ep16]"],
        )
    return _laid_out_scene(asked, asked.topology, asked.model)


def _planned_scene(asked: _Asked, path: Path) -> tuple["Scene", list[str]]:
    from epplan.planner.plan import read_plan
    from epplan.planner.simulate.build import Load, scene_of_plan

    plan = read_plan(path)
    cluster = _planned_cluster(asked, plan)
    load = None
    if asked.load is not None or asked.seed is not None:
        source = asked.load or plan.inputs.traffic.source
        load = Load(source=source, seed=plan.inputs.seed if asked.seed is None else asked.seed)
    changed, remarks = _what_if(asked, cluster)
    scene, moved = scene_of_plan(plan, changed, load, _devices(asked, cluster))
    if asked.replicas:
        from epplan.planner.simulate.build import with_replicas

        shares = with_replicas(scene.counts, plan.model, asked.replicas)
        scene = replace(scene, shares=shares)
        moved.append(f"{asked.replicas} more copies a layer, all placed anew by the fast rebalance")
    return scene, [*remarks, *moved]


def _planned_cluster(asked: _Asked, plan: "Plan") -> "Cluster":
    from epplan.errors import InputError
    from epplan.topologies.sources import load_cluster

    source = plan.inputs.topology
    try:
        cluster = load_cluster(asked.topology or source.source)
    except InputError as error:
        if asked.topology:
            raise
        raise InputError(
            f"the plan's topology cannot be read: {error.message}",
            hints=["say where it is now: --topology SOURCE"],
        ) from None
    if not asked.topology and cluster.sha256 != source.sha256:
        raise InputError(
            f"the plan's topology {source.source} was changed after planning: it is "
            f"{cluster.sha256[:12]}, the plan was made from {source.sha256[:12]}",
            hints=[
                "make the plan again with `epplan solve`",
                "or say that this is meant: --topology SOURCE",
            ],
        )
    return cluster


def _laid_out_scene(asked: _Asked, topology: str, model: str) -> tuple["Scene", list[str]]:
    from epplan.planner.model import load_model
    from epplan.planner.simulate.build import Load, scene_of_cluster
    from epplan.planner.simulate.scene import parse_layout
    from epplan.topologies.sources import load_cluster

    cluster = load_cluster(topology)
    spec = load_model(model).with_overrides(experts=asked.experts, layers=asked.layers)
    changed, remarks = _what_if(asked, cluster)
    layout = parse_layout(asked.layout) if asked.layout else None
    scene = scene_of_cluster(
        changed,
        spec,
        _group_size(layout, changed, spec),
        Load(source=asked.load or "uniform", seed=asked.seed or 0),
        _devices(asked, cluster),
        replicas=asked.replicas,
    )
    return scene, remarks


def _group_size(layout: "Layout | None", cluster: "Cluster", spec: "ModelSpec") -> int:
    """Return the GPUs used: the layout's, as many copies of it as the cluster holds for tp x pp."""
    gpus = len(cluster.gpus())
    if layout is None:
        return max(1, min(gpus, spec.num_experts))
    if layout.is_expert_parallel:
        return layout.ep
    return max(layout.size, gpus // layout.size * layout.size)


def _what_if(asked: _Asked, cluster: "Cluster") -> tuple["Cluster", list[str]]:
    from epplan.errors import InputError
    from epplan.planner.simulate.whatif import with_nics, with_oversubscription, without_hosts
    from epplan.topologies.units import parse_bandwidth

    name = cluster.name
    if asked.without_host:
        cluster = without_hosts(cluster, asked.without_host)
    if asked.nic:
        try:
            rate = parse_bandwidth(asked.nic)
        except ValueError as error:
            raise InputError(f"--nic {asked.nic}: {error}") from None
        if rate <= 0:
            raise InputError(f"--nic {asked.nic}: a NIC needs some bandwidth")
        cluster = with_nics(cluster, rate)
    if asked.leaf_oversubscription:
        cluster = with_oversubscription(cluster, asked.leaf_oversubscription)
    return cluster, [f"what if: {cluster.name}"] if cluster.name != name else []


def _devices(asked: _Asked, cluster: "Cluster") -> dict[str, "Device"]:
    """Return the given profile for the cluster's GPU model.

    Raises:
        InputError: the cluster mixes models, so that it is not said whose profile it is.
    """
    from epplan.errors import InputError
    from epplan.planner.simulate.device import read_device

    if asked.device_profile is None:
        return {}
    models = {gpu.profile.name for gpu in cluster.gpus() if gpu.profile}
    if len(models) != 1:
        raise InputError(
            f"--device-profile is for one GPU model; {cluster.name} has {', '.join(sorted(models))}"
        )
    name = models.pop()
    return {name: read_device(asked.device_profile, name)}
