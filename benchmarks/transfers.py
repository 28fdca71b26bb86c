"""What it is worth to send a token's row once to a host: the real worker on emulated hosts.

    sudo python -m benchmarks.transfers [--fabric even] [--tokens 96]

Needs root, `ip` and `tc`; takes a minute or two. 16 ranks run two layers of Qwen3-235B, scaled,
with 64 experts, four a rank, top-8, on hosts whose links are shaped (tests/cluster/fabrics.py):
once for each way in which rows can travel, by the plan that `epplan solve` makes for it. Prints
JSON lines: the median step, and the bytes that left all hosts in a step, as their interfaces count.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from epplan.launcher.request import request_from_plan
from epplan.launcher.targets.local import run_local
from tests.cluster import rank_on_host
from tests.cluster.fabric import cluster_document
from tests.cluster.fabrics import FABRICS
from tests.cluster.namespaces import INTERFACE, Emulation, emulate, why_not

MODEL = ("--model", "qwen3-235b-a22b", "--layers", "2", "--experts", "64", "--scale", "0.25")
TRANSFERS = ("per-choice", "direct", "node-dedup")


@click.command()
@click.option("--fabric", default="even", type=click.Choice([fabric.name for fabric in FABRICS]))
@click.option("--tokens", default=96, show_default=True, help="Of each rank in a step.")
@click.option("--steps", default=5, show_default=True)
def main(fabric: str, tokens: int, steps: int) -> None:
    """Measure and print."""
    if (reason := why_not()) is not None:
        raise click.ClickException(reason)
    chosen = next(each for each in FABRICS if each.name == fabric)
    per_choice: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cluster.yaml").write_text(cluster_document(chosen))
        for transfer in TRANSFERS:
            plan = _plan(folder, transfer, tokens)
            with emulate(chosen) as emulation:
                row = _run(folder, emulation, plan, tokens, steps)
            per_choice = per_choice or row
            click.echo(
                json.dumps(
                    {
                        "fabric": fabric,
                        "transfer": transfer,
                        "tokens_a_rank": tokens,
                        **row,
                        "per_choice_over_this": per_choice["step_s"] / row["step_s"],
                        "bytes_over_per_choice": row["bytes_a_step"] / per_choice["bytes_a_step"],
                    }
                )
            )


def _plan(folder: Path, transfer: str, tokens: int) -> Path:
    path = folder / f"{transfer}.json"
    command = [sys.executable, "-m", "epplan", "solve", "--topology", str(folder / "cluster.yaml")]
    command += [*MODEL, "--ep", "16", "--experts-per-gpu", "4", "--load", "uniform"]
    command += ["--tokens", str(tokens), "--transfer", transfer, "--time-limit", "10"]
    solved = subprocess.run([*command, "-o", str(path)], check=False, stdout=subprocess.DEVNULL)
    if solved.returncode not in (0, 4):  # 4: the time limit, with a plan
        raise click.ClickException(f"{' '.join(command)} ended with {solved.returncode}")
    return path


def _run(folder: Path, emulation: Emulation, plan: Path, tokens: int, steps: int) -> dict[str, Any]:
    setting, pids = folder / "emulation.json", folder / "pids"
    pids.mkdir(exist_ok=True)
    rank_on_host.write_setting(setting, emulation, pids)
    options = ("--sequences=1", f"--sequence-length={tokens}", f"--steps={steps}", "--backend=gloo")
    request = request_from_plan(plan, options=options, module="tests.cluster.rank_on_host")
    with patch.dict("os.environ", {rank_on_host.VARIABLE: str(setting)}):
        before = _sent(emulation)
        result = run_local(request, lambda line, is_error: None).result
        sent = _sent(emulation) - before
    assert result is not None
    assert result["verified"], result["problems"]
    return {
        "step_s": result["step_s"],
        "bytes_a_step": sent / (steps + 1),  # with the warm-up, whose rows are checked
    }


def _sent(emulation: Emulation) -> int:
    """Return the bytes that have left all hosts."""
    counter = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    return sum(
        int(
            subprocess.run(
                ["ip", "netns", "exec", emulation.namespace(host), "cat", counter],
                check=True,
                capture_output=True,
            ).stdout
        )
        for host in emulation.hosts
    )


if __name__ == "__main__":
    main()
