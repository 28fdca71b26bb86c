"""The variables epplan gives to ranks beside who they are, each with its reason.

Few, on purpose: NCCL's and torch's own choices are left alone unless the plan or the topology says
that they would be wrong. What the user has set already wins, except which GPU belongs to which
rank: there the plan is the only truth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epplan.planner.plan import Rank

from .request import LaunchRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable of the environment.

    Args:
        name: its name.
        value: its value.
        reason: why it is set, in words.
        is_fixed: whether it replaces what is set already.
    """

    name: str
    value: str
    reason: str
    is_fixed: bool = False


def common_variables(request: LaunchRequest) -> tuple[Variable, ...]:
    """Return the variables all ranks share."""
    variables = [
        Variable(
            name="PYTHONUNBUFFERED",
            value="1",
            reason="a rank's lines appear when it writes them, not when it ends",
        )
    ]
    if request.uses_gpus:
        variables += [
            Variable(
                name="CUDA_DEVICE_ORDER",
                value="PCI_BUS_ID",
                reason="the plan counts GPUs by PCI bus, CUDA by speed unless told",
                is_fixed=True,
            ),
            Variable(
                name="NCCL_DEBUG",
                value="WARN",
                reason="without it NCCL does not say why it failed",
            ),
        ]
    variables += [
        Variable(name=name, value=value, reason="given with --env", is_fixed=True)
        for name, value in request.environment
    ]
    return tuple(variables)


def gpu_variables(ranks: Sequence[Rank]) -> tuple[Variable, ...]:
    """Return what gives each rank of one host its GPU: local rank i takes the i-th of the list."""
    uuids = [rank.gpu_uuid for rank in ranks]
    if all(uuids):
        names, by = [str(uuid) for uuid in uuids], "UUID"
    else:
        names, by = [str(rank.gpu_index) for rank in ranks], "number in PCI bus order"
    return (
        Variable(
            name="CUDA_VISIBLE_DEVICES",
            value=",".join(names),
            reason=f"local rank i takes the i-th GPU of this list, by {by}, as planned",
            is_fixed=True,
        ),
    )


def applied(variables: Sequence[Variable], inherited: Mapping[str, str]) -> dict[str, str]:
    """Return `inherited` with these variables set, as the generated scripts set them."""
    environment = dict(inherited)
    for variable in variables:
        if variable.is_fixed or variable.name not in environment:
            environment[variable.name] = variable.value
    return environment
