"""Resampled shocks against exact laws of the bootstrap. Statistics within 4 to 5 standard errors, seeds fixed."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qpo_sim.errors import InputError
from qpo_sim.market import regime
from qpo_sim.market.block_length import optimal_block_length
from qpo_sim.market.dependence import bootstrap as module
from qpo_sim.market.dependence.bootstrap import bootstrap, example, filtered_historical
from qpo_sim.market.model import Market
from qpo_sim.numerics import MAX_UNROLLED_ASSETS
from qpo_sim.random import Address, Stream, stream_key
from qpo_sim.simulate import Plan, market_paths

F32, F64 = jnp.float32, jnp.float64
PERSISTENCE = [[0.9, 0.1], [0.25, 0.75]]


def data(n_dates=240, n_assets=3, *, seed=0, gaps=()):
    """Returns with a common factor, clustered volatility and fat tails; `gaps`: (asset, first, last) with no return."""
    rng = np.random.default_rng(seed)
    level = np.ones(n_dates)
    for t in range(1, n_dates):
        level[t] = np.exp(0.9 * np.log(level[t - 1]) + 0.3 * rng.standard_normal())
    common, own = rng.standard_t(6.0, (n_dates, 1)), rng.standard_t(6.0, (n_dates, n_assets))
    rows = 0.001 + 0.03 * level[:, None] * (0.8 * common + 0.6 * own)
    for asset, first, last in gaps:
        rows[first:last, asset] = np.nan
    return rows


def labels(n_dates=240, seed=3):
    """Spells of two regimes."""
    rng = np.random.default_rng(seed)
    state = np.zeros(n_dates, int)
    for t in range(1, n_dates):
        state[t] = rng.uniform() > PERSISTENCE[state[t - 1]][0]
    return state


@partial(jax.jit, static_argnames=("n_steps", "switching"))
def _walk(component, key, key_regime, path, mirror, *, n_steps, switching):
    prepared = component.prepare(sub_steps=1)
    dtype = component.table.dtype
    one = jnp.ones(path.shape, dtype)
    start = Address(key, path, jnp.zeros((), jnp.int32), 0, mirror)

    def body(carry, t):
        state, masks = carry
        at = Address(key, path, t + 1, 0, mirror)
        if switching:
            u = Address(key_regime, path, t).uniforms(1)[0].astype(dtype)
            masks = regime.next_masks(u, masks, regime.thresholds(jnp.asarray(PERSISTENCE, dtype)))
        state, shocks = component.step(prepared, t, state, masks, at)
        eps = shocks.eps if hasattr(shocks.eps, "ndim") else jnp.stack(shocks.eps)
        return (state, masks), (eps, state.row, masks)

    masks = (0.0 * one,) if switching else ()
    return lax.scan(body, (component.init(prepared, one, start), masks), jnp.arange(n_steps, dtype=jnp.int32))[1]


def walk(component, n_paths, n_steps, *, seed=1, switching=False, mirrored=False):
    """Shocks (steps, assets, paths), rows of the table (steps, paths) and regimes (steps, paths)."""
    path = np.arange(n_paths, dtype=np.uint32) if isinstance(n_paths, int) else np.asarray(n_paths, np.uint32)
    mirror = np.full(path.shape, 0xFFFFFFFF, np.uint32) if mirrored else None
    keys = stream_key(seed, Stream.RESAMPLE), stream_key(seed, Stream.REGIME)
    eps, row, masks = _walk(component, *keys, path, mirror, n_steps=n_steps, switching=switching)
    return SimpleNamespace(
        eps=np.asarray(eps), row=np.asarray(row), regime=np.asarray(masks[0]).astype(int) if masks else 0 * row
    )


def assert_mean(sample, expected, n_sigma=4.5):
    """Mean over independent paths (the last axis), element by element."""
    error = np.std(sample, axis=-1, ddof=1) / np.sqrt(np.shape(sample)[-1])
    assert np.all(np.abs(np.mean(sample, axis=-1) - expected) < n_sigma * error)


def circular(x, y, lag):
    """(1/n) sum of (x_i - mean)(y_{i+lag} - mean) on the ring."""
    return np.mean((x - x.mean()) * np.roll(y - y.mean(), -lag))


def standardised(rows):
    return (rows - np.nanmean(rows, axis=0)) / np.nanstd(rows, axis=0)


# ---------------------------------------------------------------- the law of the resampled series


@pytest.mark.parametrize("method", ["stationary", "circular", "iid"])
def test_every_step_has_the_table_s_moments(method):
    made = bootstrap(data(), method=method, block_length=6, dtype=F64)
    eps = walk(made.shock, 40_000, 12).eps[[0, 5, 11]]
    table = standardised(data())
    assert_mean(eps, 0.0)
    for i in range(3):
        for j in range(3):
            assert_mean(eps[:, i] * eps[:, j], np.mean(table[:, i] * table[:, j]))
    assert_mean(eps**3, np.mean(table**3, axis=0))
    np.testing.assert_allclose(made.mean[0], data().mean(axis=0))
    np.testing.assert_allclose(made.std[0], data().std(axis=0))
    correlation = made.shock.prepare(sub_steps=1).correlation[0]
    np.testing.assert_allclose(correlation, np.corrcoef(table.T), atol=1e-12)
    np.testing.assert_allclose(made.shock.correlation(made.shock.prepare(sub_steps=1), (), 0, 2), correlation[0, 2])


def _kept(method, length, lag):
    if method == "iid":
        return 0.0 if lag else 1.0
    return (1.0 - 1.0 / length) ** lag if method == "stationary" else max(0.0, 1.0 - lag / length)


@pytest.mark.parametrize("method,length", [("stationary", 1), ("stationary", 7.5), ("circular", 5), ("iid", 1)])
def test_autocovariances_of_returns_squares_and_pairs(method, length):
    """Politis & Romano (1994): those of the ring, times the chance that both dates are in one block."""
    table = standardised(data())
    eps = walk(bootstrap(data(), method=method, block_length=length, dtype=F64).shock, 40_000, 14).eps[4:]
    for lag in (1, 3, 6):
        kept = _kept(method, length, lag)
        for i, j in ((0, 0), (0, 1), (2, 1)):
            assert_mean(eps[0, i] * eps[lag, j], kept * circular(table[:, i], table[:, j], lag))
        square = (eps[0, 0] ** 2 - 1.0) * (eps[lag, 1] ** 2 - 1.0)
        assert_mean(square, kept * circular(table[:, 0] ** 2, table[:, 1] ** 2, lag))


@pytest.mark.parametrize("method,length", [("stationary", 9.0), ("circular", 6)])
def test_variance_of_the_mean_of_a_path(method, length):
    n_steps = 30
    x = standardised(data())[:, 0]
    total = (
        walk(bootstrap(data(), method=method, block_length=length, dtype=F64).shock, 60_000, n_steps).eps[:, 0].sum(0)
    )
    expected = sum(
        (n_steps - abs(k)) * _kept(method, length, abs(k)) * circular(x, x, abs(k)) for k in range(1 - n_steps, n_steps)
    )
    assert expected != pytest.approx(n_steps, rel=0.02)
    assert_mean(total**2, expected)


def test_stationary_blocks_are_geometric():
    """A step leaves the ring's order when it starts a block elsewhere: with probability (1 - 1/n)/L, independently."""
    n, length = 240, 8.0
    row = walk(bootstrap(data(), block_length=length, dtype=F32).shock, 2_000, 400).row
    jumps = row[1:] != (row[:-1] + 1) % n
    p = (1.0 - 1.0 / n) / length
    assert abs(jumps.mean() - p) < 4.0 * np.sqrt(p * (1 - p) / jumps.size)
    assert abs(1.0 / jumps.mean() - length) < 0.1
    pair = (jumps[1:] & jumps[:-1]).mean()
    assert abs(pair - p * p) < 4.0 * np.sqrt(p * p / jumps.size)
    # Uniform over dates: chi-square of independent paths' last rows.
    count = np.bincount(walk(bootstrap(data(), block_length=length, dtype=F32).shock, 48_000, 5).row[-1], minlength=n)
    statistic = np.sum((count - 200.0) ** 2 / 200.0)
    assert abs(statistic - (n - 1)) < 4.0 * np.sqrt(2.0 * (n - 1))


@pytest.mark.parametrize("random_phase", [True, False])
def test_circular_blocks_have_their_length(random_phase):
    n, length = 240, 6
    made = bootstrap(data(), method="circular", block_length=length, random_phase=random_phase)
    row = walk(made.shock, 3_000, 60).row
    jumps = row[1:] != (row[:-1] + 1) % n
    step = np.arange(1, 60)
    first = np.argmax(jumps, axis=0) + 1
    if random_phase:
        share = np.bincount(first[first <= length], minlength=length + 1)[1:] / row.shape[1]
        assert np.all(np.abs(share - 1.0 / length) < 5.0 * np.sqrt(1.0 / length / row.shape[1]))
        for path in range(50):
            assert np.all((np.flatnonzero(jumps[:, path]) + 1 - first[path]) % length == 0)
    else:
        assert not jumps[step % length != 0].any()
        assert jumps[step % length == 0].mean() > 0.98


def test_assets_stay_together():
    """Every simulated row is a row of the table."""
    made = bootstrap(data(), block_length=5, dtype=F64)
    found = walk(made.shock, 500, 40)
    np.testing.assert_array_equal(np.moveaxis(found.eps, 1, 2), np.asarray(made.shock.table)[found.row])


def test_start_draws_are_even_and_their_arithmetic_exact():
    rng = np.random.default_rng(5)
    word = np.concatenate([rng.integers(0, 2**32, 4000), [0, 1, 2**32 - 1, 2**31]]).astype(np.uint32)
    for n in (1, 2, 10, 1460, 65_536, 65_537, 2**23 - 1):
        expected = (word.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)
        np.testing.assert_array_equal(module._below(jnp.asarray(word), np.int32(n)), expected)


def test_mirrored_paths_start_at_mirrored_dates():
    component = bootstrap(data(), method="iid").shock
    row, mirrored = walk(component, 300, 20).row, walk(component, 300, 20, mirrored=True).row
    np.testing.assert_array_equal(row + mirrored, 239)


# ---------------------------------------------------------------- regimes


@pytest.mark.parametrize("method", ["stationary", "circular", "iid"])
@pytest.mark.parametrize("n_assets", [3, MAX_UNROLLED_ASSETS + 1])
def test_rows_come_from_dates_of_the_present_regime(method, n_assets):
    rows, state = data(n_assets=n_assets), labels()
    made = bootstrap(rows, method=method, block_length=6, regimes=state, dtype=F64)
    n_paths = 20_000 if n_assets == 3 else 1_000
    found = walk(made.shock, n_paths, 16, switching=True)
    order = np.argsort(state, kind="stable")
    date = order[found.row]
    np.testing.assert_array_equal(state[date], found.regime)
    changed = found.regime[1:] != found.regime[:-1]
    assert changed.any()
    for k in (0, 1):
        eps = standardised(rows[state == k])
        np.testing.assert_allclose(made.mean[k], rows[state == k].mean(axis=0))
        np.testing.assert_allclose(made.std[k], rows[state == k].std(axis=0))
        is_k = found.regime[10] == k
        np.testing.assert_array_equal(found.eps[10][:, is_k].T, np.asarray(made.shock.table)[found.row[10][is_k]])
        if n_assets == 3:
            assert_mean(found.eps[10][:, is_k], 0.0)
            assert_mean(found.eps[10][0, is_k] * found.eps[10][1, is_k], np.mean(eps[:, 0] * eps[:, 1]))
            # Every date of the regime is equally likely, first and last ones of spells too.
            count = np.bincount(date[10][is_k], minlength=state.size)[state == k]
            freedom, mean = count.size - 1, count.mean()
            assert abs(np.sum((count - mean) ** 2) / mean - freedom) < 4.5 * np.sqrt(2.0 * freedom)


def test_a_block_goes_on_within_a_regime_and_ends_with_it():
    state = labels()
    found = walk(bootstrap(data(), block_length=20, regimes=state).shock, 4_000, 30, switching=True)
    stays = found.regime[1:] == found.regime[:-1]
    counts = np.bincount(state)
    start = np.where(found.regime == 0, 0, counts[0])
    size = counts[found.regime]
    follows = found.row[1:] == (start + (found.row - start + 1) % size)[:-1]
    p = 1.0 / 20
    for k in (0, 1):
        here = stays & (found.regime[1:] == k)
        expected = 1.0 - p * (1.0 - 1.0 / counts[k])
        assert abs(follows[here].mean() - expected) < 4.5 * np.sqrt(p / here.sum())


def test_a_market_s_regimes_must_be_those_of_the_dates():
    component = bootstrap(data(), block_length=3, regimes=labels()).shock
    with pytest.raises(InputError, match="2 regimes and the market has 1"):
        walk(component, 4, 2)
    # Without labels any market will do.
    assert np.isfinite(walk(bootstrap(data(), block_length=3).shock, 4, 2, switching=True).eps).all()


# ---------------------------------------------------------------- missing data

GAPS = ((1, 0, 80), (2, 0, 80), (0, 200, 215))


def test_complete_keeps_the_correlations_of_complete_dates():
    rows = data(gaps=GAPS)
    made = bootstrap(rows, block_length=4, dtype=F64)
    complete = rows[~np.isnan(rows).any(axis=1)]
    assert made.shock.counts == (complete.shape[0],) == (145,)
    np.testing.assert_allclose(made.shock.table, standardised(complete), atol=1e-12)
    np.testing.assert_allclose(made.shock.prepare(sub_steps=1).correlation[0], np.corrcoef(complete.T), atol=1e-12)


@pytest.mark.parametrize("n_assets", [3, MAX_UNROLLED_ASSETS + 1])
@pytest.mark.parametrize("regimes", [None, "two"])
def test_own_dates_keep_each_asset_s_law_and_say_what_correlation_is_left(n_assets, regimes):
    rows = data(n_assets=n_assets, gaps=GAPS)
    state = None if regimes is None else labels()
    made = bootstrap(rows, block_length=5, regimes=state, missing="own_dates", dtype=F64)
    assert made.shock.own_assets == ((0,), (1, 2))
    few = n_assets > 3
    found = walk(made.shock, 4_000 if few else 40_000, 9, switching=regimes is not None)
    assert np.abs(found.eps).max() < 100.0
    prepared = made.shock.prepare(sub_steps=1)
    for k in range(1 if regimes is None else 2):
        is_k = found.regime[7] == k
        eps = found.eps[7][:, is_k]
        own = standardised(rows if state is None else rows[state == k])
        assert_mean(eps, 0.0, 5.0)
        assert_mean(eps**2, 1.0, 5.0)
        assert_mean(eps[:3] ** 3, np.nanmean(own[:, :3] ** 3, axis=0))
        for i, j in ((0, 1), (1, 2), (0, 2)):
            assert_mean(eps[i] * eps[j], np.asarray(prepared.correlation[k, i, j]))
        # Every value of an asset is one of its own.
        for i in range(3):
            values = own[:, i][~np.isnan(own[:, i])]
            assert np.isin(np.round(eps[i], 9), np.round(values, 9)).all()


def test_own_dates_shrink_correlation_by_the_common_share_and_keep_clustering():
    rows = data(gaps=((1, 0, 120), (2, 0, 120)))
    shock = bootstrap(rows, block_length=10.0, missing="own_dates", dtype=F64).shock
    correlation = np.asarray(shock.prepare(sub_steps=1).correlation[0])
    eps = standardised(rows)
    assert correlation[0, 1] == pytest.approx(np.nansum(eps[:, 0] * eps[:, 1]) / 240, abs=1e-12)
    # With the same gaps they borrow the same dates.
    assert correlation[1, 2] == pytest.approx(np.nanmean(eps[:, 1] * eps[:, 2]), abs=1e-12)
    # On dates of the first half both borrow: the pair's rows are rows of the second half.
    found = walk(shock, 500, 20)
    both = found.eps[:, 1:]
    second = np.round(eps[120:, 1:], 9)
    seen = np.round(np.moveaxis(both, 1, 2)[found.row < 120], 9)
    assert {tuple(row) for row in seen} <= {tuple(row) for row in second}
    # A borrowed walk goes along with its block.
    where = {tuple(row): k for k, row in enumerate(second)}
    place = np.array([[where.get(tuple(x), -1) for x in step.T] for step in np.round(both, 9)])
    goes_on = (found.row[1:] < 120) & (found.row[:-1] + 1 == found.row[1:])
    follows = place[1:][goes_on] == (place[:-1][goes_on] + 1) % 120
    # All but those for which a new block happened to start on the next date.
    assert follows.mean() > 0.995


# ---------------------------------------------------------------- smoothing


@pytest.mark.parametrize("smoothing", ["silverman", "scott", 0.7])
@pytest.mark.parametrize("regimes", [None, "two"])
def test_smoothing_keeps_mean_and_covariance(smoothing, regimes):
    state = None if regimes is None else labels()
    made = bootstrap(data(), block_length=5, smoothing=smoothing, regimes=state, dtype=F64)
    found = walk(made.shock, 60_000, 6, switching=regimes is not None)
    for k in range(len(made.shock.counts)):
        eps = found.eps[4][:, found.regime[4] == k]
        table = standardised(data() if state is None else data()[state == k])
        n, d = table.shape
        h = {"silverman": (4.0 / ((d + 2.0) * n)) ** (1 / 7), "scott": n ** (-1 / 7)}.get(smoothing, smoothing)
        assert np.asarray(made.shock.bandwidth)[k] == pytest.approx(h, rel=1e-12)
        assert_mean(eps, 0.0)
        for i in range(3):
            for j in range(3):
                assert_mean(eps[i] * eps[j], np.mean(table[:, i] * table[:, j]), 4.0)
        assert_mean(eps**3, np.mean(table**3, axis=0) * (1.0 + h * h) ** -1.5)
        assert np.unique(eps[0]).size == eps.shape[1]


def test_smoothing_keeps_a_mean_that_was_left_in():
    volatility = np.full(240, 0.02)
    made = filtered_historical(
        data() + 0.02, volatility, restandardised=False, smoothing=0.8, block_length=1, dtype=F64
    )
    residuals = (data() + 0.02) / 0.02
    assert made.mean.tolist() == [[0.0] * 3] and made.std.tolist() == [[1.0] * 3]
    eps = walk(made.shock, 60_000, 2).eps[1]
    assert_mean(eps, residuals.mean(axis=0))
    assert_mean((eps - residuals.mean(axis=0)[:, None]) ** 2, residuals.var(axis=0))
    simulated = np.exp(0.2 * eps)
    mgf = made.shock.log_mgf(made.shock.prepare(sub_steps=1), (), (jnp.full(1, 0.2),) * 3)
    assert_mean(simulated, np.exp(np.concatenate(mgf)))


@pytest.mark.parametrize("n_assets", [2, MAX_UNROLLED_ASSETS + 1])
def test_smoothing_of_zero_is_none(n_assets):
    rows = data(n_assets=n_assets)
    plain, smoothed = (bootstrap(rows, block_length=4, smoothing=h, dtype=F64).shock for h in (None, 0.0))
    assert smoothed.n_slots == plain.n_slots + (n_assets + 1) // 2
    np.testing.assert_allclose(walk(smoothed, 100, 8).eps, walk(plain, 100, 8).eps, atol=1e-12)


# ---------------------------------------------------------------- cumulant function


@pytest.mark.parametrize("smoothing", [None, 0.6])
@pytest.mark.parametrize("regimes", [None, "two"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_log_mgf_is_that_of_the_table(smoothing, regimes, dtype):
    n_assets, state = (3, None) if regimes is None else (MAX_UNROLLED_ASSETS + 1, labels())
    rows = data(n_assets=n_assets)
    shock = bootstrap(rows, block_length=5, smoothing=smoothing, regimes=state, dtype=dtype).shock
    assert shock.mgf_error < 1e-6
    prepared = shock.prepare(sub_steps=1)
    # A path per scale, up to the limit.
    scale = np.linspace(0.0, 0.5, 101)
    row = jnp.asarray(scale, dtype)
    h = smoothing or 0.0
    for k in range(len(shock.counts)):
        masks = () if state is None else (jnp.full_like(row, k),)
        scales = (row,) * n_assets if n_assets <= MAX_UNROLLED_ASSETS else jnp.stack([row] * n_assets)
        value = np.stack(list(shock.log_mgf(prepared, masks, scales)))
        eps = standardised(rows if state is None else rows[state == k])
        shrunk = scale / np.sqrt(1.0 + h * h)
        exact = np.log(np.mean(np.exp(shrunk[:, None, None] * eps), axis=1)).T + 0.5 * (h * shrunk) ** 2
        tolerance = (shock.mgf_error if dtype == F64 else 3e-6) * (2.0 * scale) ** 2 + 1e-13
        if dtype == F32:
            # One part in 10^6 of the value from the masked sums and the recurrence.
            tolerance = tolerance + 1e-6 * exact
        assert np.all(np.abs(value - exact) <= tolerance)


def test_log_mgf_goes_on_along_its_tangent_and_has_its_gradient():
    shock = bootstrap(data(), block_length=5, dtype=F64).shock
    prepared = shock.prepare(sub_steps=1)
    eps = standardised(data())[:, 0]

    def value(s):
        return shock.log_mgf(prepared, (), (s,) * 3)[0]

    for s in (0.05, 0.3, 0.499, 0.7):
        weight = np.exp(min(s, 0.5) * eps)
        slope = jax.grad(lambda s: value(s[None])[0])(jnp.asarray(s))
        assert slope == pytest.approx(weight @ eps / weight.sum(), rel=1e-4)
    at, beyond = value(jnp.asarray([0.5, 0.8]))
    assert at < beyond < np.log(np.mean(np.exp(0.8 * eps)))


def test_fit_holds_for_a_table_with_an_outlier_of_twenty_standard_deviations():
    rows = data(1400, 1)
    rows[700] = -20.0 * rows.std()
    rows[701] = 15.0 * rows.std()
    assert bootstrap(rows, block_length=5, dtype=F64).shock.mgf_error < 1e-5


# ---------------------------------------------------------------- gradients, precision, addresses


@pytest.mark.slow
def test_gradients_are_where_they_are_said_to_be():
    component = bootstrap(data(), block_length=4, smoothing=0.5, regimes=labels(), dtype=F64).shock
    path = np.arange(64, dtype=np.uint32)
    keys = stream_key(1, Stream.RESAMPLE), stream_key(1, Stream.REGIME)

    @jax.jit
    def total(component):
        eps, _, _ = _walk(component, *keys, path, None, n_steps=5, switching=True)
        prepared = component.prepare(sub_steps=1)
        mgf = component.log_mgf(prepared, (jnp.ones(1),), (jnp.full(1, 0.2),) * 3)
        return jnp.sum(eps**3) + sum(jnp.sum(x) for x in mgf)

    gradient = jax.grad(total)(component)
    for name in ("table", "renewal", "covariance", "factor", "mean", "cumulant", "cumulant_slope"):
        assert not np.any(getattr(gradient, name)), name
    for k in (0, 1):
        step = 1e-5 * np.eye(2)[k]
        up, down = (total(dataclasses.replace(component, bandwidth=component.bandwidth + d)) for d in (step, -step))
        assert np.asarray(gradient.bandwidth)[k] == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("options", [{}, dict(method="circular"), dict(missing="own_dates", smoothing=0.3)])
def test_a_path_alone_is_the_path_in_company(options):
    component = bootstrap(data(gaps=GAPS), block_length=5, regimes=labels(), **options).shock
    company = walk(component, 257, 40, switching=True)
    alone = walk(component, [13, 200], 40, switching=True)
    np.testing.assert_array_equal(alone.row, company.row[:, [13, 200]])
    if "smoothing" in options:
        np.testing.assert_allclose(alone.eps, company.eps[:, :, [13, 200]], rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(alone.eps, company.eps[:, :, [13, 200]])


@pytest.mark.parametrize("method", ["stationary", "circular"])
@pytest.mark.slow
def test_ten_thousand_steps_are_finite(method):
    component = bootstrap(data(gaps=GAPS), method=method, block_length=9, missing="own_dates", smoothing=0.2).shock
    found = walk(component, 16, 10_000)
    assert np.isfinite(found.eps).all() and np.abs(found.eps).max() < 30.0
    assert found.row.min() == 0 and found.row.max() == 239
    assert abs(found.eps[:, 0].var() - 1.0) < 0.1


@pytest.mark.parametrize("n_assets", [1, 2, 40])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_example(n_assets, dtype):
    component = example(n_assets, dtype)
    assert component.n_assets == n_assets and not component.is_conditionally_gaussian and component.needs_base_step
    found = walk(component, 64, 4)
    assert found.eps.shape == (4, n_assets, 64) and found.eps.dtype == dtype
    assert all(np.asarray(x).dtype == dtype for x in jax.tree.leaves(component))


def test_a_market_takes_it():
    """Log-returns of a composed market are drift + volatility * eps: rows of the data themselves."""
    rows, state = data(), labels()
    made = bootstrap(rows, block_length=5, regimes=state, dtype=F64)
    market = Market(
        initial=jnp.asarray([0.5, 0.5]),
        transition=jnp.asarray(PERSISTENCE),
        drift=jnp.asarray(made.mean),
        volatility=jnp.asarray(made.std),
        correlation_cholesky=None,
        dof=None,
        assets=("A", "B", "C"),
        shock=made.shock,
    )
    record = market_paths(market, 50, Plan(12))
    log_price = np.asarray(record.log_price)
    move = np.diff(np.concatenate([np.zeros_like(log_price[:1]), log_price]), axis=0)
    for k in (0, 1):
        seen = np.moveaxis(move, 1, 2)[np.asarray(record.masks)[:, 0] == k]
        known = rows[state == k]
        assert seen.size and np.abs(seen[:, None] - known[None]).max(axis=2).min(axis=1).max() < 1e-12
    # Compensated iid prices are martingales when every step is.
    iid = bootstrap(rows, method="iid", dtype=F64)
    market = dataclasses.replace(
        market, initial=jnp.ones(1), transition=jnp.ones((1, 1)), drift=jnp.zeros((1, 3)), shock=iid.shock,
        volatility=jnp.asarray(iid.std), compensated=True,
    )  # fmt: skip
    assert_mean(np.exp(np.asarray(market_paths(market, 40_000, Plan(5)).log_price)[-1]), 1.0)


# ---------------------------------------------------------------- block length


def _sp500():
    price = pytest.importorskip("arch.data.sp500").load()["Adj Close"].to_numpy()
    return 100.0 * (price[1:] / price[:-1] - 1.0)


def test_block_length_case(cases):
    expected = cases("models")["D19"]["expected"]
    returns = _sp500()
    for name, series in (("returns", returns), ("squared", returns**2)):
        for kind, length in expected[name].items():
            assert optimal_block_length(series, kind=kind) == pytest.approx(length, rel=1e-6)


def test_block_length_agrees_with_arch():
    reference = pytest.importorskip("arch.bootstrap").optimal_block_length
    rng = np.random.default_rng(2)
    series = np.zeros((900, 6))
    for t in range(1, 900):
        series[t] = np.array([-0.5, 0.0, 0.3, 0.6, 0.8, 0.95]) * series[t - 1] + rng.standard_normal(6)
    for kind in ("stationary", "circular"):
        lengths = optimal_block_length(series, kind=kind, over=None)
        np.testing.assert_allclose(lengths, np.maximum(reference(series)[kind].to_numpy(), 1.0), rtol=1e-9)
        assert optimal_block_length(series, kind=kind) == pytest.approx(lengths.mean())
        assert optimal_block_length(series, kind=kind, over="max") == lengths.max()


def test_block_length_of_an_autoregression_by_hand():
    """At lags given exactly: G and g of an AR(1) with a known bandwidth, worked out from the sample autocovariances."""
    rng = np.random.default_rng(8)
    x = np.zeros(400)
    for t in range(1, 400):
        x[t] = 0.5 * x[t - 1] + rng.standard_normal()
    y = x - x.mean()
    acv = np.array([y[k:] @ y[: 400 - k] / 400 for k in range(26)])
    band = 2.0 * np.sqrt(np.log10(400) / 400)
    first = next(k for k in range(1, 20) if np.all(np.abs(acv[k : k + 5] / acv[0]) < band))
    weights = {k: 1.0 if k <= first else 2.0 - k / first for k in range(1, 2 * first + 1)}
    slope = 2.0 * sum(w * k * acv[k] for k, w in weights.items())
    spectrum = acv[0] + 2.0 * sum(w * acv[k] for k, w in weights.items())
    assert optimal_block_length(x) == pytest.approx((slope**2 / spectrum**2 * 400) ** (1 / 3), rel=1e-12)


def test_automatic_block_length_is_used():
    eps = standardised(data())
    for of, series in (("squares", eps**2), ("returns", eps)):
        shock = bootstrap(data(), block_length=of, dtype=F64).shock
        assert 1.0 / float(shock.renewal) == pytest.approx(optimal_block_length(series), rel=1e-9)
    # Standardised within regimes, in order of time.
    state = labels()
    for k in (0, 1):
        eps[state == k] = standardised(data()[state == k])
    shock = bootstrap(data(), regimes=state, dtype=F64).shock
    assert 1.0 / float(shock.renewal) == pytest.approx(optimal_block_length(eps**2), rel=1e-9)
    eps = standardised(data())
    circular = bootstrap(data(), method="circular").shock
    assert circular.block_length == round(optimal_block_length(eps**2, kind="circular"))


@pytest.mark.parametrize(
    "series,options,message",
    [
        (np.arange(9.0), {}, "at least 12"),
        (np.full(50, 0.3), {}, "constant"),
        (np.r_[np.inf, np.arange(40.0)], {}, "infinite"),
        (np.arange(40.0), dict(kind="moving"), "stationary, circular"),
        (np.arange(40.0), dict(over="median"), "mean, max or None"),
    ],
)
def test_block_length_refusals(series, options, message):
    with pytest.raises(InputError, match=message):
        optimal_block_length(series, **options)


# ---------------------------------------------------------------- filtered historical simulation


def _filtered_volatility(returns, mean, omega, alpha, beta, backcast):
    variance = np.empty(returns.size + 1)
    variance[0] = omega + (alpha + beta) * backcast
    for t, x in enumerate(returns):
        variance[t + 1] = omega + alpha * (x - mean) ** 2 + beta * variance[t]
    return np.sqrt(variance)


def test_filtered_historical_simulation_case(cases):
    case = cases("models")["A37"]
    p, expected = case["inputs"]["params"], case["expected"]
    returns = _sp500()
    volatility = _filtered_volatility(returns, *p.values(), case["inputs"]["backcast"])
    assert volatility[-1] == pytest.approx(expected["sigma_next"], abs=1e-9)
    raw = filtered_historical(returns, volatility[:-1], mean=p["mu"], restandardised=False, dtype=F64).shock
    made = filtered_historical(returns, volatility[:-1], mean=p["mu"], dtype=F64)
    assert made.mean[0, 0] == pytest.approx(expected["std_resid_mean"], abs=1e-9)
    assert made.std[0, 0] ** 2 == pytest.approx(expected["std_resid_var"], abs=1e-9)
    eps = np.asarray(made.shock.table)[:, 0]
    assert np.mean(eps**4) == pytest.approx(expected["std_resid_kurtosis"], abs=1e-6)
    simulated = p["mu"] + volatility[-1] * walk(raw, 1 << 18, 1).eps[0, 0]
    for level, quantile in expected["VaR"].items():
        tail = 1.0 - float(level)
        for table in (np.asarray(raw.table)[:, 0], made.mean[0, 0] + made.std[0, 0] * eps):
            assert -np.quantile(p["mu"] + volatility[-1] * table, tail) == pytest.approx(quantile, abs=1e-6)
        exact = np.mean(p["mu"] + volatility[-1] * np.asarray(raw.table)[:, 0] < -quantile)
        frequency = np.mean(simulated < -quantile)
        assert abs(frequency - exact) < 4.0 * np.sqrt(exact * (1 - exact) / simulated.size)
    for level, shortfall in expected["ES_fractional"].items():
        worst = np.sort(simulated)[: round((1.0 - float(level)) * simulated.size)]
        spread = np.sqrt(np.var(worst) + float(level) * (worst.mean() - worst[-1]) ** 2)
        assert abs(-worst.mean() - shortfall) < 4.0 * spread / np.sqrt(worst.size)


# ---------------------------------------------------------------- refusals


def _with(value, row=3, asset=1, **options):
    rows = data(**options)
    rows[row, asset] = value
    return rows


@pytest.mark.parametrize(
    "rows,options,message",
    [
        (data(), dict(block_length=0.5), "block_length is 0.5; it must be at least 1"),
        (data(), dict(block_length=np.nan), "at least 1"),
        (data(), dict(block_length=241), "at most the number of dates, 240"),
        (data(), dict(method="circular", block_length=2.5), "whole number"),
        (data(), dict(block_length="weekly"), "squares, returns"),
        (data(), dict(method="moving"), "stationary, circular, iid"),
        (data(), dict(missing="drop"), "complete or own_dates"),
        (data(), dict(smoothing="plug-in"), "silverman, scott"),
        (data(), dict(smoothing=-0.1), "at least 0"),
        (data(), dict(scale_limit=0.0), "scale_limit"),
        (data(), dict(regimes=labels(), n_regimes=3), "0 dates on which every asset has a value in regime 2"),
        (data(), dict(regimes=np.r_[[1] * 9, [0] * 231]), "9 dates .* in regime 1"),
        (data(), dict(regimes=labels()[1:]), "one label for each of 240"),
        (data(), dict(regimes=labels() - 1), "one of 0..0"),
        (data(), dict(regimes=labels() + 0.5), "one of 0"),
        (data(), dict(n_regimes=2), "no date has a label"),
        (data(9), {}, "9 dates .* at least 10"),
        (data(gaps=((0, 0, 120), (1, 115, 240))), {}, 'missing="own_dates"'),
        (data(gaps=((1, 0, 235),)), dict(missing="own_dates"), "column 1 has 5 values"),
        (data(gaps=((1, 0, 240),)), {}, "column 1 has no value"),
        (data(gaps=((1, 0, 240),)), dict(missing="own_dates"), "column 1 has no value"),
        (_with(np.inf), {}, "infinite in row 3, column 1"),
        (np.c_[data(), np.full(240, 0.01)], {}, "column 3 is constant"),
        (np.c_[data(), data()[:, :1]], dict(smoothing=0.2), "positive definite"),
        (np.zeros((3, 4, 5)), {}, "must be \\(dates, assets\\)"),
    ],
)
def test_refusals(rows, options, message):
    with pytest.raises(InputError, match=message):
        bootstrap(rows, **({"block_length": 2} | options))


def test_too_many_dates_are_refused():
    with pytest.raises(InputError, match="32 bits"):
        bootstrap(np.broadcast_to(0.0, (2**23, 1)))


@pytest.mark.parametrize(
    "volatility,options,message",
    [
        (np.ones(239), {}, "shape"),
        (np.zeros(240), {}, "row 0, column 0"),
        (np.r_[np.ones(7), np.nan, np.ones(232)], {}, "nan in row 7"),
        (np.ones(240), dict(mean=[0.0, 0.0]), "one per asset"),
    ],
)
def test_filtered_historical_refusals(volatility, options, message):
    with pytest.raises(InputError, match=message):
        filtered_historical(data(), volatility, **options)


def test_volatility_is_not_needed_where_there_is_no_return():
    rows = data(gaps=((0, 0, 9),))
    volatility = np.where(np.isnan(rows), np.nan, 0.02)
    assert filtered_historical(rows, volatility).shock.counts == (231,)


def test_sub_steps_are_refused():
    with pytest.raises(InputError, match="whole base steps"):
        bootstrap(data(), block_length=2).shock.prepare(sub_steps=2)
