"""Compare a distributed run with the dense model, on rank 0.

Three things are compared, because none shows all mistakes: the weights in every slot, exactly,
since in half precision one wrong expert among eight can hide within rounding, and an idle one
shows nowhere; the choice of experts, token by token; and the outputs.

Shapes: W ranks, P slots per rank, B sequences per rank, S positions, H hidden size, T = B x S
tokens per rank, E experts, K experts per token, L MoE layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.layer.experts import fingerprint
from epplan.runtime.layer.layers import Layer, MoeWeights
from epplan.runtime.model import Step
from epplan.runtime.source import Source

from .dense import Disagreement, run_dense

# Largest difference allowed, relative to the largest reference value. Both runs use one dtype and
# differ in the order of sums only: over 4 to 24 layers 3e-6 was seen in float32, 3e-3 in float16
# and 2e-2 in bfloat16, growing with depth; exchanging two experts of one layer made 3e-2 to 3e-1.
# Rows sent as 8-bit floats made 3e-2.
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.float8_e4m3fn: 1e-1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How the distributed run compares with the dense model."""

    max_abs_error: float | None  # None: not a finite number
    tolerance: float
    num_ties: int
    problems: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether the runs agree."""
        return not self.problems


@torch.inference_mode()
def verify(
    step: Step,
    plan: Plan,
    layers: list[Layer],
    source: Source,
    rank: int,
    *,
    float8: bool = False,
) -> Verification | None:
    """Gather all ranks' outputs and compare them with the dense model; a collective.

    Args:
        step: this rank's output and choice of experts.
        plan: which expert belongs into which slot.
        layers: what this rank ran.
        source: weights and inputs it should have run.
        rank: this process.
        float8: whether rows travelled as 8-bit numbers, which rounds them.

    Returns:
        The verdict on rank 0, None on the others.
    """
    hidden_WBSH = _gather(step.hidden_BSH.detach(), rank, plan.world_size)
    experts_WLTK = _gather(step.experts_LTK, rank, plan.world_size)
    weights, device = source.weights, step.hidden_BSH.device
    fingerprints_WLP = _gather(_fingerprints(layers, device), rank, plan.world_size)
    if hidden_WBSH is None or experts_WLTK is None or fingerprints_WLP is None:
        return None
    inputs = [source.hidden(other) for other in range(plan.world_size)]
    dtype = step.hidden_BSH.dtype
    experts_LTK = experts_WLTK.transpose(0, 1).flatten(1, 2)
    rounding = torch.float8_e4m3fn if float8 else dtype
    dense = run_dense(plan.model, weights, torch.cat(inputs), experts_LTK, rounding)
    error = _largest_difference(hidden_WBSH.flatten(0, 1), dense.hidden_BSH)
    tolerance = _TOLERANCE[rounding] * float(dense.hidden_BSH.abs().max())
    problems = [
        *_wrong_experts(plan, fingerprints_WLP, dense.fingerprints_LE),
        *_wrong_outputs(error, tolerance, dtype),
        *(_explain(wrong, step.experts_LTK.shape[1]) for wrong in dense.disagreements),
    ]
    return Verification(
        max_abs_error=error if math.isfinite(error) else None,
        tolerance=tolerance,
        num_ties=dense.num_ties,
        problems=tuple(problems),
    )


def _gather(tensor: Tensor, rank: int, world_size: int) -> Tensor | None:
    """Return all ranks' tensors, stacked, on rank 0; None on the others."""
    gathered = tensor.new_empty(world_size, *tensor.shape) if rank == 0 else None
    dist.gather(tensor.contiguous(), None if gathered is None else list(gathered), dst=0)
    return gathered


def _fingerprints(layers: list[Layer], device: torch.device) -> Tensor:
    """Return the fingerprints of this rank's experts, [L, P]; 0 for an empty slot."""
    empty = torch.zeros((), dtype=torch.int64, device=device)
    rows = [
        torch.stack([empty if e is None else fingerprint(e) for e in layer.feed_forward.experts])
        for layer in layers
        if isinstance(layer.feed_forward, MoeWeights)
    ]
    return torch.stack(rows)


def _wrong_experts(plan: Plan, fingerprints_WLP: Tensor, fingerprints_LE: Tensor) -> Iterator[str]:
    """Yield every slot whose weights are not those of the plan's expert."""
    for ordinal, slots in enumerate(plan.expert_of_slot):
        expected: list[int] = fingerprints_LE[ordinal].tolist()
        actual: list[int] = fingerprints_WLP[:, ordinal].flatten().tolist()
        for slot, expert in enumerate(slots):
            if expert is None or actual[slot] == expected[expert]:
                continue
            rank, number = divmod(slot, plan.slots_per_rank)
            known = actual[slot] in expected
            held = f"expert {expected.index(actual[slot])}" if known else "unknown weights"
            yield (
                f"layer {plan.model.moe_layers[ordinal]}: slot {number} of rank {rank} holds "
                f"{held}, the plan says expert {expert}"
            )


def _wrong_outputs(error: float, tolerance: float, dtype: torch.dtype) -> Iterator[str]:
    if not math.isfinite(error):
        yield f"outputs hold values that are not finite in {dtype}"
    elif error > tolerance:
        yield f"largest difference {error:.3g}, tolerance {tolerance:.3g}"


def _largest_difference(actual_BSH: Tensor, expected_BSH: Tensor) -> float:
    """Return the largest difference; NaN or infinity where values are not finite."""
    largest = [
        (actual.float() - expected.float()).abs().max()
        for actual, expected in zip(actual_BSH, expected_BSH, strict=True)
    ]
    return float(torch.stack(largest).max())


def _explain(wrong: Disagreement, tokens_per_rank: int) -> str:
    rank, token = divmod(wrong.token, tokens_per_rank)
    return (
        f"layer {wrong.layer}: token {token} of rank {rank} went to experts {list(wrong.experts)}, "
        f"the dense model chooses {list(wrong.reference_experts)}; scores differ by "
        f"{wrong.margin:.1%}, which is no rounding"
    )
