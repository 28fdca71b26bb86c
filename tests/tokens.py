"""Problems with tokens: which experts they choose together is known."""

import numpy as np

from epplan.planner.assemble import assemble_plan
from epplan.planner.cost import Shares
from epplan.planner.model import ModelSpec, RouterSpec
from epplan.planner.objective import Objective
from epplan.planner.plan import Plan, TransferMode
from epplan.planner.problem import Problem, Replication, make_problem
from epplan.planner.routing_trace import from_topk
from epplan.planner.simulate.copies import Choices
from epplan.planner.simulate.transfers import make_library, transfer_profile
from epplan.planner.solve import Solution
from epplan.planner.token_sets import Ints
from epplan.planner.traffic import Traffic
from epplan.topologies.graph import Cluster
from tests.tiny import tiny_model


def random_tokens(
    seed: int, sources: int, experts: int, *, top_k: int = 2, tokens: int = 12, windows: int = 1
) -> Ints:
    """Return choices of skewed popularity and habit, [windows, 1, sources, tokens, k]."""
    random = np.random.default_rng(seed)
    popularity = random.lognormal(0.0, 0.7, (windows, sources, 1, experts))
    scores = random.gumbel(size=(windows, sources, tokens, experts)) + np.log(popularity)
    return np.argsort(-scores, axis=-1)[:, None, ..., :top_k]


def token_traffic(topk: Ints, experts: int) -> Traffic:
    """Return traffic of `topk` [windows, layers, sources, tokens, k]."""
    trace = from_topk(topk, "test")
    counts = np.array([[sets.counts(experts) for sets in window] for window in trace.sets])
    return Traffic(
        counts=counts,
        source="test",
        sha256="0" * 64,
        windows=len(counts),
        source_ranks=topk.shape[2],
        tokens_per_rank=topk.shape[3],
        sets=trace.sets,
    )


def token_model(topk: Ints, experts: int, *, ffn: int = 64, groups: int = 1) -> ModelSpec:
    """Return a tiny model for `topk`, with a group-limited router."""
    top_k = topk.shape[4]
    model = tiny_model(experts, layers=topk.shape[1], top_k=top_k, ffn=ffn)
    router = RouterSpec(groups=groups, topk_groups=groups)
    return model.model_copy(update={"router": router})


def token_problem(
    topk: Ints,
    experts: int,
    cluster: Cluster,
    transfer: TransferMode,
    *,
    experts_per_gpu: int = 2,
    objective: Objective | None = None,
    ffn: int = 64,
    groups: int = 1,
    replication: Replication | None = None,
) -> Problem:
    """Return the problem on all GPUs of a cluster; routing groups stay whole if there are some."""
    return make_problem(
        cluster,
        tuple(cluster.gpus()),
        token_model(topk, experts, ffn=ffn, groups=groups),
        token_traffic(topk, experts),
        experts_per_gpu,
        objective,
        replication,
        transfer=transfer,
        keep_groups=groups > 1,
    )


def token_plan(problem: Problem, traffic: Traffic, solution: Solution, cluster: Cluster) -> Plan:
    """Return the plan of a solution."""
    return assemble_plan(
        cluster=cluster,
        problem=problem,
        traffic=traffic,
        solution=solution,
        topology_source="tiny",
        model_source="tiny",
        seed=0,
        command="epplan solve",
        reasons=[],
    )


def simulated_transfers(problem: Problem, shares: Shares) -> tuple[float, float]:
    """Return the simulator's seconds of dispatch and combine for the first layer's shares."""
    assert problem.sets is not None
    dtype = problem.model.dtype
    profile = transfer_profile("plan").for_plan(problem.transfer)
    library = make_library(profile, problem.routes, problem.model.hidden_size, dtype, dtype)
    of = Choices(
        model=problem.model,
        counts=problem.counts[0, 0],
        shares=shares,
        island=problem.routes.island,
        sets=problem.sets[0][0],
    )
    return library.dispatch(of).seconds, library.combine(of).seconds
