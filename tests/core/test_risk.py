"""Standard errors against the spread of replications, the fallback to the histogram, drawdown against exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import F64, assert_frequency, lending, spot_book, tiered

from qpo_sim.book import build_book
from qpo_sim.compute import partial
from qpo_sim.compute.run import Run, kept
from qpo_sim.market import gbm
from qpo_sim.risk import liquidation, moments, summary
from qpo_sim.simulate import Plan, simulate_paths

N_SLICES, SIZE = 250, 800


def _returns(rng, n):
    return 0.01 + 0.05 * rng.standard_t(6, n) - 0.03 * (rng.random(n) < 0.05)


@pytest.mark.parametrize("name", ["volatility", "sharpe_ratio", "sortino_ratio"])
def test_moment_errors_match_a_bootstrap(name):
    # 2000 resamples: their spread is known to 1.6 %; the band of 8 % is five standard deviations.
    rng = np.random.default_rng(2)
    r = _returns(rng, 4000)
    options = {} if name == "volatility" else {"horizon_days": 30.0}

    def measure(x):
        return getattr(moments, name)(moments.return_sums(x), **options)

    stated = measure(r).std_error
    resampled = [measure(r[rng.integers(0, r.size, r.size)]).value for _ in range(2000)]
    assert stated == pytest.approx(np.std(resampled), rel=0.08)


def test_ratios_from_the_definition():
    r = _returns(np.random.default_rng(1), 1000)
    sums = moments.return_sums(r)
    scale = np.sqrt(365.0 / 30.0)
    assert moments.volatility(sums).value == pytest.approx(np.std(r), rel=1e-12)
    assert moments.sharpe_ratio(sums, horizon_days=30.0).value == pytest.approx(scale * r.mean() / np.std(r), rel=1e-12)
    downside = np.sqrt(np.mean(np.minimum(r, 0.0) ** 2))
    assert moments.sortino_ratio(sums, horizon_days=30.0).value == pytest.approx(scale * r.mean() / downside, rel=1e-12)
    mean = moments.mean(r.sum(), (r**2).sum(), float(r.size))
    assert mean.value == pytest.approx(r.mean()) and mean.std_error == pytest.approx(r.std(ddof=1) / np.sqrt(r.size))


def test_liquidation_probability_error():
    f = np.random.default_rng(0).beta(0.1, 2.0, 5000)
    estimate = liquidation.liquidation_probability(f.sum(), (f**2).sum(), 5000.0)
    assert estimate.std_error == pytest.approx(f.std(ddof=1) / np.sqrt(5000), rel=1e-9)
    # counted, and never 0 when nothing was seen
    assert liquidation.liquidation_probability(np.array(0.0), np.array(0.0), 1000.0).std_error > 5e-4
    counted = liquidation.liquidation_probability(np.array(300.0), np.array(300.0), 1000.0)
    assert counted.std_error == pytest.approx(np.sqrt(302 / 1004 * 702 / 1004 / 1004), rel=1e-12)


def test_hazard_recovers_the_cumulative_law():
    cumulative = np.array([[0.1], [0.1], [0.4], [0.7]])
    h = liquidation.hazard(cumulative)
    np.testing.assert_allclose(1.0 - np.cumprod(1.0 - h, axis=0), cumulative)


@pytest.fixture(scope="module")
def slices():
    """Many independent small runs, cut out of one batch of paths."""
    market = gbm(("A", "B"), [1.2, 1.0], [[1.0, 0.5], [0.5, 1.0]], drift="historical", dtype=jnp.float32)
    book = build_book(
        ("A", "B"),
        spot={"B": 0.3},
        perpetuals=[dict(name="x", venue=tiered(0.01), margin=0.2, positions={"A": 0.6})],
        loans=[dict(name="l", venue=lending(), collateral={"B": 0.6}, debt={"USD": 0.4})],
        dtype=jnp.float32,
    )
    plan = Plan(12)
    arrays = jax.tree.map(np.asarray, kept(simulate_paths(market, book, N_SLICES * SIZE, plan, seed=1)))
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "COARSE_BITS", 8)
        for k in range(N_SLICES):
            part = jax.tree.map(lambda x, k=k: x[..., k * SIZE : (k + 1) * SIZE], arrays)
            patch.setattr(partial, "FINE_BITS", 14)
            p = partial.partial_of(part, 0, horizons=(11,), keep=partial.tail_size(SIZE, 0.95))
            fields = dict(
                market=market, book=book, plan=plan, seed=1, n_paths=SIZE, levels=(0.95,), horizons=(12,), partial=p
            )
            fields |= {"engine": None} if "engine" in Run.__dataclass_fields__ else {}
            runs.append(Run(**fields))
    return runs


def test_stated_errors_match_the_spread_over_runs(slices):
    # 250 runs: the spread is known to 4.5 % (normal), a band of 25 % is five of its standard deviations.
    tables = [summary.measures(r) for r in slices]
    bad = {}
    for k, row in enumerate(tables[0]):
        values = np.array([t[k].value for t in tables])
        errors = np.array([t[k].std_error for t in tables])
        # The drawdown quantiles come from coarse bins here and are tested below.
        if row.measure == "max_drawdown_quantile":
            continue
        ratio = np.sqrt(np.nanmean(errors**2)) / np.nanstd(values, ddof=1)
        # Errors of times take counted liquidations for conditional probabilities: on the safe side, by their docstring.
        most = 2.0 if row.measure == "time_to_liquidation_quantile" else 1.25
        if not 0.75 < ratio < most:
            bad[(row.measure, row.account, row.level)] = round(float(ratio), 3)
    assert not bad, bad


def test_components_sum_to_shortfall(slices):
    names, estimate = summary.attribution(slices[0], 0.95)
    _, cvar = summary.tail_measures(slices[0].partial, 0, 0.95)
    assert len(names) == estimate.value.size
    assert estimate.value.sum() == pytest.approx(cvar.value, abs=2e-6)  # float32 accounts


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.999])
def test_histogram_stands_in_for_a_tail_that_was_not_kept(level):
    rng = np.random.default_rng(4)
    n = 200_000
    equity = (1.0 - 0.1 * rng.standard_t(4, (1, n))).astype(np.float32)
    batch = dict(
        equity=equity, max_drawdown=np.abs(equity[0] - 1.0), hit_probability=np.zeros((1, 0, n), np.float32),
        is_liquidated=np.zeros((0, n), bool), accounts=None, components=None, is_finite=np.ones(n, bool),
    )  # fmt: skip
    exact = partial.partial_of(batch, 0, horizons=(0,), keep=n)
    binned = partial.partial_of(batch, 0, horizons=(0,), keep=10)
    for a, b in zip(summary.tail_measures(exact, 0, level), summary.tail_measures(binned, 0, level), strict=True):
        assert b.value == pytest.approx(a.value, rel=1e-3)  # what the docstring promises
        assert b.std_error == pytest.approx(a.std_error, rel=0.15)


def test_drawdown_of_daily_gbm(cases):
    expected = cases("models")["B13"]["expected"]
    n = 1 << 15
    for drift in (0.0, 0.2):
        market = gbm(("X",), [0.8], drift="historical", mean_per_year=drift, dtype=F64)
        plan = Plan(365, dates=(365,), attribution=False)
        depth = -np.log1p(
            -np.asarray(simulate_paths(market, spot_book(market), n, plan, seed=int(10 * drift)).max_drawdown)
        )
        for h, p in expected[f"m={drift}"].items():
            assert_frequency(np.count_nonzero(depth > float(h)), n, p)
        if drift == 0.0:
            # Continuous expectation less the known shortfall of daily observation, to first order.
            continuous = cases("models")["B11"]["expected"]["zero_drift"] * 0.8
            shortfall, error = 2 * 0.5826 * 0.8 / np.sqrt(365.0), depth.std() / np.sqrt(n)
            assert continuous - 1.15 * shortfall - 4 * error < depth.mean() < continuous - 0.85 * shortfall + 4 * error
