"""A layer with token sets over cells: what stays true of its rows where only islands are known.

    row[island] = the least of row[gpu] over its GPUs, for every row, and for rows of one kind that
                  only one island's GPUs load their mean, weighed by capacity: the worst is no less

With cells that are GPUs all rows stay as they are.
"""

from dataclasses import dataclass

import numpy as np

from epplan.planner.objective import Objective, Timed
from epplan.planner.placement.rows import Floats, Ints, LayerRows
from epplan.planner.placement.terms import cell_terms
from epplan.planner.token_sets import TokenSets

from .set_rows import SetLayer, TransferRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Places of one level, made of whole cells.

    Attributes:
        place_of_cell: [cells].
        per_rank: most experts on a rank, where a place stands for its ranks; else None.
    """

    place_of_cell: Ints
    per_rank: int | None = None

    @property
    def num_places(self) -> int:
        """Number of places."""
        return int(self.place_of_cell.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTerms:
    """All phases over cells, transfers first, with the transfers' matrices by level.

    A matrix is [rows, places, sources] in seconds a token.
    """

    phases: tuple[Timed, ...]
    matrices: tuple[tuple[Floats, ...], ...]
    constant_s: Floats
    objective: Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSets:
    """Token sets with variables of their own, and the choices of the rest.

    Attributes:
        experts: of the sets, -1 is none, [sets, k].
        tokens: of every source with that set, [sources, sets].
        rest: assignments of all other tokens, [sources, experts].
        num_sources: of the tokens.
    """

    experts: Ints
    tokens: Floats
    rest: Floats
    num_sources: int

    @classmethod
    def of(cls, sets: TokenSets, most: int) -> "KeptSets":
        """Return the `most` sets that weigh most, over all sources, and the rest."""
        unique, number = np.unique(sets.experts, axis=0, return_inverse=True)
        number = number.ravel()
        weight = np.bincount(number, weights=sets.weight)
        order = np.argsort(-weight, kind="stable")
        kept = np.full(len(unique), -1)
        kept[order[:most]] = np.arange(len(order[:most]))
        tokens = np.zeros((sets.num_sources, min(most, len(unique))))
        own = kept[number] >= 0
        np.add.at(tokens, (sets.source[own], kept[number[own]]), sets.weight[own])
        rest = TokenSets(
            source=sets.source[~own],
            experts=sets.experts[~own],
            weight=sets.weight[~own],
            num_sources=sets.num_sources,
        )
        return cls(
            experts=unique[order[:most]],
            tokens=tokens,
            rest=rest.counts(int(sets.experts.max()) + 1),
            num_sources=sets.num_sources,
        )


def terms_over_cells(layer: SetLayer, cell_of_gpu: Ints) -> CellTerms:
    """Return a layer over cells, [gpus]: exact where these are GPUs, else no more than is true."""
    others = cell_terms(
        LayerRows(phases=layer.others, constant_s=layer.constant_s, objective=layer.objective),
        cell_of_gpu,
    )
    matrices = []
    for transfer in layer.transfers:
        num_sources = layer.sets[transfer.window].num_sources
        dense = [
            matrix.toarray().reshape(matrix.shape[0], -1, num_sources)
            for matrix in transfer.matrices
        ]
        matrices.append(tuple(_over_cells(transfer, dense, cell_of_gpu)))
    return CellTerms(
        phases=(*layer.transfers, *others.phases),
        matrices=tuple(matrices),
        constant_s=layer.constant_s,
        objective=layer.objective,
    )


def _over_cells(transfer: TransferRows, dense: list[Floats], cell_of_gpu: Ints) -> list[Floats]:
    """Return the matrices of a transfer over cells: its rows, then means of rows of one cell."""
    cells = [np.flatnonzero(cell_of_gpu == cell) for cell in range(int(cell_of_gpu.max()) + 1)]
    means = _means(transfer, dense, cell_of_gpu)
    whole = [np.concatenate(pair) for pair in zip(dense, means, strict=True)]
    whole[0] = np.stack([whole[0][:, gpus].min(axis=1) for gpus in cells], axis=1)
    kept = np.any([matrix.reshape(len(matrix), -1).any(axis=1) for matrix in whole], axis=0)
    return [matrix[kept] for matrix in whole]


def _means(transfer: TransferRows, dense: list[Floats], cell_of_gpu: Ints) -> list[Floats]:
    """Return rows of one kind and cell as their mean, weighed by capacity, for every level."""
    by_gpu = np.asarray(dense[0].any(axis=2))  # [rows, gpus]
    groups: dict[tuple[int, int], list[int]] = {}
    for row in range(len(by_gpu)):
        touched = np.unique(cell_of_gpu[by_gpu[row]])
        if len(touched) == 1:
            groups.setdefault((int(touched[0]), int(transfer.kind[row])), []).append(row)
    weights = np.zeros((len(groups), len(by_gpu)))
    for number, rows in enumerate(groups.values()):
        weights[number, rows] = transfer.capacity[rows] / transfer.capacity[rows].sum()
    return [np.tensordot(weights, matrix, axes=1) for matrix in dense]
