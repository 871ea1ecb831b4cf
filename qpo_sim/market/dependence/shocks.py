"""What a dependence model gives in one step."""

from typing import Any, NamedTuple

from qpo_sim.numerics import Rows


class Shocks(NamedTuple):
    """Standardised shocks of all assets, and the scale of their Gaussian part.

    Where the model is conditionally Gaussian, eps_i has the standard deviation `mixing_i` given `mixing`: one row for
    all assets, rows by asset, or None for 1.
    """

    eps: Rows
    mixing: Any = None
