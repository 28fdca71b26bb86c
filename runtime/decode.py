"""One decode step as a CUDA graph: recorded once, then started by one call.

A step is a few hundred kernels of microseconds; started one by one they would wait for the host.

Shapes: B sequences, H hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # runs before recording: they compile kernels and make room for caches


class DecodeGraph:
    """A step recorded for one number of sequences and one context length.

    The recorded kernels hold addresses: weights and caches must stay where they are, and each
    replay writes the position that was recorded. A step at another length is another graph.

    Args:
        step: from hidden states [B, 1, H] to hidden states, without waiting for the device; it
            leaves its caches as long as it found them.
        x_B1H: hidden states of the size to record.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], x_B1H: Tensor) -> None:
        self._x_B1H = x_B1H.clone()
        self._step = step  # holds weights and caches, without which addresses would dangle
        beside = torch.cuda.Stream(x_B1H.device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                step(self._x_B1H)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._out_B1H = step(self._x_B1H)

    def __call__(self, x_B1H: Tensor) -> Tensor:
        """Run the step; the result is overwritten by the next."""
        self._x_B1H.copy_(x_B1H)
        self._graph.replay()
        return self._out_B1H
