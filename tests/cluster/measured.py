"""`epplan topo measure` on an emulated cluster: its link benchmark, its fits, its cluster file."""

from pathlib import Path
from typing import Any

from epplan.files import write_atomically
from epplan.planner.model import AttentionSpec, ModelSpec
from epplan.planner.plan import Plan
from epplan.runtime.environment import choose_setting
from epplan.runtime.link_benchmark import MAX_BYTES, Options, time_links
from epplan.topologies.cluster_writer import measured_text
from epplan.topologies.measure import measure, parse_times
from epplan.topologies.sources import load_cluster
from tests.fork_ranks import fork_ranks
from tests.plans import bare_plan

from .fabric import Fabric, cluster_document
from .gloo import gloo_on
from .namespaces import Emulation

_MESSAGE_BYTES = MAX_BYTES["gloo"]


def write_measured_cluster(
    fabric: Fabric, emulation: Emulation, folder: Path, *, repeats: int
) -> Path:
    """Write the fabric's cluster file with what one rank a host measures, and return its path.

    One rank a host, so that memory keeps the profile's figures: those are of 16 busy ranks. Only
    the largest messages count: a bucket lets the first 18 kB through at once, which makes smaller
    ones look faster than the link. The network's own latency (0.1 ms) is not told that way; it
    vanishes beside the profile's 9 ms, which 16 processes on 2 cores need for any all-to-all.
    """
    path = folder / f"{fabric.name}.yaml"
    write_atomically(path, cluster_document(fabric))
    cluster = load_cluster(str(path))
    plan = _one_rank_a_host(fabric)
    store = folder / f"{fabric.name}-measure"
    found, *_ = fork_ranks(_measure_rank, len(fabric.hosts), emulation, store, plan, repeats)
    times = parse_times(found, "link times")
    large = tuple(pair for pair in times.pairs if pair.bytes == _MESSAGE_BYTES)
    rows = measure(cluster, times.model_copy(update={"pairs": large}), slow_below=0.5).rows
    write_atomically(path, measured_text(str(path), cluster, "emulated cluster", rows))
    return path


def _one_rank_a_host(fabric: Fabric) -> Plan:
    count = len(fabric.hosts)
    model = ModelSpec(
        name="probe",
        hidden_size=8,
        num_layers=1,
        moe_layers=(0,),
        num_experts=count,
        top_k=1,
        expert_ffn_size=8,
        attention=AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8),
        dtype="float32",
        weight_bytes=4,
    )
    return bare_plan(model, [(host.name, 0) for host in fabric.hosts], [list(range(count))])


def _measure_rank(
    rank: int, emulation: Emulation, store: Path, plan: Plan, repeats: int
) -> dict[str, Any] | None:
    options = Options(backend="gloo", max_bytes=_MESSAGE_BYTES, repeats=repeats)
    with gloo_on(emulation, plan.ranks[rank].host, store, rank, plan.world_size):
        return time_links(plan, options, choose_setting("gloo", plan.model, 0, 1), rank)
