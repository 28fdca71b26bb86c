"""Renamed hosts: what the plan calls them, and what they are called now."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from epplan.errors import InputError
from epplan.files import parse_yaml, read_text


def read_host_map(path: Path | None, hosts: Iterable[str]) -> dict[str, str]:
    """Return the real name of every host of a plan.

    Args:
        path: YAML or JSON, `planned: real` per line; hosts that are not in it keep their names.
            None: no host was renamed.
        hosts: of the plan.

    Raises:
        InputError: no mapping of names, hosts the plan does not have, or two hosts on one.
    """
    names = {host: host for host in hosts}
    if path is None:
        return names
    what = f"host map {path}"
    document = parse_yaml(read_text(path, "host map"), what)
    if not isinstance(document, dict):
        raise InputError(f"{what} is not a mapping", hints=["write lines `planned: real`"])
    problems = list(_problems(document, names))
    names |= {key: value for key, value in document.items() if not problems}
    counts = Counter(names.values())
    problems += [
        f"{count} hosts of the plan are on {real}" for real, count in counts.items() if count > 1
    ]
    if problems:
        raise InputError(f"{what} is not valid", problems=problems)
    return names


def same_host(one: str, other: str) -> bool:
    """Tell whether two names are of one host; one may have its domain and the other not."""
    if "." in one and "." in other:
        return one.lower() == other.lower()
    return one.partition(".")[0].lower() == other.partition(".")[0].lower()


def _problems(document: Mapping[object, object], names: Mapping[str, str]) -> Iterable[str]:
    for planned, real in document.items():
        if not isinstance(planned, str) or not isinstance(real, str) or not real:
            yield f"{planned}: {real}: put names in quotes that YAML takes for something else"
        elif planned not in names:
            yield f"{planned} is no host of the plan, which has {', '.join(names)}"
