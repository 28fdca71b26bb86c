"""When two models route a token differently: rounding, or a mistake?

Two runs of one model differ in the last bits, and where two experts score almost the same the
last bits decide. Such a tie changes a token's output by far more than rounding, so the reference
follows the choice of the run it checks, provided that the choice was close.
"""

from itertools import combinations

import torch
from torch import Tensor

from epplan.planner.model import RouterSpec


def choice_margin(preferences_E: Tensor, chosen: list[int], spec: RouterSpec) -> float:
    """Return how far `chosen` is from being the right choice, relative to the scores compared.

    0 means that it is the right choice. Otherwise it is the least part by which a score that was
    passed over exceeds one that was taken, among groups and among experts, over all sets of
    groups that hold the chosen experts. Brute force over those sets: only few tokens need it.

    Args:
        preferences_E: what the reference chooses by.
        chosen: the other run's experts.
        spec: the model's routing rule.
    """
    preferences = preferences_E.double().cpu().view(spec.groups, -1)
    taken = torch.zeros(preferences.numel(), dtype=torch.bool)
    taken[chosen] = True
    taken = taken.view_as(preferences)
    groups_N = _group_preferences(preferences, spec)
    holding = set(taken.any(-1).nonzero().flatten().tolist())
    margins = []
    for groups in combinations(range(spec.groups), spec.topk_groups):
        if holding <= set(groups):
            inside = torch.zeros(spec.groups, dtype=torch.bool)
            inside[list(groups)] = True
            allowed = inside[:, None] & ~taken
            margins.append(
                max(
                    _excess(groups_N[~inside], groups_N[inside]),
                    _excess(preferences[allowed], preferences[taken]),
                )
            )
    # Experts of more groups than may be chosen from: no rounding leads there.
    return min(margins, default=float("inf"))


def _group_preferences(preferences_Ne: Tensor, spec: RouterSpec) -> Tensor:
    if spec.group_rule == "max":
        return preferences_Ne.max(-1).values
    return preferences_Ne.sort(-1, descending=True).values[:, :2].sum(-1)


def _excess(passed_over: Tensor, taken: Tensor) -> float:
    """Return by which part the best passed over exceeds the worst taken; 0 if it does not."""
    if not len(passed_over):
        return 0.0
    best, worst = float(passed_over.max()), float(taken.min())
    return max(0.0, best - worst) / max(abs(best), abs(worst), 1e-12)
