"""Device profiles: how long a GPU computes.

A profile measured by `epplan.runtime.calibrate` is read as shares of the roofline: the time that
FLOP/s and HBM bytes/s allow at best, by the rated figures, over the time measured. A piece of work
takes its own roofline time over the share of the nearest table at equal rows (or context, cache).

    seconds = max(FLOPs / FLOP/s, bytes / HBM bytes/s) / share

A GPU without a profile of its own is derived: it reaches the shares of the measured GPU nearest in
FLOPs per HBM byte, at its own rated figures, and is marked `profile`. Weights of one byte (FP8)
double FLOP/s where the GPU has such units.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from epplan.files import parse_yaml, read_text, validate
from epplan.planner.model import AttentionSpec
from epplan.topologies.hardware import GpuProfile, gpu_profile

from .device_tables import (
    AttentionTable,
    DecodeTable,
    DeviceProfile,
    LinearTable,
    MlpTable,
    RowMove,
)
from .work import Floats, Work, roofline_work

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class _Curve:
    """Share of the roofline over some amount, interpolated in the logarithm of the amount."""

    amounts: tuple[float, ...]
    shares: tuple[float, ...]

    def at(self, amount: Floats) -> Floats:
        x = np.log(np.maximum(amount, 1e-9))
        found: Floats = np.interp(x, np.log(self.amounts), self.shares)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU model that computes as its tables say.

    Attributes:
        gpu: rated figures.
        provenance: measured, or profile where the tables are another GPU's.
        source: where the tables are from.
        tables: the tables.
        reference: rated figures of the GPU the tables were measured on.
    """

    gpu: GpuProfile
    provenance: Literal["measured", "profile"]
    source: str
    tables: DeviceProfile
    reference: GpuProfile
    _curves: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def flops_per_s(self, weight_bytes: float = 2.0) -> float:
        """Return the rated FLOP/s for weights of that size."""
        return self.gpu.flops * _fp8_factor(self.gpu, weight_bytes)

    def linear(self, weights: float, rows: Floats, weight_bytes: float, width: float = 0) -> Work:
        """Return the work of matrix products of `weights` weights for rows, [ranks].

        Args:
            weights: in all matrices together.
            rows: of every rank.
            weight_bytes: of one weight.
            width: elements a row reads and writes.
        """
        table = self._nearest(self.tables.linear, weights)
        return self._product(table, weights, rows, weight_bytes, width)

    def mlp(self, hidden: int, ffn: int, gated: bool, rows: Floats, weight_bytes: float) -> Work:
        """Return the work of an MLP for rows, [ranks]; nothing for no rows."""
        weights = (3 if gated else 2) * hidden * ffn
        tables = [table for table in self.tables.mlp if table.gated == gated] or self.tables.mlp
        return self._product(
            self._nearest(tables, weights), weights, rows, weight_bytes, 2 * hidden
        )

    def prefill_attention(self, spec: AttentionSpec, sequences: Floats, context: int) -> Work:
        """Return the work of causal attention of whole sequences over themselves, [ranks]."""
        flops = sequences * attention_flops(spec, context)
        _, dim = _dims(spec)
        table = self._nearest_heads(self.tables.attention, spec, dim)
        share = self._curve(f"attention {id(table)}", lambda: self._attention_curve(table))
        # Queries and results of every head, two bytes each; keys and values stay in the cache.
        moved = sequences * context * spec.num_heads * sum(_dims(spec)) * 2.0
        best = flops / self.gpu.flops, np.zeros_like(flops)
        return roofline_work(flops, moved, best, share.at(np.full_like(sequences, context)))

    def decode_attention(
        self, spec: AttentionSpec, sequences: Floats, context: int, kv_bytes: float
    ) -> Work:
        """Return the work of one new token of every sequence over its cache, [ranks].

        Args:
            spec: the attention; latent attention works on its latents (absorbed projections).
            sequences: of every rank.
            context: positions of every sequence.
            kv_bytes: cache bytes of one position in one layer.
        """
        dim_in, dim = _dims(spec)
        if spec.kind == "mla":
            dim_in, dim = spec.kv_lora_rank + spec.qk_rope_head_dim, spec.kv_lora_rank
        flops = 2.0 * sequences * context * spec.num_heads * (dim_in + dim)
        cache_bytes = sequences * context * kv_bytes
        table = self._nearest_heads(self.tables.decode, spec, dim)
        curve = self._curve(f"decode {id(table)}", lambda: self._decode_curve(table))
        best = flops / self.gpu.flops, cache_bytes / self.gpu.hbm
        return roofline_work(flops, cache_bytes, best, curve.at(cache_bytes))

    def move_rows(self, rows: Floats, row_bytes: float) -> Work:
        """Return the work of permuting rows, [ranks]: each is read and written."""
        return self._moved(self.tables.memory.permute[-1], 2 * rows * row_bytes, launches=1)

    def norm_rows(self, rows: Floats, row_bytes: float) -> Work:
        """Return the work of adding the residual to rows and normalising them, [ranks].

        The sum reads two and writes one, the norm reads and writes.
        """
        return self._moved(self.tables.memory.norm, 5 * rows * row_bytes, launches=2)

    def launches(self, number: float, num_ranks: int, *, eager: bool) -> Work:
        """Return the cost of launching kernels that do next to nothing, [ranks]."""
        launch = self.tables.launch
        none = np.zeros(num_ranks)
        seconds = np.full(num_ranks, number * (launch.eager_s if eager else launch.graph_s))
        return Work(arithmetic_s=none, memory_s=none, launch_s=seconds, flops=none, hbm_bytes=none)

    def _moved(self, timed: RowMove, moved: Floats, *, launches: int) -> Work:
        share = 2 * timed.rows * timed.row_bytes / timed.seconds / self.reference.hbm
        none = np.zeros_like(moved)
        work = roofline_work(none, moved, (none - 1, moved / self.gpu.hbm), share)
        return work + self.launches(launches, len(moved), eager=False)

    def _product(
        self,
        table: MlpTable | LinearTable,
        weights: float,
        rows: Floats,
        weight_bytes: float,
        width: float,
    ) -> Work:
        rows = np.asarray(rows, dtype=np.float64)
        curve = self._curve(f"product {id(table)}", lambda: self._product_curve(table))
        flops = 2.0 * rows * weights
        moved = np.where(rows > 0, weights * weight_bytes + rows * width * 2, 0.0)
        best = flops / self.flops_per_s(weight_bytes), moved / self.gpu.hbm
        # A profile for the same intensity on another GPU is at other rows: its ridge moved.
        ridge = self._ridge(self.gpu, weight_bytes) / self._ridge(self.reference, 2.0)
        return roofline_work(flops, moved, best, curve.at(rows / ridge))

    def _ridge(self, gpu: GpuProfile, weight_bytes: float) -> float:
        """Return the rows at which a product's arithmetic takes as long as reading its weights."""
        return gpu.flops * _fp8_factor(gpu, weight_bytes) * weight_bytes / 2 / gpu.hbm

    def _curve(self, name: str, make: Any) -> _Curve:
        if name not in self._curves:
            self._curves[name] = make()
        curve: _Curve = self._curves[name]
        return curve

    def _product_curve(self, table: MlpTable | LinearTable) -> _Curve:
        gpu, size = self.reference, _BYTES[table.dtype]
        width = 2 * table.hidden if isinstance(table, MlpTable) else table.size_in + table.size_out
        shares = [
            max(2 * rows * table.weights / gpu.flops,
                (table.weights + rows * width) * size / gpu.hbm) / seconds
            for rows, seconds in zip(table.rows, table.seconds, strict=True)
        ]  # fmt: skip
        return _Curve(tuple(map(float, table.rows)), tuple(shares))

    def _attention_curve(self, table: AttentionTable) -> _Curve:
        shares = [
            2.0 * table.num_heads * table.head_dim * context**2 / self.reference.flops / seconds
            for context, seconds in zip(table.context, table.seconds, strict=True)
        ]
        return _Curve(tuple(map(float, table.context)), tuple(shares))

    def _decode_curve(self, table: DecodeTable) -> _Curve:
        points = sorted(table.points, key=lambda point: point.sequences * point.context)
        size = _BYTES[table.dtype]
        amounts: list[float] = []
        shares: list[float] = []
        for point in points:
            positions = point.sequences * point.context
            cache_bytes = 2.0 * positions * table.num_kv_heads * table.head_dim * size
            flops = 4.0 * positions * table.num_heads * table.head_dim
            best = max(flops / self.reference.flops, cache_bytes / self.reference.hbm)
            if amounts and cache_bytes <= amounts[-1]:
                shares[-1] = max(shares[-1], best / point.seconds)
            else:
                amounts.append(cache_bytes)
                shares.append(best / point.seconds)
        return _Curve(tuple(amounts), tuple(shares))

    @staticmethod
    def _nearest(tables: Sequence[Any], weights: float) -> Any:
        return min(tables, key=lambda table: abs(log(table.weights / max(weights, 1))))

    @staticmethod
    def _nearest_heads(tables: Sequence[Any], spec: AttentionSpec, dim: int) -> Any:
        group = spec.num_heads if spec.kind == "mla" else spec.num_heads / spec.num_kv_heads
        return min(
            tables,
            key=lambda table: (
                abs(log(table.head_dim / dim))
                + abs(log(table.num_heads / table.num_kv_heads / group)) / 2
            ),
        )


def attention_flops(spec: AttentionSpec, context: int) -> float:
    """Return the FLOPs of causal attention of one sequence over itself, in one layer."""
    return float(context) ** 2 * spec.num_heads * sum(_dims(spec))


def _dims(spec: AttentionSpec) -> tuple[int, int]:
    """Return the widths of a query or key head and of a value head."""
    if spec.kind == "mla":
        return spec.qk_nope_head_dim + spec.qk_rope_head_dim, spec.head_dim
    return spec.head_dim, spec.head_dim


def _fp8_factor(gpu: GpuProfile, weight_bytes: float) -> float:
    amd = any(device.startswith("0x1002") for device in gpu.device)
    has_fp8 = amd or (gpu.sm or 0) >= 89
    return 2.0 if weight_bytes <= 1 and has_fp8 else 1.0


@cache
def _bundled() -> dict[str, DeviceProfile]:
    """Return the measured profiles by GPU model."""
    entries = resources.files("epplan.planner.simulate.data").iterdir()
    profiles = {}
    for entry in entries:
        if entry.name.endswith(".yaml"):
            document = yaml.safe_load(entry.read_text(encoding="utf-8"))
            if document.get("kind") == "epplan-device-profile":
                profiles[Path(entry.name).stem] = DeviceProfile.model_validate(document)
    return profiles


@cache
def device(gpu_model: str) -> Device:
    """Return a GPU model's device: measured, or derived from the measured GPU most like it.

    Raises:
        InputError: unknown GPU model.
    """
    gpu = gpu_profile(gpu_model)
    measured = _bundled()
    own = measured.get(gpu_model)
    if own is not None:
        return Device(gpu=gpu, provenance="measured", source=own.source, tables=own, reference=gpu)
    names = list(measured)
    ratios = [log(gpu_profile(name).flops / gpu_profile(name).hbm) for name in names]
    ratio = log(gpu.flops / gpu.hbm)
    nearest = names[int(np.argmin([abs(x - ratio) for x in ratios]))]
    return Device(
        gpu=gpu,
        provenance="profile",
        source=f"the shares of the roofline that {nearest} reaches, at {gpu_model}'s rated figures",
        tables=measured[nearest],
        reference=gpu_profile(nearest),
    )


def read_device(path: Path, gpu_model: str) -> Device:
    """Return a device from a profile file, for GPUs of a model.

    Raises:
        InputError: the file is missing or invalid, or the GPU model unknown.
    """
    what = f"device profile {path}"
    tables = validate(DeviceProfile, parse_yaml(read_text(path, "device profile"), what), what)
    gpu = gpu_profile(gpu_model)
    return Device(
        gpu=gpu, provenance="measured", source=tables.source, tables=tables, reference=gpu
    )
