"""Policies: what a book trades after each step.

A policy is made by a builder in a file here, one that its `BUILDERS` names.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from qpo_sim.errors import InputError, call, did_you_mean


def builders() -> dict[str, Callable[..., Any]]:
    """Builder of each kind of policy."""
    found = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        for kind in getattr(module, "BUILDERS", ()):
            found[kind] = getattr(module, kind)
    return found


def build(description: Mapping[str, Any], place: str, known: Mapping[str, Any]) -> Any:
    """Policy of a description.

    Args:
      description: `kind` and the options of its builder.
      place: where it stands, for messages.
      known: what the book knows and a description cannot give: names of accounts, loans, assets and so on.

    Raises:
      InputError: unknown kind or option, a missing one, or what the builder refuses.
    """
    options, offered = dict(description), builders()
    kind = options.pop("kind", None)
    if kind not in offered:
        raise InputError(f"{place}.kind is {kind!r}: {did_you_mean(str(kind), offered)}")
    return call(offered[kind], options, place, known)
