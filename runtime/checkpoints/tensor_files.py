"""Tensors of a checkpoint folder, read one by one: `safetensors` files and their index.

The files are mapped, so that of a file only the pages of the tensors asked for are read.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epplan.errors import EpplanError, InputError
from epplan.files import read_text

from .quantized import dequantize_fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"  # what block-scaled fp8 weights' names are followed by
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")


class TensorFiles:
    """The tensors of all files of a folder, by name.

    Raises:
        InputError: no checkpoint there, or every file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError:
            raise InputError(
                "reading a checkpoint needs safetensors, which is not installed",
                hints=["pip install 'epplan[runtime]'"],
            ) from None
        self._file_of: dict[str, Any] = {}
        indexed = _read_index(folder)
        problems = []
        for file, listed in indexed.items():
            try:
                opened: Any = safe_open(folder / file, framework="pt")
            except FileNotFoundError:
                problems.append(f"{file}: missing, holds {len(listed)} tensors")
                continue
            except (SafetensorError, OSError) as error:
                problems.append(f"{file}: {error}")
                continue
            held = set(opened.keys())
            problems += [f"{file}: has no tensor {name}" for name in sorted(listed - held)]
            self._file_of |= dict.fromkeys(listed or held, opened)
        if problems:
            raise InputError(
                f"checkpoint {folder} is not complete",
                problems=problems,
                hints=["download it again; a truncated file has a wrong size"],
            )

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape on disk."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Return the element type on disk, in the format's own words: F32, BF16, F8_E4M3, U8."""
        return str(self._file_of[name].get_slice(name).get_dtype())

    def read(self, name: str, *where: int | slice) -> Tensor:
        """Return a tensor as it is stored, or the part of it at the indices `where`."""
        file = self._file_of[name]
        tensor: Tensor = file.get_slice(name)[where] if where else file.get_tensor(name)
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReader:
    """Reads tensors to a device, in a dtype; block-scaled fp8 is multiplied out."""

    files: TensorFiles
    device: torch.device
    dtype: torch.dtype
    fp8_block: tuple[int, int] = (128, 128)

    def raw(self, name: str, *where: int | slice) -> Tensor:
        """Return a tensor, or a part of it, as stored."""
        return self.files.read(name, *where).to(self.device)

    def tensor(self, name: str, *where: int | slice, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor, or a part of it, in `dtype` (None: the reader's)."""
        stored = self.raw(name, *where)
        if stored.dtype == torch.float8_e4m3fn:
            stored = dequantize_fp8(stored, self.raw(name + SCALE), self.fp8_block)
        return stored.to(dtype or self.dtype).contiguous()


def _read_index(folder: Path) -> dict[str, set[str]]:
    """Return the tensors listed for each file; of a single file nothing is listed."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return {SINGLE: set()}
        found = sorted(folder.glob("*.bin")) if folder.is_dir() else []
        raise InputError(
            f"no checkpoint in {folder}: neither {INDEX} nor {SINGLE}",
            hints=["convert pytorch_model.bin to safetensors"] if found else [],
        )
    what = f"index {folder / INDEX}"
    try:
        document = json.loads(read_text(folder / INDEX, "index"))
        weight_map: Mapping[str, str] = document["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise InputError(f"{what} puts {name} outside the folder: {file}")
            files.setdefault(file, set()).add(name)
    except EpplanError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{what} is damaged: it has no mapping weight_map") from None
    return dict(sorted(files.items()))
