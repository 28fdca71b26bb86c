"""The few best groups by price, tried with real placements: the search without the solver.

Even traffic does not see which ranks send to which experts, and a small group, or one whose GPUs
share NICs, can hide much in that. Trying costs seconds where pricing costs milliseconds, so the
number of tries falls with the size of the problem; it does not depend on the clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from epplan.errors import InfeasibleError, InputError
from epplan.planner.model import ModelSpec
from epplan.planner.problem import make_problem
from epplan.planner.traffic import Traffic
from epplan.topologies.graph import Cluster

from .choice_bound import choice_bound
from .group_price import Pricer
from .group_search import Found, exchanges, gpus_of
from .sharing import share_links, solve_groups

_WORK = 10_000  # GPUs x experts x tries
_MOST = 32
_WORTH_IT = 1 - 5e-3  # whole hosts, and cluster order, are not given up for less
_PROVEN = 1 + 1e-3  # of the bound over all choices: good enough


def try_groups(
    cluster: Cluster,
    pricer: Pricer,
    model: ModelSpec,
    traffic: Traffic,
    experts_per_gpu: int,
    candidates: Sequence[Found],
) -> Found:
    """Return the candidate whose slowest group has the fastest placement, improved by exchanges.

    Args:
        cluster: the cluster.
        pricer: prices groups of its pool.
        model: the model.
        traffic: of a group.
        experts_per_gpu: most experts of one layer on a GPU.
        candidates: groups, by price.
    """
    mean = traffic.counts.mean(axis=0)  # [layers, ranks, experts]
    hardest = int(mean.sum(axis=1).max(axis=1).argmax())
    one_layer = model.model_copy(update={"moe_layers": (model.moe_layers[hardest],)})
    its_traffic = replace(traffic, counts=mean[None, hardest : hardest + 1])

    def seconds(found: Found) -> float:
        try:
            problems = [
                make_problem(cluster, gpus, one_layer, its_traffic, experts_per_gpu)
                for gpus in gpus_of(pricer.pool, found)
            ]
        except (InfeasibleError, InputError):  # no memory, no path
            return np.inf
        solutions = solve_groups(
            share_links(problems),
            gap=1.0,
            time_limit_s=np.inf,
            seed=0,
            progress=lambda line: None,
        )
        return max(solution.objective_s for solution in solutions)

    num_gpus = traffic.counts.shape[2] * len(candidates[0].groups)
    bound_s = choice_bound(pricer.pool, one_layer, its_traffic.counts[0], experts_per_gpu)
    left = min(_MOST, max(2, _WORK // (num_gpus * model.num_experts)))
    return _best(pricer, candidates, seconds, left, bound_s * _PROVEN)


def _best(
    pricer: Pricer,
    candidates: Sequence[Found],
    seconds: Callable[[Found], float],
    left: int,
    enough_s: float,
) -> Found:
    """Try half of `left` on candidates, the rest on exchanges from the best of them."""
    best, least = candidates[0], np.inf
    for candidate in candidates[: max(2, left // 2)]:
        time, left = seconds(candidate), left - 1
        if time < least * _WORTH_IT:
            best, least = candidate, time
        if least <= enough_s:
            return best
    improved = True
    while improved and left > 0:
        improved = False
        for candidate in exchanges(pricer, best):
            time, left = seconds(candidate), left - 1
            if time < least * _WORTH_IT:
                best, least, improved = candidate, time, True
            if improved or left <= 0:
                break
        if least <= enough_s:
            break
    return best
