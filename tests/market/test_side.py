"""Side processes against their exact laws, worked examples, and themselves at other steps.

Statistics within 4 standard errors: false alarm 6e-5 each.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special, stats

from qpo_sim import random, simulate
from qpo_sim.errors import InputError
from qpo_sim.market import line, model, presets
from qpo_sim.market.side import basis, borrow_rate, depth, funding, gas, implied_volatility, oracle, peg, process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import materialised
from qpo_sim.random import Address, Stream, stream_key

F32, F64 = jnp.float32, jnp.float64
MODULES = (funding, borrow_rate, gas, depth, peg, basis, implied_volatility, oracle)
N = 100_000
LOG_TWO = np.log(2.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Market:
    """Independent Brownian log-returns of one law; one regime unless masks are given."""

    n_assets: int = dataclasses.field(default=1, metadata={"static": True})
    per_day: float = 0.03
    drift_per_day: float = 0.0
    masks: tuple[float, ...] = ()
    jump: float | None = None
    side: dict[str, float] = dataclasses.field(default_factory=dict)
    stacked: bool = dataclasses.field(default=False, metadata={"static": True})

    def rows(self, values):
        return jnp.stack(list(values)) if self.stacked or self.n_assets > 32 else tuple(values)

    def view(self, at: Address, log_price, hours: float) -> View:
        days, one = hours / 24.0, jnp.ones_like(log_price[0])
        move = [
            self.drift_per_day * days + self.per_day * days**0.5 * e.astype(one.dtype)
            for e in at.normals(len(log_price))
        ]
        if self.jump is not None:
            move = [r + self.jump for r in move]
        return View(
            log_return=self.rows(move),
            log_price=self.rows([p + r for p, r in zip(log_price, move, strict=True)]),
            masks=tuple(m * one for m in self.masks),
            volatility=self.rows([self.per_day * days**0.5 * one] * self.n_assets),
            jump=None if self.jump is None else self.rows([self.jump * one] * self.n_assets),
            side={name: self.rows([x * one] * self.n_assets) for name, x in self.side.items()},
        )


@partial(jax.jit, static_argnames=("n_paths", "n_steps", "hours", "keep"))
def _drive(parts, keys, market, *, n_paths, n_steps, hours, keep):
    path = jnp.arange(n_paths, dtype=jnp.uint32)
    one = jnp.ones(n_paths, jax.tree.leaves(parts)[0].dtype)
    prepared = [part.prepare(step_hours=hours) for part in parts]

    def step(carry, t):
        states, log_price, paid, _ = carry
        view = market.view(Address(keys[0], path, t, 0), log_price, hours)
        at, after, outputs = Address(keys[1], path, t, 0), [], dict(view.side)
        for part, ready, state in zip(parts, prepared, states, strict=True):
            state, named = materialised(part.step)(ready, t, state, view._replace(side=dict(outputs)), at)
            after.append(state)
            outputs.update(named)
            at = at.after(part.n_slots)
        outputs.update(log_price=view.log_price, log_return=view.log_return)
        outputs = {name: jnp.stack(list(x)) if isinstance(x, tuple) else x for name, x in outputs.items()}
        paid = paid + outputs.get("funding_accrued", 0.0)
        outputs["paid"] = paid
        row = {"last": None, "all": outputs, "finite": {n: jnp.all(jnp.isfinite(x)) for n, x in outputs.items()}}
        return (tuple(after), view.log_price, paid, outputs), row[keep]

    start = Address(keys[1], path, jnp.zeros((), jnp.int32), 0)
    states = tuple(part.init(ready, one, start) for part, ready in zip(parts, prepared, strict=True))
    zeros = market.rows([0.0 * one] * market.n_assets)
    first = (states, zeros, jnp.stack([0.0 * one] * market.n_assets))
    shapes = jax.eval_shape(lambda t: step((*first, None), t)[0][3], jnp.zeros((), jnp.int32))
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry, kept = lax.scan(step, (*first, blank), jnp.arange(n_steps, dtype=jnp.int32))
    return carry[3] if keep == "last" else kept


def drive(*parts, n_paths=N, n_steps=1, hours=24.0, market=None, keep="last", seed=0):
    """Outputs of the components on simulated returns: of the last step, of all, or whether they are finite."""
    keys = tuple(stream_key(seed, stream) for stream in (Stream.SHOCK, Stream.SIDE))
    dtype = jax.tree.leaves(parts)[0].dtype
    market = jax.tree.map(lambda x: jnp.asarray(x, dtype), Market() if market is None else market)
    out = _drive(parts, keys, market, n_paths=n_paths, n_steps=n_steps, hours=hours, keep=keep)
    return {name: np.asarray(x) for name, x in out.items()}


def assert_mean(sample, expected, n_sigma=4.0):
    sample = np.ravel(sample)
    error = sample.std(ddof=1) / np.sqrt(sample.size)
    assert abs(sample.mean() - expected) < n_sigma * error, (sample.mean(), expected, error)


def assert_frequency(hits, expected, n_sigma=4.0):
    hits = np.ravel(hits)
    error = np.sqrt(expected * (1.0 - expected) / hits.size)
    assert abs(hits.mean() - expected) < n_sigma * error, (hits.mean(), expected, error)


def assert_moments(x, y, mean, variance, covariance, y_mean):
    """Mean and variance of x, and its covariance with y, whose mean is known."""
    assert_mean(x, mean)
    assert_mean((x - mean) ** 2, variance)
    assert_mean((x - mean) * (y - y_mean), covariance)


def within(case, got, expected):
    tolerance = case["tolerance"]
    np.testing.assert_allclose(np.asarray(got), expected, rtol=tolerance["rel"], atol=tolerance["abs"])


# Mean reversion.


@pytest.mark.parametrize("dtype, rtol", [(F64, 1e-12), (F32, 2e-5)])
def test_transition_constants(dtype, rtol):
    x = np.array([1e-9, 1e-5, 1e-3, 0.1, 0.7, 0.999, 1.001, 3.0, 40.0, 500.0])
    half_life = jnp.asarray(LOG_TWO / x, dtype)
    got = process.reversion(half_life, 1.0)
    big = x.astype(np.longdouble)
    gain = -np.expm1(-big) / big
    # The closed form of the timing term is only of use where it does not cancel.
    closed = -np.expm1(-2 * big) / (2 * big) - gain**2
    timing = np.where(x < 0.01, big**2 / 12 * (1 - big + big**2 * 0.55), closed)
    np.testing.assert_allclose(got.decay, np.exp(-x), rtol=10 * rtol, atol=1e-30)
    np.testing.assert_allclose(got.noise, np.sqrt(-np.expm1(-2 * x)), rtol=rtol)
    np.testing.assert_allclose(got.gain, gain.astype(float), rtol=rtol)
    np.testing.assert_allclose(got.timing, timing.astype(float), rtol=max(rtol, 1e-6))
    slopes = jax.grad(lambda h: sum(jnp.sum(c) for c in process.reversion(h, 1.0)))(half_life)
    assert np.all(np.isfinite(slopes))


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_reversion_has_one_law_at_every_step(hours):
    """Mean, variance and covariance with the return after 48 hours, by the closed form."""
    half_life, s, beta, sigma, mu = 20.0, 0.4, 12.0, 0.04, 0.005
    part = borrow_rate.borrow_rate(
        0, utilisation=0.7, deviation=s, half_life_hours=half_life, return_response=beta, initial=0.9, dtype=F64
    )
    out = drive(part, n_steps=round(48 / hours), hours=hours, market=Market(per_day=sigma, drift_per_day=mu))
    logit, total = special.logit(out["utilisation"][0]), out["log_price"][0]
    kappa, level = 24.0 * LOG_TWO / half_life, special.logit(0.7)
    a = np.exp(-2.0 * kappa)
    mean = level + a * (special.logit(0.9) - level) + beta * mu * (1 - a) / kappa
    variance = s**2 * (1 - a**2) + (beta * sigma) ** 2 * (1 - a**2) / (2 * kappa)
    assert_moments(logit, total, mean, variance, beta * sigma**2 * (1 - a) / kappa, 2 * mu)


def test_stationary_law_and_memory():
    s, half_life, beta, sigma = 0.5, 12.0, 10.0, 0.03
    part = borrow_rate.borrow_rate(
        0, utilisation=0.8, deviation=s, half_life_hours=half_life, return_response=beta, dtype=F64
    )
    out = drive(part, n_steps=22, hours=8.0, market=Market(per_day=sigma), keep="all")
    x = special.logit(out["utilisation"][-3:, 0]) - special.logit(0.8)
    kappa = 24.0 * LOG_TWO / half_life
    variance = s**2 + (beta * sigma) ** 2 / (2 * kappa)
    assert_mean(x[0], 0.0)
    assert_mean(x[0] ** 2, variance)
    for lag in (1, 2):
        assert_mean(x[0] * x[lag], variance * 0.5 ** (8.0 * lag / half_life))


@pytest.mark.parametrize("antithetic", [False, True])
def test_normals_are_those_of_the_address(antithetic):
    path, mirror = jnp.arange(64, dtype=jnp.uint32), None
    if antithetic:
        path, mirror = random.antithetic(path)
    at = Address(stream_key(5, Stream.SIDE), path, jnp.asarray(9, jnp.int32), 3, mirror)
    np.testing.assert_allclose(process.normals(at, 5, F32), at.normals(5), rtol=1e-5, atol=1e-6)


def test_arrivals_of_rare_events_keep_their_frequency():
    """1e-8 per step is far below the 2^-23 of a uniform; a first arrival splits its step evenly."""
    path = jnp.arange(1 << 16, dtype=jnp.uint32)
    key = stream_key(3, Stream.SIDE)

    def count(t):
        first = process.arrivals(Address(key, path, t, 0), jnp.full(path.shape, 1e-8, F32), 1)[0]
        return jnp.sum(first.happens)

    # 2^16 * 2^12 draws, 2.7 arrivals expected: none has probability 0.07, more than 12 1e-5; at least the smallest
    # cells must count, so compare the threshold itself.
    smallest = process.exponential(jnp.asarray([0, 42, 43], jnp.uint32), F32)
    np.testing.assert_allclose(smallest, (np.array([0, 42, 43]) + 0.5) * 2.0**-32, rtol=1e-6)
    assert float(jnp.sum(lax.map(count, jnp.arange(1 << 12, dtype=jnp.int32)))) <= 12
    found = process.arrivals(Address(key, path, jnp.zeros((), jnp.int32), 0), jnp.full(path.shape, 0.4, F64))
    n = sum(np.asarray(a.happens) for a in found)
    for k in range(3):
        assert_frequency(n == k, stats.poisson.pmf(k, 0.4))
    first = np.asarray(found[0].left)[np.asarray(found[0].happens) > 0]
    assert stats.kstest(first, lambda left: (np.exp(-0.4 * (1 - left)) - np.exp(-0.4)) / -np.expm1(-0.4)).pvalue > 1e-4


# Funding.


def test_funding_example(cases):
    case = cases("domain")["perp-11"]
    p, expected = case["inputs"], case["expected"]
    sample = [jnp.asarray([s[name] for s in p["samples"]], F64) for name in ("impact_bid", "impact_ask", "index")]
    within(case, funding.premium_index(*sample), expected["premium_index"])
    premium = funding.weighted_premium(jnp.asarray(p["premium_series"], F64))
    within(case, premium, expected["weighted_premium"])
    rate = funding.funding_rate(premium, p["interest"], 5e-4, 3e-3)
    within(case, rate, expected["funding"])
    within(case, p["qty"] * p["mark"] * rate, expected["long_pays_usdt"])


def test_funding_clamp_and_cap():
    premium = jnp.asarray([-0.05, -1e-3, -4e-4, 0.0, 3e-4, 6e-4, 1e-3, 0.05], F64)
    np.testing.assert_allclose(
        funding.funding_rate(premium, 1e-4, 5e-4, 3e-3), [-3e-3, -5e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-4, 3e-3], atol=1e-18
    )
    # A dead band is the same formula without interest.
    np.testing.assert_allclose(
        funding.funding_rate(jnp.asarray([-1e-3, 1e-4, 3e-4], F64), 0.0, 2.5e-4, 5e-3), [-7.5e-4, 0.0, 5e-5], atol=1e-18
    )
    smooth = funding.smoothed_funding_rate(premium, 1e-4, 5e-4, 3e-3, 5e-5)
    assert np.max(np.abs(smooth - funding.funding_rate(premium, 1e-4, 5e-4, 3e-3))) < 1.4 * 5e-5
    slope = jax.vmap(jax.grad(lambda x: funding.smoothed_funding_rate(x, 1e-4, 5e-4, 3e-3, 5e-5)))(premium)
    assert np.all(slope[1:-1] > 0.0)


def test_share_of_rates_at_the_interest():
    """Mean 0.7 bp and deviation 4 bp: what BitMEX reported, 78.19 % at 0.01 % and more than 92 % positive."""
    part = funding.funding(1, half_life_hours=8.0, dtype=F64)
    rate = drive(part, n_steps=20, hours=8.0)["funding_rate"][0]
    pinned = stats.norm.cdf(6.0, 0.7, 4.0) - stats.norm.cdf(-4.0, 0.7, 4.0)
    positive = stats.norm.sf(-5.0, 0.7, 4.0)
    assert abs(pinned - 0.7819) < 0.006 and positive > 0.92
    assert_frequency(rate == np.float64(1e-4), pinned)
    assert_frequency(rate > 0.0, positive)


@pytest.mark.parametrize("hours", [4.0, 8.0, 24.0])
def test_funding_paid_has_one_law_at_every_step(hours):
    """Without clamp the rate is the premium and five days of payments are Gaussian; moments by recursion."""
    s, half_life, beta, sigma, mu = 4e-4, 30.0, 0.01, 0.04, 0.004
    part = funding.funding(
        1, mean=1e-4, deviation=s, half_life_hours=half_life, return_response=beta, initial=8e-4, clamp=0.0, cap=1.0,
        dtype=F64,
    )  # fmt: skip
    out = drive(part, n_steps=round(120 / hours), hours=hours, market=Market(per_day=sigma, drift_per_day=mu))
    paid, premium, total = out["paid"][0], out["premium"][0], out["log_price"][0]
    kappa, n = LOG_TWO / half_life, 15
    a, per_hour = np.exp(-8.0 * kappa), sigma**2 / 24.0
    gain = (1 - a) / kappa
    noise = s**2 * (1 - a**2) + beta**2 * per_hour * (1 - a**2) / (2 * kappa)
    # Weight of the innovation of interval i in the sum of the premiums after it.
    weight = (1 - a ** (n - np.arange(n))) / (1 - a)
    start = 8e-4 - 1e-4
    drift = beta * mu / 24.0 * gain
    mean = n * 1e-4 + start * a * (1 - a**n) / (1 - a) + drift * weight.sum()
    cross = beta * per_hour * gain
    assert_moments(paid, total, mean, noise * np.sum(weight**2), cross * weight.sum(), 5 * mu)
    last = 1e-4 + start * a**n + drift * weight[0]
    assert_moments(premium, total, last, noise * (1 - a ** (2 * n)) / (1 - a**2), cross * weight[0], 5 * mu)
    assert_mean((paid - mean) * (premium - last), noise * np.sum(weight * a ** (n - 1 - np.arange(n))))


def test_funding_is_paid_at_settlements_only():
    part = funding.funding(2, deviation=0.0, mean=8e-4, dtype=F64)
    out = drive(part, n_paths=3, n_steps=5, hours=4.0, market=Market(2), keep="all")["funding_accrued"]
    np.testing.assert_allclose(out[:, 0, 0], [0.0, 3e-4, 0.0, 3e-4, 0.0], atol=1e-15)
    hourly = funding.funding(1, deviation=0.0, mean=8e-4, settlement_hours=1.0, dtype=F64)
    np.testing.assert_allclose(drive(hourly, n_paths=1)["funding_accrued"], 24 * 3e-4 / 8)


# Lending rates.


def test_kinked_rate_example(cases):
    case = cases("domain")["lend-07"]
    p, expected = case["inputs"], case["expected"]
    u = jnp.asarray(p["utilisation"], F64)
    borrow = borrow_rate.kinked_rate(u, p["base"], p["slope1"], p["slope2"], p["optimal"])
    within(case, borrow, expected["borrow_apr"])
    within(case, borrow_rate.supplied_rate(borrow, u, p["reserve_factor"]), expected["supply_apr"])
    seconds = 365 * 86400
    within(case, (1 + np.asarray(borrow) / seconds) ** seconds - 1, expected["borrow_apy"])


def test_pools_follow_their_assets_and_regime():
    part = borrow_rate.borrow_rate(
        ["B", "A"], assets=("A", "B"), utilisation=[0.5, 0.9], deviation=0.0, return_response=[3.0, 0.0],
        half_life_hours=1e9, initial=0.5, dtype=F64,
    )  # fmt: skip
    out = drive(part, n_paths=1000, market=Market(2, masks=(0.0,)))
    # Without mean reversion a pool moves with the return alone.
    np.testing.assert_allclose(special.logit(out["utilisation"][0]), 3.0 * out["log_return"][1], atol=1e-6)
    np.testing.assert_allclose(out["utilisation"][1], 0.5, atol=1e-7)
    fast = dataclasses.replace(part, half_life_hours=jnp.full(2, 1e-3))
    calm = drive(fast, n_paths=10, market=Market(2, per_day=0.0, masks=(0.0,)))["utilisation"]
    stress = drive(fast, n_paths=10, market=Market(2, per_day=0.0, masks=(1.0,)))["utilisation"]
    np.testing.assert_allclose(calm, 0.5)
    np.testing.assert_allclose(stress, 0.9)


# Gas.


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_gas_has_one_law_at_every_step(hours):
    """X and the shot noise of spikes after 48 hours; sizes uniform, so the second moment is (a^2 + ab + b^2) / 3."""
    s, beta, sigma = 0.3, -8.0, 0.04
    low, high, per_day, half_life = 1.0, 3.0, 0.3, 9.0
    part = gas.gas(
        level=2.0, deviation=s, half_life_hours=30.0, return_response=beta, volatility_response=0.5, initial=1.0,
        reference_volatility=0.04 * 365**0.5 / 4.0, spike_per_day=per_day, spike_low=low, spike_high=high,
        spike_half_life_hours=half_life, move_response=0.0, dtype=F64,
    )  # fmt: skip
    out = drive(part, n_steps=round(48 / hours), hours=hours, market=Market(per_day=sigma))
    log_gas, total = np.log(out["gas"]), out["log_price"][0]
    kappa, fade = 24 * LOG_TWO / 30.0, 24 * LOG_TWO / half_life
    a, b = np.exp(-2 * kappa), np.exp(-2 * fade)
    level = np.log(2.0) + 0.5 * np.log(4.0)
    mean = level * (1 - a) + per_day * (low + high) / 2 * (1 - b) / fade
    square = (low**2 + low * high + high**2) / 3
    variance = (s**2 + (beta * sigma) ** 2 / (2 * kappa)) * (1 - a**2) + per_day * square * (1 - b**2) / (2 * fade)
    assert_moments(log_gas, total, mean, variance, beta * sigma**2 * (1 - a) / kappa, 0.0)


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_moves_raise_gas_by_their_variance(hours):
    """b E[r^2] does not depend on the step."""
    b, sigma = 20.0, 0.03
    part = gas.gas(
        deviation=1e-9, volatility_response=0.0, spike_per_day=0.0, move_response=b, move_limit=1e6, level=1.0,
        dtype=F64,
    )  # fmt: skip
    out = drive(part, n_steps=round(48 / hours), hours=hours, market=Market(per_day=sigma))
    fade = 24 * LOG_TWO / 6.0
    assert_mean(np.log(out["gas"]), b * sigma**2 * (1 - np.exp(-2 * fade)) / fade)


def test_gas_leaps_in_a_crash():
    """A fall of 40 % in a day raises the log by more than 1, one of 3 % by less than 0.05; no step by more than l."""
    part = gas.gas(deviation=0.0, volatility_response=0.0, spike_per_day=0.0, level=1.0, dtype=F64)
    for jump, low, high in ((-0.5, 0.4, 5.0), (-0.03, 0.0, 0.05), (-50.0, 1.5, 5.0)):
        rise = np.log(drive(part, n_paths=1, market=Market(per_day=0.0, jump=jump))["gas"])
        assert low < rise < high


# Depth.


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_depth_has_one_law_at_every_step(hours):
    s, beta, sigma = 0.3, 2.0, 0.03
    part = depth.depth(
        1, level=0.5, deviation=s, half_life_hours=6.0, return_response=beta, move_response=0.0, initial=1.0, dtype=F64
    )
    out = drive(part, n_steps=round(8 / hours), hours=hours, market=Market(per_day=sigma))
    kappa = 24 * LOG_TWO / 6.0
    a = np.exp(-kappa / 3)
    variance = (s**2 + (beta * sigma) ** 2 / (2 * kappa)) * (1 - a**2)
    assert_moments(
        np.log(out["depth"][0]),
        out["log_price"][0],
        np.log(0.5) * (1 - a),
        variance,
        beta * sigma**2 * (1 - a) / kappa,
        0.0,
    )
    moves = depth.depth(1, deviation=1e-9, half_life_hours=6.0, move_response=50.0, move_limit=1e6, dtype=F64)
    fallen = np.log(drive(moves, n_steps=round(8 / hours), hours=hours, market=Market(per_day=sigma))["depth"])
    assert_mean(fallen, -50.0 * sigma**2 * (1 - a) / kappa)


def test_depth_falls_with_regime_moves_and_jumps_and_recovers():
    part = depth.depth(2, level=[1.0, 0.03], deviation=0.0, half_life_hours=2.0, initial=1.0, dtype=F64)

    def level(n_steps=1, **changes):
        return drive(part, n_paths=2, n_steps=n_steps, hours=1.0, market=Market(2, per_day=0.0, **changes))["depth"][
            0, 0
        ]

    assert level(masks=(0.0,)) == 1.0
    assert level(masks=(1.0,)) < level(masks=(0.0,))
    np.testing.assert_allclose(level(60, masks=(1.0,)), 0.03, rtol=1e-5)
    gain = (1 - 0.5**0.5) / (0.5 * LOG_TWO)
    size = 50.0 * 0.2**2
    np.testing.assert_allclose(np.log(level(masks=(0.0,), jump=-0.2)), -gain * (size / (1 + size / 4.0) + 5.0 * 0.2))
    # By symmetry a rise takes as much away; the largest moves leave a positive depth.
    assert level(masks=(0.0,), jump=0.2) == level(masks=(0.0,), jump=-0.2)
    assert 0.0 < level(masks=(0.0,), jump=-1.5) < 1e-3


# Stablecoins.


@pytest.mark.parametrize("a, b", [(2.0, 14.0), (2.0, 6.0), (4.0, 2.0), (0.5, 0.5), (1.0, 30.0)])
def test_beta_sizes(a, b):
    coefficients = peg.beta_size(a, b)
    zeta = np.linspace(-5.4, 5.4, 301)
    size = special.expit(np.polynomial.polynomial.polyval(zeta / 5.6, coefficients))
    probability = stats.beta.cdf(size, a, b)
    np.testing.assert_allclose(probability, stats.norm.cdf(zeta), atol=1e-4)
    weight = stats.norm.pdf(zeta) / stats.norm.pdf(zeta).sum()
    np.testing.assert_allclose(weight @ size, a / (a + b), rtol=1e-3)


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_depegs_have_one_law_at_every_step(hours):
    """dE[D] = (lambda E[d](1 - E[D]) - kappa E[D]) dt; E[1 - loss] = exp(-lambda E[L] t); both per day."""
    per_year, half_life = 60.0, 10.0
    quiet = dict(deviation=0.0, dtype=F64)
    part = peg.peg(("X",), depeg_per_year=per_year, depeg_half_life_hours=half_life, impairment_per_year=0.0, **quiet)
    out = drive(part, n_steps=round(72 / hours), hours=hours)
    lam, kappa = per_year / 365 * 0.125, 24 * LOG_TWO / half_life
    assert_mean(1.0 - out["peg"], lam / (kappa + lam) * (1 - np.exp(-3 * (kappa + lam))))
    # Those never hit.
    assert_frequency(out["peg"] == 1.0, np.exp(-3 * per_year / 365))
    lost = peg.peg(("X",), depeg_per_year=0.0, impairment_per_year=15.0, impairment=(2.0, 6.0), **quiet)
    out = drive(lost, n_steps=round(72 / hours), hours=hours)["peg"]
    assert_mean(out, np.exp(-3 * 15.0 / 365 * 0.25))
    assert_frequency(out == 1.0, np.exp(-3 * 15.0 / 365))


def test_a_depeg_heals_and_an_impairment_stays():
    """p(t) = 1 - D e^(-kappa t) after the event, and p = 1 - L for good."""
    quiet = dict(deviation=0.0, dtype=F64)
    part = peg.peg(("X",), depeg_per_year=3.0, depeg_half_life_hours=12.0, impairment_per_year=0.0, **quiet)
    price = drive(part, n_paths=4000, n_steps=20, hours=6.0, keep="all")["peg"][:, 0]
    discount = 1.0 - price
    ratio = discount[1:][discount[:-1] > 0] / discount[:-1][discount[:-1] > 0]
    # One event a path in most: between events the discount halves in 12 hours.
    assert np.mean(np.abs(ratio - 0.5**0.5) < 1e-9) > 0.9
    assert np.all(ratio > 0.5**0.5 - 1e-9)
    lost = peg.peg(("X",), depeg_per_year=0.0, impairment_per_year=10.0, **quiet)
    price = drive(lost, n_paths=2000, n_steps=20, hours=6.0, keep="all")["peg"][:, 0]
    assert np.all(np.diff(price, axis=0) <= 0.0) and np.mean(np.diff(price, axis=0) == 0.0) > 0.95


def test_depegs_follow_falls():
    """A fall of 10 % of the driver within the day, twice the threshold, brings the whole further intensity."""
    part = peg.peg(
        ("X", "Y"), deviation=0.0, depeg_per_year=0.0, impairment_per_year=0.0, fall_per_day=[0.4, 0.0], dtype=F64,
        fall_threshold=0.05,
    )  # fmt: skip
    out = drive(part, hours=1.0, market=Market(per_day=0.0, jump=-0.12))["peg"]
    assert_frequency(out[0] < 1.0, -np.expm1(-0.4 / 24))
    assert np.all(out[1] == 1.0)
    # The recent return, with the mean age of a day in it, is -0.075 after the step: half the ramp.
    out = drive(part, hours=1.0, market=Market(per_day=0.0, jump=-0.075 * (1 / 24) / -np.expm1(-1 / 24)))["peg"]
    assert_frequency(out[0] < 1.0, -np.expm1(-0.2 / 24))
    assert np.all(drive(part, hours=1.0, market=Market(per_day=0.0, jump=0.3))["peg"] == 1.0)


def test_peg_stays_in_its_bounds():
    part = peg.peg(
        ("X", "Y"), deviation=[[0.02, 0.5]], half_life_hours=5.0, depeg_per_year=100.0, depth=(4.0, 1.0),
        impairment_per_year=15.0, impairment=(0.5, 0.5), fall_per_day=0.2, dtype=F32,
    )  # fmt: skip
    price = drive(part, n_paths=2000, n_steps=200, market=Market(per_day=0.1), keep="all")["peg"]
    assert price.min() >= 0.0 and price.max() <= 1.0501 and price.min() < 0.05


# Basis.


def _offset(ratio, band):
    return band * np.arctanh((ratio - 1.0) / band)


@pytest.mark.parametrize("minutes", [1.0, 30.0])
def test_basis_and_its_average_have_one_law_at_every_step(minutes):
    """After half an hour from 20 bp, with an average of two minutes, against the closed form."""
    s, half_life, tau, beta, sigma, start = 5e-4, 0.4, 2.0 / 60.0, 0.05, 0.05, 2e-3
    part = basis.basis(
        1, deviation=s, half_life_hours=half_life, return_response=beta, averaging_seconds=tau * 3600, initial=start,
        band=0.9, dtype=F64,
    )  # fmt: skip
    out = drive(part, n_steps=round(30 / minutes), hours=minutes / 60, market=Market(per_day=sigma))
    b, e, r = _offset(out["last_ratio"][0], 0.9), _offset(out["mark_ratio"][0], 0.9), out["log_price"][0]
    kappa, gamma, t, per_hour = LOG_TWO / half_life, 1 / tau, 0.5, sigma**2 / 24
    a, g, pull = np.exp(-kappa * t), np.exp(-gamma * t), gamma / (gamma - kappa)
    diffusion = 2 * kappa * s**2 + beta**2 * per_hour

    def decayed(rate):
        return -np.expm1(-rate * t) / rate

    mean_e = start * g + start * pull * (a - g)
    var_e = diffusion * pull**2 * (decayed(2 * kappa) - 2 * decayed(kappa + gamma) + decayed(2 * gamma))
    assert_moments(b, r, start * a, diffusion * decayed(2 * kappa), beta * per_hour * decayed(kappa), 0.0)
    assert_moments(e, r, mean_e, var_e, beta * per_hour * pull * (decayed(kappa) - decayed(gamma)), 0.0)
    cross = diffusion * pull * (decayed(2 * kappa) - decayed(kappa + gamma))
    assert_mean((b - start * a) * (e - mean_e), cross)


def test_stationary_basis():
    """Variance of the average is that of the basis times 1 / (1 + kappa tau)."""
    part = basis.basis(1, deviation=1e-3, half_life_hours=0.2, averaging_seconds=120.0, band=0.9, dtype=F64)
    out = drive(part, n_steps=12, hours=0.5, market=Market(per_day=0.0))
    b, e = _offset(out["last_ratio"], 0.9), _offset(out["mark_ratio"], 0.9)
    share = 1 / (1 + LOG_TWO / 0.2 / 30.0)
    assert_mean(b**2, 1e-6)
    assert_mean(e**2, 1e-6 * share)
    assert_mean(b * e, 1e-6 * share)


def test_basis_follows_a_premium_and_stays_in_its_band():
    part = basis.basis(1, deviation=0.0, half_life_hours=0.01, averaging_seconds=1.0, follows="premium", dtype=F64)
    out = drive(part, n_paths=1, market=Market(per_day=0.0, side={"premium": 2e-3}))
    np.testing.assert_allclose(out["mark_ratio"], 1.002, rtol=1e-7)
    with pytest.raises(InputError, match="follows 'premium'"):
        drive(part, n_paths=1)
    wild = basis.basis(1, deviation=2.0, band=0.3, dtype=F32)
    ratio = drive(wild, n_paths=1000, n_steps=10)["mark_ratio"]
    assert ratio.min() >= 0.7 - 1e-6 and ratio.max() <= 1.3 + 1e-6


# Implied volatility.


def test_ssvi_example(cases):
    case = cases("domain")["opt-09"]
    p, expected = case["inputs"], case["expected"]
    k = jnp.asarray(p["k"], F64)
    for atm, row in zip(p["atm"], expected["slices"], strict=True):
        outputs = {
            name: jnp.full(k.shape, x)
            for name, x in (("iv_level", atm["sigma"]), ("iv_rho", p["rho"]), ("iv_eta", p["eta"]))
        }
        maturity = atm["days"] / 365
        theta = implied_volatility.atm_total_variance(maturity, outputs)[0]
        phi = implied_volatility.curvature(theta, p["eta"], p["gamma"])
        within(case, theta, row["theta"])
        within(case, phi, row["phi"])
        within(case, implied_volatility.implied_volatility(k, maturity, outputs, p["gamma"]), row["iv"])
        within(case, theta * phi * (1 + abs(p["rho"])), row["c1"])
        within(case, theta * phi**2 * (1 + abs(p["rho"])), row["c2"])
        found = implied_volatility.static_arbitrage(outputs, np.linspace(-2, 2, 81), [maturity, 2 * maturity])
        assert bool(jnp.all(found.is_free())) == expected["butterfly_free"]
    within(case, p["eta"] * (1 + abs(p["rho"])), expected["eta_bound"])
    # The case's four maturities are one surface: its total variance at the money rises.
    assert all(np.diff([row["theta"] for row in expected["slices"]]) > 0) == expected["calendar_free"]


def _surface(**values):
    return {f"iv_{name}": jnp.asarray([x], F64) for name, x in values.items()}


def test_term_structure_and_its_limits():
    surface = _surface(level=0.9, rho=-0.2, eta=0.9, long=0.5, reversion=4.0)
    maturity = np.array([1e-9, 0.01, 0.1, 1.0, 30.0])
    theta = np.concatenate([implied_volatility.atm_total_variance(t, surface) for t in maturity])
    exact = 0.25 * maturity + (0.81 - 0.25) * -np.expm1(-4.0 * maturity) / 4.0
    np.testing.assert_allclose(theta[1:], exact[1:], rtol=1e-12)
    at_the_money = implied_volatility.implied_volatility(0.0, 1e-6, surface)
    np.testing.assert_allclose(at_the_money, 0.9, rtol=1e-5)


def test_arbitrage_is_seen_where_there_is_some():
    k, maturities = np.linspace(-3, 3, 121), [0.02, 0.1, 0.5, 1.0]
    free = implied_volatility.static_arbitrage(_surface(level=0.6, rho=-0.5, eta=1.3), k, maturities)
    assert bool(free.is_free()[0])
    wings = implied_volatility.static_arbitrage(_surface(level=0.6, rho=-0.9, eta=6.0), k, maturities)
    assert float(wings.butterfly[0]) < -0.01 and not bool(wings.is_free()[0])
    # Durrleman's g by finite differences of the total variance.
    surface = _surface(level=0.6, rho=-0.5, eta=1.3)

    def w(x):
        return implied_volatility.implied_volatility(x, 0.1, surface)[0] ** 2 * 0.1

    x = 0.3
    first, second = jax.grad(w)(x), jax.grad(jax.grad(w))(x)
    g = (1 - x * first / (2 * w(x))) ** 2 - first**2 / 4 * (1 / w(x) + 0.25) + second / 2
    found = implied_volatility.static_arbitrage(surface, [x], [0.1, 0.2]).butterfly[0]
    lower = implied_volatility.static_arbitrage(surface, [x], [0.1, 0.1000001]).butterfly[0]
    np.testing.assert_allclose(lower, g, rtol=1e-5)
    assert found <= lower + 1e-12


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_iv_factors_have_one_law_at_every_step(hours):
    """Log variance follows returns by beta and reverts; sticky delta, so its law is closed."""
    s, beta, sigma, half_life = 0.4, -3.0, 0.04, 40.0
    reference = 0.02 * 365**0.5
    part = implied_volatility.surface(
        1, level=0.5, level_deviation=s, level_half_life_hours=half_life, level_response=beta, variance_power=0.7,
        reference_volatility=reference, initial_level=0.8, rho=-0.2, rho_deviation=0.3, rho_response=2.0,
        shape_half_life_hours=half_life, dtype=F64,
    )  # fmt: skip
    out = drive(part, n_steps=round(48 / hours), hours=hours, market=Market(per_day=sigma))
    x = 2 * np.log(out["iv_level"][0]) - 0.7 * 2 * np.log(2.0)
    kappa = 24 * LOG_TWO / half_life
    a = np.exp(-2 * kappa)
    mean = 2 * np.log(0.5) + a * 2 * np.log(0.8 / 0.5)
    variance = (s**2 + (beta * sigma) ** 2 / (2 * kappa)) * (1 - a**2)
    total = out["log_price"][0]
    assert_moments(x, total, mean, variance, beta * sigma**2 * (1 - a) / kappa, 0.0)
    y = np.arctanh(out["iv_rho"][0] / 0.999)
    variance = 0.3**2 * (1 - a**2) + (2.0 * sigma) ** 2 * (1 - a**2) / (2 * kappa)
    assert_moments(y, total, np.arctanh(-0.2 / 0.999), variance, 2.0 * sigma**2 * (1 - a) / kappa, 0.0)


def test_sticky_strike_moves_the_level_along_the_skew():
    """Slope of the 30-day at-the-money volatility on the return is R times the skew (skew-stickiness ratio)."""
    for ratio in (0.0, 1.0):
        part = implied_volatility.surface(
            1, level=0.6, level_deviation=0.0, level_response=0.0, stickiness=ratio, variance_power=0.0, rho=-0.3,
            rho_deviation=0.0, rho_response=0.0, eta=1.0, eta_deviation=0.0, long_volatility=0.6, dtype=F64,
            reversion_per_year=0.0, level_half_life_hours=1e9,
        )  # fmt: skip
        out = drive(part, n_paths=200, hours=1.0, market=Market(per_day=1e-4))
        surface = {name: jnp.asarray(x[0, 0]) for name, x in out.items() if name.startswith("iv_")}
        surface["iv_level"] = jnp.asarray(0.6)
        skew = jax.grad(implied_volatility.implied_volatility)(0.0, 30 / 365, surface)
        slope = np.polyfit(out["log_return"][0], out["iv_level"][0], 1)[0]
        np.testing.assert_allclose(slope, ratio * skew, rtol=1e-3, atol=1e-6)
        assert np.all(out["iv_stickiness"] == ratio)


def test_no_arbitrage_on_any_path_of_a_stress_run():
    """In single precision, with returns of 15 % a day and shapes that swing over all they can."""
    part = implied_volatility.surface(
        2, level=[0.6, 1.2], level_deviation=1.0, level_half_life_hours=100.0, level_response=-3.0,
        stickiness=[0.0, 1.5], rho=[[-0.1, 0.3], [-0.9, 0.6]], rho_deviation=1.5, rho_response=5.0,
        eta=[[0.9, 1.3], [1.0, 1.2]], eta_deviation=3.0, shape_half_life_hours=50.0, dtype=F32,
    )  # fmt: skip
    out = drive(part, n_paths=1000, n_steps=30, market=Market(2, per_day=0.15, masks=(1.0,)), keep="all")
    rho, eta = out["iv_rho"], out["iv_eta"]
    assert np.abs(rho).max() < 1.0 and (eta * (1 + np.abs(rho))).max() <= 2.0
    assert (eta * (1 + np.abs(rho))).max() > 1.99 and np.abs(rho).max() > 0.99
    check = jax.jit(
        partial(
            implied_volatility.static_arbitrage,
            log_moneyness=tuple(np.linspace(-1.5, 1.5, 31)),
            maturity_years=(1 / 365, 7 / 365, 30 / 365, 0.25, 1.0),
        )
    )
    for i in range(2):
        surface = {name: jnp.asarray(x[:, i].ravel()) for name, x in out.items() if name.startswith("iv_")}
        assert np.all(check(surface).is_free())


def test_implied_volatility_is_differentiable():
    surface = {name: x[0] for name, x in _surface(level=0.7, rho=-0.2, eta=0.9, long=0.5, reversion=3.0).items()}
    values = jnp.asarray([0.2, 0.1, *(surface[name] for name in sorted(surface))])

    def iv(v):
        return implied_volatility.implied_volatility(v[0], v[1], dict(zip(sorted(surface), v[2:], strict=True)))

    step = 1e-6
    for i, slope in enumerate(jax.grad(iv)(values)):
        e = jnp.zeros_like(values).at[i].set(step)
        np.testing.assert_allclose(slope, (iv(values + e) - iv(values - e)) / (2 * step), rtol=1e-6, atol=1e-9)
    one = {name: (x, 2 * x) for name, x in surface.items()}
    assert implied_volatility.of_asset({**one, "gas": 1.0}, 1)["iv_level"] == 1.4


# Oracles.


def _feed(part, log_price, hours, masks=()):
    """Reports on given log-prices (steps, paths)."""
    prepared = part.prepare(step_hours=hours)
    path = jnp.arange(log_price.shape[1], dtype=jnp.uint32)
    key, one = stream_key(0, Stream.SIDE), jnp.ones_like(log_price[0])
    at = Address(key, path, jnp.zeros((), jnp.int32), 0)

    def step(state, x):
        t, row = x
        view = View((row,), (row,), masks, (row,), None, {})
        state, out = part.step(prepared, t, state, view, dataclasses.replace(at, step=t))
        return state, (out["oracle_log_price"][0], state.outage)

    steps = jnp.arange(log_price.shape[0], dtype=jnp.int32)
    return [np.asarray(x) for x in lax.scan(step, part.init(prepared, one, at), (steps, log_price))[1]]


def _brownian(n_steps, n_paths, deviation, seed=1):
    step = np.random.default_rng(seed).normal(0.0, deviation, (n_steps, n_paths))
    return jnp.asarray(np.cumsum(step, axis=0))


def test_oracle_example(cases):
    case = cases("domain")["lend-14"]
    p, expected = case["inputs"], case["expected"]
    part = oracle.oracle(0, threshold=p["threshold"], heartbeat_hours=p["heartbeat_s"] / 3600, dtype=F64)
    price = jnp.log(jnp.asarray(p["prices"], F64) / p["prices"][0])[:, None]
    report = p["prices"][0] * np.exp(_feed(part, price, p["dt_s"] / 3600)[0][:, 0])
    within(case, report, expected["oracle"])
    within(case, np.max(np.abs(report / np.asarray(p["prices"]) - 1)), expected["max_abs_error"])
    assert np.count_nonzero(np.diff(report)) == expected["updates"]


@pytest.mark.parametrize("monitoring", ["step", "continuous"])
def test_oracle_never_deviates_by_more_than_its_threshold(monitoring):
    part = oracle.oracle(0, threshold=0.005, heartbeat_hours=2.0, monitoring=monitoring, dtype=F64)
    price = _brownian(400, 500, 0.004)
    report, _ = _feed(part, price, 0.25)
    assert np.max(np.abs(np.expm1(np.asarray(price) - report))) < 0.005 + 1e-12
    changes = np.diff(report, axis=0) != 0.0
    # A heartbeat of 8 steps: no run of 8 without an update.
    runs = np.lib.stride_tricks.sliding_window_view(changes, 8, axis=0)
    assert np.all(runs.any(axis=-1))


def test_continuous_monitoring_leaves_a_triangular_error():
    part = oracle.oracle(0, threshold=0.01, heartbeat_hours=1e6, monitoring="continuous", dtype=F64)
    price = _brownian(4, N, 0.5)
    error = np.expm1(np.asarray(price) - _feed(part, price, 24.0)[0])[-1]
    moved = np.abs(error) < 0.01
    assert moved.all()
    assert stats.kstest(error[: N // 2], stats.triang(0.5, -0.01, 0.02).cdf).pvalue > 1e-4


def test_latency_of_whole_and_part_steps():
    price = _brownian(40, 2000, 0.02)
    always = dict(threshold=1e-9, dtype=F64)
    late = _feed(oracle.oracle(0, latency_hours=3.0, **always), price, 1.0)[0]
    np.testing.assert_array_equal(late[3:], np.asarray(price)[:-3])
    np.testing.assert_array_equal(late[:3], 0.0)
    # 2.25 steps: between the prices two and three steps ago, a quarter of the way on average.
    part = _feed(oracle.oracle(0, latency_hours=2.25, **always), price, 1.0)[0]
    near, far = np.asarray(price)[1:-2], np.asarray(price)[:-3]
    weight = (part[3:] - near) / (far - near)
    assert weight.min() > -1e-6 and weight.max() < 0.5 + 1e-6
    assert_mean(weight, 0.25)
    # A step longer than the latency.
    short = _feed(oracle.oracle(0, latency_hours=0.3, **always), price, 1.0)[0]
    weight = (short[1:] - np.asarray(price)[1:]) / (np.asarray(price)[:-1] - np.asarray(price)[1:])
    assert weight.min() > -1e-6 and weight.max() < 0.6 + 1e-6
    assert_mean(weight, 0.3)


@pytest.mark.parametrize("hours", [1.0, 8.0])
def test_outages_have_one_law_at_every_step(hours):
    """Share of outages after 24 hours, and that one lasts 8, by the two-state chain; nothing is reported meanwhile."""
    per_day, mean = 1.5, 6.0
    part = oracle.oracle(0, threshold=1e-9, outage_per_day=[0.0, per_day], outage_hours=mean, dtype=F64)
    price = _brownian(round(24 / hours), N // 2, 0.01)
    report, outage = _feed(part, price, hours, masks=(jnp.ones(N // 2),))
    start, end = per_day / 24, 1 / mean
    share = start / (start + end)
    assert_frequency(outage[-1], share * -np.expm1(-24 * (start + end)))
    before = outage[round(16 / hours) - 1] > 0.5
    assert_frequency(outage[-1][before], share + (1 - share) * np.exp(-8 * (start + end)))
    held = outage[1:] > 0.5
    assert np.all(np.diff(report, axis=0)[held] == 0.0) and np.all(np.diff(report, axis=0)[~held] != 0.0)
    calm = _feed(part, price, hours, masks=(jnp.zeros(N // 2),))[1]
    assert not calm.any()


# What all of them promise.

NO_GRADIENT = {
    gas: {"spike_per_day"},
    peg: {"depeg_per_day", "fall_per_day", "fall_threshold", "impairment_per_day", "window_hours"},
    oracle: {"heartbeat_hours", "outage_per_day", "outage_hours", "threshold"},
}


def _parts_for_gradients():
    stress = np.array([[1.0], [2.0]])
    return {
        funding: funding.funding(
            1, mean=[1e-4, -5e-4], deviation=4e-4 * stress, return_response=0.01, smoothed_width=5e-5, dtype=F64,
            settlement_hours=4.0,
        ),
        borrow_rate: borrow_rate.borrow_rate(
            0, utilisation=[0.8, 0.97], optimal=0.85, return_response=1.0, base=0.01, dtype=F64
        ),
        gas: gas.gas(
            level=[0.3, 1.0], spike_per_day=0.4, volatility_response=0.4, return_response=-2.0, move_response=20.0,
            move_limit=3.0, dtype=F64,
        ),
        depth: depth.depth(1, level=[1.0, 0.1], return_response=1.0, dtype=F64),
        peg: peg.peg(
            ("X",), depeg_per_year=100.0, impairment_per_year=15.0, fall_per_day=0.1, deviation=2e-3, dtype=F64
        ),
        basis: basis.basis(
            1, deviation=[1e-3, 4e-3], mean=1e-3, return_response=0.1, jump_response=0.2, averaging_seconds=3000.0,
            half_life_hours=7.0, follows="premium", follow_weight=0.5, initial=2e-3, band=0.2, dtype=F64,
        ),
        implied_volatility: implied_volatility.surface(
            1, level=[0.5, 0.8], stickiness=[0.2, 1.0], rho=[-0.1, -0.3], eta_response=0.2, dtype=F64
        ),
        oracle: oracle.oracle(0, threshold=0.02, latency_hours=5.0, outage_per_day=0.3, dtype=F64),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_gradients_against_central_differences(module):
    """Every leaf along a random direction; leaves that decide whether something happens have exact zeros."""
    part = _parts_for_gradients()[module]
    market = Market(1, per_day=0.04, masks=(0.6,), jump=-0.05, side={"premium": 1e-3})
    market = jax.tree.map(lambda x: jnp.asarray(x, F64), market)
    keys = tuple(stream_key(0, stream) for stream in (Stream.SHOCK, Stream.SIDE))

    @jax.jit
    @jax.value_and_grad
    def value(part):
        out = _drive((part,), keys, market, n_paths=256, n_steps=3, hours=8.0, keep="all")
        named = [x for name, x in sorted(out.items()) if name not in ("log_price", "log_return")]
        return sum((1.0 + 0.1 * k) * jnp.mean(x) + jnp.mean(x * x) for k, x in enumerate(named))

    gradient = value(part)[1]
    rng = np.random.default_rng(0)
    for leaf in dataclasses.fields(part):
        if leaf.metadata.get("static"):
            continue
        entry, slope = getattr(part, leaf.name), np.asarray(getattr(gradient, leaf.name))
        if leaf.name in NO_GRADIENT.get(module, ()):
            assert not slope.any(), leaf.name
            continue
        direction = np.asarray(rng.uniform(0.5, 1.5, entry.shape) * np.maximum(np.abs(entry), 1e-3))
        up, down = (
            float(value(dataclasses.replace(part, **{leaf.name: entry + sign * 1e-5 * direction}))[0])
            for sign in (1, -1)
        )
        np.testing.assert_allclose(
            np.sum(slope * direction), (up - down) / 2e-5, rtol=1e-4, atol=1e-7 * abs(up), err_msg=leaf.name
        )
        assert slope.any() or leaf.name == "cap", leaf.name


def test_oracle_passes_the_gradient_of_prices_on():
    part = oracle.oracle(0, threshold=0.02, dtype=F64)
    price = _brownian(6, 50, 0.02)

    def report(scale):
        prepared = part.prepare(step_hours=0.1)
        at = Address(stream_key(0, Stream.SIDE), jnp.arange(50, dtype=jnp.uint32), jnp.zeros((), jnp.int32), 0)
        state = part.init(prepared, jnp.ones(50), at)
        for row in price:
            state, out = part.step(prepared, 0, state, View((row,), (scale * row,), (), (row,), None, {}), at)
        return jnp.mean(out["oracle_log_price"][0] ** 2)

    step = 1e-7
    np.testing.assert_allclose(jax.grad(report)(1.0), (report(1 + step) - report(1 - step)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(
    "n_assets, stacked",
    [(1, False), pytest.param(30, True, marks=pytest.mark.slow), pytest.param(30, False, marks=pytest.mark.slow)],
    ids=["one", "thirty", "thirty rows"],
)
@pytest.mark.slow
def test_finite_over_ten_thousand_steps(n_assets, stacked, monkeypatch):
    """All components together in single precision, with 8 % a day and the regime of the largest stress."""
    if stacked:
        monkeypatch.setattr(process, "MAX_UNROLLED_ASSETS", 1)
    parts = tuple(module.example(n_assets, F32, 2) for module in MODULES)
    market = Market(n_assets, per_day=0.08, masks=(1.0,), stacked=stacked)
    finite = drive(*parts, n_paths=8, n_steps=10_000, market=market, keep="finite")
    assert all(np.all(x) for x in finite.values()), {name: np.argmin(x) for name, x in finite.items() if not np.all(x)}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_examples_draw_within_their_slots_and_in_one_precision(module, monkeypatch):
    used, bits = [], random.bits

    def recording(key, path, step, slot):
        used.extend(np.ravel(slot).tolist())
        return bits(key, path, step, slot)

    part = module.example(3, F32)
    prepared = part.prepare(step_hours=24.0)
    one = jnp.ones(4, F32)
    at = Address(stream_key(0, Stream.SIDE), jnp.arange(4, dtype=jnp.uint32), jnp.zeros((), jnp.int32), 7)
    view = Market(3).view(dataclasses.replace(at, slot=0), (0.0 * one,) * 3, 24.0)
    state = part.init(prepared, one, at)
    monkeypatch.setattr(random, "bits", recording)
    after, outputs = part.step(prepared, jnp.zeros((), jnp.int32), state, view, at)
    assert len(set(used)) == len(used)
    assert min(used) == 7 and max(used) < 7 + part.n_slots
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(x.dtype == F32 and x.shape == (4,) for x in jax.tree.leaves((after, outputs)))


@pytest.mark.slow
def test_one_array_of_assets_gives_what_a_tuple_of_rows_gives(monkeypatch):
    parts = tuple(module.example(2, F64, 2) for module in MODULES)
    few = drive(*parts, n_paths=50, n_steps=3, market=Market(2, masks=(0.4,), jump=-0.01))
    monkeypatch.setattr(process, "MAX_UNROLLED_ASSETS", 0)
    many = drive(*parts, n_paths=50, n_steps=3, market=Market(2, masks=(0.4,), jump=-0.01, stacked=True))
    assert few.keys() == many.keys()
    for name in few:
        np.testing.assert_allclose(many[name], few[name], rtol=1e-12, atol=1e-15, err_msg=name)


REFUSED = [
    (lambda: funding.funding(0), "n_assets is 0"),
    (lambda: funding.funding(2, mean=[[1e-4, 1e-4, 1e-4]]), "mean has shape"),
    (lambda: funding.funding(2, deviation=-1e-4), "deviation is .* at least 0"),
    (lambda: funding.funding(2, half_life_hours=0.0), "half_life_hours is .* above 0"),
    (lambda: funding.funding(2, half_life_hours=[1.0, 2.0, 3.0]), "half_life_hours has shape"),
    (lambda: funding.funding(1, mean=[0.0, 0.0], deviation=[1.0, 1.0, 1.0]), "number of regimes"),
    (lambda: funding.funding(1, mean="high"), "mean is 'high'"),
    (lambda: funding.funding(1, mean=np.nan), "finite"),
    (lambda: funding.funding(1, interest=0.01, cap=0.005), "cap"),
    (lambda: funding.funding(1, settlement_hours=[1.0, 2.0]), "one number"),
    (lambda: funding.funding(1).prepare(step_hours=5.0), "whole multiple"),
    (lambda: funding.funding(1).prepare(step_hours=48.0), "longest_step_hours"),
    (lambda: borrow_rate.borrow_rate(0, utilisation=1.0), "utilisation is .* below 1"),
    (lambda: borrow_rate.borrow_rate([]), "drivers is empty"),
    (lambda: borrow_rate.borrow_rate(["BTX"], assets=("BTC", "ETH")), "BTC"),
    (lambda: borrow_rate.borrow_rate([-1]), "drivers has -1"),
    (lambda: borrow_rate.borrow_rate([2], assets=("BTC", "ETH")), "from 0 to 1"),
    (lambda: borrow_rate.borrow_rate(0, optimal=0.0), "optimal"),
    (lambda: gas.gas(level=0.0), "level"),
    (lambda: gas.gas(spike_per_day=1.0), "arrivals"),
    (lambda: gas.gas(spike_low=3.0, spike_high=2.0), "spike_low"),
    (lambda: gas.gas().prepare(step_hours=48.0), "longest_step_hours"),
    (lambda: depth.depth(1, level=-1.0), "level"),
    (lambda: depth.depth(1, move_limit=0.0), "move_limit"),
    (lambda: peg.peg([]), "coins"),
    (lambda: peg.peg(["A", "A"]), "coins"),
    (lambda: peg.peg(["A"], depth=(2.0,)), "depth"),
    (lambda: peg.peg(["A"], impairment=(0.1, 2.0)), "impairment"),
    (lambda: peg.peg(["A"], fall_per_day=2.0), "arrivals"),
    (lambda: peg.peg(["A"], impairment_per_year=40.0), "arrivals"),
    (lambda: peg.peg(["A"]).prepare(step_hours=48.0), "longest_step_hours"),
    (lambda: basis.basis(1, half_life_hours=0.01, averaging_seconds=30.0), "four times"),
    (lambda: basis.basis(1, band=1.0), "band"),
    (lambda: implied_volatility.surface(1, rho=1.0), "rho"),
    (lambda: implied_volatility.surface(1, rho=-0.5, eta=1.5), "butterfly"),
    (lambda: implied_volatility.surface(1, level=0.0), "level"),
    (lambda: oracle.oracle(0, threshold=0.0), "threshold"),
    (lambda: oracle.oracle(0, monitoring="often"), "monitoring"),
    (lambda: oracle.oracle(0, latency_hours=24.0).prepare(step_hours=0.1), "latency_hours"),
    (lambda: drive(funding.funding(2), n_paths=2), "2 assets and the market has 1"),
    (lambda: drive(oracle.oracle(3), n_paths=2), "asset number 3"),
    (lambda: drive(depth.depth(1, level=[1.0, 0.5]), n_paths=2), "2 regimes and the market 1"),
]  # fmt: skip


@pytest.mark.parametrize("build, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(build, message):
    with pytest.raises(InputError, match=message):
        build()


# ----------------------------------------------------------------------------- before the first step


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_first_outputs_are_where_the_process_starts(module):
    """What a process says before the first step has the form of its outputs, and a short step hardly moves it."""
    component = module.example(2, F64)
    if module is implied_volatility:
        # The level also follows the volatility of the step, which nobody knows before it.
        component = dataclasses.replace(component, variance_power=0.0 * component.variance_power)
    market = presets.gbm(("A", "B"), [0.5, 0.8], [[1.0, 0.5], [0.5, 1.0]], step_hours=0.01, dtype=F64)
    market = dataclasses.replace(market, side=(component,))
    prepared = model.prepare(market)
    path = jnp.arange(64, dtype=jnp.uint32)
    context = simulate.context_of(
        market, prepared, None, random.stream_keys(3), path, simulate.Plan(1, step_hours=0.01)
    )
    first = line.first_outputs(context, jnp.ones(64))
    after = simulate.record_market(
        market, prepared, random.stream_keys(3), path, simulate.Plan(1, step_hours=0.01)
    ).side
    assert hasattr(component, "first") and set(first) == set(after)
    for output, rows in first.items():
        start = jnp.stack(list(rows)) if isinstance(rows, tuple) else rows
        assert start.shape == after[output][0].shape, output
        # Half of the paths: rare events and what accrues in the step may move the others.
        gap = np.median(np.abs(np.asarray(start - after[output][0])), axis=-1)
        assert np.all(gap < 0.01 * (1.0 + np.median(np.abs(np.asarray(start)), axis=-1))), output
