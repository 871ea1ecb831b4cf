"""Gradients of risk measures through the simulator."""

from qpo_sim.sensitivity.pathwise import value_and_gradient

__all__ = ["value_and_gradient"]
