"""An independent, slow and plain filter; and records drawn from known parameters."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats


@pytest.fixture(scope="session")
def naive_posterior():
    """`naive_posterior(values, fit)`: log-likelihood, filter and smoother by plain recursions on scipy's densities."""

    def run(values, fit):
        n_steps, n_regimes = len(values), len(fit.dof)
        log_density = np.zeros((n_steps, n_regimes))
        for k in range(n_regimes):
            for t, row in enumerate(values):
                seen = ~np.isnan(row)
                if seen.any():
                    law = stats.multivariate_t(fit.mean[k][seen], fit.scale[k][np.ix_(seen, seen)], df=fit.dof[k])
                    log_density[t, k] = law.logpdf(row[seen])
        shift = log_density.max(axis=1)
        density = np.exp(log_density - shift[:, None])
        filtered, backward = np.zeros((n_steps, n_regimes)), np.ones((n_steps, n_regimes))
        total = shift.sum()
        for t in range(n_steps):
            prior = fit.start if t == 0 else filtered[t - 1] @ fit.transition
            total += np.log((prior * density[t]).sum())
            filtered[t] = prior * density[t] / (prior * density[t]).sum()
        for t in range(n_steps - 2, -1, -1):
            backward[t] = fit.transition @ (density[t + 1] * backward[t + 1])
            backward[t] /= backward[t].sum()
        smoothed = filtered * backward
        return total, filtered, smoothed / smoothed.sum(axis=1, keepdims=True)

    return run


@pytest.fixture(scope="session")
def two_regimes():
    """A market of two assets in two clearly different regimes, per-step units of a few per cent."""
    return SimpleNamespace(
        assets=("asset_0", "asset_1"),
        step_hours=24.0,
        start=np.array([0.7, 0.3]),
        transition=np.array([[0.97, 0.03], [0.08, 0.92]]),
        mean=np.array([[0.001, 0.002], [-0.003, -0.005]]),
        scale=np.array([[[1e-4, 0.8e-4], [0.8e-4, 2e-4]], [[9e-4, 4e-4], [4e-4, 25e-4]]]),
        dof=np.array([4.0, 8.0]),
    )


@pytest.fixture(scope="session")
def simulate():
    """`simulate(market, n_steps, seed)` -> (returns, regimes)."""

    def run(market, n_steps, seed):
        rng = np.random.default_rng(seed)
        regimes = np.empty(n_steps, dtype=int)
        for t in range(n_steps):
            law = market.start if t == 0 else market.transition[regimes[t - 1]]
            regimes[t] = rng.choice(len(law), p=law)
        roots = np.linalg.cholesky(market.scale)
        z = rng.standard_normal((n_steps, market.mean.shape[1]))
        mixing = np.sqrt(market.dof[regimes] / rng.chisquare(market.dof[regimes]))
        shock = np.einsum("tab,tb->ta", roots[regimes], z) * mixing[:, None]
        return market.mean[regimes] + shock, regimes

    return run


@pytest.fixture(scope="session")
def record(two_regimes, simulate):
    """400 rows with holes: the second asset starts late, some single values and one whole row are missing."""
    values, _ = simulate(two_regimes, 400, seed=11)
    values[:60, 1] = np.nan
    values[100:140:5, 0] = np.nan
    values[200] = np.nan
    return values
