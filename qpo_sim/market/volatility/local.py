"""What a volatility model says of one step, before the shock is known."""

from typing import NamedTuple

from qpo_sim.numerics import Rows


class Local(NamedTuple):
    """Scale of the step's shocks, and what the model adds to the log-return itself.

    The log-return of asset i is drift_i + shift_i + factor_i v_i eps_i + jump_i, with eps_i the standardised shock and
    v_i the market's own volatility of the regime.
    """

    factor: Rows
    shift: Rows | None = None
    jump: Rows | None = None
