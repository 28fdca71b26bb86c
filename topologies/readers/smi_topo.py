"""`nvidia-smi topo -m` text: who is joined to whom, and how near.

            GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity   GPU NUMA ID
    GPU0     X      NV18    PIX     0-55,112-167    0               N/A
    GPU1    NV18     X      SYS     56-111,168-223  1               N/A
    NIC0    PIX     SYS      X
    NIC Legend:
      NIC0: mlx5_0

Taken as found in the wild: tabs or blanks, escape codes, indents, a header without its blank first
cell, NIC columns named after devices, no NUMA column, glued cells, rows missing at the end. NV# is
what a GPU has towards the other: behind NVSwitches all pairs share it, in a mesh it is the pair's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder
from epplan.topologies.hardware import gpu_profile

from .smi_host import build_host

MAX_DEVICES = 256

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_HEADER = re.compile(r"^\s*GPU0(\s|$|GPU|NIC)")
_DEVICE = re.compile(r"(?:GPU|NIC)[0-9]+|[A-Za-z][\w.-]*")
_CELL = re.compile(r"\s*(NV[0-9]{1,2}|NODE|PIX|PXB|PHB|SYS|SOC|X)")
_P2P_CELLS = {"OK", "CNS", "GNS", "TNS", "NS", "DR", "U"}
_LEGEND = re.compile(r"^\s*(NIC[0-9]+)\s*:\s*(\S+)")
_HIDDEN_NICS = re.compile(r"([0-9]+) NICs found in the topology, only displaying ([0-9]+)")


@dataclass(slots=True)
class Matrix:
    """The matrix as written.

    Attributes:
        gpus: column names of GPUs.
        nics: column names of NICs.
        labels: by (row, column) what the cell says; both directions where both are there.
        cpus: CPU affinity by GPU, as text.
        numa: NUMA affinity by GPU; absent where the source does not tell.
        nic_names: device names of the NIC legend.
        remarks: what is odd about the text.
    """

    gpus: list[str]
    nics: list[str]
    labels: dict[tuple[str, str], str] = field(default_factory=dict)
    cpus: dict[str, str] = field(default_factory=dict)
    numa: dict[str, int] = field(default_factory=dict)
    nic_names: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def is_smi_topo(text: str) -> bool:
    """Tell whether a text has the header of a matrix between GPUs."""
    return any(_HEADER.match(line) for line in _lines(text))


def read_smi_topo(text: str, what: str, gpu_model: str | None = None) -> ClusterBuilder:
    """Return the host a matrix describes.

    Args:
        text: output of `nvidia-smi topo -m`, with or without its legends.
        what: names it in errors.
        gpu_model: the profile of the GPUs: the matrix does not tell their model.

    Raises:
        InputError: a peer-to-peer matrix, no rows, or rows that do not fit the header.
    """
    matrix = read_matrix(text, what)
    return build_host(matrix, what, gpu_profile(gpu_model) if gpu_model else None)


def _lines(text: str) -> list[str]:
    return _ESCAPE.sub("", text).splitlines()


def read_matrix(text: str, what: str) -> Matrix:
    """Return the matrix as written.

    Raises:
        InputError: as `read_smi_topo`.
    """
    lines = _lines(text)
    start = next(number for number, line in enumerate(lines) if _HEADER.match(line))
    # the first line of output that has lost its blank cell looks like a row that has no cells
    columns = _DEVICE.findall(re.split(r"CPU\s+Affinity", lines[start])[0])
    _check_columns(columns, what)
    matrix = Matrix(
        gpus=[name for name in columns if re.fullmatch("GPU[0-9]+", name)],
        nics=[name for name in columns if not re.fullmatch("GPU[0-9]+", name)],
    )
    seen: set[str] = set()
    for number, line in enumerate(lines[start + 1 :], start + 2):
        name = line.split()[0] if line.split() else ""
        if name in columns and name not in seen:
            seen.add(name)
            _read_row(matrix, columns, name, line, f"{what}: line {number}")
    _read_legend(matrix, lines)
    rows = [name for name in matrix.gpus if name in seen]
    if not rows:
        raise InputError(f"{what} has the header of nvidia-smi topo -m and no row of a GPU")
    if len(rows) < len(matrix.gpus):
        matrix.remarks.append(
            f"{len(matrix.gpus) - len(rows)} of {len(matrix.gpus)} GPU rows are missing; they are "
            "taken from the columns of the others"
        )
    matrix.remarks += _asymmetries(matrix)
    return matrix


def _check_columns(columns: list[str], what: str) -> None:
    if len(columns) > MAX_DEVICES:
        raise InputError(f"{what} has {len(columns)} columns; no host has that many devices")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(f"{what}: column {twice[0]} appears twice in the header")


def _read_row(matrix: Matrix, columns: list[str], name: str, line: str, where: str) -> None:
    rest = line[line.index(name) + len(name) :]
    first = rest.split()[0] if rest.split() else ""
    if first in _P2P_CELLS or (first == "X" and _P2P_CELLS & set(rest.split())):
        raise InputError(
            f"{where} has cells like OK and NS: this is a peer-to-peer matrix (nvidia-smi topo "
            "-p2p), which does not tell how GPUs are joined",
            hints=["give the output of nvidia-smi topo -m"],
        )
    cells: list[str] = []
    while match := _CELL.match(rest):
        cells.append(match[1])
        rest = rest[match.end() :]
    if len(cells) > len(columns) or (cells and len(cells) < len(columns) and rest.strip()):
        raise InputError(
            f"{where}: {name} has {len(cells)} cells, the header has {len(columns)} columns"
        )
    for column, cell in zip(columns, cells, strict=False):
        if cell != "X":
            matrix.labels[name, column] = "SYS" if cell == "SOC" else cell
    if name in matrix.gpus:
        _read_affinity(matrix, name, rest)


def _read_affinity(matrix: Matrix, name: str, rest: str) -> None:
    # a tab stands before each cell, so that the first part is empty
    cells = [cell.strip() for cell in rest.split("\t")[1:]] if "\t" in rest else rest.split()
    if cells and re.match("[0-9]", cells[0]):
        matrix.cpus[name] = cells[0]
    match = re.match("[0-9]{1,6}", cells[1]) if len(cells) > 1 else None
    if match:
        matrix.numa[name] = int(match[0])  # of a list the first: the others are GPUs' memory


def _read_legend(matrix: Matrix, lines: list[str]) -> None:
    for line in lines:
        hidden, named = _HIDDEN_NICS.search(line), _LEGEND.match(line)
        if hidden:
            matrix.remarks.append(f"the host has {hidden[1]} NICs, the matrix only {hidden[2]}")
        if named and named[1] in matrix.nics and named[2] not in matrix.nic_names.values():
            matrix.nic_names[named[1]] = named[2]


def _asymmetries(matrix: Matrix) -> Iterator[str]:
    """Yield a remark for a pair whose two cells differ; NV# may, when a GPU lost some links."""
    for (row, column), label in matrix.labels.items():
        back = matrix.labels.get((column, row), label)
        both_nvlink = label.startswith("NV") and back.startswith("NV")
        if row < column and label != back and not both_nvlink:
            yield f"{row} to {column} is {label}, {column} to {row} is {back}: {label} taken"
