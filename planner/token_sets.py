"""Which experts tokens choose together: weighted sets of experts, by the rank where tokens live.

Counts say how often an expert is chosen; how many ranks or hosts a token reaches depends on which
experts it chooses at once. A layer's tokens are a hypergraph: experts are vertices, and every
different set of a source is an edge that weighs as many tokens as chose it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_ENTRIES = 2**26  # of shares looked up at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSets:
    """The tokens of one layer and window, aggregated.

    Attributes:
        source: rank of the tokens, [sets].
        experts: ids in ascending order, -1 first where a token has fewer, [sets, k].
        weight: tokens with that set, [sets].
        num_sources: source ranks; 1 where all ranks have the same mix in equal parts.
    """

    source: Ints
    experts: Ints
    weight: Floats
    num_sources: int

    def counts(self, num_experts: int) -> Floats:
        """Return assignments, [sources, experts]."""
        return self.reached(np.arange(num_experts), num_experts)

    def reached(self, place: Ints, num_places: int) -> Floats:
        """Return the tokens of every source with some expert at each place, [sources, places].

        Args:
            place: of every expert, [experts].
            num_places: number of places.
        """
        places = np.sort(np.append(place, num_places)[self.experts], axis=1)  # -1: nowhere
        first = np.ones_like(places, dtype=bool)
        first[:, 1:] = places[:, 1:] != places[:, :-1]
        edge, column = np.nonzero(first)
        width = num_places + 1
        cell = self.source[edge] * width + places[edge, column]
        total = np.bincount(cell, weights=self.weight[edge], minlength=self.num_sources * width)
        return total.reshape(self.num_sources, width)[:, :num_places].astype(np.float64)

    def reached_by_shares(self, at_place: Floats) -> Floats:
        """Return the tokens expected at each place where experts have copies, [sources, places].

        A token's expert is at a place with the share of its copies there, drawn for every choice
        by itself: 1 - prod(1 - share) of the tokens with these experts reach it.

        Args:
            at_place: shares of every expert at every place, [experts, places].
        """
        nowhere = np.ones((1, at_place.shape[1]))
        missed = np.concatenate([np.maximum(1.0 - at_place, 0.0), nowhere])  # -1 is the last
        total = np.zeros((self.num_sources, at_place.shape[1]))
        parts = -(-self.experts.size * at_place.shape[1] // _ENTRIES)
        for part in np.array_split(np.arange(len(self.weight)), max(1, parts)):
            none_there = np.ones((len(part), at_place.shape[1]))
            for column in self.experts[part].T:
                none_there *= missed[column]
            for place, none in enumerate(none_there.T):
                total[:, place] += np.bincount(
                    self.source[part],
                    weights=self.weight[part] * (1.0 - none),
                    minlength=self.num_sources,
                )
        return total

    def tokens_at(self, place_of_rank: Ints, shares: Floats) -> Floats:
        """Return the tokens of every rank expected at each place, [ranks, places].

        Args:
            place_of_rank: [ranks].
            shares: of every expert's rows on each rank, [experts, ranks].
        """
        num_ranks, num_places = len(place_of_rank), int(place_of_rank.max()) + 1
        if np.count_nonzero(shares) == len(shares):
            reached = self.reached(place_of_rank[shares.argmax(axis=1)], num_places)
        else:
            reached = self.reached_by_shares(shares @ np.eye(num_places)[place_of_rank])
        if self.num_sources == 1:  # in equal parts from all ranks
            reached = np.repeat(reached / num_ranks, num_ranks, axis=0)
        return reached

    def scaled(self, factor: float) -> "TokenSets":
        """Return as many times the tokens."""
        return replace(self, weight=self.weight * factor)

    def from_sources(self, sources: Sequence[int]) -> "TokenSets":
        """Return the tokens of some sources, which are numbered anew; one source stays as it is.

        Where all ranks have the same mix, fewer of them have fewer tokens: scale them.
        """
        if self.num_sources == 1:
            return self
        number = np.full(self.num_sources, -1)
        number[list(sources)] = np.arange(len(sources))
        kept = number[self.source] >= 0
        return TokenSets(
            source=number[self.source[kept]],
            experts=self.experts[kept],
            weight=self.weight[kept],
            num_sources=len(sources),
        )

    @property
    def num_tokens(self) -> float:
        """Tokens of all sources."""
        return float(self.weight.sum())


def aggregated(source: Ints, experts: Ints, weight: Floats, num_sources: int) -> TokenSets:
    """Return sets with equal ones of a source added up; ids in any order, [tokens, k]."""
    rows = np.column_stack([source, np.sort(experts, axis=1)]).astype(np.intp)
    unique, number = np.unique(rows, axis=0, return_inverse=True)
    return TokenSets(
        source=unique[:, 0],
        experts=unique[:, 1:],
        weight=np.bincount(number.ravel(), weights=weight, minlength=len(unique)).astype(float),
        num_sources=num_sources,
    )


def mean_of(windows: Sequence[TokenSets]) -> TokenSets:
    """Return the mean window of several, of equal k and sources."""
    return aggregated(
        np.concatenate([sets.source for sets in windows]),
        np.concatenate([sets.experts for sets in windows]),
        np.concatenate([sets.weight for sets in windows]) / len(windows),
        windows[0].num_sources,
    )


def single_choices(counts: Floats, *, one_source: bool) -> TokenSets:
    """Return the sets of tokens with one expert each, for choices that travel by themselves.

    Args:
        counts: assignments, [sources, experts].
        one_source: all sources have the same mix, and count as one.
    """
    counts = counts.sum(axis=0, keepdims=True) if one_source else counts
    source, expert = np.nonzero(counts)
    return TokenSets(
        source=source,
        experts=expert[:, None],
        weight=counts[source, expert].astype(np.float64),
        num_sources=len(counts),
    )
