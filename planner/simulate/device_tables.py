"""The tables of a device profile, as `epplan.runtime.calibrate` writes them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _ByRows(_Record):
    """A product timed for numbers of rows."""

    dtype: str
    rows: tuple[int, ...] = Field(min_length=1)
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> "_ByRows":
        if len(self.rows) != len(self.seconds) or list(self.rows) != sorted(set(self.rows)):
            raise ValueError("rows must ascend, with one time each")
        if min(self.seconds) <= 0:
            raise ValueError("times must be above 0")
        return self


class MlpTable(_ByRows):
    """An MLP."""

    hidden: int
    ffn: int
    gated: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return (3 if self.gated else 2) * self.hidden * self.ffn


class LinearTable(_ByRows):
    """One matrix product."""

    size_in: int
    size_out: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.size_in * self.size_out


class _HeadsTable(_Record):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str


class AttentionTable(_HeadsTable):
    """Causal attention of one sequence over itself."""

    context: tuple[int, ...] = Field(min_length=1)
    seconds: tuple[float, ...]


class DecodePoint(_Record):
    """One new token of every sequence."""

    sequences: int
    context: int
    seconds: float = Field(gt=0)
    way: str


class DecodeTable(_HeadsTable):
    """Attention of new tokens over a cache."""

    points: tuple[DecodePoint, ...] = Field(min_length=1)


class RowMove(_Record):
    """Rows moved, read and written once."""

    rows: int
    row_bytes: int
    seconds: float = Field(gt=0)


class MemoryTable(_Record):
    """Moving memory."""

    copy_bytes_per_s: float = Field(gt=0)
    read_bytes_per_s: float = Field(gt=0)
    permute: tuple[RowMove, ...] = Field(min_length=1)
    norm: RowMove


class LaunchTable(_Record):
    """A kernel that does next to nothing."""

    eager_s: float = Field(ge=0)
    graph_s: float = Field(ge=0)


class DeviceProfile(_Record):
    """What `epplan.runtime.calibrate` writes."""

    schema_version: Literal[1]
    kind: Literal["epplan-device-profile"]
    name: str
    provenance: Literal["measured"]
    source: str
    mlp: tuple[MlpTable, ...] = Field(min_length=1)
    linear: tuple[LinearTable, ...] = Field(min_length=1)
    attention: tuple[AttentionTable, ...] = Field(min_length=1)
    decode: tuple[DecodeTable, ...] = Field(min_length=1)
    memory: MemoryTable
    launch: LaunchTable
