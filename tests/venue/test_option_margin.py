"""Standard margin of options: published formulas, homogeneity, continuity, and what the builder refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpo_sim import venue
from qpo_sim.errors import InputError
from qpo_sim.venue.option_margin import OptionMargin, Rates, margin, out_of_the_money

DERIBIT = Rates(0.15, 0.1, 0.075)
AEVO = Rates(0.15, 0.1, 0.1)
CALL_PUT = [True, False]


def test_shares_out_of_the_money():
    np.testing.assert_allclose(out_of_the_money(100.0, np.array([80.0, 100.0, 120.0]), is_call=True), [0, 0, 0.2])
    np.testing.assert_allclose(out_of_the_money(100.0, np.array([80.0, 100.0, 120.0]), is_call=False), [0.2, 0, 0])


@pytest.mark.parametrize(
    ("strike", "is_call", "mark", "initial", "maintenance"),
    [
        (90_000.0, True, 0.12, 0.15 + 0.12, 0.075 + 0.12),  # in the money
        (103_000.0, True, 0.03, 0.12 + 0.03, 0.075 + 0.03),  # 3 % out of it
        (150_000.0, True, 0.001, 0.1 + 0.001, 0.075 + 0.001),  # far out of it
        (98_000.0, False, 0.03, 0.13 + 0.03, 0.075 + 0.03),
        (50_000.0, False, 0.001, 0.1 + 0.001, 0.075 + 0.001),
        (250_000.0, False, 1.5, 0.15 + 1.5, 0.1125 + 1.5),  # worth more than a coin
        (350_000.0, False, 2.5, 0.1875 + 2.5, 0.1875 + 2.5),  # maintenance takes over
    ],
)
def test_written_coin_settled_options(strike, is_call, mark, initial, maintenance):
    got = margin(DERIBIT, -3.0, mark, 100_000.0, strike, is_call=is_call, is_coin_settled=True)
    np.testing.assert_allclose(got, (3 * initial, 3 * maintenance), rtol=1e-12)


def test_written_linear_options_of_aevo():
    call = margin(AEVO, -2.0, 50.0, 2000.0, 2100.0, is_call=True)
    np.testing.assert_allclose(call, (2 * (0.1 * 2000 + 50), 2 * (0.1 * 2000 + 50)))
    put = margin(AEVO, -2.0, 60.0, 2000.0, 1980.0, is_call=False)
    np.testing.assert_allclose(put, (2 * (0.14 * 2000 + 60), 2 * (0.1 * 2000 + 60)))
    deep = margin(AEVO, -1.0, 3000.0, 2000.0, 5000.0, is_call=False)
    np.testing.assert_allclose(deep, (3300.0, 3300.0))


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_linear_is_inverse_times_the_underlying(is_call):
    rng = np.random.default_rng(0)
    underlying, mark = rng.uniform(100, 1000, 200), rng.uniform(0, 2, 200)
    strike = underlying * rng.uniform(0.3, 3, 200)
    coins = margin(DERIBIT, -1.0, mark, underlying, strike, is_call=is_call, is_coin_settled=True)
    usd = margin(DERIBIT, -1.0, mark * underlying, underlying, strike, is_call=is_call)
    for a, b in zip(coins, usd, strict=True):
        np.testing.assert_allclose(a * underlying, b, rtol=1e-13)


@pytest.mark.parametrize("is_call", CALL_PUT)
@pytest.mark.parametrize("is_coin_settled", [True, False])
def test_bought_options_need_nothing(is_call, is_coin_settled):
    got = margin(DERIBIT, np.array([0.0, 1.0, 7.5]), 0.2, 100.0, 90.0, is_call=is_call, is_coin_settled=is_coin_settled)
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_order_and_monotonicity(is_call):
    strike = np.linspace(40.0, 250.0, 4001)
    mark = np.linspace(0.0, 3.0, 61)[:, None]
    got = margin(DERIBIT, -1.0, mark, 100.0, strike, is_call=is_call, is_coin_settled=True)
    assert np.all(got.initial >= got.maintenance) and np.all(got.maintenance >= mark)
    assert np.all(np.diff(got.initial, axis=0) > 0.0) and np.all(np.diff(got.maintenance, axis=0) > 0.0)
    # Continuous in the strike: a step of 0.05 % of the underlying moves no margin by more.
    assert np.abs(np.diff(got.initial, axis=1)).max() <= 0.000525 + 1e-12
    # Further out of the money never needs more.
    step = np.diff(got.initial, axis=1)
    assert np.all(step <= 1e-12) if is_call else np.all(step >= -1e-12)


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_net_of_mark_leaves_out_what_is_owed(is_call):
    terms = (DERIBIT, -4.0, 0.07, 100.0, 104.0)
    gross = margin(*terms, is_call=is_call, is_coin_settled=True)
    net = margin(*terms, is_call=is_call, is_coin_settled=True, net_of_mark=True)
    np.testing.assert_allclose(np.subtract(gross, net), 4 * 0.07, rtol=1e-12)


def test_paths_and_kinds_broadcast_in_single_precision():
    underlying = jnp.linspace(0.5, 1.5, 7, dtype=jnp.float32)
    mark = jnp.full((2, 7), 0.05, jnp.float32)
    is_call = np.array([[True], [False]])
    got = jax.jit(lambda m, u: margin(DERIBIT, -1.0, m, u, 1.0, is_call=is_call))(mark, underlying)
    assert got.initial.shape == (2, 7) and got.initial.dtype == jnp.float32
    for row, kind in enumerate(CALL_PUT):
        one = margin(DERIBIT, -1.0, 0.05, np.asarray(underlying, np.float64), 1.0, is_call=kind)
        np.testing.assert_allclose(got.maintenance[row], one.maintenance, rtol=1e-6)


@pytest.mark.parametrize("is_call", CALL_PUT)
def test_gradient(is_call):
    def initial(quantity, mark, underlying, strike):
        return margin(DERIBIT, quantity, mark, underlying, strike, is_call=is_call).initial

    terms = [-2.0, 6.0, 100.0, 102.0 if is_call else 98.0]
    slopes = jax.grad(initial, argnums=(0, 1, 2, 3))(*terms)
    for i, slope in enumerate(slopes):
        up, down = (list(terms) for _ in range(2))
        up[i], down[i] = terms[i] + 1e-5, terms[i] - 1e-5
        np.testing.assert_allclose(slope, (initial(*up) - initial(*down)) / 2e-5, rtol=1e-6)


def test_shipped_venue():
    deribit = venue.load("deribit")
    assert isinstance(deribit, OptionMargin) and deribit.rates == DERIBIT
    assert deribit.fee_rate("taker", is_coin_settled=True) == 0.0003
    assert deribit.fee_rate("maker", is_coin_settled=False) == 0.0001
    assert deribit.fee_rate("delivery", is_coin_settled=True) == 0.00015
    assert OptionMargin().fee_rate("taker", is_coin_settled=True) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"initial_rate": 0.0}, r"initial_rate is 0.0; it must lie in \(0, 1\)"),
        ({"maintenance_rate": 1.5}, "maintenance_rate is 1.5"),
        ({"maintenance_rate": 0.12}, "must not fall in this order"),
        ({"least_initial_rate": 0.2}, "must not fall in this order"),
        ({"taker_fee_rate": {"coin": 0.1}}, "taker_fee_rate has a row 'coin'; its rows are inverse and linear"),
        ({"maker_fee_rate": {"linear": -0.1}}, "maker_fee_rate.linear is -0.1"),
        ({"fee_cap": 0.0}, "fee_cap is 0.0"),
        ({"initial": 0.1}, "initial is not an option"),
    ],
)
def test_what_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        venue.from_config({"kind": "option_margin", "source": "a test", "as_of": "2024-06", **values}, name="mine")
