"""The worker, after writing down what the scheduler made of it."""

import json
import os
import socket
from pathlib import Path

from epplan.runtime.worker import main

NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "EPPLAN_HOST"),
    "CUDA_VISIBLE_DEVICES",
)

if __name__ == "__main__":
    record = {name: os.environ.get(name) for name in NAMES} | {"host": socket.gethostname()}
    folder = Path(os.environ["TEST_RECORDS"])
    (folder / os.environ["RANK"]).write_text(json.dumps(record))
    main()
