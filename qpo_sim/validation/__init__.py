"""Backtests of risk forecasts, scores to compare them by, and the facts that simulated returns should share.

All functions take NumPy arrays and return named tuples; losses are positive.
"""

from qpo_sim.validation.calibration_tests import (
    anderson_darling,
    berkowitz,
    berkowitz_tail,
    cramer_von_mises,
    kolmogorov_smirnov,
    pit,
)
from qpo_sim.validation.comparison import diebold_mariano, model_confidence_set, superior_predictive_ability
from qpo_sim.validation.exceedance import (
    christoffersen,
    dynamic_quantile,
    exact_binomial,
    exceedances,
    kupiec,
    mixed_kupiec,
    monte_carlo_p_value,
    time_until_first,
    traffic_light,
    value_at_risk_interval,
    weibull_duration,
)
from qpo_sim.validation.reliability import brier, calibration_slope, log_loss, reliability_curve, spiegelhalter
from qpo_sim.validation.scores import crps, energy_score, joint_score, log_score, quantile_score, variogram_score
from qpo_sim.validation.shortfall import acerbi_szekely, cumulative_violations, mcneil_frey
from qpo_sim.validation.stylised_facts import (
    autocorrelation,
    co_exceedance,
    compare,
    drawdown_quantiles,
    drawdowns,
    gain_loss_asymmetry,
    hill,
    leverage_effect,
    scaled_quantile_ratio,
    tails,
    volatility_quantiles,
)

__all__ = [
    "acerbi_szekely",
    "anderson_darling",
    "autocorrelation",
    "berkowitz",
    "berkowitz_tail",
    "brier",
    "calibration_slope",
    "christoffersen",
    "co_exceedance",
    "compare",
    "cramer_von_mises",
    "crps",
    "cumulative_violations",
    "diebold_mariano",
    "drawdown_quantiles",
    "drawdowns",
    "dynamic_quantile",
    "energy_score",
    "exact_binomial",
    "exceedances",
    "gain_loss_asymmetry",
    "hill",
    "joint_score",
    "kolmogorov_smirnov",
    "kupiec",
    "leverage_effect",
    "log_loss",
    "log_score",
    "mcneil_frey",
    "mixed_kupiec",
    "model_confidence_set",
    "monte_carlo_p_value",
    "pit",
    "quantile_score",
    "reliability_curve",
    "scaled_quantile_ratio",
    "spiegelhalter",
    "superior_predictive_ability",
    "tails",
    "time_until_first",
    "traffic_light",
    "value_at_risk_interval",
    "variogram_score",
    "volatility_quantiles",
    "weibull_duration",
]
