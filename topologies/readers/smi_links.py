"""NVLink behind the NV# labels of `nvidia-smi topo -m`: switch or mesh, and links of what model.

The matrix writes NV18 both for 18 links of a GPU to NVSwitches and for 18 links of that pair. It is
a switch when every linked GPU has the same NV# to all the others and a mesh cannot be: the number
is the model's link count, or the sum over the row is more than any GPU has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from epplan.topologies.hardware import GpuProfile, hardware

if TYPE_CHECKING:
    from .smi_topo import Matrix


@dataclass(slots=True)
class Links:
    """What the labels say about NVLink.

    Attributes:
        profile: the GPUs' model, None when not told.
        model: the model whose link speed is used; None without links.
        switched: all links go to NVSwitches.
        of_gpu: links of each GPU as the matrix states them, 0 for none.
        of_pair: links of each joined pair; empty when switched.
        cap: the most links a GPU can have.
        assumed: what is not in the matrix.
        warnings: what is odd in it.
    """

    profile: GpuProfile | None
    model: GpuProfile | None
    switched: bool
    of_gpu: dict[str, int]
    of_pair: dict[tuple[str, str], int]
    cap: int
    assumed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_links(matrix: Matrix, profile: GpuProfile | None) -> Links:
    """Return the NVLinks of a matrix.

    Args:
        matrix: the labels.
        profile: the GPUs' model, None when not told.
    """
    pairs = _pairs(matrix)
    linked = [gpu for gpu in matrix.gpus if any(gpu in pair for pair in pairs)]
    largest = {gpu: _largest(matrix, pairs, gpu) for gpu in matrix.gpus}
    switched = _is_switch(matrix, pairs, linked, largest, profile)
    of_gpu = largest if switched else _row_sums(matrix, pairs)
    candidates = _candidates(max(of_gpu.values(), default=0), profile)
    model = min(candidates, key=lambda x: x.link) if pairs else None
    links = Links(
        profile=profile,
        model=model,
        switched=switched,
        of_gpu=of_gpu,
        of_pair={} if switched else pairs,
        cap=profile.links if profile and profile.links else 99,
    )
    _say_what_is_assumed(links, candidates)
    _say_what_is_odd(links, linked)
    return links


def _pairs(matrix: Matrix) -> dict[tuple[str, str], int]:
    pairs: dict[tuple[str, str], int] = {}
    for one, other in combinations(matrix.gpus, 2):
        cells = (matrix.labels.get((one, other)), matrix.labels.get((other, one)))
        counts = [int(cell[2:]) for cell in cells if cell and re.fullmatch("NV[1-9][0-9]?", cell)]
        if counts:
            pairs[one, other] = min(counts)
    return pairs


def _largest(matrix: Matrix, pairs: dict[tuple[str, str], int], gpu: str) -> int:
    """Return the largest NV# of a GPU's own row, or of its column where the row is missing."""
    own = [int(x[2:]) for (row, _), x in matrix.labels.items() if row == gpu and x[:2] == "NV"]
    return max(own or [count for pair, count in pairs.items() if gpu in pair], default=0)


def _row_sums(matrix: Matrix, pairs: dict[tuple[str, str], int]) -> dict[str, int]:
    sums = dict.fromkeys(matrix.gpus, 0)
    for pair, count in pairs.items():
        for gpu in pair:
            sums[gpu] += count
    return sums


def _is_switch(
    matrix: Matrix,
    pairs: dict[tuple[str, str], int],
    linked: list[str],
    largest: dict[str, int],
    profile: GpuProfile | None,
) -> bool:
    known = {
        (one, other)
        for one, other in combinations(linked, 2)
        if (one, other) in matrix.labels or (other, one) in matrix.labels
    }
    if not pairs or known != pairs.keys() & known:
        return False
    # a GPU that lost some links shows fewer to all, and all show that number or theirs to it
    if any(count not in (largest[a], largest[b]) for (a, b), count in pairs.items()):
        return False
    most = max(largest.values())
    if profile is not None and profile.links == most:
        return profile.fabric == "switch"
    models = [x for x in hardware().gpus.values() if x.links == most]
    if most * (len(linked) - 1) > max(x.links for x in hardware().gpus.values()):
        return True
    return bool(models) and all(model.fabric == "switch" for model in models)


def _candidates(links: int, profile: GpuProfile | None) -> list[GpuProfile]:
    """Return the models the links may belong to: the given one, those with as many, or any."""
    if profile is not None and profile.links:
        return [profile]
    nvlink = [x for x in hardware().gpus.values() if x.sm and x.links]
    return [x for x in nvlink if x.links == links] or nvlink


def _say_what_is_assumed(links: Links, candidates: list[GpuProfile]) -> None:
    if links.profile is not None:
        links.assumed.append(f"the GPUs are taken as {links.profile.name}, as given")
        return
    exact = links.model is not None and links.model.links == max(links.of_gpu.values())
    names = " or ".join(x.name for x in candidates) if exact else "unknown"
    if links.model is not None:
        links.assumed.append(
            f"each NVLink is taken as {links.model.link / 1e9:g} GB/s, the slowest of the models "
            f"that may be meant ({names})"
        )
    links.warnings.append(
        f"the matrix does not tell the GPUs' model ({names}); give it with --gpu MODEL to plan "
        "with this topology"
    )


def _say_what_is_odd(links: Links, linked: list[str]) -> None:
    most = max(links.of_gpu.values(), default=0)
    if links.profile is not None and most > links.profile.links:
        links.warnings.append(
            f"a GPU has {most} NVLinks, a {links.profile.name} {links.profile.links}: capacity of "
            f"{links.profile.links} links taken"
        )
    for gpu, count in links.of_gpu.items():
        if linked and not count:
            links.warnings.append(f"{gpu} has no NVLink, others have {most}: it lost its links")
        elif links.switched and count < most:
            links.warnings.append(f"{gpu} has {count} NVLinks, others {most}: it lost some")
    if links.profile is not None and links.switched and most < links.profile.links:
        links.warnings.append(
            f"the GPUs have {most} NVLinks, a {links.profile.name} has {links.profile.links}"
        )
