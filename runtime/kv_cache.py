"""Keys and values of the positions already seen, layer by layer.

Shapes: B sequences, G key and value heads, S new positions, T = cached + S positions, D and V
widths of a key and a value head; layers may differ in all but B, and V may be 0.
"""

import torch
from torch import Tensor


class KvCache:
    """Keys and values of some sequences, all equally long."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Positions that every layer holds; within a step, those of the steps before."""
        return min(0 if keys is None else keys.shape[2] for keys in self._keys)

    def update(self, layer: int, key_BGSD: Tensor, value_BGSV: Tensor) -> tuple[Tensor, Tensor]:
        """Append one step's keys and values of a layer and return all, [B, G, T, D and V]."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is not None and values is not None:
            key_BGSD = torch.cat([keys, key_BGSD], dim=2)
            value_BGSV = torch.cat([values, value_BGSV], dim=2)
        self._keys[layer], self._values[layer] = key_BGSD, value_BGSV
        return key_BGSD, value_BGSV
