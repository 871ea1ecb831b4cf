"""Monte Carlo risk of digital-asset portfolios, differentiable from weights to tail risk.

`import qpo_sim as qpo` gives the pieces of the main path: `qpo.load_prices`, `qpo.log_returns`, `qpo.calibrate`,
`qpo.regime_student_t` (or `qpo.gbm`), `qpo.build_book`, `qpo.run`, `qpo.measures`, `qpo.optimize_weights`. All of them
are plain functions on pytrees; `qpo.simulate_paths` is the differentiable core. `qpo.use_cores()`, called first, lets
runs use every core.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that holds it. Resolved on first use, so that importing the package, the command line's
# completion and its bad-option errors do not wait for JAX and pandas.
_HOMES = {
    "Book": "qpo_sim.book",
    "Estimate": "qpo_sim.types",
    "InputError": "qpo_sim.errors",
    "Market": "qpo_sim.market",
    "Plan": "qpo_sim.simulate",
    "attribution": "qpo_sim.risk.summary",
    "build_book": "qpo_sim.book",
    "calibrate": "qpo_sim.calibration",
    "compose_market": "qpo_sim.market.compose",
    "gbm": "qpo_sim.market",
    "liquidation_prices": "qpo_sim.book.liquidation_prices",
    "load_prices": "qpo_sim.data",
    "load_venue": "qpo_sim.venue",
    "loan_crowd": "qpo_sim.account.lending_crowd",
    "log_returns": "qpo_sim.data",
    "market_paths": "qpo_sim.simulate",
    "market_statistics": "qpo_sim.market.statistics",
    "measures": "qpo_sim.risk.summary",
    "optimize_weights": "qpo_sim.optimize",
    "regime_student_t": "qpo_sim.market",
    "run": "qpo_sim.compute",
    "simulate_crowd": "qpo_sim.compute.loan_crowd",
    "simulate_paths": "qpo_sim.simulate",
    "use_cores": "qpo_sim.config.host",
    "value_and_gradient": "qpo_sim.sensitivity",
}

__all__ = [
    "Book",
    "Estimate",
    "InputError",
    "Market",
    "Plan",
    "attribution",
    "build_book",
    "calibrate",
    "compose_market",
    "gbm",
    "liquidation_prices",
    "load_prices",
    "load_venue",
    "loan_crowd",
    "log_returns",
    "market_paths",
    "market_statistics",
    "measures",
    "optimize_weights",
    "regime_student_t",
    "run",
    "simulate_crowd",
    "simulate_paths",
    "use_cores",
    "value_and_gradient",
    "__version__",
]

if TYPE_CHECKING:
    from qpo_sim.account.lending_crowd import loan_crowd
    from qpo_sim.book import Book, build_book
    from qpo_sim.book.liquidation_prices import liquidation_prices
    from qpo_sim.calibration import calibrate
    from qpo_sim.compute import run
    from qpo_sim.compute.loan_crowd import simulate_crowd
    from qpo_sim.config.host import use_cores
    from qpo_sim.data import load_prices, log_returns
    from qpo_sim.errors import InputError
    from qpo_sim.market import Market, gbm, regime_student_t
    from qpo_sim.market.compose import compose_market
    from qpo_sim.market.statistics import market_statistics
    from qpo_sim.optimize import optimize_weights
    from qpo_sim.risk.summary import attribution, measures
    from qpo_sim.sensitivity import value_and_gradient
    from qpo_sim.simulate import Plan, market_paths, simulate_paths
    from qpo_sim.types import Estimate
    from qpo_sim.venue import load as load_venue


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = "load" if name == "load_venue" else name
    return getattr(importlib.import_module(_HOMES[name]), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
