"""The worker under an agent that restarts it: fails at first, and is on another host afterwards."""

import os
import sys

from epplan.runtime import worker


def fail(*_: object) -> None:
    sys.exit("the ranks passed the check and fail now")


if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        vars(worker)["run_rank"] = fail
    else:
        os.environ["EPPLAN_HOST"] = "c"
    worker.main()
