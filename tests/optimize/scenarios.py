"""The fixed scenario matrix of the reference cases: 1000 weeks of five assets, rebuilt from its recipe."""

import numpy as np

VOLATILITY = np.array([0.035, 0.045, 0.06, 0.02, 0.002])
MEAN = np.array([0.0015, 0.0018, 0.0022, 0.0006, 0.0001])
CORRELATION = np.array(
    [
        [1.0, 0.75, 0.6, 0.3, 0.0],
        [0.75, 1.0, 0.65, 0.3, 0.0],
        [0.6, 0.65, 1.0, 0.25, 0.0],
        [0.3, 0.3, 0.25, 1.0, 0.1],
        [0.0, 0.0, 0.0, 0.1, 1.0],
    ]
)


def scenarios(case: dict) -> np.ndarray:
    """Returns (1000, 5); checked against the digits that the case states."""
    g = np.random.default_rng(20240601)
    z = g.standard_normal((1000, 5)) @ np.linalg.cholesky(CORRELATION).T
    w = g.chisquare(4.0, (1000, 1)) / 4.0
    returns = MEAN + VOLATILITY * np.sqrt(0.5) * z / np.sqrt(w)
    stated = case["inputs"]["scenarios"]
    np.testing.assert_allclose(returns[0], stated["row0"], rtol=1e-12)
    np.testing.assert_allclose(returns.mean(axis=0), stated["column_means"], rtol=1e-10)
    np.testing.assert_allclose(returns.std(axis=0), stated["column_sds"], rtol=1e-10)
    return returns
