"""From positions in words to the ledger's arrays: checks everything a user can get wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qpo_sim import account as account_kinds
from qpo_sim import policy as policy_kinds
from qpo_sim import venue as venues
from qpo_sim.account.lending import LendingAccount
from qpo_sim.account.positions import CASH_NAMES
from qpo_sim.book.desk import TradingCosts
from qpo_sim.book.ledger import Book
from qpo_sim.errors import InputError, did_you_mean, finite
from qpo_sim.instrument.contract import Option
from qpo_sim.instrument.loan import Loan, LoanShape
from qpo_sim.instrument.perpetual import Perpetual, PerpetualShape
from qpo_sim.numerics import rounded
from qpo_sim.types import HOURS_PER_YEAR, Array
from qpo_sim.venue.health_factor import HealthFactor
from qpo_sim.venue.tiered_margin import TieredMargin, TierSchedule, maintenance_margin

MODES = ("cross", "isolated")
_CASH_NAMES = (*CASH_NAMES, "cash")

# Tiers that start beyond this multiple of a position's starting notional are not carried along the paths: a price would
# have to rise as much for them to matter.
_TIER_REACH = 100.0


def build_book(
    assets: Sequence[str],
    *,
    capital: float = 1_000_000.0,
    spot: Mapping[str, float] | None = None,
    perpetuals: Sequence[Mapping[str, Any]] = (),
    loans: Sequence[Mapping[str, Any]] = (),
    accounts: Sequence[Mapping[str, Any]] = (),
    policies: Sequence[Mapping[str, Any]] = (),
    trading_costs: Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
    venue: Any = venues.load,
    dtype: Any = jnp.float32,
) -> Book:
    """Book of spot holdings, perpetual accounts, loans and other accounts; what is not spent is cash.

    Args:
      assets: the market's assets, in its order.
      capital: starting equity in USD.
      spot: value per asset as a fraction of the capital.
      perpetuals: accounts `{name, venue, mode: cross|isolated, margin, positions: {asset: signed notional}, entry:
        {asset: price}}`; margin and notionals as fractions of the capital. Entry prices need `prices`; without them a
        position is entered at the starting price.
      loans: `{name, venue, collateral: {asset: value}, debt: {USD or asset: value}}` as fractions of the capital. The
        borrowed money has left the book into whatever else the book holds: a loan ties up collateral minus debt.
      accounts: `{kind, name, ...}` by the builders of `account`: margin accounts of any contracts, pool shares, loans
        under any lending rule and so on.
      policies: `{kind, ...}` by the builders of `policy`, in the order in which they act after each step. With
        policies the perpetual accounts and loans become accounts that can trade.
      trading_costs: of a policy's outright trades: `fee` and `slippage` on the value, `gas_usd` per holding traded.
      prices: starting prices in USD, needed for entry prices, strikes in USD and numbers of contracts.
      venue: function from a venue's name to its rule, or a rule itself may stand in the account.
      dtype: precision of the paths.

    Raises:
      InputError: an unknown asset or mode, a negative margin or collateral, a position beyond the venue's leverage, an
        account that would be liquidated at once, or more spent than the capital.
    """
    assets = tuple(assets)
    if not capital > 0.0:
        raise InputError(f"book.capital is {capital}, it must be positive.")
    holdings = {asset: finite(value, f"book.spot.{asset}") for asset, value in (spot or {}).items()}
    for asset, value in holdings.items():
        _index(asset, assets, f"book.spot.{asset}")
        if value < 0.0:
            raise InputError(f"book.spot.{asset} is {value}, it must not be negative; use a perpetual to be short.")
    names: set[str] = set()
    perpetual_params, shapes = [], []
    spent = sum(holdings.values())
    others: list[Mapping[str, Any]] = []
    if policies:
        others, perpetuals, loans = [*map(_as_margin, perpetuals), *map(_as_lending, loans)], (), ()
    for k, account in enumerate(perpetuals):
        place = _place("perpetuals", k, account, names)
        params, shape, value = _perpetual(account, assets, capital, prices or {}, venue, place, dtype)
        perpetual_params.append(params)
        shapes.append(shape)
        spent += value
    loan_params, loan_shapes = [], []
    for k, loan in enumerate(loans):
        place = _place("loans", k, loan, names)
        params, shape, value = _loan(loan, assets, capital, venue, place, dtype)
        loan_params.append(params)
        loan_shapes.append(shape)
        spent += value
    known = {"assets": assets, "capital": capital, "prices": prices or {}, "venue_of": venue, "dtype": dtype}
    built = []
    for k, description in enumerate([*others, *accounts]):
        place = _place("accounts", k, description, names)
        built.append(account_kinds.build(description, place, **known))
        spent += built[-1].start_value()
    cash = 1.0 - spent
    if cash < -1e-9:
        raise InputError(
            f"the book spends {spent:.6g} of its capital of 1 on spot, margin and net collateral; it must not exceed "
            f"1, so take {-cash:.3g} off."
        )
    held = tuple(holdings)
    return Book(
        capital=rounded(capital, dtype),
        cash=rounded(max(cash, 0.0), dtype),
        spot=rounded([holdings[a] for a in held], dtype),
        perpetuals=tuple(perpetual_params),
        loans=tuple(loan_params),
        assets=assets,
        holdings=tuple(built),
        policies=_policies(policies, built, held, assets, capital, dtype),
        trading_costs=_trading_costs(trading_costs or {}, capital, dtype) if policies else None,
        spot_assets=tuple(assets.index(a) for a in held),
        perpetual_shapes=tuple(shapes),
        loan_shapes=tuple(loan_shapes),
    )


def _as_margin(account: Mapping[str, Any]) -> dict[str, Any]:
    # The same account as one that can trade.
    entry = account.get("entry") or {}
    return {
        "kind": "margin",
        "name": account.get("name"),
        "venue": account.get("venue", "binance"),
        "balance": {"USD": account.get("margin")},
        "positions": [
            {"asset": asset, "notional": notional, **({"entry": entry[asset]} if asset in entry else {})}
            for asset, notional in (account.get("positions") or {}).items()
        ],
    }


def _as_lending(loan: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "lending", "venue": "aave_v3", **loan}


def _policies(policies, accounts, spot, assets, capital, dtype) -> tuple[Any, ...]:
    contracts = [getattr(account, "contracts", ()) for account in accounts]
    known = {
        "accounts": [account.name for account in accounts],
        "loans": [account.name for account in accounts if isinstance(account, LendingAccount)],
        "assets": assets,
        "spot": spot,
        "account_assets": [account.assets for account in accounts],
        "account_options": [[c.asset if isinstance(c, Option) else -1 for c in row] for row in contracts],
        "n_positions": [len(row) for row in contracts],
        "capital": capital,
        "dtype": dtype,
    }
    return tuple(policy_kinds.build(p, f"book.policies[{k}]", known) for k, p in enumerate(policies))


def _trading_costs(costs: Mapping[str, float], capital: float, dtype: Any) -> TradingCosts:
    place = "book.trading_costs"
    _known(costs, ("fee", "slippage", "gas_usd"), place)
    values = {key: finite(costs.get(key, 0.0), f"{place}.{key}") for key in ("fee", "slippage", "gas_usd")}
    for key, value in values.items():
        if value < 0.0:
            raise InputError(f"{place}.{key} is {value}; it must not be negative.")
    return TradingCosts(
        rounded(values["fee"], dtype), rounded(values["slippage"], dtype), rounded(values["gas_usd"] / capital, dtype)
    )


def _perpetual(account, assets, capital, prices, venue, place, dtype) -> tuple[Perpetual, PerpetualShape, float]:
    _known(account, ("name", "venue", "mode", "margin", "positions", "entry"), place)
    rule = _rule(account.get("venue", "binance"), venue, TieredMargin, place)
    mode = account.get("mode", "cross")
    if mode not in MODES:
        raise InputError(f"{place}.mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    positions = {a: finite(v, f"{place}.positions.{a}") for a, v in (account.get("positions") or {}).items()}
    if not positions:
        raise InputError(f"{place}.positions is empty; give at least one asset with its signed notional.")
    if mode == "isolated" and len(positions) > 1:
        raise InputError(
            f"{place} is isolated and has {len(positions)} positions; an isolated account holds exactly one."
        )
    margin = finite(account.get("margin"), f"{place}.margin")
    if not margin > 0.0:
        raise InputError(f"{place}.margin is {margin}, it must be positive.")
    index = tuple(_index(a, assets, f"{place}.positions.{a}") for a in positions)
    quantity = np.array(list(positions.values()), np.float64)
    entry = np.ones_like(quantity)
    for asset, price in (account.get("entry") or {}).items():
        if asset not in positions:
            raise InputError(f"{place}.entry names {asset}, which is not among its positions {', '.join(positions)}.")
        if asset not in prices:
            raise InputError(f"{place}.entry.{asset} needs the starting price of {asset}, which is not known here.")
        paid = finite(price, f"{place}.entry.{asset}")
        if not paid > 0.0:
            raise InputError(f"{place}.entry.{asset} is {paid}, it must be a positive price in USD.")
        entry[list(positions).index(asset)] = paid / float(prices[asset])
    schedules = [rule.schedule(a) for a in positions]
    for asset, size in positions.items():
        limit = rule.max_leverage(asset, size * capital)
        if limit is not None and abs(size) > limit * max(margin + float(np.sum(quantity * (1.0 - entry))), 0.0) + 1e-12:
            raise InputError(
                f"{place}.positions.{asset} is {size} on a margin of {margin}; {rule.name} allows {limit:g} times the "
                f"margin at this notional, so raise the margin or cut the position."
            )
    equity = margin + float(np.sum(quantity * (1.0 - entry)))
    required = sum(
        float(maintenance_margin(s, q * capital)) / capital for s, q in zip(schedules, quantity, strict=True)
    )
    if equity <= required:
        raise InputError(
            f"{place} would be liquidated at once: its equity {equity:.6g} is not above its maintenance "
            f"margin {required:.6g}."
        )
    limits = [rule.max_leverage(asset, size * capital) for asset, size in positions.items()]
    initial = sum(abs(q) / limit for q, limit in zip(quantity, limits, strict=True) if limit is not None)
    if equity < initial * (1.0 - 1e-9):
        raise InputError(
            f"{place} has an equity of {equity:.6g}; {rule.name} asks for an initial margin of {initial:.6g}, so raise "
            f"the margin or cut the positions."
        )
    reach = [int(np.sum(s.floor <= _TIER_REACH * abs(q) * capital)) for s, q in zip(schedules, quantity, strict=True)]
    n_tiers = max(1, *reach)

    def table(name: str, scale: float, pad: float | None) -> Array:
        columns = []
        for s in schedules:
            values = np.asarray(getattr(s, name), np.float64)[:n_tiers] / scale
            columns.append(
                np.pad(values, (0, n_tiers - values.size), constant_values=values[-1] if pad is None else pad)
            )
        return rounded(np.stack(columns, axis=1), dtype)

    def each(value: float) -> Array:
        return rounded(np.full(quantity.shape, value), dtype)

    params = Perpetual(
        margin=rounded(margin, dtype),
        quantity=rounded(quantity, dtype),
        entry=rounded(entry, dtype),
        schedule=TierSchedule(
            table("floor", capital, 1e30), table("rate", 1.0, None), table("deduction", capital, None)
        ),
        funding_rate=each(rule.funding_rate),
        liquidation_fee=each(rule.liquidation_fee_rate),
        liquidation_slippage=each(rule.liquidation_slippage),
    )
    shape = PerpetualShape(str(account["name"]), index, mode, rule.name, float(rule.funding_interval_hours))
    return params, shape, equity


def _loan(loan, assets, capital, venue, place, dtype) -> tuple[Loan, LoanShape, float]:
    _known(loan, ("name", "venue", "collateral", "debt"), place)
    rule = _rule(loan.get("venue", "aave_v3"), venue, HealthFactor, place)
    collateral = {a: finite(v, f"{place}.collateral.{a}") for a, v in (loan.get("collateral") or {}).items()}
    debt = {a: finite(v, f"{place}.debt.{a}") for a, v in (loan.get("debt") or {}).items()}
    for key, values in (("collateral", collateral), ("debt", debt)):
        if not values:
            raise InputError(f"{place}.{key} is empty; a loan needs collateral and debt.")
        for asset, value in values.items():
            if not value > 0.0:
                raise InputError(f"{place}.{key}.{asset} is {value}, it must be positive.")
    cash_debt = sum(v for a, v in debt.items() if a in _CASH_NAMES and a not in assets)
    asset_debt = {a: v for a, v in debt.items() if not (a in _CASH_NAMES and a not in assets)}
    collateral_index = tuple(_index(a, assets, f"{place}.collateral.{a}") for a in collateral)
    debt_index = tuple(_index(a, assets, f"{place}.debt.{a}") for a in asset_debt)
    threshold = np.array([rule.value("liquidation_threshold", a) for a in collateral])
    ltv = np.array([rule.value("ltv", a) for a in collateral])
    values = np.array(list(collateral.values()))
    total_debt = sum(debt.values())
    if total_debt > float(ltv @ values) * (1.0 + 1e-12):
        raise InputError(
            f"{place}.debt is {total_debt:.6g}; {rule.name} lends at most {float(ltv @ values):.6g} on this collateral "
            f"(loan-to-value limit), so cut the debt or add collateral."
        )

    def array(x: Any) -> Array:
        return rounded(x, dtype)

    params = Loan(
        collateral=array(values),
        threshold=array(threshold),
        bonus=array([rule.value("liquidation_bonus", a) for a in collateral]),
        debt_cash=array(cash_debt),
        debt=array(list(asset_debt.values())),
        borrow_rate_per_hour=array(rule.borrow_rate_per_year / HOURS_PER_YEAR),
        close_factor=array(rule.close_factor),
        full_close_health=array(rule.full_close_health_factor),
        small_position=array(rule.small_position_usd / capital),
    )
    return (
        params,
        LoanShape(str(loan["name"]), collateral_index, debt_index, rule.name),
        float(values.sum()) - total_debt,
    )


def _rule(value: Any, venue: Any, kind: type, place: str) -> Any:
    rule = venue(value) if isinstance(value, str) else value
    if not isinstance(rule, kind):
        raise InputError(
            f"{place}.venue is {value!r}, whose rule is {type(rule).__name__}; this account needs {kind.__name__}."
        )
    return rule


def _place(group: str, k: int, account: Mapping[str, Any], names: set[str]) -> str:
    name = account.get("name") if hasattr(account, "get") else None
    if not name:
        raise InputError(f"book.{group}[{k}].name is missing; every account needs a name.")
    if name in names:
        raise InputError(f"book.{group}[{k}].name is {name!r}, which another account has; names must differ.")
    names.add(str(name))
    return f"book.{group}[{k}] ({name})"


def _known(account: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    for key in account:
        if key not in keys:
            raise InputError(f"{place} has no option {key!r}: {did_you_mean(str(key), keys)}.")


def _index(asset: str, assets: Sequence[str], place: str) -> int:
    if asset not in assets:
        raise InputError(f"{place}: there is no asset {asset!r} in the market: {did_you_mean(str(asset), assets)}.")
    return list(assets).index(asset)
