"""Launching one kernel while the one before it still runs (programmatic dependent launch).

A decode step is some fifty kernels of microseconds, and between two of them the memory would idle
while one drains and the next starts. Every kernel here is therefore started early, does what does
not depend on the one before (an expert's weights can be fetched into the L2 cache), and then waits
for it with `gdc_wait`; nothing another kernel writes may be touched before that.
"""

from functools import cache

import torch

EARLY = {"launch_pdl": True}


@cache
def has_hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU: later ones do not know its matrix instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
