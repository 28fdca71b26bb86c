"""Keys and values of the positions already seen, layer by layer.

Shapes: B sequences, G key and value heads, S new positions, T = cached + S positions, C capacity
in positions, D and V widths of a key and a value head; layers may differ in all but B, and V may
be 0.
"""

from torch import Tensor

from .own_kernels import can_run_short_step_kernels


class KvCache:
    """Keys and values of some sequences, all equally long.

    They lie in buffers that stay where they are while they suffice, so that a step costs the
    copy of its own positions and a CUDA graph of it can be replayed.

    Args:
        num_layers: layers that have a cache.
        capacity: positions to make room for at once; when they are full the room doubles.
    """

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * num_layers  # [B, G, C, D]
        self._values: list[Tensor | None] = [None] * num_layers  # [B, G, C, V]
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Positions that every layer holds; within a step, those of the steps before."""
        return min(self._lengths)

    def update(self, layer: int, key_BGSD: Tensor, value_BGSV: Tensor) -> tuple[Tensor, Tensor]:
        """Append one step's keys and values of a layer and return all, [B, G, T, D and V].

        The result is a view of the buffers: it holds until the next `truncate`.
        """
        keys, values, first = self.extend(layer, key_BGSD, value_BGSV)
        _write(keys, values, key_BGSD, value_BGSV, first)
        length = self._lengths[layer]
        return keys[:, :, :length], values[:, :, :length]

    def extend(
        self, layer: int, key_BGSD: Tensor, value_BGSV: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Count one step's positions in, for the caller to write.

        Returns:
            the layer's buffers, [B, G, C, D and V], and the place of the first new position.
        """
        first = self._lengths[layer]
        length = first + key_BGSD.shape[2]
        keys = _with_room(self._keys[layer], key_BGSD, first, length, self._capacity)
        values = _with_room(self._values[layer], value_BGSV, first, length, self._capacity)
        self._keys[layer], self._values[layer] = keys, values
        self._lengths[layer] = length
        return keys, values, first

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self._lengths = [min(held, length) for held in self._lengths]


def _write(keys: Tensor, values: Tensor, key_BGSD: Tensor, value_BGSV: Tensor, first: int) -> None:
    """Copy new positions into their buffers."""
    is_short = key_BGSD.shape == value_BGSV.shape and key_BGSD.shape[2] == 1
    if is_short and can_run_short_step_kernels(keys):
        from epplan.runtime.kernels.decode_rows import append

        append([keys, values], [key_BGSD, value_BGSV], first)
        return
    last = first + key_BGSD.shape[2]
    keys[:, :, first:last] = key_BGSD
    values[:, :, first:last] = value_BGSV


def _with_room(
    buffer: Tensor | None, new_BGSD: Tensor, length: int, needed: int, capacity: int
) -> Tensor:
    """Return a buffer for `needed` positions that holds the first `length` of `buffer`."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    num_sequences, heads, _, width = new_BGSD.shape
    room = max(needed, capacity if buffer is None else 2 * buffer.shape[2])
    larger = new_BGSD.new_empty(num_sequences, heads, room, width)
    if buffer is not None:
        larger[:, :, :length] = buffer[:, :, :length]
    return larger
