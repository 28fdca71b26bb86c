"""The options that `solve` and `replan` share: what is minimised, and how long it may take."""

import click

from epplan.launcher.shared_options import Decorated, add_options

_OPTIONS = (
    click.option(
        "--overlap",
        is_flag=True,
        help="Minimise max(transfers, experts) of a layer, not their sum: micro-batches overlap.",
    ),
    click.option(
        "--worst-windows",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        metavar="SHARE",
        help="Minimise the mean over this share of the traffic's windows, the worst ones (CVaR).",
    ),
    click.option(
        "--gpu", "gpu_model", metavar="MODEL", help="GPU model where SOURCE does not tell it."
    ),
    click.option(
        "--gap",
        type=click.FloatRange(0, 1),
        default=0.01,
        show_default=True,
        help="Stop when this relative gap is proven.",
    ),
    click.option(
        "--time-limit",
        type=click.FloatRange(0, min_open=True),
        default=120.0,
        show_default=True,
        help="Seconds for the solver.",
    ),
)


def solver_options(command: Decorated) -> Decorated:
    """Add the options to a click command, in their order."""
    return add_options(_OPTIONS, command)
