"""The one exception that bad user input raises, and the hints and checks that several borders share."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """User input that breaks a rule; the message is one sentence for a person.

    It names the field, the value, the rule, the place (row and column for files) and how to mend it.
    The command line prints it without a traceback and exits with code 2.
    """


def check_level(level: float) -> float:
    """The confidence level itself.

    Raises:
      InputError: not inside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"confidence level is {level}; it must lie strictly between 0 and 1, e.g. 0.99.")
    return level


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Words that help with a misspelt name: the nearest option, or all of them where none is near and they are few."""
    names = list(dict.fromkeys(options))
    near = nearest(word, names)
    if near is not None:
        return f"did you mean {near!r}?"
    if not names:
        return "there is none to choose from"
    shown = ", ".join(names[:20])
    return f"choose from {shown}" + (", ..." if len(names) > 20 else "")


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that a misspelt word is most like, capitals aside; None where none is near."""
    by_folded = {name.casefold(): name for name in reversed(list(options))}
    near = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def call(builder: Callable[..., Any], options: Mapping[str, Any], place: str, known: Mapping[str, Any]) -> Any:
    """`builder` with options from a description and those of `known` that it takes; messages name the place.

    Raises:
      InputError: an unknown option, a missing one, or what the builder refuses.
    """
    parameters = inspect.signature(builder).parameters
    offered = [name for name in parameters if name not in known]
    for name in options:
        if name not in offered:
            raise InputError(f"{place} has no option {name!r}: {did_you_mean(str(name), offered)}")
    for name in offered:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise InputError(f"{place}.{name} is missing.")
    taken = {name: value for name, value in known.items() if name in parameters}
    try:
        return builder(**options, **taken)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except TypeError as error:
        raise InputError(f"{place}: {error}.") from None


def finite(value: Any, place: str) -> float:
    """A finite number.

    Raises:
      InputError: anything else.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{place} is {value!r}; it must be a number.") from None
    if not math.isfinite(number):
        raise InputError(f"{place} is {value}; it must be finite.")
    return number
