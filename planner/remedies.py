"""What would make an infeasible question feasible: options changed one by one, each change tried.

Only changes after which everything fits are named. Of each option the value nearest to the one
given is looked for (steps that double, then halving), then, if no option alone helps, two together.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

_LIMIT_S = 20.0  # for trying
_SHRINKS = 12  # halvings of a model's widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The options that decide whether there is room.

    Attributes:
        ep: GPUs of a group.
        groups: groups.
        experts_per_gpu: most copies of a layer on a GPU.
        replicas: of a layer.
        survive: whether the loss of a host must be survived.
        tokens: of a rank and step.
        layers: of the model, those without experts included.
        experts: of a layer.
        scale: of the model's widths.
    """

    ep: int
    groups: int
    experts_per_gpu: int
    replicas: int
    survive: bool
    tokens: int
    layers: int
    experts: int
    scale: float = 1.0


Fits = Callable[[Ask], bool]
_WORDS = {
    "ep": "use more GPUs: --ep {}",
    "experts_per_gpu": "allow more experts on a GPU: --experts-per-gpu {}",
    "replicas": "take another number of replicas: --replicas {}",
    "survive": "do without --survive",
    "groups": "plan fewer groups: --groups {}",
    "tokens": "plan for fewer tokens a rank, whose buffers and KV cache are smaller: --tokens {}",
    "layers": "keep fewer layers: --layers {}",
    "experts": "keep fewer experts: --experts {}",
    "scale": "take a narrower model: --scale {:g}",
}
_TOGETHER = ("ep", "experts_per_gpu", "replicas", "tokens")


def remedies(
    ask: Ask, most_gpus: int, fits: Fits, fixed: frozenset[str] = frozenset()
) -> list[str]:
    """Return changes that were found to help, in words.

    Args:
        ask: what does not fit.
        most_gpus: GPUs there are.
        fits: whether something does.
        fixed: names of options that cannot be changed here.
    """
    deadline = time.monotonic() + _LIMIT_S

    def tried(changed: Ask) -> bool:
        return time.monotonic() < deadline and fits(changed)

    names = [name for name in _WORDS if name not in fixed]
    found = []
    for name in names:
        value = _nearest(ask, name, most_gpus, tried)
        if value is not None:
            found.append((name, _WORDS[name].format(value)))
    if not {name for name, _ in found} & {"survive", "groups", *_TOGETHER}:
        both = [pair for pair in combinations(_TOGETHER, 2) if not fixed & set(pair)]
        pairs = (_two(ask, first, second, most_gpus, tried) for first, second in both)
        text = next((text for text in pairs if text), None)
        found[:0] = [("", text)] if text else []
    return [text for _, text in found]


def _nearest(ask: Ask, name: str, most_gpus: int, fits: Fits) -> object:
    """Return the value of one option that fits and is nearest to the one given; None without."""
    before = getattr(ask, name)
    for value in _values(ask, name, most_gpus):
        if fits(_changed(ask, name, value)):
            if isinstance(value, bool | float):
                return value
            return _between(ask, name, before, value, fits)
        before = value
    return None


def _changed(ask: Ask, name: str, value: float) -> Ask:
    return replace(ask, **{name: value})  # type: ignore[arg-type]


def _between(ask: Ask, name: str, bad: int, good: int, fits: Fits) -> int:
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(_changed(ask, name, middle)) else (good, middle)
    return good


def _two(ask: Ask, first: str, second: str, most_gpus: int, fits: Fits) -> str | None:
    for value in _values(ask, first, most_gpus):
        changed = _changed(ask, first, value)
        other = _nearest(changed, second, most_gpus, fits)
        if other is not None:
            return f"{_WORDS[first].format(value)}, and {_WORDS[second].format(other)}"
    return None


def _values(ask: Ask, name: str, most_gpus: int) -> Iterator[int | float | bool]:
    """Yield values ever farther from the one given."""
    now = getattr(ask, name)
    if name == "survive":
        yield from [False] * now
    elif name == "scale":
        yield from (now / 2**n for n in range(1, _SHRINKS + 1))
    elif name == "ep":
        yield from _steps(now, most_gpus // ask.groups)
    elif name == "experts_per_gpu":
        yield from _steps(now, ask.experts)
    elif name == "replicas":  # surviving needs more of them, memory fewer
        yield from _steps(now, 0)
        yield from _steps(now, ask.experts * (ask.ep - 1))
    else:
        yield from _steps(now, 1)


def _steps(now: int, last: int) -> Iterator[int]:
    """Yield values from next to `now` to `last`, in steps that double."""
    step = 1
    while step < abs(last - now):
        yield now + step if last > now else now - step
        step *= 2
    if last != now:
        yield last
