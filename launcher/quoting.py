"""Names that become text of a scheduler's file, which cannot quote them.

Shells quote anything (`epplan/quoting.py`). Rank files, host files and node lists have no quoting
at all, so that a host name which needs it is refused before anything is written.
"""

import re
from collections.abc import Iterable

from epplan.errors import InputError

# A DNS name; underscores are not legal there and are found in clusters all the same.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
# What Kubernetes takes as a part of host names: DNS-1123, beginning with a letter.
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_hosts(hosts: Iterable[str], where: str) -> None:
    """Refuse host names that a rank file, a host file or ssh would read as something else.

    Raises:
        InputError: names all of them.
    """
    bad = [name for name in hosts if not _HOST.fullmatch(name)]
    if bad:
        raise InputError(
            f"{where} names hosts that no launcher can address",
            problems=[
                f"{name!r}: host names have letters, digits, '.', '-' and '_'" for name in bad
            ],
            hints=["give their real names with --host-map FILE, lines `planned: real`"],
        )


def check_label(name: str, max_length: int) -> None:
    """Refuse a job name that Kubernetes could not make host names of.

    Raises:
        InputError: with the rule.
    """
    if not _LABEL.fullmatch(name) or len(name) > max_length:
        raise InputError(
            f"job name {name!r} is not valid: it has at most {max_length} lower-case letters, "
            "digits and '-', and begins with a letter",
            hints=["give another with --name"],
        )


def label(text: str, max_length: int) -> str:
    """Return `text` as a job name, with what Kubernetes does not take replaced."""
    cleaned = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not cleaned or not cleaned[0].isalpha():
        cleaned = f"epplan-{cleaned}"
    return cleaned[:max_length].strip("-")


def parse_variable(text: str) -> tuple[str, str]:
    """Return name and value of `NAME=VALUE`.

    Raises:
        InputError: it is not of this form.
    """
    name, equals, value = text.partition("=")
    if not equals or not _VARIABLE.fullmatch(name) or "\0" in value:
        raise InputError(f"--env {text!r} is not NAME=VALUE")
    return name, value
