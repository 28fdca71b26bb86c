"""How few places the tokens of a layer can reach: a lower bound over all placements.

A token with n_p experts at place p reaches D = #{p: n_p > 0} places. For every integer m >= 1

    1 >= a n - b n (n - 1) / 2   with a = 2 / (m + 1), b = 2 / (m (m + 1)), for integers n >= 1

(equality at n = m and n = m + 1: Dawson and Sankoff's inequality, "An inequality for
probabilities", 1967, for one place). Added up over places and tokens, with S the assignments and P
the pairs of experts of a token at one place: D >= a S - b P. S is given. P is the weight of all
pairs of experts inside places where a pair weighs the tokens that choose both; `most_pairs` bounds
it from above.

Places of a token's home do not count where only what leaves home is asked for. With H its experts
at home, D - [home] >= a (S - H) - b (P - pairs at home). Where home is one place any integer j <= m
gives n (n - 1) / 2 >= j n - j (j + 1) / 2 (the chord of a convex function at j and j + 1), so

    D - [home] >= a S - (a - b j) H - b P - b j (j + 1) / 2

per token, and j = 0 holds where home is several places. Summed over tokens H is at most what the
best assignment of experts to homes keeps there.

All this holds for copies, too, that a token's choices pick at random by their shares, each for
itself: for every outcome, and so for what is expected. A pair is then at p with the product of both
shares q[e,p], q[f,p], and with Q = (q[e,p]) twice the pairs expected are tr(Q' C Q). Two bounds:

- `most_pairs`, of placements with one copy, holds: draw a copy of every expert once, by its share.
  No two experts of a token are the same, so pairs are as likely as before; and every placement
  drawn is on GPUs that hold these copies, so it keeps their capacity. A mean is at most the most.
- `most_pairs_within`: no place has more than W assignments. With c the experts' assignments, D =
  diag c, N = D^-1/2 C D^-1/2 and Y = D^1/2 Q, tr(Q' C Q) = tr(N Y Y'). Y'Y = Q' D Q is no less than
  0 everywhere and its row of p adds up to the assignments at p, so its eigenvalues are at most W;
  they add up to its trace, at most S. So tr(N Y Y') is at most the largest eigenvalues of N, one a
  place, W times each until S is used up (von Neumann's trace inequality). Popular experts alone
  give N one large eigenvalue, k - 1 for tokens of k choices: even places make pairs few.
"""

import time
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment

from epplan.planner.placement.rows import Floats, Ints
from epplan.planner.token_sets import TokenSets

_STEPS = 40
_PATIENCE = 8


def coactivation(sets: TokenSets, num_experts: int) -> Floats:
    """Return the tokens that choose both of two experts, [experts, experts]; 0 on the diagonal."""
    total = np.zeros((num_experts + 1, num_experts + 1))  # -1 is the last
    size, width = num_experts + 1, sets.experts.shape[1]
    for first in range(width):
        for second in range(first + 1, width):
            cell = sets.experts[:, first] % size * size + sets.experts[:, second] % size
            total += np.bincount(cell, weights=sets.weight, minlength=size * size).reshape(
                size, size
            )
    together = (total + total.T)[:-1, :-1]
    np.fill_diagonal(together, 0.0)
    return together


def most_pairs(together: Floats, capacity: Ints, deadline: float = np.inf) -> float:
    """Return a bound on the weight of pairs inside places, over all placements.

    With X the 0/1 matrix of experts x places, twice the weight is tr(X' C X), and for any d

        tr(X' C X) = sum of d + tr(X' (C - diag d) X)
                  <= sum of d + sum over j of n_j max(0, lambda_j(C - diag d))

    because the columns of X are orthogonal with squared lengths n_p (experts at p), both sorted
    (Donath and Hoffman, "Lower bounds for the partitioning of graphs", 1973). n_j is what fills the
    largest capacities with all experts. d is improved by subgradient steps; any d is valid. Beside
    it: no expert has more with its partners than with its heaviest capacity - 1 ones.

    Args:
        together: C, [experts, experts], symmetric, 0 on the diagonal.
        capacity: most experts at every place, [places].
        deadline: when to stop improving d (time.monotonic).
    """
    num_experts = len(together)
    partners = np.sort(together, axis=1)[:, ::-1][:, : max(0, int(capacity.max()) - 1)]
    best = float(partners.sum()) / 2
    largest = np.sort(capacity)[::-1]
    size = np.diff(np.minimum(np.cumsum(largest), num_experts), prepend=0)
    size = size[size > 0].astype(float)
    value, vector = _largest_pairs(together, 1)
    diagonal = -value[0] * vector[:, 0] ** 2  # makes popularity alone a matrix of rank one
    step, since = float(together.sum()) / num_experts**1.5, 0
    for _ in range(_STEPS):
        value, vector = _largest_pairs(together - np.diag(diagonal), len(size))
        bound = float(diagonal.sum() + size @ np.maximum(value, 0.0)) / 2
        since = 0 if bound < best * (1 - 1e-5) else since + 1
        best = min(best, bound)
        if since > _PATIENCE or time.monotonic() > deadline:
            break
        slope = 1.0 - vector**2 @ (size * (value > 0))
        diagonal = diagonal - step * slope / max(float(np.linalg.norm(slope)), 1e-12)
        step *= 0.93
    return best * (1 + 1e-9)  # rounding of the eigenvalues


def spectrum(together: Floats, load: Floats, places: int) -> Floats:
    """Return the largest eigenvalues of D^-1/2 C D^-1/2, descending, one a place.

    Args:
        together: C, [experts, experts].
        load: assignments of every expert, the diagonal of D, [experts].
        places: how many.
    """
    chosen = np.flatnonzero(load > 0)
    scale = 1.0 / np.sqrt(load[chosen])
    normal = together[np.ix_(chosen, chosen)] * scale[:, None] * scale[None, :]
    value, _ = _largest_pairs(normal, min(places, len(chosen)))
    return value


def most_pairs_within(spectrum: Floats, heaviest: float, assignments: float) -> float:
    """Return a bound on the pairs at places, where none has more than some assignments.

    Args:
        spectrum: of the tokens.
        heaviest: W, most assignments at a place.
        assignments: S, of all tokens.
    """
    filled = np.minimum(np.arange(1, len(spectrum) + 1) * heaviest, assignments)
    part = np.diff(filled, prepend=0.0)
    return float(part @ np.maximum(spectrum, 0.0)) / 2 * (1 + 1e-9)


def _largest_pairs(matrix: Floats, number: int) -> tuple[Floats, Floats]:
    """Return the largest eigenvalues, descending, [number], and their vectors, [n, number]."""
    last = len(matrix) - 1
    value, vector = eigh(matrix, subset_by_index=[last - number + 1, last])
    return value[::-1], vector[:, ::-1]


def most_at_home(home_counts: Floats, capacity: Ints) -> float:
    """Return the most assignments that an assignment of experts to homes keeps at home.

    Args:
        home_counts: of the tokens of every home, [homes, experts].
        capacity: most experts in every home, [homes].
    """
    slots = np.repeat(np.arange(len(capacity)), np.minimum(capacity, home_counts.shape[1]))
    gain = home_counts[slots].T  # [experts, slots]
    expert, slot = linear_sum_assignment(gain, maximize=True)
    return float(gain[expert, slot].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What is known of all tokens of a window: `least` is a bound on the places they reach.

    Attributes:
        tokens: number of tokens.
        assignments: their choices.
        pairs: most pairs of one token at one place.
        at_home: most choices that stay at home; 0 where homes count like other places.
        single_home: whether a home is one place.
    """

    tokens: float
    assignments: float
    pairs: float
    at_home: float = 0.0
    single_home: bool = True

    def least(self, top_k: int) -> float:
        """Return the fewest places outside home reached, over all tokens."""
        best = 0.0
        for m in range(1, top_k + 1):
            a, b = 2 / (m + 1), 2 / (m * (m + 1))
            for j in range(m + 1 if self.at_home and self.single_home else 1):
                best = max(
                    best,
                    a * self.assignments
                    - (a - b * j) * self.at_home
                    - b * self.pairs
                    - b * j * (j + 1) / 2 * self.tokens,
                )
        return best
