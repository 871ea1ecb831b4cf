"""Where each position of a book would be liquidated and bankrupt, at the prices and with the book of the start.

The price of one underlying moves and all others stand still; positions of an account in the same underlying move with
it. Accounts with fixed linear positions have closed forms (`instrument.liquidation_price`), as have loans; accounts of
any contracts under any rule are looked at over the price, and the nearest one that liquidates them is refined until it
has 12 digits.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import exp, inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qpo_sim.account.margin import MarginAccount, State
from qpo_sim.account.positions import label_of
from qpo_sim.book.ledger import Book
from qpo_sim.errors import InputError
from qpo_sim.instrument.contract import Option
from qpo_sim.instrument.liquidation_price import Leg, linear_band, linear_bankruptcy
from qpo_sim.instrument.loan import Loan, LoanShape
from qpo_sim.instrument.perpetual import Perpetual, PerpetualShape
from qpo_sim.instrument.scene import Scene
from qpo_sim.venue.portfolio_margin import BoundPortfolio
from qpo_sim.venue.tiered_margin import TierSchedule, maintenance_margin

# Log prices that are looked at, in units of the starting price, and how.
_REACH, _N_POINTS, _N_ROUNDS = 9.0, 4001, 4


class LiquidationPrice(NamedTuple):
    """Liquidation and bankruptcy price of a position.

    Attributes:
      account: name of its account.
      position: label, as in the P&L by position.
      price: USD price of its underlying at which the account is liquidated, None if no price does.
      bankruptcy_price: USD price at which the account is worth nothing, None if it always is.
      convention: how the price was found.
    """

    account: str
    position: str
    price: float | None
    bankruptcy_price: float | None
    convention: str


def liquidation_prices(book: Book, prices: Mapping[str, float]) -> list[LiquidationPrice]:
    """Rows for every position of the perpetual and margin accounts and every collateral and debt of the loans.

    A price is the first one that a fall (of longs and collateral; a rise, of shorts and debts) meets; of options the
    nearer of both sides. Fees of closing are left out. Other kinds of accounts have no rows.

    Args:
      book: see `book`.
      prices: USD by asset at the start.

    Raises:
      InputError: the price of an asset that a position depends on is missing.
    """
    rows: list[LiquidationPrice] = []
    for account, shape in zip(book.perpetuals, book.perpetual_shapes, strict=True):
        rows += _perpetual(account, shape, book.assets, prices)
    for loan, shape in zip(book.loans, book.loan_shapes, strict=True):
        rows += _loan(loan, shape, book.assets, prices)
    for holding in book.holdings:
        if isinstance(holding, MarginAccount):
            rows += _margin(holding, book.assets, prices)
    return rows


def _price(asset: str, prices: Mapping[str, float]) -> float:
    if asset not in prices:
        raise InputError(
            f"prices has no {asset}, which a position depends on; it has {', '.join(prices) or 'nothing'}."
        )
    return float(prices[asset])


def _found(factor: float, price: float) -> float | None:
    return float(factor * price) if 0.0 < factor < inf else None


def _perpetual(
    account: Perpetual, shape: PerpetualShape, assets: tuple[str, ...], prices: Mapping[str, float]
) -> list[LiquidationPrice]:
    quantity, entry = (np.asarray(x, np.float64) for x in (account.quantity, account.entry))
    schedules = [
        TierSchedule(*(np.asarray(table, np.float64)[:, i] for table in account.schedule)) for i in range(quantity.size)
    ]
    needed = [float(maintenance_margin(s, q)) for s, q in zip(schedules, quantity, strict=True)]
    profit, rows = quantity * (1.0 - entry), []
    for i, asset in enumerate(shape.assets):
        leg, price = Leg(float(quantity[i]), float(entry[i]), schedules[i]), _price(assets[asset], prices)
        others = float(profit.sum() - profit[i])
        band = linear_band(
            [leg], margin=float(account.margin), other_maintenance=sum(needed) - needed[i], other_profit=others
        )
        side = band.lower if leg.size > 0.0 else band.upper
        bankruptcy = linear_bankruptcy(leg, margin=float(account.margin) + others)
        rows.append(
            LiquidationPrice(
                shape.name,
                f"{assets[asset]} perpetual",
                _found(side, price),
                _found(bankruptcy, price),
                f"{shape.mode} margin, linear",
            )
        )
    return rows


def _loan(loan: Loan, shape: LoanShape, assets: tuple[str, ...], prices: Mapping[str, float]) -> list[LiquidationPrice]:
    collateral, threshold, debt = (np.asarray(x, np.float64) for x in (loan.collateral, loan.threshold, loan.debt))
    owed, weighted = float(loan.debt_cash) + float(debt.sum()), threshold * collateral
    rows: list[tuple[str, float | None, float | None]] = []
    for i, asset in enumerate(shape.collateral_assets):
        price = _price(assets[asset], prices)
        least = (owed - (weighted.sum() - weighted[i])) / weighted[i]
        bankruptcy = (owed - (collateral.sum() - collateral[i])) / collateral[i]
        rows.append((f"{assets[asset]} collateral", _found(least, price), _found(bankruptcy, price)))
    for i, asset in enumerate(shape.debt_assets):
        price = _price(assets[asset], prices)
        most = (weighted.sum() - (owed - debt[i])) / debt[i]
        bankruptcy = (collateral.sum() - (owed - debt[i])) / debt[i]
        rows.append((f"{assets[asset]} debt", _found(most, price), _found(bankruptcy, price)))
    return [LiquidationPrice(shape.name, label, at, zero, "health factor of 1") for label, at, zero in rows]


def _margin(account: MarginAccount, assets: tuple[str, ...], prices: Mapping[str, float]) -> list[LiquidationPrice]:
    rows = []
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), account)
        # What a venue's mark price or oracle says at the start is the index.
        wide = replace(wide, trigger="index")
        rule = "portfolio margin" if isinstance(wide.rule, BoundPortfolio) else "cross margin"
        for contract, quantity in zip(wide.contracts, np.asarray(wide.quantity), strict=True):
            name, price = assets[contract.asset], _price(assets[contract.asset], prices)
            sides = (-1, 1) if isinstance(contract, Option) else (-1 if quantity > 0.0 else 1,)
            found = [
                _nearest([_crossing(partial(of, wide, len(assets), contract.asset), side) for side in sides])
                for of in (_distance, _equity)
            ]
            label = label_of(contract, assets)
            rows.append(
                LiquidationPrice(
                    account.name,
                    label,
                    _scaled(found[0], price),
                    _scaled(found[1], price),
                    f"{rule}, {label.removeprefix(name).strip()}",
                )
            )
    return rows


def _moved(account: MarginAccount, n_assets: int, asset: int, log_price: np.ndarray) -> tuple[State, Scene]:
    # The account at prices of one asset, which stand where paths do.
    one = jnp.ones_like(jnp.asarray(log_price))
    first = Scene((one,) * n_assets, jnp.zeros(1), {})
    rows = list(first.prices)
    rows[asset] = jnp.exp(jnp.asarray(log_price))
    return account.first(first, one), first._replace(prices=tuple(rows))


def _distance(account: MarginAccount, n_assets: int, asset: int, log_price: np.ndarray) -> np.ndarray:
    return np.asarray(account.distance(*_moved(account, n_assets, asset, log_price)))


def _equity(account: MarginAccount, n_assets: int, asset: int, log_price: np.ndarray) -> np.ndarray:
    return np.asarray(account.equity(*_moved(account, n_assets, asset, log_price)))


def _nearest(log_prices: list[float | None]) -> float | None:
    known = [u for u in log_prices if u is not None]
    return min(known, key=abs) if known else None


def _scaled(log_price: float | None, price: float) -> float | None:
    return None if log_price is None else price * exp(log_price)


def _crossing(value: Callable[[np.ndarray], Any], side: int) -> float | None:
    # First log price on a side of 0 at which the value is not positive any more.
    low, high = 0.0, side * _REACH
    for _ in range(_N_ROUNDS):
        grid = np.linspace(low, high, _N_POINTS)
        gone = np.flatnonzero(value(grid) <= 0.0)
        if gone.size == 0:
            return None
        k = max(int(gone[0]), 1)
        low, high = grid[k - 1], grid[k]
    return 0.5 * (low + high)
