"""The worker; one of its ranks is killed once, after some steps. Every start is written down."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from epplan.runtime.worker import main

DYING_RANK = 2
AFTER_STEPS = 2


def die_after_some_steps(progress: Path, died: Path) -> None:
    """Kill this process, if it lives until then."""
    while not progress.exists() or json.loads(progress.read_text())["done"] < AFTER_STEPS:
        time.sleep(0.005)
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, rank = Path(os.environ["TEST_RECORDS"]), os.environ["RANK"]
    with (folder / f"starts-{rank}").open("a") as starts:
        starts.write("start\n")
    [progress] = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("--progress=")]
    if int(rank) == DYING_RANK and not (folder / "died").exists():
        arguments = (Path(progress), folder / "died")
        threading.Thread(target=die_after_some_steps, args=arguments, daemon=True).start()
    main()
