"""What a library sends for a layer's choices: the copies of tokens between ranks.

    choice   one copy per (token, expert): all_to_all, low-latency kernels
    rank     one per (token, rank): a rank with several of a token's experts gets it once
    node     one per (token, node) over the network, to the GPU with the sender's index, which
             forwards it inside: DeepEP's normal kernels
    padded   every expert's buffer whole, whatever is in it: a fixed-capacity all_to_all

A node is an island: the ranks that reach each other without the network; `planner.forwarding` has
the rule. Where token sets are known, ranks and nodes reached are counted, or expected where experts
have copies. Otherwise counts say how often a rank chooses an expert, not which experts a token
chooses together, and how many ranks and nodes a token reaches is an expectation over independent
choices (`hit_probability`).
"""

from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

from epplan.planner.forwarding import through_islands
from epplan.planner.model import ModelSpec
from epplan.planner.token_sets import TokenSets

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Copies = Literal["choice", "rank", "node", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Which experts the tokens of a layer choose, and where these experts are.

    Attributes:
        model: gives experts, top-k and the groups of the router.
        counts: assignments, [ranks, experts].
        shares: share of an expert's rows on each rank, [experts, ranks].
        island: of every rank, [ranks].
        sets: the tokens, if it is known which experts they choose together; their counts are
            `counts`.
    """

    model: ModelSpec
    counts: Floats
    shares: Floats
    island: Ints
    sets: TokenSets | None = None

    @property
    def tokens(self) -> Floats:
        """Tokens of every rank, [ranks]."""
        tokens: Floats = self.counts.sum(axis=1) / self.model.top_k
        return tokens


def sent_copies(choices: Choices, copies: Copies) -> Floats:
    """Return the copies of tokens sent from every rank to every rank, [ranks, ranks].

    The diagonal is what stays on its rank.
    """
    if copies == "choice":
        rows: Floats = choices.counts @ choices.shares
        return rows
    if copies == "padded":
        slots = np.count_nonzero(choices.shares, axis=0)
        return np.outer(choices.tokens, slots)
    to_rank = _reached(choices, np.arange(choices.shares.shape[1]))
    if copies == "rank":
        return to_rank
    return through_islands(to_rank, _reached(choices, choices.island), choices.island)


def _reached(choices: Choices, place_of_rank: Ints) -> Floats:
    """Return the tokens of every rank with some expert at each place, [ranks, places]."""
    shares, num_places = choices.shares, int(place_of_rank.max()) + 1
    if choices.sets is not None:
        return choices.sets.tokens_at(place_of_rank, shares)
    at_places = shares @ np.eye(num_places)[place_of_rank]
    tokens: Floats = choices.tokens[:, None] * hit_probability(choices, at_places)
    return tokens


def hit_probability(choices: Choices, shares: Floats) -> Floats:
    """Return the probability that a token chooses some expert of a place, [ranks, places].

    The place holds e = (its share of the rank's choices) x E experts' worth. Of k different experts
    none is there with probability prod over j < k of 1 - e / (E - j): exact where a rank's choices
    are even, and a fair reading of skewed ones. A router that keeps to g of G groups first picks
    groups; e then counts among the experts of the groups picked.

    Args:
        choices: the choices.
        shares: share of an expert's rows at each place, [experts, places].
    """
    model = choices.model
    total = np.maximum(choices.counts.sum(axis=1, keepdims=True), 1e-300)
    part = choices.counts / total  # [ranks, experts]
    worth = np.clip(part @ shares, 0.0, 1.0) * model.num_experts  # e, [ranks, places]
    groups, picked = model.router.groups, model.router.topk_groups
    of_group = np.arange(model.num_experts) * groups // model.num_experts
    there = np.stack([(shares[of_group == g] > 0).any(axis=0) for g in range(groups)]).sum(axis=0)
    eligible = model.num_experts * picked / groups
    miss = np.zeros_like(worth)
    for number in range(picked + 1):
        chance = np.array([_hypergeometric(number, groups, int(m), picked) for m in there])
        among = worth * number / np.maximum(there, 1)
        none = np.ones_like(worth)
        for drawn in range(model.top_k):
            none *= np.clip(1.0 - among / max(eligible - drawn, 1e-9), 0.0, 1.0)
        miss += chance * none
    # An expert chosen by every token is hit by every token, whatever the others do.
    single = np.zeros_like(worth)
    for place in range(shares.shape[1]):
        held = shares[:, place] > 0
        if held.any():
            single[:, place] = (part[:, held] * shares[held, place]).max(axis=1) * model.top_k
    most = np.minimum(1.0, (part @ shares) * model.top_k)
    hit: Floats = np.minimum(np.maximum(1.0 - miss, single), most)
    return hit


def _hypergeometric(number: int, groups: int, there: int, picked: int) -> float:
    """Return the chance that `number` of `there` groups are among `picked` of all."""
    if number > there or picked - number > groups - there:
        return 0.0
    return comb(there, number) * comb(groups - there, picked - number) / comb(groups, picked)
