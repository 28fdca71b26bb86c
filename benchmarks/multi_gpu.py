"""What follows from the files that `benchmarks/multi_gpu.sh` has kept; a JSON line each.

    PYTHONPATH=. python benchmarks/multi_gpu.py OUTPUT_DIR

Ratios only between figures of the same run. A part that was not run, or failed, is left out, and
`missing` at the end names it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

Fields = dict[str, Any]
_MODELS = ("reference", "narrow")


class Kept:
    """The JSON files of a run; remembers which of those asked for are missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.missing: list[str] = []

    def get(self, name: str) -> Any:
        """Return a document, None where the command left none."""
        try:
            return json.loads((self._folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            self.missing.append(name)
            return None

    def all(self, *names: str) -> list[Any] | None:
        """Return documents, None where any is missing."""
        documents = [self.get(name) for name in names]
        return None if None in documents else documents

    def windows(self, name: str) -> list[Any]:
        """Return the documents of a file with one a line."""
        path = self._folder / f"{name}.jsonl"
        if not path.exists():
            self.missing.append(name)
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def main(folder: Path) -> None:
    """Print what the files in FOLDER say."""
    kept = Kept(folder)
    for section in (_links, _equal, _overlap, _predicted, _skew, _moving, _killed):
        for line in section(kept):
            click.echo(json.dumps(_rounded(line)))
    click.echo(json.dumps({"what": "missing", "files": kept.missing}))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _links(kept: Kept) -> Iterator[Fields]:
    if (links := kept.get("links")) is not None:
        for row in links["classes"]:
            yield {"what": "links", **row}
        for row in links["compared"]:
            yield {
                "what": "expected over measured",
                **{key: row[key] for key in ("path", "transfers", "bytes", "measured_s")},
                "ratio": row["expected_s"] / row["measured_s"],
            }
        yield {"what": "slow pairs", "pairs": links["slow"]}


def _equal(kept: Kept) -> Iterator[Fields]:
    for name in ("equal-alltoall", "equal-padded", "equal-reference"):
        if (run := kept.get(name)) is not None:
            yield {
                "what": "equal to the dense model",
                "model": run["model"],
                **{key: run[key] for key in ("ranks", "device", "dispatcher", "micro_batches")},
                **{key: run[key] for key in ("verified", "max_abs_error", "tolerance")},
            }


def _phase(bench: Any) -> Any:
    return bench["phases"][0]


def _overlap(kept: Kept) -> Iterator[Fields]:
    for model in _MODELS:
        names = [f"{model}-prefill{suffix}" for suffix in ("", "-serial", "-alone", "-tp")]
        if (benches := kept.all(*names)) is not None:
            yield {"what": "overlap", "model": model, **_overlap_of(*benches)}
        if (both := kept.all(f"{model}-decode", f"{model}-decode-tp")) is not None:
            expert, tensor = (_phase(bench) for bench in both)
            yield {
                "what": "decode",
                "model": model,
                "how": both[0]["how"],
                "graph": expert["graph"],
                "ms": expert["step_s"] * 1e3,
                "tp_how": both[1]["how"],
                "tp_graph": tensor["graph"],
                "tp_ms": tensor["step_s"] * 1e3,
                "tp_over_ep": tensor["step_s"] / expert["step_s"],
            }


def _overlap_of(overlapped: Any, serial: Any, alone: Any, tensor: Any) -> Fields:
    """Return times of a prefill step, and how much of what can be hidden is hidden."""
    together, apart = _phase(overlapped)["step_s"], _phase(serial)["step_s"]
    transfers = sum(_phase(serial)["transfers"].values())
    computing = apart - transfers
    shorter = min(computing, transfers)  # what can be hidden under the other
    return {
        "how": overlapped["how"],
        "device": overlapped["device"],
        "ranks": overlapped["ranks"],
        "ms": together * 1e3,
        "serial_ms": apart * 1e3,
        "transfers_ms": transfers * 1e3,
        "rest_ms": computing * 1e3,
        "one_rank_without_transfers_ms": _phase(alone)["step_s"] * 1e3,
        "hidden_share": (apart - together) / shorter,  # 1: the longer part alone is left
        "gemm_share": _phase(overlapped)["gemm_share"],
        "tp_ms": _phase(tensor)["step_s"] * 1e3,
        "tp_how": tensor["how"],
        "tp_over_ep": _phase(tensor)["step_s"] / together,
    }


def _predicted(kept: Kept) -> Iterator[Fields]:
    for model in _MODELS:
        for phase, measured in (("", "-prefill-serial"), ("-decode", "-decode")):
            names = (
                f"{model}{measured}",
                f"{model}{phase}-predicted",
                f"{model}{phase}-calibrated",
            )
            if (documents := kept.all(*names)) is None:
                continue
            bench, before, after = _phase(documents[0]), documents[1], documents[2]
            line = {
                "what": "predicted over measured",
                "model": model,
                "phase": bench["phase"],
                "graph": bench["graph"],
                "measured_ms": bench["step_s"] * 1e3,
                "step": before["step_s"] / bench["step_s"],
                "step_calibrated": after["step_s"] / bench["step_s"],
            }
            if transfers := sum(bench["transfers"].values()):  # a graph has no marks
                line |= {
                    "measured_transfers_ms": transfers * 1e3,
                    "transfers": before["transfer_s"] / transfers,
                    "transfers_calibrated": after["transfer_s"] / transfers,
                }
            yield line


def _skew(kept: Kept) -> Iterator[Fields]:
    names = ("contiguous", "planned", "replicas")
    if (runs := kept.all(*(f"run-{name}" for name in names))) is None:
        return
    for name, run in zip(names, runs, strict=True):
        yield {
            "what": "skewed routing",
            "placement": name,
            "ms": run["step_s"] * 1e3,
            "experts_ms": run["phases"]["experts"]["max_s"] * 1e3,
            "max_over_mean": [layer["max_over_mean"] for layer in run["balance"]],
            "contiguous_over_this": runs[0]["step_s"] / run["step_s"],
            "verified": run["verified"],
        }


def _moving(kept: Kept) -> Iterator[Fields]:
    windows, run = kept.windows("moving-windows"), kept.get("moving")
    if windows and run is not None:
        per_step = [window["seconds"] / window["steps"] * 1e3 for window in windows]
        yield {
            "what": "experts move while running",
            **{key: run[key] for key in ("rebalances", "moved_experts", "moved_bytes", "verified")},
            "window_ms_a_step": per_step,
            "worst_window_over_first": max(per_step) / per_step[0],
            "first_over_last": per_step[0] / per_step[-1],
        }


def _killed(kept: Kept) -> Iterator[Fields]:
    if (run := kept.get("killed")) is not None:
        notes = [note for note in run["notes"] if "went on after" in note]
        yield {"what": "a rank was killed", "steps": run["steps"], "went_on": notes}


if __name__ == "__main__":
    main()
