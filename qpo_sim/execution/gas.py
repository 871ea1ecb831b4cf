"""What a transaction costs on a chain.

Units: typical figures of public contracts, of which only the plain transfer is fixed by the protocol; the others vary
with the contract and its state and are not confirmed by a published table. Gas prices come from the market's side
process `gas`, in gwei.
"""

from collections.abc import Mapping
from types import MappingProxyType

from qpo_sim.types import Array

GWEI = 1e-9

UNITS: Mapping[str, int] = MappingProxyType(
    {
        "transfer": 21_000,
        "token_transfer": 65_000,
        "token_approval": 46_000,
        "constant_product_swap": 130_000,
        "concentrated_swap": 180_000,
        "extra_hop": 100_000,
        "stableswap_swap": 225_000,
        "lending_supply": 250_000,
        "lending_borrow": 250_000,
        "liquidation": 475_000,
        "flash_liquidation": 800_000,
        # aave-v3-origin, comment in LiquidationLogic.
        "bad_debt_asset": 75_000,
    }
)


def cost(units: Array, base_fee: Array, native_price: Array, *, tip: Array = 0.0) -> Array:
    r"""Cost in USD, $units \cdot (base + tip) \cdot 10^{-9} \cdot price$ (EIP-1559).

    Args:
      units: gas used.
      base_fee: gwei per unit of gas.
      native_price: USD per native coin.
      tip: priority fee, gwei per unit of gas.

    Pathwise gradient: all arguments.
    """
    return units * ((base_fee + tip) * GWEI) * native_price


def layer_2_cost(
    units: Array, fee: Array, native_price: Array, *, data_units: Array, data_fee: Array, tip: Array = 0.0
) -> Array:
    """Cost in USD on a rollup: execution there plus data posted to the chain below (EIP-4844 blobs).

    Args:
      units: gas used by execution.
      fee: gwei per unit of gas on the rollup.
      native_price: USD per native coin.
      data_units: blob gas (one per byte) that the transaction's data take.
      data_fee: gwei per unit of blob gas.
      tip: priority fee on the rollup, gwei.

    Pathwise gradient: all arguments.
    """
    return cost(units, fee, native_price, tip=tip) + cost(data_units, data_fee, native_price)


def break_even_trade(cost: Array, benefit_per_money: Array) -> Array:
    """Smallest notional whose benefit covers a fixed cost; trades below it are skipped.

    Args:
      cost: of the transaction, in money.
      benefit_per_money: what one unit of money traded gains, > 0 (a spread, a saving of risk).

    Pathwise gradient: all arguments.
    """
    return cost / benefit_per_money
