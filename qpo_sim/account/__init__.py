"""Accounts whose positions change along a path. A kind is one file here with a builder of its name.

A description (a mapping, as in a book's YAML) picks the kind and gives the builder's arguments by name.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from qpo_sim.errors import InputError, call, did_you_mean


def kinds() -> tuple[str, ...]:
    """Kinds of accounts: the modules of this folder that have a builder of their own name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(name for name in names if callable(getattr(_module(name), name, None)))


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def build(description: Mapping[str, Any], place: str, **known: Any) -> Any:
    """Account of a description.

    Args:
      description: `kind`, `name` and the arguments of the kind's builder.
      place: where it stands, for messages.
      known: what the book knows: assets, capital, prices, venue_of (name -> rule), dtype.

    Raises:
      InputError: unknown kind or option, a missing one, or what the builder refuses.
    """
    options = dict(description)
    kind = options.pop("kind", None)
    if kind not in kinds():
        raise InputError(f"{place}.kind is {kind!r}: {did_you_mean(str(kind), kinds())}")
    builder = getattr(_module(kind), kind)
    return call(builder, options, place, known)
