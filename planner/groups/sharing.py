"""Several groups on one cluster at the same time: links they share have equal shares for each."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from epplan.planner.cost import evaluate_layer
from epplan.planner.problem import Problem
from epplan.planner.solve import Progress, Solution, solve_placement
from epplan.topologies.routes import Routes

_UNUSED = 1e-9  # of the pairs of a group: less is rounding


def share_links(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with links' capacities divided by the number of groups that use them.

    A group uses a link when bytes between some pair of its ranks take it.
    """
    used = [_used(problem.routes) for problem in problems]
    users = Counter(link for links in used for link in links)
    return [
        replace(problem, routes=_divided(problem.routes, users, links))
        for problem, links in zip(problems, used, strict=True)
    ]


def sharing_in_words(problems: Sequence[Problem]) -> list[str]:
    """Return what sharing assumes, for problems with whole links; nothing for one group."""
    if len(problems) == 1:
        return []
    users = Counter(link for problem in problems for link in _used(problem.routes))
    shared = sum(count > 1 for count in users.values())
    return [
        f"all {len(problems)} groups have the same traffic at the same time",
        f"each group has an equal share of the {shared} links that several groups use"
        if shared
        else "no link is used by more than one group",
    ]


def solve_groups(
    problems: Sequence[Problem], *, gap: float, time_limit_s: float, seed: int, progress: Progress
) -> list[Solution]:
    """Return every group's solution; groups that differ in names only are solved once.

    Args:
        problems: of the groups, with their share of the links.
        gap: relative gap at which to stop.
        time_limit_s: wall-clock limit over all groups; after Ctrl-C the rest is only searched.
        seed: of search and solver.
        progress: called with a line now and then.
    """
    deadline = time.monotonic() + time_limit_s
    solved: list[tuple[Problem, Solution]] = []
    for number, problem in enumerate(problems):
        twin = next((done for other, done in solved if _same_numbers(problem, other)), None)
        if twin is not None:
            solved.append((problem, _renamed(problem, twin)))
            continue
        if len(problems) > 1:
            progress(f"group {number}")
        stopped = any(solution.interrupted for _, solution in solved)
        left_s = 0.0 if stopped else max(0.0, deadline - time.monotonic())
        share_s = left_s / (len(problems) - number)
        solution = solve_placement(
            problem, gap=gap, time_limit_s=share_s, seed=seed, progress=progress
        )
        solved.append((problem, solution))
    return [solution for _, solution in solved]


def _renamed(problem: Problem, twin: Solution) -> Solution:
    """Return a solution of an equal problem as this one's: evaluations name hosts and links."""
    layers = tuple(
        replace(layer, evaluation=evaluate_layer(problem, number, layer.shares))
        for number, layer in enumerate(twin.layers)
    )
    return replace(twin, layers=layers)


def _same_numbers(problem: Problem, other: Problem) -> bool:
    """Tell whether two groups differ in nothing but the names of their hosts and links."""
    ours, theirs = problem.routes, other.routes
    pairs = [
        (problem.counts, other.counts),
        (problem.flops_per_s, other.flops_per_s),
        (problem.hbm_bytes_per_s, other.hbm_bytes_per_s),
        (problem.slots_of_gpu, other.slots_of_gpu),
        (ours.capacity, theirs.capacity),
        (ours.resource_of_flow, theirs.resource_of_flow),
        (ours.latency_s, theirs.latency_s),
        (ours.island, theirs.island),
    ]
    for first, second in ((ours.sources, theirs.sources), (ours.destinations, theirs.destinations)):
        pairs += [(getattr(first, x), getattr(second, x)) for x in ("data", "indices", "indptr")]
    return all(np.array_equal(first, second) for first, second in pairs)


def _used(routes: Routes) -> frozenset[tuple[str, str]]:
    size = len(routes.gpus)
    loads = routes.bytes_per_resource(np.ones((size, size)))
    return frozenset(
        (resource.tail, resource.head)
        for resource, load in zip(routes.resources, loads.tolist(), strict=True)
        if load > _UNUSED * size**2
    )


def _divided(
    routes: Routes, users: Counter[tuple[str, str]], links: frozenset[tuple[str, str]]
) -> Routes:
    sharers = [
        users[resource.tail, resource.head] if (resource.tail, resource.head) in links else 1
        for resource in routes.resources
    ]
    return replace(routes, capacity=routes.capacity / np.array(sharers))
