"""Matrices that lie one after the other in memory, seen as one."""

from collections.abc import Sequence

from torch import Tensor


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return contiguous tensors of the same row length joined along their rows, as a view.

    None where they do not follow each other in one storage.
    """
    first, last = tensors[0], tensors[-1]
    expected, stride, width = first.data_ptr(), first.stride(), first.size(-1)
    for tensor in tensors:
        if (
            tensor.data_ptr() != expected
            or tensor.stride() != stride
            or tensor.size(-1) != width
            or not tensor.is_contiguous()
        ):
            return None
        expected += tensor.numel() * tensor.itemsize
    # What begins and ends in one storage is in it all the way.
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return None
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
