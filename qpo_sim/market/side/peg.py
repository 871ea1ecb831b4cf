r"""Price of stablecoins: small deviations from 1, temporary depegs that heal, and permanent impairments.

price = (1 - loss) (1 - D) (1 + x). A temporary depeg of depth d at time s makes $D_t = d\,e^{-\kappa(t - s)}$; one that
hits during another takes off its share of what is left, $D \to D + d(1 - D)$. A permanent impairment takes off a share
for good. Depths and shares are Beta distributed.

Figures: USDC fell to 0.88 on 2023-03-11 and was back at 0.99 to 1 in two to three days; UST from 1 to 0.1 to 0.2 in
four days of May 2022; USDe to 0.65 on one venue for hours on 2025-10-10. Temporary depths 0.03 to 0.35, half-lives 0.3
to 1 day. Suggested per year (inferred): fiat coin temporary 5 %, Beta(2, 14), permanent 0.3 %, Beta(2, 6); synthetic or
algorithmic coin permanent 5 to 10 %, Beta(4, 2); intensities 3 to 10 times as high in a crash. A fall of 10 % of BTC in
a day comes with a deviation above 1 % of some coin in about 30 % of cases (from memory). USDC against USDT 2022 to 2026
within 50 bp: standard deviation 6 bp, autocorrelation 0.99 after an hour and 0.87 after a day (own, from hourly pool
prices on Uniswap v3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.side import process
from qpo_sim.market.side.view import View
from qpo_sim.numerics import Rows, each_asset, polynomial, rounded
from qpo_sim.random import Address, normal_score
from qpo_sim.types import DAYS_PER_YEAR, Array

# Bound of the small deviations, approached smoothly: a coin that can be minted at 1 does not trade far above it.
BAND = 0.05
_DEGREE = 14
_SCORE_RANGE = 5.6


def beta_size(a: float, b: float) -> np.ndarray:
    r"""Coefficients of the logit of a Beta(a, b) quantile as a polynomial in $\zeta/5.6$ of a normal score $\zeta$.

    The quantile is analytic in the score; probabilities are met to 1e-4 for a, b >= 0.5.
    """
    from numpy.polynomial import chebyshev
    from scipy import special

    def logit_quantile(y):
        zeta = y * _SCORE_RANGE
        # Each side from its own tail, so that neither the value nor its complement loses its digits.
        value, rest = special.betaincinv(a, b, special.ndtr(zeta)), special.betaincinv(b, a, special.ndtr(-zeta))
        return np.log(value) - np.log(rest)

    return np.asarray(chebyshev.cheb2poly(chebyshev.chebinterpolate(logit_quantile, _DEGREE)), np.float64)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Peg:
    r"""Price of each stablecoin in its currency, output `peg` in [0, 1.05] at the end of a step.

    x = 0.05 tanh(X / 0.05) with X reverting to 0. Depegs arrive at
    $\lambda_k + \lambda_f\,\mathrm{clip}(-R/q - 1, 0, 1)$ per day, where R is the recent log-return of the driver, an
    exponentially weighted sum with mean age w: beyond a fall of q the intensity rises, and from 2q on it is higher by
    $\lambda_f$. Impairments arrive at the regime's intensity, at most one in a step. Exact at any step but for the
    moment within a step at which R passes q.

    Attributes:
      deviation: stationary standard deviation of X, per regime.
      half_life_hours: of X.
      depeg_per_day: lambda_k, per regime.
      fall_per_day: lambda_f.
      fall_threshold: q > 0, a log-return.
      depeg_size: polynomial of the logit depth in a normal score (see `beta_size`); the first row is the logit median.
      depeg_half_life_hours: of D.
      impairment_per_day: per regime.
      impairment_size: as depeg_size.
      window_hours: w.
      driver: number of the asset whose falls matter (static).
      longest_step_hours: steps up to this length can be simulated (static).
      coins: names (static).
      name: of the component, see `view.named` (static).

    Pathwise gradient: deviation, half_life_hours, depeg_half_life_hours and the sizes. None: intensities,
    fall_threshold and window_hours, which decide whether something happens.
    """

    deviation: Float[Array, "regimes coins"]
    half_life_hours: Float[Array, " coins"]
    depeg_per_day: Float[Array, "regimes coins"]
    fall_per_day: Float[Array, " coins"]
    fall_threshold: Float[Array, " coins"]
    depeg_size: Float[Array, "coefficients coins"]
    depeg_half_life_hours: Float[Array, " coins"]
    impairment_per_day: Float[Array, "regimes coins"]
    impairment_size: Float[Array, "coefficients coins"]
    window_hours: Float[Array, " 1"]
    driver: int = field(default=0, metadata={"static": True})
    longest_step_hours: float = field(default=24.0, metadata={"static": True})
    coins: tuple[str, ...] = field(default=("USD",), metadata={"static": True})
    name: str = field(default="peg", metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        n = len(self.coins)
        return (n + 1) // 2 + n * (process.MAX_ARRIVALS + 1)

    def prepare(self, *, step_hours: float) -> "Prepared":
        """Constants of a step.

        Raises:
          InputError: a step longer than the component was built for.
        """
        process.check_step("peg", step_hours, self.longest_step_hours)
        days = step_hours / process.HOURS_PER_DAY
        log_two = float(np.log(2.0))
        return Prepared(
            parameters=self,
            transition=process.reversion(self.half_life_hours, step_hours),
            recent=process.reversion(self.window_hours * log_two, step_hours),
            heal_rate=log_two * step_hours / self.depeg_half_life_hours,
            depegs=self.depeg_per_day * days,
            fall_depegs=self.fall_per_day * days,
            impairments=self.impairment_per_day * days,
        )

    def init(self, prepared: "Prepared", one: Array, address: Address) -> "State":
        """At par."""
        zeros = process.constant_rows(jnp.zeros_like(prepared.parameters.half_life_hours), one)
        return State(zeros, zeros, zeros, jnp.zeros_like(one))

    def first(self, prepared: "Prepared", one: Array) -> dict[str, Rows]:
        """Prices before the first step: par."""
        return {"peg": process.constant_rows(jnp.ones_like(prepared.parameters.half_life_hours), one)}

    def step(
        self, prepared: "Prepared", t: Array, state: "State", view: View, address: Address
    ) -> tuple["State", dict[str, Rows]]:
        """Prices after one step."""
        p, n = prepared.parameters, len(self.coins)
        zeros = each_asset(jnp.zeros_like, state.deviation)
        deviation = process.revert(
            state.deviation,
            zeros,
            process.by_regime(view, p.deviation, zeros),
            jnp.zeros_like(p.half_life_hours),
            zeros,
            zeros,
            process.container(process.normals(address, n, p.deviation.dtype)),
            prepared.transition,
        )
        log_return = process.pick(view.log_return, (self.driver,))[0]
        recent = lax.stop_gradient(state.recent * prepared.recent.decay[0] + log_return * prepared.recent.gain[0])
        depegs = process.by_regime(view, prepared.depegs, zeros)
        impairments = process.by_regime(view, prepared.impairments, zeros)
        after_normals = address.after((n + 1) // 2)
        discounts, losses = [], []
        for i in range(n):
            at = after_normals.after(i * (process.MAX_ARRIVALS + 1))
            fall = jnp.clip(-recent / p.fall_threshold[i] - 1.0, 0.0, 1.0)
            expected = depegs[i] + prepared.fall_depegs[i] * fall
            discounts.append(self._discount(state.discount[i], process.arrivals(at, expected), prepared, i))
            (hit,) = process.arrivals(at.after(process.MAX_ARRIVALS), impairments[i], 1)
            share = hit.happens * _size(hit.word, p.impairment_size[:, i])
            losses.append(state.loss[i] + share * (1.0 - state.loss[i]))
        discount, loss = process.container(discounts), process.container(losses)

        def price(x, discount, loss):
            return (1.0 - loss) * (1.0 - discount) * (1.0 + BAND * jnp.tanh(x / BAND))

        return State(deviation, discount, loss, recent), {"peg": each_asset(price, deviation, discount, loss)}

    def _discount(self, discount: Array, found: list[process.Arrival], prepared: "Prepared", i: int) -> Array:
        left = jnp.ones_like(discount)
        for arrival in found:
            # Heals up to the arrival; one that does not happen has nothing left of the step and changes nothing.
            discount = discount * jnp.exp(-prepared.heal_rate[i] * (left - arrival.left))
            size = arrival.happens * _size(arrival.word, prepared.parameters.depeg_size[:, i])
            discount, left = discount + size * (1.0 - discount), arrival.left
        return discount * jnp.exp(-prepared.heal_rate[i] * left)


def _size(word: Array, coefficients: Float[Array, " coefficients"]) -> Array:
    score = normal_score(word).astype(coefficients.dtype) * (1.0 / _SCORE_RANGE)
    return jax.nn.sigmoid(polynomial([coefficients[k] for k in range(coefficients.shape[0])], score))


class State(NamedTuple):
    """X, D and the permanent loss by coin, and the recent return of the driver."""

    deviation: Rows
    discount: Rows
    loss: Rows
    recent: Array


class Prepared(NamedTuple):
    """Constants of a step; depegs, fall_depegs and impairments are expected numbers in it."""

    parameters: Peg
    transition: process.Reversion
    recent: process.Reversion
    heal_rate: Array
    depegs: Array
    fall_depegs: Array
    impairments: Array


def peg(
    coins: Sequence[str],
    *,
    deviation: process.Entries = 6e-4,
    half_life_hours: process.Entries = 72.0,
    depeg_per_year: process.Entries = 0.05,
    depth: Sequence[Any] = (2.0, 14.0),
    depeg_half_life_hours: process.Entries = 12.0,
    fall_per_day: process.Entries = 0.0,
    fall_threshold: process.Entries = 0.05,
    window_hours: float = 24.0,
    impairment_per_year: process.Entries = 0.003,
    impairment: Sequence[Any] = (2.0, 6.0),
    driver: int | str = 0,
    assets: Sequence[str] = (),
    longest_step_hours: float = 24.0,
    name: str = "peg",
    dtype: Any = jnp.float32,
) -> Peg:
    """Stablecoins of plain numbers (see `Peg`; tables as in `process`).

    Args:
      coins: names.
      deviation: of small deviations, per regime.
      half_life_hours: of small deviations.
      depeg_per_year: intensity of temporary depegs, per regime.
      depth: (a, b) of the Beta law of their depth, or one pair per coin.
      depeg_half_life_hours: of a temporary depeg.
      fall_per_day: further intensity per day after a fall of the driver by twice fall_threshold or more.
      fall_threshold: fall of the driver's recent log-return from which on depegs are likelier.
      window_hours: mean age of the returns in the recent return.
      impairment_per_year: intensity of permanent losses, per regime.
      impairment: (a, b) of the Beta law of their size, or one pair per coin.
      driver: asset, by number or name.
      assets: names of the market's assets, where the driver is named.
      longest_step_hours: steps up to this length can be simulated.
      name: of the component, see `view.named`.
      dtype: precision of the paths.

    Raises:
      InputError: an entry out of bounds, a wrong shape, or too many events for a step.
    """
    coins = tuple(coins)
    n = len(coins)
    if n == 0 or len(set(coins)) < n:
        raise InputError(f"coins is {list(coins)}; name at least one coin, each once.")
    deviations = process.table("deviation", deviation, n, at_least=0.0)
    depegs = process.table("depeg_per_year", depeg_per_year, n, at_least=0.0) / DAYS_PER_YEAR
    losses = process.table("impairment_per_year", impairment_per_year, n, at_least=0.0) / DAYS_PER_YEAR
    falls = process.vector("fall_per_day", fall_per_day, n, at_least=0.0)
    process.check_regimes(deviation=deviations, depeg_per_year=depegs, impairment_per_year=losses)
    longest = process.number("longest_step_hours", longest_step_hours, above=0.0)
    process.check_intensity("depeg_per_year with fall_per_day", depegs + falls, longest)
    # Ten times rarer than what three arrivals allow, as only one impairment is drawn.
    process.check_intensity("impairment_per_year (times ten)", 10.0 * losses, longest)
    leaves = {
        "deviation": deviations,
        "half_life_hours": process.vector("half_life_hours", half_life_hours, n, above=0.0),
        "depeg_per_day": depegs,
        "fall_per_day": falls,
        "fall_threshold": process.vector("fall_threshold", fall_threshold, n, above=0.0),
        "depeg_size": _sizes("depth", depth, n),
        "depeg_half_life_hours": process.vector("depeg_half_life_hours", depeg_half_life_hours, n, above=0.0),
        "impairment_per_day": losses,
        "impairment_size": _sizes("impairment", impairment, n),
        "window_hours": process.vector("window_hours", window_hours, 1, above=0.0),
    }
    return Peg(
        **{key: rounded(value, dtype) for key, value in leaves.items()},
        driver=process.check_drivers("driver", driver, assets)[0],
        longest_step_hours=longest,
        coins=coins,
        name=name,
    )


def _sizes(name: str, pairs: Sequence[Any], n_coins: int) -> np.ndarray:
    array = np.asarray(pairs, np.float64)
    if array.shape not in ((2,), (n_coins, 2)) or not np.all((array >= 0.5) & (array <= 200.0)):
        raise InputError(
            f"{name} is {array.tolist()}; give the two parameters of a Beta law, each in [0.5, 200], or a pair "
            "per coin."
        )
    return np.stack([beta_size(a, b) for a, b in np.broadcast_to(array, (n_coins, 2))], axis=1)


def example(n_assets: int, dtype: Any = jnp.float32, n_regimes: int = 1) -> Peg:
    """A fiat-backed and a synthetic coin; events ten times as frequent in the last regime, and after falls."""
    stress = np.geomspace(1.0, 10.0, n_regimes)[:, None] if n_regimes > 1 else np.ones((1, 1))
    return peg(
        ("USDC", "USDe"),
        depeg_per_year=stress * [[0.05, 0.1]],
        impairment_per_year=stress * [[0.003, 0.07]],
        impairment=[(2.0, 6.0), (4.0, 2.0)],
        fall_per_day=0.3,
        dtype=dtype,
    )
