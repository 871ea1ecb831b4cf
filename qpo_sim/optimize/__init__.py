"""Weights by gradient descent through the simulator: objectives, constraints, solver and the check on fresh paths."""

from qpo_sim.optimize.linear import rebalanced_wealth, terminal_prices
from qpo_sim.optimize.portfolio import Optimum, compare, optimize_weights
from qpo_sim.optimize.solve import Solution, minimize

__all__ = [
    "Optimum",
    "Solution",
    "compare",
    "minimize",
    "optimize_weights",
    "rebalanced_wealth",
    "terminal_prices",
]
