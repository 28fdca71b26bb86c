"""Token sets for counts that come without them: drawn, with exactly these counts.

Systematic sampling (Madow, "On the theory of systematic sampling, II", 1949): experts lie on a
line in random order, each as long as the share of tokens that choose it, k in all; a token with the
number u in [0, 1) chooses the experts at u, u + 1, ..., u + k - 1. No expert is longer than 1, so
they are different, and an expert is chosen by exactly its share of the u. The sets change at E
values of u at most, so all u at once are E weighted sets: marginals are exact, only the order is
random. Over random orders, joint choices come close to those of independent tokens (Hartley and
Rao, "Sampling with unequal probabilities and without replacement", 1962).

A router that keeps to g of G groups draws groups first, then k / g experts in each, in this way.
"""

from dataclasses import dataclass

import numpy as np

from .token_sets import Floats, Ints, TokenSets, aggregated

_SETS = 32768  # of a layer and all its windows, about: what search takes seconds for
_MOST_ORDERS = 128
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What a token may choose: `top_k` experts in `picked` of `groups` id ranges."""

    top_k: int
    groups: int = 1
    picked: int = 1


def draw_sets(
    counts: Floats, router: Router, random: np.random.Generator, windows: int = 1
) -> tuple[TokenSets, int]:
    """Return sets with these marginals, and how many sources could not keep to the groups.

    A source's groups cannot be kept where one has more than its share of choices (more than
    top_k / picked of every token's), or an expert more than all tokens that pick its group.

    Args:
        counts: assignments of one layer and window, [sources, experts]; none above its source's
            total / top_k.
        router: the rule of choice.
        random: gives the orders.
        windows: share the number of sets.
    """
    num_sources, num_experts = counts.shape
    size = windows * num_sources * num_experts * router.picked
    orders = int(np.clip(_SETS // size, 1, _MOST_ORDERS))
    source, experts, weight, ungrouped = [], [], [], 0
    for number, own in enumerate(counts):
        tokens = float(own.sum()) / router.top_k
        if not tokens:
            continue
        share = np.minimum(own / tokens, 1.0)
        keeps = _keeps_groups(share, router)
        ungrouped += not keeps
        rule = router if keeps else Router(top_k=router.top_k)
        for _ in range(orders):
            size, picks = _pieces(share, rule, random)
            source.append(np.full(len(size), number))
            experts.append(picks)
            weight.append(size * (tokens / orders))
    sets = aggregated(
        np.concatenate(source), np.concatenate(experts), np.concatenate(weight), num_sources
    )
    return sets, ungrouped


def _group_of(num_experts: int, router: Router) -> Ints:
    number: Ints = np.arange(num_experts) * router.groups // num_experts
    return number


def _group_shares(share: Floats, router: Router) -> Floats:
    """Return the share of tokens that pick each group, [groups]."""
    mass = np.bincount(_group_of(len(share), router), weights=share, minlength=router.groups)
    shares: Floats = mass * router.picked / router.top_k
    return shares


def _keeps_groups(share: Floats, router: Router) -> bool:
    if router.top_k % router.picked:
        return False
    of_group = _group_shares(share, router)
    within = share <= of_group[_group_of(len(share), router)] * (1 + _ROUNDING)
    return bool((of_group <= 1 + _ROUNDING).all() and within.all())


def _pieces(share: Floats, router: Router, random: np.random.Generator) -> tuple[Floats, Ints]:
    """Return sets and their shares of the tokens, [pieces] and [pieces, k]."""
    group, of_group = _group_of(len(share), router), _group_shares(share, router)
    order = random.permutation(len(share))
    inside = [order[group[order] == number] for number in range(router.groups)]
    in_group = share / np.maximum(of_group, 1e-300)[group]  # of the tokens that pick the group
    each = router.top_k // router.picked
    size, picked = _systematic([of_group], [random.permutation(router.groups)], router.picked)
    sizes, picks = [], []
    for part, groups in zip(size, picked, strict=True):
        members = [inside[number] for number in groups]
        length, experts = _systematic([in_group] * len(members), members, each)
        sizes.append(part * length)
        picks.append(experts)
    return np.concatenate(sizes), np.concatenate(picks)


def _systematic(shares: list[Floats], orders: list[Ints], each: int) -> tuple[Floats, Ints]:
    """Return what all u in [0, 1) choose, `each` on every line: lengths of u, [pieces, choices]."""
    ends = []
    for share, order in zip(shares, orders, strict=True):
        end = np.cumsum(share[order])
        ends.append(end * (each / end[-1]))  # rounding must not lose the last
    breaks = np.unique(np.concatenate([[0.0, 1.0], *(end % 1.0 for end in ends)]))
    length = np.diff(breaks)
    middle = (breaks[:-1] + length / 2)[:, None] + np.arange(each)
    middle, length = middle[length > _ROUNDING], length[length > _ROUNDING]
    picks = [
        order[np.minimum(np.searchsorted(end, middle, side="right"), len(order) - 1)]
        for end, order in zip(ends, orders, strict=True)
    ]
    return length / length.sum(), np.concatenate(picks, axis=1)
