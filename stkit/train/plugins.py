"""Rewards by name: those of the kit, a function that was handed over, or one in a user's file or package.

    found = find_rewards({"correct": 1.0, "my_rewards.py:brief": 0.1}, REWARDS)
    function, weight = found["my_rewards.py:brief"]
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from ..runtime import BadUse, StkitError


def find_rewards(
    weights: Mapping[str, float], known: Mapping[str, Callable], functions: Mapping[str, Callable] | None = None
) -> dict[str, tuple[Callable, float]]:
    """The functions that have a weight, each with it.

    Args:
        weights: by name; "file.py:function" and "package.module:function" are looked up.
        known: the kit's own.
        functions: handed over by name; without a weight they weigh 1.

    Raises:
        BadUse: an unknown name (with the nearest one), a name that stands for two, no weight at all.
        StkitError: a file or module that cannot be loaded.
    """
    functions = functions or {}
    if double := sorted(functions.keys() & known.keys()):
        raise BadUse(f"reward {double[0]!r} is one of the kit's own: give your function another name")
    weights = {name: 1.0 for name in functions} | dict(weights)
    table = {**known, **functions}
    found = {}
    for name, weight in weights.items():
        function = table[name] if name in table else _named(name, table)
        if not callable(function):
            raise BadUse(f"reward {name!r} is {function!r:.60}: give a function that takes the rollouts of a clip")
        if weight:
            found[name] = (function, weight)
    if not found:
        raise BadUse(f"rewards={weights}: every weight is 0, nothing would be learned: give one a weight")
    return found


def _named(name: str, table: Mapping[str, Callable]) -> Callable:
    """The function that "file.py:function" or "package.module:function" names."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        near = difflib.get_close_matches(name, table, 1, 0.0)[0]
        raise BadUse(f"reward {name!r} is unknown: did you mean {near!r}? (your own: my_rewards.py:function)")
    module = _file(place) if place.endswith(".py") else _module(place)
    if not hasattr(module, attribute):
        raise BadUse(f"reward {name!r}: {place} has no {attribute!r}: name a function that it defines")
    return getattr(module, attribute)


def _file(place: str):
    path = Path(place).expanduser()
    if not path.is_file():
        raise StkitError(f"{place}: no such file: name your rewards as path/to/file.py:function")
    return _loaded(str(path.resolve()), path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _loaded(path: str, changed_ns: int):
    """A file's module, read again only when the file has changed."""
    name = f"stkit_rewards_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise StkitError(f"{path}: it cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _module(place: str):
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise StkitError(f"{place}: it cannot be imported: {type(error).__name__}: {error}") from error
