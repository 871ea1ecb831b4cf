"""What a jump model gives in one step."""

from typing import NamedTuple

from qpo_sim.numerics import Rows


class Jump(NamedTuple):
    """Sum of the log-jumps of the step, and minus log E[exp(size)] given what is known before it (None for 0)."""

    size: Rows
    compensator: Rows | None = None
