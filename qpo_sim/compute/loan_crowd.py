"""A crowd of loans over many paths: chunks of market paths over all devices, memory that does not grow with either."""

from collections import deque
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim import random
from qpo_sim.account.lending_crowd import CrowdOutcome, LoanCrowd, crowd_outcome
from qpo_sim.errors import InputError
from qpo_sim.market import model as market_model
from qpo_sim.market.model import Market
from qpo_sim.simulate import Plan, record_market, sub_steps_of
from qpo_sim.types import HOURS_PER_YEAR, Array, Estimate

CHUNK = 256


class CrowdResult(NamedTuple):
    """What a crowd of loans leaves behind, in USD.

    Attributes:
      probability: of being liquidated at least once, by loan.
      bad_debt: expected, by loan.
      repaid: debt that liquidators have paid, by path.
      seized: collateral taken for it, by path.
      lost: bad debt of all loans, by path: the protocol's loss.
    """

    probability: Estimate
    bad_debt: Estimate
    repaid: Float[np.ndarray, " paths"]
    seized: Float[np.ndarray, " paths"]
    lost: Float[np.ndarray, " paths"]


def simulate_crowd(
    market: Market, crowd: LoanCrowd, plan: Plan, n_paths: int, *, seed: int = 0, chunk: int = CHUNK
) -> CrowdResult:
    """Liquidations and losses of a crowd of loans on the paths 0..n_paths-1 of a market.

    Args:
      market: see `market`; its path k is that of every other run with this seed.
      crowd: from `account.lending_crowd.loan_crowd`, in the precision of the market.
      plan: steps, with monitoring "step".
      n_paths: number of paths.
      seed: 64-bit seed.
      chunk: paths at a time on each device.

    Raises:
      InputError: monitoring other than "step", assets that are not the market's, too few paths, or a step that does not
        divide the market's.
    """
    if plan.monitoring != "step" or plan.antithetic:
        raise InputError(
            "a crowd of loans is looked at when steps end, on independent paths: use Plan(monitoring='step')."
        )
    if market.assets != crowd.assets:
        raise InputError(
            f"the crowd is built for {', '.join(crowd.assets)}, the market has {', '.join(market.assets)}."
        )
    if n_paths < 2 or chunk < 1:
        raise InputError(f"n_paths is {n_paths} and chunk {chunk}; there must be at least 2 paths and 1 per chunk.")
    sub_steps_of(market, plan)
    keys, devices = random.stream_keys(seed), jax.local_devices()
    size = min(chunk, n_paths)
    placed = [jax.device_put((market, crowd, keys), device) for device in devices]
    sums = np.zeros((3, crowd.n_loans))
    totals: list[list[np.ndarray]] = []
    running: deque[tuple[CrowdOutcome, int]] = deque()

    def collect() -> None:
        outcome, n = running.popleft()
        for total, row in zip(sums, outcome[:3], strict=True):
            total += np.asarray(row, np.float64)
        totals.append([np.asarray(row, np.float64)[:n] for row in outcome[3:]])

    for k, first in enumerate(range(0, n_paths, size)):
        n = min(size, n_paths - first)
        # One chunk waits on each device while another runs.
        if len(running) >= 2 * len(devices):
            collect()
        running.append((_outcome(*placed[k % len(devices)], np.uint32(first), np.uint32(n), plan, size), n))
    while running:
        collect()
    hits, bad, squared = sums
    mean = bad / n_paths
    variance = np.maximum(squared / n_paths - mean**2, 0.0) * (n_paths / (n_paths - 1.0))
    # Agresti and Coull: the plain error would be 0 where no path or every path is liquidated.
    shrunk = (hits + 2.0) / (n_paths + 4.0)
    repaid, seized, lost = (np.concatenate(rows) for rows in zip(*totals, strict=True))
    return CrowdResult(
        Estimate(hits / n_paths, np.sqrt(shrunk * (1.0 - shrunk) / (n_paths + 4.0))),
        Estimate(mean, np.sqrt(variance / n_paths)),
        repaid,
        seized,
        lost,
    )


@partial(jax.jit, static_argnames=("plan", "size"))
def _outcome(
    market: Market, crowd: LoanCrowd, keys: Any, first: Array, n: Array, plan: Plan, size: int
) -> CrowdOutcome:
    # Whole vectors of lanes, as in `simulate.padded`; paths beyond the last one do not count.
    lane = jnp.arange(size + (-size) % 256, dtype=jnp.uint32)
    prepared = market_model.prepare(market, sub_steps=round(market.step_hours / plan.step_hours))
    record = record_market(market, prepared, keys, first + lane, plan)
    gwei = record.side["gas"] if record.side and "gas" in record.side else None
    counts = (lane < n).astype(market.drift.dtype)
    return crowd_outcome(crowd, jnp.exp(record.log_price), gwei, plan.step_hours / HOURS_PER_YEAR, counts)
