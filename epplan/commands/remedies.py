"""Remedies for `epplan solve`: the options changed, and everything up to the solver tried again."""

from epplan.errors import InfeasibleError, InputError
from epplan.planner.groups.group import choose_groups, group_size
from epplan.planner.model import ModelSpec
from epplan.planner.problem import Replication, room_for
from epplan.planner.remedies import Ask, remedies
from epplan.planner.traffic import make_traffic
from epplan.topologies.graph import Cluster


def with_remedies(
    error: InfeasibleError,
    ask: Ask,
    *,
    ep: int | None,
    cluster: Cluster,
    model: ModelSpec,
    load: str,
    seed: int,
) -> InfeasibleError:
    """Return the error with remedies that were tried, if any was found.

    Args:
        error: why `ask` is infeasible.
        ask: the options, with the size of group that follows from them.
        ep: the size as given; None follows the number of experts.
        cluster: the cluster.
        model: before `ask.scale`, `ask.experts` and `ask.layers`.
        load: rule or counts file.
        seed: of the traffic.
    """

    def fits(changed: Ask) -> bool:
        try:
            spec = model.with_overrides(
                experts=changed.experts, layers=changed.layers, scale=changed.scale
            )
            size = group_size(
                cluster,
                spec,
                ep if changed.ep == ask.ep else changed.ep,
                changed.experts_per_gpu,
                changed.groups,
                changed.replicas,
            )
            traffic = make_traffic(load, spec, size, changed.tokens, seed)
            groups = choose_groups(
                cluster,
                spec,
                traffic,
                changed.experts_per_gpu,
                num_groups=changed.groups,
                bounded=False,
            )
        except (InfeasibleError, InputError):
            return False
        rule = Replication(extra=changed.replicas, survive_hosts=int(changed.survive))
        return all(
            room_for(gpus, spec, traffic, changed.experts_per_gpu, rule).fits()
            for gpus in groups.gpus
        )

    hints = remedies(ask, len(cluster.gpus()), fits)
    return InfeasibleError(error.message, problems=error.problems, hints=hints or error.hints)
