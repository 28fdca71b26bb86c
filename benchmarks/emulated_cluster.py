"""Planned placements against others on an emulated cluster, and predicted times against measured.

    sudo python -m benchmarks.emulated_cluster [--traces COUNTS.npz] [--write PAGE.md]

Needs root, `ip` and `tc`; takes half an hour. Every fabric of tests/cluster/fabrics.py is built
from network namespaces, measured by `epplan topo measure`'s benchmark, planned for by
`epplan solve`, and gets the same traffic under the planned, the contiguous and random placements.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from epplan.errors import EpplanError
from epplan.files import read_text, write_atomically
from tests.cluster.fabric import Fabric
from tests.cluster.fabrics import FABRICS
from tests.cluster.measured import write_measured_cluster
from tests.cluster.namespaces import emulate, why_not
from tests.cluster.proof import (
    PLACEMENTS,
    Counts,
    Proof,
    load_problem,
    prove,
    rule_counts,
    solve,
    write_inputs,
)
from tests.cluster.replay_rank import STARVED

RULE = "lognormal:1,1"
TOKENS = 512  # a rank
LAYERS = 2
TRACE_WINDOW, TRACE_LAYERS, TRACE_TOP_K = 200, (4, 16), 2  # iteration 2001 of the trace
TRACE_SHARE = 64  # of so many recorded assignments one is replayed: 256 a rank
ERROR_GOAL = 0.15
BEGIN, END = "<!-- begin: benchmarks/emulated_cluster.py -->\n", "<!-- end -->\n"


@click.command()
@click.option("--traces", type=click.Path(path_type=Path), help="Recorded counts (SmartMoE's).")
@click.option("--repeats", default=5, show_default=True, help="Of every all-to-all.")
@click.option("--only", multiple=True, help="Names of fabrics; all by default.")
@click.option("--write", type=click.Path(path_type=Path), help="Put the tables into this page.")
def main(traces: Path | None, repeats: int, only: tuple[str, ...], write: Path | None) -> None:
    """Measure everything and print both tables."""
    if (reason := why_not()) is not None:
        raise click.ClickException(reason)
    proofs = []
    for fabric in FABRICS:
        if only and fabric.name not in only:
            continue
        for traffic, counts, top_k in _traffics(fabric, traces):
            proofs.append(_prove(fabric, traffic, counts, top_k, repeats))
            click.echo("\n".join(_case_lines(proofs[-1])), err=True)
    text = "\n".join([*_gain_table(proofs), "", *_error_table(proofs), ""])
    click.echo(text)
    if write is not None:
        page = read_text(write, "page")
        head, _, rest = page.partition(BEGIN)
        _, _, tail = rest.partition(END)
        write_atomically(write, f"{head}{BEGIN}{text}{END}{tail}")


def _traffics(fabric: Fabric, traces: Path | None) -> Iterator[tuple[str, Counts, int]]:
    yield RULE, rule_counts(RULE, layers=LAYERS, ranks=fabric.num_ranks, tokens=TOKENS), 1
    if traces is not None:
        recorded = np.load(traces)["counts"][TRACE_WINDOW]  # [source ranks, layers, experts]
        chosen = recorded[:, list(TRACE_LAYERS)].astype(np.int64) // TRACE_SHARE
        yield "trace", chosen.transpose(1, 0, 2), TRACE_TOP_K


def _prove(fabric: Fabric, traffic: str, counts: Counts, top_k: int, repeats: int) -> Proof:
    experts_per_gpu = counts.shape[2] // fabric.num_ranks
    with tempfile.TemporaryDirectory() as name, emulate(fabric) as emulation:
        folder = Path(name)
        cluster = write_measured_cluster(fabric, emulation, folder, repeats=repeats)
        model, load = write_inputs(folder, counts, top_k)
        plan = solve(cluster, model, load, experts_per_gpu)
        problem = load_problem(cluster, model, load, experts_per_gpu)
        store = folder / "store"
        return prove(fabric, traffic, plan, problem, emulation, store, repeats=repeats)


def _gain_table(proofs: list[Proof]) -> Iterator[str]:
    """Yield seconds of dispatch and combine, and how much faster the plan is."""
    yield (
        "| fabric | traffic | planned s | contiguous s | random s | planned is faster than "
        "contiguous (predicted) | than random (predicted) |"
    )
    yield "|---|---|---|---|---|---|---|"
    for proof in proofs:
        seconds = (f"{proof.seconds(placement):.2f}" for placement in PLACEMENTS)
        gains = (
            f"{proof.gain(other):.2f}x ({proof.gain(other, predicted=True):.2f}x)"
            for other in PLACEMENTS[1:]
        )
        yield f"| {' | '.join([proof.fabric.name, proof.traffic, *seconds, *gains])} |"


def _error_table(proofs: list[Proof]) -> Iterator[str]:
    """Yield predicted and measured time of a layer by placement, and the worst single case."""
    yield (
        "| fabric | traffic | placement | dispatch ms, predicted / measured | combine ms | error | "
        "worst all-to-all |"
    )
    yield "|---|---|---|---|---|---|---|"
    for proof in proofs:
        for placement in PLACEMENTS:
            cells = [proof.fabric.name, proof.traffic, placement]
            for phase in ("dispatch", "combine"):
                cases = proof.of(placement, phase)
                predicted = np.mean([case.predicted_s for case in cases])
                measured = np.mean([case.measured_s for case in cases])
                cells.append(f"{predicted * 1e3:.0f} / {measured * 1e3:.0f}")
            predicted_s = proof.seconds(placement, predicted=True)
            cells.append(f"{predicted_s / proof.seconds(placement) - 1:+.1%}")
            cells.append(f"{max((case.error for case in proof.of(placement)), key=abs):+.1%}")
            yield f"| {' | '.join(cells)} |"
    cases = [case for proof in proofs for case in proof.cases]
    errors = np.abs([case.error for case in cases])
    within = np.count_nonzero(errors <= ERROR_GOAL)
    yield ""
    yield (
        f"{len(cases)} all-to-alls: the prediction is off by {errors.mean():.1%} on average and by "
        f"{errors.max():.1%} at most; {within} are within {ERROR_GOAL:.0%}. Repeats of one differ "
        f"by {np.mean([case.spread for case in cases]):.1%} on average, by "
        f"{max(case.spread for case in cases):.0%} at most. {sum(case.spoiled for case in cases)} "
        f"rounds were repeated because a rank waited for a processor for more than {STARVED:.0%} "
        f"of them; {sum(case.kept_spoiled for case in cases)} count although one did."
    )


def _case_lines(proof: Proof) -> Iterator[str]:
    for case in proof.cases:
        yield (
            f"{proof.fabric.name} {proof.traffic} {case.placement} layer {case.layer} "
            f"{case.phase}: predicted {case.predicted_s * 1e3:.0f} ms, measured "
            f"{case.measured_s * 1e3:.0f} ms ({case.error:+.1%}, repeats within "
            f"{case.spread:.1%}, {case.spoiled} repeated for want of a processor), set by "
            f"{case.limit}"
        )


if __name__ == "__main__":
    try:
        main()
    except EpplanError as error:
        sys.exit(f"error: {error}")
