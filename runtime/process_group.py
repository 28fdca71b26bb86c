"""The process group of a run: joined and used with a timeout, and watched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from epplan.errors import PeerError

from .environment import RankEnvironment, Setting
from .watchdog import Watchdog


@contextmanager
def process_group(
    environment: RankEnvironment, setting: Setting, store: Store, timeout_s: float
) -> Iterator[Watchdog]:
    """Join the process group of all ranks, and leave it at the end of the block.

    Args:
        environment: this rank's place.
        setting: backend and device.
        store: where the ranks met.
        timeout_s: how long any rank waits for the others.

    Raises:
        PeerError: another rank did not come, failed or hangs.
    """
    timeout = timedelta(seconds=timeout_s)
    device = setting.device if setting.device.type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    # A connection of its own, whatever the other one is waiting for.
    own_store = dist.TCPStore(  # type: ignore[attr-defined]  # public, left out of __all__
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    with (
        Watchdog(own_store, environment.rank, environment.world_size, timeout_s) as watchdog,
        watchdog.explained(),
    ):
        dist.init_process_group(
            setting.backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
            device_id=device,
        )
        yield watchdog
        # Not after an error: others may still be waiting for this rank, and NCCL would wait for
        # them.
        dist.destroy_process_group()


def meet(environment: RankEnvironment, timeout_s: float) -> Store:
    """Return the store on rank 0 in which all ranks meet, found by torchrun's variables.

    It is there before the process group, so that ranks can talk before NCCL is asked for anything.

    Raises:
        PeerError: rank 0 or the others are not reached in time, or its port is taken: by somebody
            else, or by a rank 0 that is about to end, so that a restart may find it free.
    """
    is_host, timeout = environment.rank == 0, timedelta(seconds=timeout_s)
    ranks = (environment.rank, environment.world_size)
    store: Store
    try:
        # Half the time for the others, because torch tries twice to reach rank 0.
        patience = timeout if is_host else timeout / 2
        store, _, _ = next(rendezvous("env://", *ranks, timeout=patience))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise PeerError(
                f"rank {environment.rank}: port {os.environ['MASTER_PORT']}, where ranks are to "
                "meet, is in use on its host",
                hints=["take another --master-port, or end the job that has it"],
            ) from None
        who = "some rank did not reach it" if is_host else "it did not reach rank 0"
        raise PeerError(
            f"rank {environment.rank}: {who} within {timeout.total_seconds():g} s",
            hints=["MASTER_ADDR and MASTER_PORT must name rank 0's host and a free port there"],
        ) from None
    store.set_timeout(timeout)
    # torchrun keeps one store over restarts, with all that was written into it before: under its
    # static rendezvous restarted ranks would find the addresses and answers of their dead ones.
    return PrefixStore(f"start {environment.restarts}", store)
