"""One decode step as a CUDA graph: recorded once, then started by one call.

A step is a few hundred kernels of microseconds; started one by one they would wait for the host.

Shapes: B sequences, H hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from epplan.runtime.dispatchers.dispatch import Counts, gather_counts
from epplan.runtime.layer.kv_cache import KvCache

from .clock import Place
from .model import ExpertParallelModel, MicroBatch

_WARM_UP = 3  # runs before recording: they compile kernels and make room for caches
_AFTER = Place(-1, -1)  # a step
Outcome = TypeVar("Outcome")


class DecodeGraph(Generic[Outcome]):
    """A step recorded for one number of sequences and one context length.

    The recorded kernels hold addresses: weights and caches must stay where they are, and each
    replay writes the position that was recorded. A step at another length is another graph.

    Args:
        step: from hidden states [B, 1, H] to tensors, without waiting for the device; it leaves
            its caches as long as it found them.
        x_B1H: hidden states of the size to record.
    """

    def __init__(self, step: Callable[[Tensor], Outcome], x_B1H: Tensor) -> None:
        self._x_B1H = x_B1H.clone()
        self._step = step  # holds weights and caches, without which addresses would dangle
        beside = torch.cuda.Stream(x_B1H.device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                step(self._x_B1H)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread records: NCCL's own asks for the state of events meanwhile.
        with (
            torch.inference_mode(),
            torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
        ):
            self._outcome = step(self._x_B1H)

    def __call__(self, x_B1H: Tensor) -> Outcome:
        """Run the step; its tensors are overwritten by the next."""
        self._x_B1H.copy_(x_B1H)
        self._graph.replay()
        return self._outcome


class GraphedDecode:
    """Decode steps over all ranks as CUDA graphs; the dispatcher must be one that never waits.

    As in `ExpertParallelModel.forward` the counts say afterwards whether rows were lost. Such a
    step is run again without a graph, and the next one is recorded anew, with more room.

    Args:
        model: of this rank.
        caches: of each micro-batch; a step leaves them as long as it found them.
    """

    def __init__(self, model: ExpertParallelModel, caches: Sequence[KvCache]) -> None:
        self._model, self._caches = model, caches
        self._graph: DecodeGraph[tuple[Tensor, list[Counts]]] | None = None

    def __call__(self, x_B1H: Tensor) -> Tensor:
        """Run a step; a collective. The result is overwritten by the next."""
        if self._graph is None:
            self._graph = DecodeGraph(partial(_step, self._model, self._caches), x_B1H)
        hidden_B1H, counts = self._graph(x_B1H)
        dispatcher = self._model.dispatcher
        dropless = dispatcher.rerun(gather_counts(dispatcher.channel, counts, _AFTER))
        if dropless is None:
            return hidden_B1H
        self._graph = None
        with torch.inference_mode():
            again = self._model.run(x_B1H, dropless, caches=self._caches)
        _rewind(self._caches)
        return _hidden(again)


# Not methods: a graph that held its owner would live until a garbage collection, and NCCL ends no
# process group that a graph still holds.
def _step(
    model: ExpertParallelModel, caches: Sequence[KvCache], x_B1H: Tensor
) -> tuple[Tensor, list[Counts]]:
    batches = model.run(x_B1H, model.dispatcher, caches=caches)
    _rewind(caches)
    return _hidden(batches), [each for batch in batches for each in batch.counts]


def _rewind(caches: Sequence[KvCache]) -> None:
    for cache in caches:
        cache.truncate(cache.length - 1)


def _hidden(batches: list[MicroBatch]) -> Tensor:
    return torch.cat([batch.hidden_BSH for batch in batches])
