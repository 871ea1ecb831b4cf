"""Balances and positions of a margin account: from their descriptions, and as margin rules and policies see them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.instrument.contract import (
    USD,
    Contract,
    DatedFuture,
    InversePerpetual,
    LinearPerpetual,
    Option,
    QuantoPerpetual,
)
from qpo_sim.instrument.scene import Scene
from qpo_sim.types import DAYS_PER_YEAR, Array, Held, OptionTerms

CASH_NAMES = ("USD", "USDT", "USDC")


def wallet_of(balance: Mapping[str, float], assets: Sequence[str]) -> dict[int, float]:
    """Balance by asset number or `USD`, in the order given.

    Raises:
      InputError: nothing given, an unknown currency, a negative amount.
    """
    if not balance:
        raise InputError("balance is empty; give USD or a coin with a fraction of the capital, e.g. {USD: 0.1}.")
    wallet: dict[int, float] = {}
    for currency, amount in balance.items():
        value = finite(amount, f"balance.{currency}")
        if value < 0.0:
            raise InputError(f"balance.{currency} is {value}; it must not be negative.")
        if currency in assets:
            wallet[list(assets).index(currency)] = value
        elif currency in CASH_NAMES:
            wallet[USD] = wallet.get(USD, 0.0) + value
        else:
            raise InputError(f"balance names {currency!r}: {did_you_mean(currency, ['USD', *assets])}")
    return wallet


# Options of a position by kind, besides `kind`, `asset`, `notional` and `contracts`.
_OPTIONS = {
    "linear": ("entry",),
    "inverse": ("entry",),
    "quanto": ("entry", "settlement"),
    "future": ("entry", "days", "carry_per_year"),
    "option": ("type", "strike", "moneyness", "days", "carry_per_year", "settlement", "volatility"),
}


def position_of(
    position: Mapping[str, Any], place: str, assets: Sequence[str], capital: float, prices: Mapping[str, float]
) -> tuple[Contract, float, float]:
    """Contract, units, and cost of a unit at entry in the settlement currency, of a position's description.

    Raises:
      InputError: an unknown kind, option or asset, a contract that has expired, a number that is missing or refused.
    """
    kind = position.get("kind", "linear")
    if kind not in _OPTIONS:
        raise InputError(f"{place}.kind is {kind!r}: {did_you_mean(str(kind), _OPTIONS)}")
    for key in position:
        if key not in ("kind", "asset", "notional", "contracts", *_OPTIONS[kind]):
            known = ("asset", "notional", "contracts", *_OPTIONS[kind])
            raise InputError(f"{place} has no option {key!r}: {did_you_mean(str(key), known)}")
    asset = str(position.get("asset"))
    if asset not in assets:
        raise InputError(f"{place}.asset is {asset!r}: {did_you_mean(str(asset), assets)}")
    index = list(assets).index(asset)

    def price(of: str, why: str) -> float:
        if of not in prices:
            raise InputError(f"{place}.{why} needs the starting price of {of}, which is not known here.")
        return float(prices[of])

    if ("notional" in position) == ("contracts" in position):
        raise InputError(f"{place} needs either notional (fraction of the capital) or contracts, and not both.")
    if "notional" in position:
        units = finite(position["notional"], f"{place}.notional")
    else:
        number = finite(position["contracts"], f"{place}.contracts")
        units = number / capital if kind == "inverse" else number * price(asset, "contracts") / capital
    entry = 1.0
    if "entry" in position:
        paid = finite(position["entry"], f"{place}.entry")
        if not paid > 0.0:
            raise InputError(f"{place}.entry is {paid}; it must be a positive price in USD.")
        entry = paid / price(asset, "entry")
    carry = finite(position.get("carry_per_year", 0.0), f"{place}.carry_per_year")
    expiry = 0.0
    if kind in ("future", "option"):
        if "days" not in position:
            raise InputError(f"{place}.days is missing: the time to expiry, in days.")
        days = finite(position["days"], f"{place}.days")
        if not days > 0.0:
            raise InputError(f"{place}.days is {days:g}: the contract has expired; give a positive number of days.")
        expiry = days / DAYS_PER_YEAR
    if kind == "linear":
        return LinearPerpetual(index), units, entry
    if kind == "inverse":
        return InversePerpetual(index), units, -1.0 / entry
    if kind == "quanto":
        paid_in = str(position.get("settlement"))
        if paid_in not in assets:
            raise InputError(f"{place}.settlement is {paid_in!r}: {did_you_mean(str(paid_in), assets)}")
        return QuantoPerpetual(index, list(assets).index(paid_in)), units, entry
    if kind == "future":
        if "entry" not in position:
            entry = float(np.exp(carry * expiry))
        return DatedFuture(np.float64(carry), np.float64(expiry), index), units, entry
    return _option(position, place, index, asset, carry, expiry, price), units, 0.0


def _option(
    position: Mapping[str, Any],
    place: str,
    index: int,
    asset: str,
    carry: float,
    expiry: float,
    price: Callable[[str, str], float],
) -> Option:
    kind = position.get("type")
    if kind not in ("call", "put"):
        raise InputError(f"{place}.type is {kind!r}; it must be call or put.")
    if ("strike" in position) == ("moneyness" in position):
        raise InputError(f"{place} needs either strike in USD or moneyness (strike over the price), and not both.")
    if "moneyness" in position:
        strike = finite(position["moneyness"], f"{place}.moneyness")
    else:
        strike = finite(position["strike"], f"{place}.strike") / price(asset, "strike")
    volatility = finite(position.get("volatility", 0.6), f"{place}.volatility")
    for key, value in (("strike", strike), ("volatility", volatility)):
        if not value > 0.0:
            raise InputError(f"{place}.{key} is {value:g}; it must be positive.")
    settlement = position.get("settlement", "USD")
    if settlement not in ("USD", "coin", asset, *CASH_NAMES):
        raise InputError(f"{place}.settlement is {settlement!r}; it must be USD or coin.")
    return Option(
        np.float64(strike),
        np.float64(expiry),
        np.float64(volatility),
        np.float64(carry),
        index,
        kind == "call",
        settlement in ("coin", asset),
    )


def start_mark(contract: Contract) -> float:
    """Value of one unit at the start; 0 for an option, whose premium is then in no balance yet."""
    if isinstance(contract, Option):
        return 0.0
    if isinstance(contract, DatedFuture):
        return float(np.exp(float(contract.carry_per_year) * float(contract.expiry_years)))
    return -1.0 if isinstance(contract, InversePerpetual) else 1.0


_LABELS = {
    "LinearPerpetual": "perpetual",
    "InversePerpetual": "inverse perpetual",
    "QuantoPerpetual": "quanto perpetual",
    "DatedFuture": "future",
}


def label_of(contract: Contract, assets: Sequence[str]) -> str:
    """What a position is called in reports."""
    if isinstance(contract, Option):
        return f"{assets[contract.asset]} {'call' if contract.is_call else 'put'}"
    return f"{assets[contract.asset]} {_LABELS[type(contract).__name__]}"


def held_of(contract: Contract, quantity: Array, scene: Scene) -> Held:
    """A position as a margin rule sees it."""

    def revalue(factor: Array, volatility: Any) -> Array:
        # A tuple of rows, as the shocked one may have scenarios as a leading axis.
        moved = list(scene.prices)
        moved[contract.asset] = moved[contract.asset] * factor
        shocked = scene._replace(prices=tuple(moved))
        if isinstance(contract, Option) and volatility is not None:
            return contract.mark_at(shocked, volatility)
        return contract.mark(shocked)

    terms = None
    if isinstance(contract, Option):
        terms = OptionTerms(
            contract.forward(scene),
            contract.strike,
            contract.time_left(scene),
            contract.implied_volatility(scene),
            contract.is_call,
            contract.is_coin_settled,
        )
    return Held(
        asset=contract.asset,
        kind=type(contract).__name__,
        quantity=quantity,
        price=scene.prices[contract.asset],
        mark=contract.mark(scene),
        notional=contract.notional(scene),
        revalue=revalue,
        option=terms,
    )


def unit_delta(contract: Contract, scene: Scene) -> Array:
    """What buying one unit at the mark adds to an account's delta in the underlying.

    The implied volatility of an option moves as the market's surface says; a premium paid in coin is a balance less.
    """
    if not isinstance(contract, Option):
        return contract.notional(scene)
    price = scene.prices[contract.asset]

    def mark(move):
        return contract.mark(scene.at_prices((contract.asset,), (price * (1.0 + move),)))

    value, delta = jax.jvp(mark, (jnp.zeros_like(price),), (jnp.ones_like(price),))
    return delta - value if contract.is_coin_settled else delta


def unit_vega(contract: Contract, scene: Scene) -> Array:
    """Change of one unit's value per 1.00 of implied volatility."""
    if not isinstance(contract, Option):
        return jnp.zeros_like(scene.prices[contract.asset])
    volatility = contract.implied_volatility(scene)
    return jax.jvp(lambda v: contract.mark_at(scene, v), (volatility,), (jnp.ones_like(volatility),))[1]
