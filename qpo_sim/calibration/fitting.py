"""Fit a regime market to returns, and filter returns at the parameters of a fit."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from qpo_sim.calibration.fit import RegimeFit, RegimePosterior, durations, stationary_law, variance_factor
from qpo_sim.calibration.inputs import ReturnTable, check_enough, pack, read_returns
from qpo_sim.calibration.regime_student_t import Fits, Params, Settings, evaluate, fit_restarts
from qpo_sim.calibration.starts import starting_params
from qpo_sim.errors import InputError

MAX_REGIMES = 8
MAX_DOF = 1e4
_FIRST_DOF = 5.0


def calibrate(
    returns: Any,
    *,
    n_regimes: int = 3,
    n_restarts: int = 8,
    seed: int = 0,
    sticky: float = 0.0,
    dof: float | None = None,
    dof_floor: float = 2.1,
    dof_cap: float = 200.0,
    scale_floor: float = 1e-3,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    step_hours: float | None = None,
) -> RegimeFit:
    r"""Fit a Markov market of Student-t regimes to log-returns by expectation maximisation (see `regime_student_t`).

    The restarts begin at different splits of the rows by rolling volatility; the one with the highest log-likelihood is
    kept. A restart in which a regime ends with fewer rows than assets + 1 has fitted its scale floor, not the data: it
    is kept only if all did. Whether the fit converged is a flag of the result, not an error. The fit is done in double
    precision whatever JAX's setting, and is a function of its arguments only.

    Args:
      returns: pandas table or array of log-returns per step (one row per step, oldest first; one column per asset).
        NaN entries are integrated out.
      n_regimes: 1 to 8; 1 is the plain multivariate t maximum-likelihood fit.
      n_restarts: starting points (one is enough, and is used, for one regime).
      seed: of the starting points.
      sticky: prior count of steps that stay in their regime, added for each regime.
      dof: keeps all degrees of freedom at this value; infinity makes the regimes Gaussian. None fits them.
      dof_floor: smallest dof, above 2 so that variances exist.
      dof_cap: largest dof; the likelihood is flat beyond 30.
      scale_floor: rows' worth of pooled variance added to each regime's scale matrix, against collapse.
      tolerance: a restart has converged when an iteration raises the log-likelihood by less than this.
      max_iterations: of each restart.
      step_hours: hours per row; None reads it off the table's dates, and takes 24 where there are none.

    Raises:
      InputError: an option out of range, an infinite or constant return, or too few rows (see `inputs.check_enough`).
    """
    table = read_returns(returns, step_hours)
    _check_options(
        n_regimes=n_regimes,
        n_restarts=n_restarts,
        seed=seed,
        sticky=sticky,
        dof=dof,
        dof_floor=dof_floor,
        dof_cap=dof_cap,
        scale_floor=scale_floor,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    check_enough(table, n_regimes)
    settings = Settings(sticky, scale_floor, dof_floor, dof_cap, tolerance, max_iterations)
    centre, deviation = np.nanmean(table.values, axis=0), np.nanstd(table.values, axis=0)
    standard = (table.values - centre) / deviation
    fits = _fit(standard, n_regimes, n_restarts if n_regimes > 1 else 1, seed, dof, settings)

    best = _best_restart(fits, n_assets=len(table.assets))
    params, regimes = jax.tree.map(lambda leaf: leaf[best], (fits.params, fits.regimes))
    params = params._replace(mean=centre + params.mean * deviation, scale=params.scale * np.outer(deviation, deviation))
    # Back in the units of the returns: every value observed carries the Jacobian of the standardisation.
    jacobian = np.sum(~np.isnan(table.values) * np.log(deviation))
    order = _calm_first(params)
    return _result(
        table,
        Params(
            params.start[order],
            params.transition[np.ix_(order, order)],
            params.mean[order],
            params.scale[order],
            params.dof[order],
        ),
        RegimePosterior(
            float(regimes.log_likelihood - jacobian), regimes.filtered[:, order], regimes.smoothed[:, order]
        ),
        is_dof_fixed=dof is not None,
        n_iterations=int(fits.n_iterations[best]),
        converged=bool(fits.has_converged[best]),
        restarts=fits.regimes.log_likelihood - jacobian,
    )


def filter_regimes(returns: Any, fit: Any) -> RegimePosterior:
    """Log-likelihood, filter and smoother of returns at the parameters of a fit.

    Args:
      returns: as in `calibrate`; any number of rows, NaN allowed, whole rows too.
      fit: a `RegimeFit`, or anything with its `assets`, `start`, `transition`, `mean`, `scale` and `dof`.

    Raises:
      InputError: an infinite return, or columns other than the fit's.
    """
    table = read_returns(returns, getattr(fit, "step_hours", None))
    if len(table.assets) != len(fit.assets) or (hasattr(returns, "columns") and table.assets != tuple(fit.assets)):
        raise InputError(
            f"returns has the columns {', '.join(table.assets)} and the fit {', '.join(fit.assets)}; "
            "give the assets of the fit in its order."
        )
    leaves = (fit.start, fit.transition, fit.mean, fit.scale, fit.dof)
    params = Params(*(np.asarray(leaf, dtype=np.float64) for leaf in leaves))
    with jax.enable_x64(True):
        found = jax.device_get(evaluate(pack(table.values), params))
    return RegimePosterior(float(found.log_likelihood), found.filtered, found.smoothed)


def _fit(
    values: Float[np.ndarray, "steps assets"],
    n_regimes: int,
    n_restarts: int,
    seed: int,
    dof: float | None,
    settings: Settings,
) -> Fits:
    first_dof = float(np.clip(_FIRST_DOF, settings.dof_floor, settings.dof_cap)) if dof is None else float(dof)
    starts = starting_params(values, n_regimes=n_regimes, n_restarts=n_restarts, seed=seed, dof=first_dof)
    typed = jax.tree.map(np.float64, settings)._replace(max_iterations=np.int32(settings.max_iterations))
    with jax.enable_x64(True):
        return jax.device_get(fit_restarts(pack(values), starts, typed, is_dof_fixed=dof is not None))


def _best_restart(fits: Fits, *, n_assets: int) -> int:
    is_sound = np.min(fits.rows, axis=1) >= n_assets + 1
    score = np.where(np.isnan(fits.regimes.log_likelihood), -np.inf, fits.regimes.log_likelihood)
    return int(np.argmax(np.where(is_sound | ~is_sound.any(), score, -np.inf)))


def _calm_first(params: Params) -> Int[np.ndarray, " regimes"]:
    variance = np.diagonal(params.scale, axis1=1, axis2=2) * variance_factor(params.dof)[:, None]
    return np.argsort(np.sqrt(variance).mean(axis=1), kind="stable")


def _result(
    table: ReturnTable,
    params: Params,
    found: RegimePosterior,
    *,
    is_dof_fixed: bool,
    n_iterations: int,
    converged: bool,
    restarts: Float[np.ndarray, " restarts"],
) -> RegimeFit:
    n_regimes, n_assets = params.mean.shape
    per_regime = n_assets + n_assets * (n_assets + 1) // 2 + (0 if is_dof_fixed else 1)
    n_parameters = n_regimes * (n_regimes - 1) + n_regimes - 1 + n_regimes * per_regime
    n_observations = int((~np.isnan(table.values)).any(axis=1).sum())
    return RegimeFit(
        assets=table.assets,
        step_hours=table.step_hours,
        transition=params.transition,
        initial=found.filtered[-1],
        start=params.start,
        mean=params.mean,
        scale=params.scale,
        dof=params.dof,
        stationary=stationary_law(params.transition),
        durations=durations(params.transition),
        log_likelihood=found.log_likelihood,
        aic=2.0 * n_parameters - 2.0 * found.log_likelihood,
        bic=float(np.log(n_observations)) * n_parameters - 2.0 * found.log_likelihood,
        n_parameters=n_parameters,
        n_observations=n_observations,
        n_iterations=n_iterations,
        converged=converged,
        filtered=found.filtered,
        smoothed=found.smoothed,
        restart_log_likelihoods=restarts,
    )


def _check_options(**options: Any) -> None:
    """Ranges of the options of `calibrate`.

    Raises:
      InputError: names the option, its value and its range.
    """
    floor = options["dof_floor"]
    rules = {
        "n_regimes": ("a whole number from 1 to 8", lambda x: _is_whole(x) and 1 <= x <= MAX_REGIMES),
        "n_restarts": ("a whole number, 1 or more", lambda x: _is_whole(x) and x >= 1),
        "seed": ("a whole number, 0 or more", lambda x: _is_whole(x) and x >= 0),
        "sticky": ("a number of steps, 0 or more", lambda x: 0.0 <= x < np.inf),
        "dof": ("above 2, where the variance exists, or None to fit it", lambda x: x is None or x > 2.0),
        "dof_floor": ("above 2, where the variance exists", lambda x: 2.0 < x < MAX_DOF),
        "dof_cap": (f"above dof_floor={floor} and at most {MAX_DOF:g}", lambda x: floor < x <= MAX_DOF),
        "scale_floor": ("above 0 and at most 10 rows", lambda x: 0.0 < x <= 10.0),
        "tolerance": ("above 0", lambda x: 0.0 < x < np.inf),
        "max_iterations": ("a whole number, 1 or more", lambda x: _is_whole(x) and 1 <= x < 2**31),
    }
    for name, (rule, holds) in rules.items():
        value = options[name]
        if not (value is None and name == "dof") and not _is_real(value) or not holds(value):
            raise InputError(f"calibration.{name}={value!r} must be {rule}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
