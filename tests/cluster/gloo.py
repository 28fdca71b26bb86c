"""A gloo process group whose ranks are on the hosts of an emulated cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from .namespaces import Emulation, enter


@contextmanager
def gloo_on(
    emulation: Emulation, host: str, store: Path, rank: int, world_size: int
) -> Iterator[None]:
    """Move this rank, forked a moment ago, onto its host and join the others there.

    Args:
        emulation: the cluster.
        host: this rank's host.
        store: a file that does not exist yet, where the ranks find each other.
        rank: this rank.
        world_size: number of ranks.
    """
    enter(emulation, host)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()
