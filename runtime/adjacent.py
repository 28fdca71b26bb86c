"""Matrices that lie one after the other in memory, seen as one."""

from collections.abc import Sequence

from torch import Tensor


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return contiguous tensors of the same row length joined along their rows, as a view.

    None where they do not follow each other in one storage.
    """
    first, expected = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != expected
            or tensor.untyped_storage().data_ptr() != storage
            or not tensor.is_contiguous()
            or tensor.shape[1:] != first.shape[1:]
        ):
            return None
        expected += tensor.numel() * tensor.itemsize
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
