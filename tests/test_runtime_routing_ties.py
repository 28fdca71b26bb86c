"""How far a choice is from right, against the definition: perturb the scores until it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epplan.planner.model import RouterSpec
from epplan.runtime.checks.routing_ties import choice_margin
from epplan.runtime.layer.router import choose

FLAT = RouterSpec()
GROUPED = RouterSpec(groups=4, topk_groups=2)
BEST_OF_GROUP = RouterSpec(groups=4, topk_groups=2, group_rule="max")


@pytest.mark.parametrize(
    ("spec", "chosen", "margin"),
    [
        (FLAT, [0, 2], 0.0),
        (FLAT, [0, 4], (0.5 - 0.4) / 0.5),
        # Groups of two: sums 0.9, 0.7, 0.6, 0.1; the second group gives way to the third.
        (GROUPED, [0, 4], (0.7 - 0.6) / 0.7),
        # From the right groups, but the worst expert instead of the best.
        (GROUPED, [0, 3], (0.5 - 0.2) / 0.5),
        (BEST_OF_GROUP, [0, 4], (0.5 - 0.4) / 0.5),
        # Of three groups where two are allowed.
        (GROUPED, [0, 2, 4], float("inf")),
    ],
)
def test_margin(spec: RouterSpec, chosen: list[int], margin: float) -> None:
    preferences = torch.tensor([0.6, 0.3, 0.5, 0.2, 0.4, 0.2, 0.07, 0.03])
    assert choice_margin(preferences, chosen, spec) == pytest.approx(margin)


def test_a_tied_group_that_gave_no_expert() -> None:
    # Groups 1 and 2 tie; the other run took group 2, whose experts lost to group 0's.
    preferences = torch.tensor([0.9, 0.8, 0.85, 0.0, 0.425, 0.425])
    spec = RouterSpec(groups=3, topk_groups=2)
    assert choice_margin(preferences, [0, 1], spec) == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None)  # a busy machine is no error
@given(
    st.lists(st.floats(0.1, 1.0), min_size=12, max_size=12),
    st.lists(st.floats(-1e-3, 1e-3), min_size=12, max_size=12),
    st.sampled_from([FLAT, GROUPED, BEST_OF_GROUP]),
)
def test_small_errors_give_small_margins(
    values: list[float], errors: list[float], spec: RouterSpec
) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    disturbed = scores * (1 + torch.tensor(errors, dtype=torch.float64))
    for source, largest in ((scores, 1e-9), (disturbed, 3e-3)):
        chosen: list[int] = choose(source[None], spec, 3)[0].tolist()
        assert choice_margin(scores, chosen, spec) <= largest
