r"""A crowd of loans under one health-factor rule, all on the same market paths: a protocol's liquidations and losses.

Of each loan and path only two numbers are carried: the shares of its collateral and of its debt that are left. All its
collaterals are seized, and all its debts repaid, in proportion to their values; with one of each the loan is that of
`lending` looked at when steps end. A loan with several pays the mean bonus of its collaterals, where a liquidator would
pick the pair that pays most. Values are in USD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from qpo_sim.account.positions import CASH_NAMES
from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.execution import gas
from qpo_sim.numerics import Pair, materialised, rounded
from qpo_sim.types import Array
from qpo_sim.venue.health_factor import HealthFactor, liquidate_pair, max_repay

# Loans whose shares stay in the cache together, for a few hundred paths.
BLOCK = 32
# Weights of the collaterals: liquidation threshold, value, value less bonus, the protocol's part of the bonus.
_N_WEIGHTS = 4


class Terms(NamedTuple):
    """Numbers of the rule that all loans share, in USD and per year, and the cost of a liquidation.

    `gas_per_gwei` is that of a liquidation per gwei at the starting price of the chain's coin.
    """

    close_factor: Float[Array, ""]
    full_close_health: Float[Array, ""]
    small_position: Float[Array, ""]
    min_leftover: Float[Array, ""]
    borrow_rate: Float[Array, ""]
    gas: Float[Array, ""]
    gas_per_gwei: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoanCrowd:
    """Loans from the least to the most healthy, padded with empty ones to whole blocks.

    A block in which no loan is due skips the work of a liquidation, so neighbours should be due together.

    Attributes:
      collateral: value by asset at the starting prices, USD.
      debt: the same, with debt in USD in the last column.
      weight: of each asset's value in the sums that a liquidation needs.
      place: of each loan in this order.
      terms: of the rule.
      assets: of the market (static).
      gas_asset: the chain's coin, -1 where gas is a constant (static).
    """

    collateral: Float[Array, "blocks loans assets"]
    debt: Float[Array, "blocks loans columns"]
    weight: Float[Array, "weights assets"]
    place: Int[Array, " loans"]
    terms: Terms
    assets: tuple[str, ...] = field(metadata={"static": True})
    gas_asset: int = field(default=-1, metadata={"static": True})

    @property
    def n_loans(self) -> int:
        """Without the padding."""
        return self.place.shape[0]


class CrowdOutcome(NamedTuple):
    """Sums over the paths of a chunk by loan, and sums over the loans by path, USD at the time of each liquidation.

    Attributes:
      hits: paths on which the loan was liquidated.
      bad_debt: of the loan, summed over paths.
      squared_bad_debt: the same of its square.
      repaid: debt that liquidators have paid.
      seized: collateral taken for it.
      lost: bad debt: written off, or not covered by collateral at the end.
    """

    hits: Float[Array, " loans"]
    bad_debt: Float[Array, " loans"]
    squared_bad_debt: Float[Array, " loans"]
    repaid: Float[Array, " paths"]
    seized: Float[Array, " paths"]
    lost: Float[Array, " paths"]


def crowd_outcome(
    crowd: LoanCrowd,
    prices: Float[Array, "steps assets paths"],
    gwei: Float[Array, "steps paths"] | None,
    step_years: float,
    counts: Float[Array, " paths"],
) -> CrowdOutcome:
    """Outcome of all loans on some paths; traceable. Each loan can be liquidated once at the end of each step.

    Args:
      crowd: see `LoanCrowd`.
      prices: over their starting prices, at the end of each step.
      gwei: gas price, where the market has one.
      step_years: length of a step.
      counts: 1 for the paths that count in the sums by loan, else 0.
    """
    n_steps, _, n_paths = prices.shape
    terms, one = crowd.terms, jnp.ones((n_steps, 1, n_paths), prices.dtype)
    growth = jnp.exp(terms.borrow_rate * step_years * jnp.arange(1, n_steps + 1, dtype=prices.dtype))
    cost = terms.gas * one[:, 0]
    if gwei is not None and crowd.gas_asset >= 0:
        cost = gas.cost(terms.gas_per_gwei / gas.GWEI, gwei, prices[:, crowd.gas_asset])
    owed_at = growth[:, None, None] * jnp.concatenate([prices, one], axis=1)

    def block(loans: tuple[Array, Array]):
        collateral, debt = loans
        weighted = [collateral * crowd.weight[k] for k in range(_N_WEIGHTS)]

        def step(carry, row):
            held_left, owed_left = carry[:2]
            price, owed_price, _ = row
            health_value, owed = held_left * _product(weighted[0], price), owed_left * _product(debt, owed_price)

            def liquidated(carry):
                return _liquidated(terms, weighted, carry, row, health_value, owed)

            is_any_due = jnp.any((health_value <= owed) & (owed > 0.0))
            return lax.cond(is_any_due, liquidated, lambda carry: carry, carry), None

        square = jnp.ones((collateral.shape[0], n_paths), prices.dtype)
        nothing = jnp.zeros(n_paths, prices.dtype)
        carry = (square, square, 0.0 * square, nothing, nothing)
        (held_left, owed_left, bad, repaid, seized), _ = lax.scan(step, carry, (prices, owed_at, cost))
        held, owed = held_left * _product(collateral, prices[-1]), owed_left * _product(debt, owed_at[-1])
        bad = bad + jnp.maximum(owed - held, 0.0)
        by_loan = ((owed_left < 1.0).astype(prices.dtype) @ counts, bad @ counts, (bad * bad) @ counts)
        return by_loan, (repaid, seized, jnp.sum(bad, axis=0))

    by_loan, by_path = lax.map(block, (crowd.collateral, crowd.debt))
    by_loan = (row.reshape(-1)[crowd.place] for row in by_loan)
    return CrowdOutcome(*by_loan, *(jnp.sum(row, axis=0) for row in by_path))


def _product(amounts: Array, prices: Array) -> Array:
    return lax.dot(amounts, prices, precision=lax.Precision.HIGHEST)


def _liquidated(terms: Terms, weighted: list[Array], carry: Any, row: Any, health_value: Array, owed: Array) -> Any:
    held_left, owed_left, bad, total_repaid, total_seized = carry
    price, _, cost = row
    held, less_bonus, fee = (held_left * _product(matrix, price) for matrix in weighted[1:])

    def shares(terms: Terms, held, less_bonus, fee, health_value, owed, cost) -> Pair:
        # Shares of what is held and of what is owed that leave in a call; 0 where there is none.
        is_due = (health_value <= owed) & (owed > 0.0)
        debt = jnp.where(is_due, owed, 1.0)
        most = max_repay(
            held,
            debt,
            debt,
            health_value / debt,
            close_factor=terms.close_factor,
            full_close_health=terms.full_close_health,
            small_position=terms.small_position,
        )
        has_any = less_bonus > 0.0
        call = liquidate_pair(
            held,
            debt,
            most,
            bonus=jnp.where(has_any, held / jnp.where(has_any, less_bonus, 1.0), 1.0) - 1.0,
            min_leftover=terms.min_leftover,
        )
        taken = call.seized / jnp.where(held > 0.0, held, 1.0)
        acts = is_due & (call.seized - taken * fee - call.repaid > cost)
        # Nothing is owed by who has nothing.
        is_empty = call.seized >= held
        removed = jnp.where(is_empty, 1.0, call.repaid / debt)
        removed = jnp.where(removed >= 1.0 - 8.0 * jnp.finfo(removed.dtype).eps, 1.0, removed)
        return Pair(jnp.where(acts, jnp.where(is_empty, 1.0, taken), 0.0), jnp.where(acts, removed, 0.0))

    taken, removed = materialised(shares)(terms, held, less_bonus, fee, health_value, owed, cost)
    repaid = taken * less_bonus
    return (
        held_left * (1.0 - taken),
        owed_left * (1.0 - removed),
        bad + jnp.where(taken >= 1.0, jnp.maximum(removed * owed - repaid, 0.0), 0.0),
        total_repaid + jnp.sum(repaid, axis=0),
        total_seized + jnp.sum(taken * held, axis=0),
    )


def loan_crowd(
    venue: HealthFactor,
    collateral: Any,
    debt: Any,
    *,
    assets: Sequence[str],
    prices: Mapping[str, float] | None = None,
    in_coins: bool = False,
    emode: str | None = None,
    gas_units: float | None = gas.UNITS["liquidation"],
    gas_asset: str = "ETH",
    liquidation_gas_usd: float = 0.0,
    dtype: Any = jnp.float32,
) -> LoanCrowd:
    """Crowd of loans from tables.

    Args:
      venue: the rule of all loans.
      collateral: table with a column per asset and a row per loan (a mapping of arrays or a data frame): USD at the
        starting prices.
      debt: the same, by asset or USD (USDT and USDC are USD unless they are assets of the market).
      assets: the market's assets.
      prices: starting prices in USD, for `in_coins` and for gas.
      in_coins: the tables hold numbers of coins.
      emode: category of the venue that all borrowers have chosen.
      gas_units: gas of a liquidation where the market has a gas process; None for the constant below.
      gas_asset: coin in which gas is paid; without its starting price the constant below is taken.
      liquidation_gas_usd: cost of a liquidation where the market has no gas process. Nobody comes for less.
      dtype: precision of the paths.

    A loan that is liquidatable from the start is liquidated at the end of the first step.

    Raises:
      InputError: another kind of rule, an unknown asset, columns of different lengths, a negative amount, a collateral
        that the venue does not accept, a missing starting price.
    """
    if not isinstance(venue, HealthFactor):
        raise InputError(f"a crowd of loans needs a health-factor rule; {venue!r} is a {type(venue).__name__}.")
    if not liquidation_gas_usd >= 0.0:
        raise InputError(f"liquidation_gas_usd is {liquidation_gas_usd}; it must not be negative.")
    known, prices = tuple(assets), prices or {}
    held = _matrix("collateral", collateral, known, prices, in_coins)
    owed = _matrix("debt", debt, known, prices, in_coins)
    if held.shape[0] != owed.shape[0]:
        raise InputError(
            f"collateral has {held.shape[0]} loans and debt {owed.shape[0]}; both tables need one row each."
        )
    if held[:, -1].any():
        raise InputError(f"collateral is in USD; it must be in assets of the market ({', '.join(known)}).")
    held = held[:, :-1]
    lent = [asset for asset, column in zip((*known, "USD"), owed.T, strict=True) if column.any()]
    used = [asset for asset, column in zip(known, held.T, strict=True) if column.any()]
    params = venue.params(used, lent, emode=emode, dtype=np.float64)
    weight = np.zeros((_N_WEIGHTS, len(known)))
    bonus, share = (np.asarray(row, np.float64) for row in (params.bonus, params.protocol_fee))
    kept = 1.0 / (1.0 + bonus)
    columns = [known.index(asset) for asset in used]
    weight[:, columns] = [np.asarray(params.threshold, np.float64), np.ones(len(used)), kept, share * (1.0 - kept)]
    n_loans = held.shape[0]
    owing = owed.sum(axis=1)
    health = np.divide(held @ weight[0], owing, out=np.full(n_loans, np.inf), where=owing > 0.0)
    order = np.argsort(health, kind="stable")
    held, owed = held[order], owed[order]
    rows = (-(-n_loans // BLOCK)) * BLOCK
    blocks = [np.pad(table, ((0, rows - n_loans), (0, 0))).reshape(-1, BLOCK, table.shape[1]) for table in (held, owed)]
    has_gas = bool(gas_units) and gas_asset in known and gas_asset in prices
    numbers = {key: getattr(params, key) for key in Terms._fields if hasattr(params, key)} | {
        "borrow_rate": venue.borrow_rate_per_year,
        "gas": liquidation_gas_usd,
        "gas_per_gwei": gas.cost(gas_units, 1.0, float(prices[gas_asset])) if has_gas else 0.0,
    }
    terms = Terms(**{key: rounded(value, dtype) for key, value in numbers.items()})
    return LoanCrowd(
        *(rounded(table, dtype) for table in blocks),
        weight=rounded(weight, dtype),
        place=jnp.asarray(np.argsort(order).astype(np.int32)),
        terms=terms,
        assets=known,
        gas_asset=known.index(gas_asset) if has_gas else -1,
    )


def _matrix(key: str, table: Any, assets: tuple[str, ...], prices: Mapping[str, float], in_coins: bool) -> np.ndarray:
    # (loans, assets and USD), in USD.
    columns = {str(name): np.asarray(table[name], np.float64) for name in table}
    if not columns:
        raise InputError(f"{key} is empty; loans need collateral and debt.")
    sizes = {name: column.shape for name, column in columns.items()}
    first = next(iter(sizes.values()))
    if len(first) != 1 or any(size != first for size in sizes.values()):
        raise InputError(f"{key} has columns of shapes {sizes}; each needs one number per loan.")
    matrix = np.zeros((first[0], len(assets) + 1))
    for name, column in columns.items():
        if not (np.isfinite(column) & (column >= 0.0)).all():
            row = int(np.argmin(np.isfinite(column) & (column >= 0.0)))
            raise InputError(f"{key}.{name}[{row}] is {column[row]}; amounts must be finite and not negative.")
        if name not in assets and name not in CASH_NAMES:
            raise InputError(f"{key} names {name!r}: {did_you_mean(name, ['USD', *assets])}")
        if name not in assets:
            matrix[:, -1] += column
            continue
        if in_coins and name not in prices:
            raise InputError(f"{key}.{name} is in coins; prices must hold the starting price of {name}.")
        matrix[:, assets.index(name)] += column * (float(prices[name]) if in_coins else 1.0)
    return matrix
