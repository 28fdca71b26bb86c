"""A training step: forward, backward through dispatch and combine, gradients added up over ranks.

Shapes: B sequences of this rank, S positions, H hidden size.

The loss is the output's projection on a seeded direction: any loss gives the layers some gradient
of their output, and this one gives every element its own. What to do with gradients is the
caller's business; there is no optimizer here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.planner.plan import Plan
from epplan.runtime.layer.layers import MoeWeights

from .clock import Place
from .model import ExpertParallelModel, Step
from .options import Options
from .weights import seeded_hidden

_END = Place(-1, -1)  # of a step, after all layers


def named_weights(tree: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors of nested dataclasses, mappings and sequences, by path."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_weights(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from named_weights(value, f"{name}.{number}")
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from named_weights(getattr(tree, field.name), f"{name}.{field.name}")


class Trainer:
    """Runs training steps; a collective, as the model is.

    Args:
        plan: says which expert has copies where.
        options: the seed of the loss.
        model: whose weights get gradients.
        rank: this process.
    """

    def __init__(self, plan: Plan, options: Options, model: ExpertParallelModel, rank: int) -> None:
        self.model = model
        self.seed = options.seed
        self._rank = rank
        self._copies = _Copies(plan)
        self._weights = dict(named_weights(model.layers))
        for weight in self._weights.values():
            weight.requires_grad_()
        self.gradients: dict[str, Tensor] = {}

    def step(self, x_BSH: Tensor) -> Step:
        """Run the sequences forward and backward; `gradients` then holds the sums over ranks."""
        for weight in self._weights.values():
            weight.grad = None
        x_BSH = x_BSH.detach().requires_grad_()
        step = self.model.forward(x_BSH, train=True)
        hidden_BSH = step.hidden_BSH
        loss(hidden_BSH, self.seed, self._rank).backward()  # type: ignore[no-untyped-call]
        self.model.clock.mark("backward", _END)
        self._add_up()
        self.model.clock.mark("gradients", _END)
        self.gradients = {
            name: weight.grad for name, weight in self._weights.items() if weight.grad is not None
        }
        assert x_BSH.grad is not None
        self.gradients["input"] = x_BSH.grad
        return replace(step, hidden_BSH=hidden_BSH.detach())

    def _add_up(self) -> None:
        """Add up gradients: of what all ranks hold over all, of an expert over its copies."""
        shared = [weight for name, weight in self._weights.items() if ".experts." not in name]
        _all_reduce(shared, None)
        layers = [layer.feed_forward for layer in self.model.layers]
        moes = [moe for moe in layers if isinstance(moe, MoeWeights)]
        for ordinal, moe in enumerate(moes):
            for slot, group in self._copies.of_rank(ordinal, self._rank):
                expert = moe.experts[slot]
                assert expert is not None
                _all_reduce(expert.tensors, group)


def loss(hidden_BSH: Tensor, seed: int, rank: int) -> Tensor:
    """Return a rank's part of the loss, which is the sum over ranks; float32."""
    direction_BSH = seeded_hidden(
        seed + 1, rank, hidden_BSH.shape, device=hidden_BSH.device, dtype=torch.float32
    )
    return (hidden_BSH.float() * direction_BSH).mean()


class _Copies:
    """Process groups of the ranks that hold copies of the same expert.

    All ranks make all groups in the same order, as making one is a collective, and later use those
    they are in by layer and expert, so that groups that overlap cannot wait for each other.
    """

    def __init__(self, plan: Plan) -> None:
        self._slots_per_rank = plan.slots_per_rank
        self._slots = [
            [slots for slots in plan.slots_of_expert(ordinal) if len(slots) > 1]
            for ordinal in range(plan.model.num_moe_layers)
        ]
        ranks = {self._ranks(slots) for layer in self._slots for slots in layer}
        self._groups = {own: dist.new_group(list(own)) for own in sorted(ranks)}

    def of_rank(self, ordinal: int, rank: int) -> Iterator[tuple[int, dist.ProcessGroup]]:
        """Yield this rank's slots of an expert that has copies, and the group of all of them."""
        for slots in self._slots[ordinal]:
            for slot in slots:
                if slot // self._slots_per_rank == rank:
                    yield slot % self._slots_per_rank, self._groups[self._ranks(slots)]

    def _ranks(self, slots: list[int]) -> tuple[int, ...]:
        return tuple(slot // self._slots_per_rank for slot in slots)


def _all_reduce(weights: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Add up the gradients of `weights` over the ranks, a dtype at a time."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.grad is None:  # this rank has no tokens, or the weight is in no gradient's way
            weight.grad = torch.zeros_like(weight)
        by_dtype[weight.dtype].append(weight.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
