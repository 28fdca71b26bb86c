"""Compare the gradients of a distributed training step with the dense model's, on rank 0."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.layer.layers import build_layers
from epplan.runtime.model import Step
from epplan.runtime.source import Source
from epplan.runtime.training import Trainer, loss, named_weights
from epplan.runtime.weights import Weights

from .dense import run_dense
from .verify import Verification

# Largest difference of a tensor's gradients, relative to the largest of the tensor. Over 2 and 3
# layers 1e-6 was seen in float32, 3e-3 in float16 and 4e-2 in bfloat16.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_MAX_PROBLEMS = 5


def verify_gradients(
    verification: Verification | None,
    trainer: Trainer,
    step: Step,
    plan: Plan,
    source: Source,
    rank: int,
) -> Verification | None:
    """Compare all ranks' gradients with the dense model's, on rank 0; a collective.

    The dense model runs with all its experts and activations at once in rank 0's memory.

    Returns:
        The verification with what differs added to its problems.
    """
    own = {name: gradient.cpu() for name, gradient in trainer.gradients.items()}
    gathered: list[Any] | None = [None] * plan.world_size if rank == 0 else None
    dist.gather_object((own, step.experts_LTK.cpu()), gathered, dst=0)
    if verification is None or gathered is None:
        return verification
    weights: Any = _Remembered(source.weights)
    inputs = [source.hidden(other).requires_grad_() for other in range(plan.world_size)]
    experts_LTK = torch.cat([choice for _, choice in gathered], dim=1)
    dtype = inputs[0].dtype
    dense = run_dense(plan.model, weights, torch.cat(inputs), experts_LTK, dtype)
    parts = torch.split(dense.hidden_BSH, [len(x_BSH) for x_BSH in inputs])
    losses = [loss(part, trainer.seed, other) for other, part in enumerate(parts)]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    problems: list[str] = []
    for other, (gradients, _) in enumerate(gathered):
        layers = build_layers(plan, other, weights, joined=False)
        expected = {name: weight.grad for name, weight in named_weights(layers)}
        expected["input"] = inputs[other].grad
        problems += _differences(other, gradients, expected, _TOLERANCE[dtype])
    return replace(verification, problems=(*verification.problems, *problems[:_MAX_PROBLEMS]))


class _Remembered:
    """Weights that give the same tensor every time, so that it collects its gradients."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._given: dict[tuple[Any, ...], Any] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._weights, name)
        if not callable(attribute):
            return attribute

        def remember(*arguments: int) -> Any:
            key = (name, *arguments)
            if key not in self._given:
                given = attribute(*arguments)
                for _, weight in named_weights(given):
                    weight.requires_grad_()
                self._given[key] = given
            return self._given[key]

        return remember


def _differences(
    rank: int, gradients: dict[str, Tensor], expected: dict[str, Tensor | None], tolerance: float
) -> Iterator[str]:
    for name, dense in expected.items():
        own = gradients.get(name)
        if own is None and dense is None:
            continue
        right = torch.zeros_like(own) if dense is None and own is not None else dense
        assert right is not None
        right = right.cpu().float()
        own = torch.zeros_like(right) if own is None else own.float()
        largest = max(float(right.abs().max()), torch.finfo(torch.float32).tiny)
        error = float((own - right).abs().max()) / largest
        if not error <= tolerance:
            yield (
                f"gradient of {name.lstrip('.')} on rank {rank} differs from the dense model's by "
                f"{error:.2g} of its largest value, tolerance {tolerance:.2g}"
            )
