"""One layer to be solved with replicas: what is given, what is allowed, what copies cost."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epplan.planner.cost import Floats
from epplan.planner.placement.levels import LayerPlacement, Limits
from epplan.planner.placement.rows import Ints, LayerRows
from epplan.planner.placement.search import Limit
from epplan.planner.problem import Replication

from .shares import best_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedTask:
    """One layer to be solved with replicas.

    Attributes:
        rows: of one copy of each expert.
        load: rows of every expert, mean over windows, [experts].
        cell_of_gpu: `RowBuilder.cells`.
        host_of_gpu: numbers, [gpus].
        capacity: most copies on every GPU, [gpus].
        rule: what is allowed.
    """

    rows: LayerRows
    load: Floats
    cell_of_gpu: Ints
    host_of_gpu: Ints
    capacity: npt.NDArray[np.int64]
    rule: Replication

    @property
    def room(self) -> npt.NDArray[np.int64]:
        """Most copies in every cell, [cells]."""
        return np.bincount(self.cell_of_gpu, weights=self.capacity).astype(np.int64)

    @property
    def host_of_cell(self) -> Ints:
        """Number of every cell's host, [cells]."""
        host = np.zeros(len(self.room), dtype=np.intp)
        host[self.cell_of_gpu] = self.host_of_gpu
        return host

    def limits(self, expert: Ints) -> Limits:
        """Return what keeps copies apart: one of an expert on a GPU, and not all on one host."""
        num_experts, num_gpus = len(self.load), len(self.capacity)
        in_cell = Limit(
            group=expert,
            domain=np.arange(len(self.room)),
            most=np.tile(np.bincount(self.cell_of_gpu), (num_experts, 1)),
        )
        on_gpu = Limit(
            group=expert,
            domain=np.arange(num_gpus),
            most=np.ones((num_experts, num_gpus), dtype=np.int64),
        )
        hosts = [replace(limit, domain=self.host_of_cell) for limit in self._over_hosts(expert)]
        return Limits(on_gpus=(on_gpu, *self._over_hosts(expert)), on_cells=(in_cell, *hosts))

    def _over_hosts(self, expert: Ints) -> list[Limit]:
        if not self.rule.survive_hosts:
            return []
        copies = np.bincount(expert)
        most = np.tile((copies - self.rule.survive_hosts)[:, None], (1, self.host_of_gpu.max() + 1))
        return [Limit(group=expert, domain=self.host_of_gpu, most=most)]

    def priced(self, expert: Ints, share: Floats, placement: Ints, found_by: str) -> LayerPlacement:
        """Return `share` of `expert` on the GPUs of `placement`, each [items], with its cost."""
        placed = LayerPlacement(
            placement=placement,
            seconds=0.0,
            bound_s=0.0,
            found_by=found_by,
            floor_s=0.0,
            expert=expert,
            share=share,
        )
        seconds = self.rows.seconds_of_shares(placed.shares(len(self.capacity)))
        return replace(placed, seconds=seconds)

    def shared(self, found: LayerPlacement, time_limit_s: float) -> LayerPlacement:
        """Return the same copies with the best shares."""
        assert found.expert is not None
        shares = best_shares(self.rows, found.shares(len(self.capacity)), time_limit_s)
        share = shares[found.expert, found.placement]
        return self.priced(found.expert, share, found.placement, found.found_by)
