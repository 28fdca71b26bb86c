"""The real worker on an emulated host: `epplan launch` runs this module in the worker's place.

`EPPLAN_TEST_EMULATION` names a file with the emulation and where ranks shall note their process
ids. Hosts are told by name, so that a plan for some of them finds its own.
"""

import json
import os
from pathlib import Path

from epplan.planner.plan import read_plan
from epplan.runtime import worker

from .namespaces import Emulation, enter

VARIABLE = "EPPLAN_TEST_EMULATION"


def write_setting(path: Path, emulation: Emulation, pids: Path) -> None:
    """Write what the ranks read."""
    emulated = {name: getattr(emulation, name) for name in ("prefix", "hosts", "host_of_rank")}
    path.write_text(json.dumps({"emulation": emulated, "pids": str(pids)}))


def main(arguments: list[str]) -> None:
    """Be a rank: the launcher's arguments end in the plan, `--result` and its file."""
    setting = json.loads(Path(os.environ[VARIABLE]).read_text())
    emulation = Emulation(**setting["emulation"])
    ranks = read_plan(Path(arguments[-3])).ranks
    host = ranks[int(os.environ["RANK"])].host
    Path(setting["pids"], f"{host}-{os.getpid()}").touch()
    os.environ["MASTER_ADDR"] = emulation.address(ranks[0].host)
    enter(emulation, host)
    worker.main(arguments)
