"""`epplan launch` with the rank program and the grace period of a test."""

import os
from functools import partial

from epplan import cli
from epplan.launcher import request
from epplan.launcher.targets import local

if __name__ == "__main__":
    module, grace_s = os.environ["TEST_MODULE"], float(os.environ["TEST_GRACE_S"])
    request.request_from_plan = partial(request.request_from_plan, module=module)
    local.run_local = partial(local.run_local, grace_s=grace_s)
    cli.main()
