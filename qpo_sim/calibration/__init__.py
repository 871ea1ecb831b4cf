"""Log-returns in, a Markov market of Student-t regimes out.

`calibrate(returns)` fits it, `cached_calibrate` remembers the fit on disk, `filter_regimes(returns, fit)` says in
which regime a record is at the parameters of a fit.
"""

from qpo_sim.calibration.cache import cached_calibrate
from qpo_sim.calibration.fit import RegimeFit, RegimePosterior
from qpo_sim.calibration.fitting import calibrate, filter_regimes

__all__ = ["RegimeFit", "RegimePosterior", "cached_calibrate", "calibrate", "filter_regimes"]
