import jax
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from qpo_sim.calibration import calibrate, filter_regimes
from qpo_sim.calibration.fit import stationary_law
from qpo_sim.calibration.starts import starting_labels
from qpo_sim.errors import InputError

ASSETS = ["BTC", "ETH", "BNB", "ADA", "XRP", "DOGE", "AVAX", "LINK", "MATIC", "ALGO"]


@pytest.fixture(scope="module")
def fit(record):
    return calibrate(record, n_regimes=2, n_restarts=2)


@pytest.fixture(scope="module")
def real_returns(shared):
    prices = pd.read_csv(shared / "data" / "embed_candidate_daily_2020_2023.csv", index_col="date", parse_dates=True)
    return np.log(prices[ASSETS]).diff().iloc[1:]


def test_known_parameters_are_recovered_from_a_long_record_with_holes(two_regimes, simulate):
    values, regimes = simulate(two_regimes, 6000, seed=4)
    values[:1000, 1] = np.nan
    fit = calibrate(values, n_regimes=2, n_restarts=3)
    assert fit.converged
    assert_allclose(fit.restart_log_likelihoods, fit.log_likelihood, atol=0.05)
    # Standard errors at 6000 rows are near 3 % for scales and 10 % for dof; the bands are four of them.
    assert_allclose(np.diagonal(fit.transition), np.diagonal(two_regimes.transition), atol=0.02)
    assert_allclose(fit.scale, two_regimes.scale, rtol=0.15)
    assert_allclose(fit.dof, two_regimes.dof, rtol=0.4)
    assert_allclose(fit.mean[0], two_regimes.mean[0], atol=1e-3)
    assert_allclose(fit.stationary, [8.0 / 11.0, 3.0 / 11.0], atol=0.06)
    assert ((fit.smoothed[:, 1] > 0.5) == (regimes == 1)).mean() > 0.93
    assert fit.log_likelihood > filter_regimes(values, two_regimes).log_likelihood


def test_the_log_likelihood_is_the_one_at_the_returned_parameters(record, fit, naive_posterior):
    total, filtered, smoothed = naive_posterior(record, fit)
    assert_allclose(fit.log_likelihood, total, rtol=1e-11)
    assert_allclose(fit.filtered, filtered, atol=1e-10)
    assert_allclose(fit.smoothed, smoothed, atol=1e-10)
    again = filter_regimes(record, fit)
    assert_allclose(fit.log_likelihood, again.log_likelihood, rtol=1e-12)
    assert_allclose(fit.smoothed, again.smoothed, atol=1e-11)


def test_the_parts_of_a_fit_agree(record, fit):
    assert fit.assets == ("asset_0", "asset_1")
    assert fit.n_observations == len(record) - 1
    assert fit.n_parameters == 2 * 1 + 1 + 2 * (2 + 3 + 1)
    assert_allclose(fit.aic, 2 * fit.n_parameters - 2 * fit.log_likelihood)
    assert_allclose(fit.bic, np.log(fit.n_observations) * fit.n_parameters - 2 * fit.log_likelihood)
    assert_allclose(fit.log_likelihood, fit.restart_log_likelihoods.max(), rtol=1e-14)
    assert_allclose(fit.transition.sum(axis=1), 1.0, atol=1e-14)
    assert_allclose(fit.stationary @ fit.transition, fit.stationary, atol=1e-13)
    assert_allclose(fit.durations, 1.0 / (1.0 - np.diagonal(fit.transition)))
    assert_allclose(fit.initial, fit.smoothed[-1], atol=1e-13)
    assert_allclose(fit.filtered[-1], fit.initial)
    volatility = fit.volatility_per_year()
    assert_allclose(volatility**2 / 365.0, np.diagonal(fit.covariance(), axis1=1, axis2=2))
    assert_allclose(fit.covariance()[1], fit.scale[1] * fit.dof[1] / (fit.dof[1] - 2.0))
    assert volatility[0].mean() < volatility[1].mean()
    assert_allclose(np.diagonal(fit.correlation(), axis1=1, axis2=2), 1.0)
    rows = fit.summary()["regimes"]
    assert_allclose([row["share"] for row in rows], fit.stationary)
    assert_allclose([row["mean_correlation"] for row in rows], fit.correlation()[:, 0, 1])


def test_the_fit_does_not_depend_on_jax_precision(record, fit):
    with jax.enable_x64(False):
        single = calibrate(record, n_regimes=2, n_restarts=2)
        found = filter_regimes(record, fit)
        assert jax.numpy.zeros(1).dtype == np.float32
    assert single.scale.dtype == np.float64
    assert single.log_likelihood == fit.log_likelihood
    np.testing.assert_array_equal(single.scale, fit.scale)
    assert_allclose(found.log_likelihood, fit.log_likelihood, rtol=1e-12)


def test_the_order_of_the_assets_does_not_matter(record, fit):
    swapped = calibrate(record[:, ::-1], n_regimes=2, n_restarts=2)
    assert_allclose(swapped.log_likelihood, fit.log_likelihood, atol=1e-6)
    assert_allclose(swapped.scale[:, ::-1, ::-1], fit.scale, rtol=1e-5)
    assert_allclose(swapped.smoothed, fit.smoothed, atol=1e-5)


def test_the_unit_of_an_asset_does_not_matter(record, fit):
    percent = calibrate(record * [100.0, 1.0], n_regimes=2, n_restarts=2)
    n_values = (~np.isnan(record[:, 0])).sum()
    assert_allclose(percent.log_likelihood, fit.log_likelihood - n_values * np.log(100.0), atol=1e-6)
    assert_allclose(percent.scale[:, 0, 0], fit.scale[:, 0, 0] * 1e4, rtol=1e-6)


def test_a_table_brings_its_names_and_its_step(record):
    hours = pd.date_range("2024-01-01", periods=len(record), freq="8h", name="date")
    table = pd.DataFrame(record, index=hours, columns=["BTC", "ETH"])
    fit = calibrate(table, n_regimes=1)
    assert fit.assets == ("BTC", "ETH")
    assert fit.step_hours == 8.0
    plain = calibrate(record, n_regimes=1)
    assert_allclose(fit.volatility_per_year(), plain.volatility_per_year() * 3**0.5)
    with pytest.raises(InputError, match="the assets of the fit"):
        filter_regimes(table[["ETH", "BTC"]], fit)


def test_one_regime_never_ends(record):
    fit = calibrate(record, n_regimes=1)
    assert fit.transition == 1.0 and np.isinf(fit.durations[0]) and fit.stationary == 1.0
    assert fit.restart_log_likelihoods.shape == (1,)
    assert (fit.smoothed == 1.0).all()


def test_a_sticky_prior_lengthens_the_stays(record, fit):
    sticky = calibrate(record, n_regimes=2, n_restarts=2, sticky=200.0)
    assert (sticky.durations > fit.durations).all()
    assert sticky.log_likelihood <= fit.log_likelihood + 1e-6


def test_dof_stays_between_its_floor_and_cap(record):
    fit = calibrate(record, n_regimes=2, n_restarts=2, dof_floor=5.0, dof_cap=6.0)
    assert (fit.dof >= 5.0).all() and (fit.dof <= 6.0).all()


def test_stopping_early_is_a_flag(record, naive_posterior):
    fit = calibrate(record, n_regimes=2, n_restarts=2, max_iterations=3)
    assert not fit.converged and fit.n_iterations == 3
    assert_allclose(fit.log_likelihood, naive_posterior(record, fit)[0], rtol=1e-11)


def test_a_stale_price_does_not_blow_up_the_likelihood(record):
    stale = record.copy()
    stale[300:320] = stale[300]
    fit = calibrate(stale, n_regimes=2, n_restarts=2)
    assert np.isfinite(fit.log_likelihood)
    assert np.linalg.cond(fit.correlation()).max() < 1e6


def test_starting_splits_follow_volatility_and_the_seed():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 2)) * np.repeat([0.2, 1.0, 3.0], 100)[:, None]
    labels = starting_labels(values, n_regimes=3, n_restarts=4, seed=7)
    assert (labels[0] == np.repeat([0, 1, 2], 100)).mean() > 0.9
    assert len({tuple(row) for row in labels}) == 4
    np.testing.assert_array_equal(labels, starting_labels(values[:, ::-1], n_regimes=3, n_restarts=4, seed=7))
    assert (labels[1:] != starting_labels(values, n_regimes=3, n_restarts=4, seed=8)[1:]).any()


def test_a_chain_that_never_mixes_still_has_a_stationary_law():
    law = stationary_law(np.eye(3))
    assert_allclose(law, 1.0 / 3.0)


def test_real_prices_give_three_regimes_that_every_restart_finds(real_returns, naive_posterior):
    fit = calibrate(real_returns, n_regimes=3, n_restarts=4)
    assert fit.converged and fit.assets == tuple(ASSETS) and fit.step_hours == 24.0
    assert_allclose(fit.restart_log_likelihoods, fit.log_likelihood, atol=0.01)
    assert_allclose(fit.log_likelihood, naive_posterior(real_returns.to_numpy(), fit)[0], rtol=1e-11)
    assert (np.diff(fit.volatility_per_year().mean(axis=1)) > 0.0).all()
    assert (fit.dof > 2.3).all() and (fit.dof < 6.0).all()
    # The crash of May 2021 and the fall of FTX; the rallies of spring 2021; the quiet summer of 2023.
    days = pd.DataFrame(fit.smoothed, index=real_returns.index)
    assert (days.loc[["2021-05-19", "2022-11-09"], 2] > 0.99).all()
    assert days.loc["2021-04":"2021-06", 2].mean() > 0.7
    assert days.loc["2023-04":"2023-09", 0].mean() > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_regimes": 0}, r"calibration\.n_regimes=0 must be a whole number from 1 to 8"),
        ({"n_regimes": 9}, r"n_regimes=9"),
        ({"n_regimes": True}, r"n_regimes=True"),
        ({"n_restarts": 0}, r"n_restarts=0"),
        ({"seed": -1}, r"seed=-1"),
        ({"sticky": -0.5}, r"sticky=-0\.5"),
        ({"sticky": float("nan")}, r"sticky=nan"),
        ({"dof": 2.0}, r"dof=2\.0 must be above 2"),
        ({"dof_floor": 2.0}, r"dof_floor=2\.0 must be above 2"),
        ({"dof_floor": 5.0, "dof_cap": 4.0}, r"dof_cap=4\.0 must be above dof_floor=5\.0"),
        ({"scale_floor": 0.0}, r"scale_floor=0\.0"),
        ({"tolerance": 0.0}, r"tolerance=0\.0"),
        ({"max_iterations": 0}, r"max_iterations=0"),
        ({"step_hours": 0.0}, r"step_hours=0\.0"),
    ],
)
def test_an_option_out_of_range_is_named(record, change, message):
    with pytest.raises(InputError, match=message):
        calibrate(record, **change)


def spoil(record, rows, columns, value):
    spoilt = record.copy()
    spoilt[rows, columns] = value
    return spoilt


def test_bad_returns_are_named_with_their_place(record):
    with pytest.raises(InputError, match=r"row 7, column 'asset_1' is -inf"):
        calibrate(spoil(record, 7, 1, -np.inf))
    with pytest.raises(InputError, match=r"column 'asset_0' has 29 values"):
        calibrate(spoil(record, slice(29, None), 0, np.nan))
    with pytest.raises(InputError, match=r"column 'asset_0' is 0\.5 in every row"):
        calibrate(spoil(record, slice(None), 0, 0.5))
    with pytest.raises(InputError, match=r"has 79 rows with values, too few for n_regimes=8"):
        calibrate(record[60:139], n_regimes=8)
    with pytest.raises(InputError, match=r"35 rows with values, too few for n_regimes=1 and 20 assets"):
        calibrate(np.random.default_rng(0).standard_normal((35, 20)), n_regimes=1)
    with pytest.raises(InputError, match=r"has shape \(2, 2, 2\)"):
        calibrate(np.zeros((2, 2, 2)))
    with pytest.raises(InputError, match="not numbers"):
        calibrate([["a", "b"]])


def test_bad_tables_are_named_with_their_place(record):
    days = pd.date_range("2024-01-01", periods=len(record), freq="D")
    with pytest.raises(InputError, match="'BTC' twice"):
        calibrate(pd.DataFrame(record, index=days, columns=["BTC", "BTC"]))
    with pytest.raises(InputError, match="row 10: date 2024-01-12 .* does not follow 2024-01-10"):
        calibrate(pd.DataFrame(record, index=days).drop(index=days[10]))
