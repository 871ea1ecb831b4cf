"""Small markets and books that several tests share."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from qpo_sim.book import Book, build_book
from qpo_sim.market import Market
from qpo_sim.simulate import Plan, simulate_paths
from qpo_sim.venue import HealthFactor, TieredMargin

F64 = jnp.float64


def tiered(rate: float = 0.005, *, tiers=None, **costs) -> TieredMargin:
    """Venue with one tier (or the given ones) and no leverage limit."""
    return TieredMargin(tiers={"default": tiers or [[0.0, rate]]}, name="toy", **costs)


def lending(**options) -> HealthFactor:
    values = dict(
        liquidation_threshold={"default": 0.83}, liquidation_bonus={"default": 0.05}, ltv={"default": 0.8}, name="toy"
    )
    return HealthFactor(**{**values, **options})


def single_market(
    *,
    drift=0.0,
    volatility=0.03,
    dof=None,
    transition=None,
    initial=None,
    step_hours=24.0,
    dtype=F64,
    cut=None,
    assets=("X",),
) -> Market:
    """One asset; drift, volatility and dof per regime and base step."""
    drift, volatility = np.atleast_1d(drift).astype(float), np.atleast_1d(volatility).astype(float)
    k = volatility.size
    transition = np.eye(k) if transition is None else np.asarray(transition)
    initial = np.eye(k)[0] if initial is None else np.asarray(initial)
    options = {} if cut is None else {"mixing_cut": cut}
    return Market(
        initial=jnp.asarray(initial, dtype),
        transition=jnp.asarray(transition, dtype),
        drift=jnp.asarray(np.broadcast_to(drift, (k,))[:, None], dtype),
        volatility=jnp.asarray(volatility[:, None], dtype),
        correlation_cholesky=jnp.ones((k, 1, 1), dtype),
        dof=None if dof is None else jnp.asarray(np.atleast_1d(dof), dtype),
        assets=assets,
        step_hours=step_hours,
        **options,
    )


def spot_book(market: Market, weights=None) -> Book:
    weights = {market.assets[0]: 1.0} if weights is None else weights
    return build_book(market.assets, spot=weights, dtype=market.drift.dtype)


def prices(market: Market, n_paths, n_steps: int, *, step_hours=None, dates=(), seed=0) -> np.ndarray:
    """Relative prices (dates, assets, paths), read as the equity of one-asset books: no observer but the equity."""
    plan = Plan(n_steps, step_hours=step_hours or market.step_hours, dates=dates, attribution=False)
    book = spot_book(market, {asset: 1.0 / market.n_assets for asset in market.assets})
    unit = np.eye(market.n_assets)
    rows = []
    for i in range(market.n_assets):
        held = dataclasses.replace(book, cash=0.0 * book.cash, spot=jnp.asarray(unit[i], book.spot.dtype))
        rows.append(np.asarray(simulate_paths(market, held, n_paths, plan, seed=seed).equity, np.float64))
    return np.stack(rows, axis=1)


def touch_book(market: Market, barrier: float, *, asset: str | None = None, rate: float = 0.004, **costs) -> Book:
    """One isolated position of notional 1 that is liquidated when its relative price touches the barrier.

    Long for a barrier below 1, short above. The book's capital is the margin alone.
    """
    side = 1.0 if barrier < 1.0 else -1.0
    margin = side * (1.0 - barrier) + rate * barrier
    account = dict(
        name="touch",
        venue=tiered(rate, **costs),
        mode="isolated",
        margin=margin,
        positions={asset or market.assets[0]: side},
    )
    # margin above the capital of 1 would overspend: scale the whole account
    scale = min(1.0, 1.0 / margin)
    account["margin"], account["positions"] = margin * scale, {asset or market.assets[0]: side * scale}
    return build_book(market.assets, perpetuals=[account], dtype=market.drift.dtype)


def assert_mc(sample, expected, n_sigma=4.0):
    """Sample mean within n_sigma standard errors (4: false alarm 6e-5, 5: 6e-7)."""
    sample = np.asarray(sample, np.float64)
    error = sample.std(ddof=1) / np.sqrt(sample.size)
    assert abs(sample.mean() - expected) < n_sigma * error, (sample.mean(), expected, error)


def assert_frequency(count, n, probability, n_sigma=4.0):
    """Binomial frequency within n_sigma standard deviations of its law."""
    sd = np.sqrt(probability * (1.0 - probability) / n)
    assert abs(count / n - probability) < n_sigma * sd, (count / n, probability, sd)


def assert_quantile(sample, level, quantile, n_sigma=4.0):
    """The share of the sample below a known quantile is binomial: no density needed."""
    assert_frequency(np.count_nonzero(np.asarray(sample) < quantile), np.size(sample), level, n_sigma)


def assert_lower_tail_mean(sample, level, expected, n_sigma=4.0):
    """Mean below the level's quantile, by q - E(q - X)^+ / level, with its asymptotic error."""
    sample = np.asarray(sample, np.float64)
    q = np.quantile(sample, level, method="inverted_cdf")
    below = np.maximum(q - sample, 0.0)
    error = below.std() / level / np.sqrt(sample.size)
    assert abs(q - below.mean() / level - expected) < n_sigma * error, (q - below.mean() / level, expected, error)
