"""When policies act: dates that are a fixed time apart, the first one such a time after the start."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.numerics import stamps
from qpo_sim.types import Array, Context


def is_due(context: Context, t: Array, every_hours: float) -> Any:
    """1 where a date falls into (start, end] of step t, else 0; 1 always for `every_hours` of 0."""
    if every_hours <= 0.0:
        return 1.0
    return jnp.minimum(stamps(context, every_hours, t), 1.0)


def check(policy: str, every_hours: float) -> None:
    """Refuses a time between dates that is not one.

    Raises:
      InputError: negative or not finite.
    """
    if not (np.isfinite(every_hours) and every_hours >= 0.0):
        raise InputError(f"{policy}: every_hours is {every_hours}; it must be 0 (every step) or positive.")


def account_number(policy: str, name: str, accounts: Sequence[str]) -> int:
    """Number of the account a policy names.

    Raises:
      InputError: there is none of that name.
    """
    if name not in accounts:
        raise InputError(f"{policy}: there is no account {name!r}: {did_you_mean(str(name), accounts)}")
    return list(accounts).index(name)
