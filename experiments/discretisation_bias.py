r"""How far off are the stochastic volatility schemes at a given step, and how fast does it shrink?

Every scheme runs with ever shorter steps, and what it gives is compared with a closed form:

* calls at the money under Heston, Bates and SVJJ, by QE-M and by full-truncation Euler, with the price of the Lewis
  integral (`qpo_sim.market.transforms`); in units of a spot of 100, without rates;
* rough Bergomi has no such prices, but moments. With $M=\int_0^T\sqrt{v_t}\,dB_t$ and $K(u)=\sqrt{2H}u^{H-1/2}$
  $$E[M^3]=3\rho\eta\int_0^T\!\!\int_0^tK(t-s)\,E[v_t\sqrt{v_s}]\,ds\,dt,\qquad
  E\Big[\Big(\int_0^Tv_t\,dt\Big)^2\Big]=2\int_0^T\!\!\int_0^tE[v_sv_t]\,ds\,dt,$$
  the first by Clark-Ocone, with lognormal expectations from the exact covariance of the driver. They hold the leverage
  that makes the skew, and the variability of the realised variance.

Given the variances (and jumps) a log-price is normal, so the shocks are integrated out in closed form: prices are
averages of Black-Scholes prices. The average forward is known exactly in every scheme and is the control variate.

A bias is significant when it is several times its standard error; what is left of smaller ones is noise. Rows with the
same number of steps use the same draws, so their noise goes together: another seed tells it from a bias.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_paths import table
from jax import lax
from scipy import special

from qpo_sim.errors import InputError
from qpo_sim.market import transforms
from qpo_sim.market.volatility.heston import FellerWarning, heston
from qpo_sim.market.volatility.rough_bergomi import driver_covariance, rough_bergomi
from qpo_sim.numerics import each_asset, materialised
from qpo_sim.random import Address, Stream, stream_key
from qpo_sim.types import HOURS_PER_YEAR

N_PATHS, AT_ONCE = 1 << 20, 1 << 14
STEPS = (4, 8, 16, 32, 64, 128)
YEARS, SPOT = 1.0, 100.0

# Fang & Oosterlee (2008) and Broadie & Kaya (2006), where Feller's condition fails; and a market like Bitcoin's.
PARAMETERS: dict[str, dict[str, Any]] = {
    "Heston, Fang-Oosterlee": dict(v0=0.0175, kappa=1.5768, theta=0.0398, vol_of_vol=0.5751, rho=-0.5711),
    "Heston, Broadie-Kaya": dict(v0=0.010201, kappa=6.21, theta=0.019, vol_of_vol=0.61, rho=-0.7),
    "Heston, crypto-like": dict(v0=0.4, kappa=4.0, theta=0.5, vol_of_vol=1.5, rho=-0.4),
    "Bates": dict(
        v0=0.008836, kappa=3.99, theta=0.014, vol_of_vol=0.27, rho=-0.79,
        intensity=0.11, jump_mean=math.log(0.88) - 0.5 * 0.15**2, jump_std=0.15,
    ),
    "SVJJ": dict(
        v0=0.4, kappa=4.0, theta=0.5, vol_of_vol=1.5, rho=-0.4,
        intensity=1.5, jump_mean=-0.05, jump_std=0.1, variance_jump_mean=0.15, jump_leverage=-0.4,
    ),
}  # fmt: skip
SCHEME_NAMES = {"qe": "QE-M", "euler": "Euler"}
ROUGH: dict[str, Any] = dict(xi=0.25, eta=1.0, hurst=0.1, rho=-0.7)


class Sums(NamedTuple):
    """What the variances of a path say of its return, for one asset.

    Attributes:
      mean: of the log-return given the variances, jumps included.
      variance: of the log-return given the variances.
    """

    mean: Any
    variance: Any


class Quantity(NamedTuple):
    """An expectation with a known value: `sample` gives a path's value and a control variate with mean `control`."""

    name: str
    sample: Callable[[Sums], tuple[Any, Any]]
    control: float
    exact: float


class Case(NamedTuple):
    """A scheme with what it is judged by."""

    name: str
    scheme: str
    model: Any
    quantities: tuple[Quantity, ...]


# ----------------------------------------------------------------------------- truths


def call_quantity(name: str) -> Quantity:
    """A call at the money."""
    parameters = PARAMETERS[name]
    law = transforms.heston
    if "intensity" in parameters:
        law = transforms.svjj if "variance_jump_mean" in parameters else transforms.bates
    exact = float(transforms.lewis_call(partial(law, years=YEARS, **parameters), SPOT, forward=SPOT))

    def sample(sums: Sums) -> tuple[Any, Any]:
        forward, deviation = SPOT * np.exp(sums.mean + 0.5 * sums.variance), np.sqrt(sums.variance)
        d = np.log(forward / SPOT) / deviation + 0.5 * deviation
        return forward * special.ndtr(d) - SPOT * special.ndtr(d - deviation), forward

    return Quantity("call", sample, SPOT, exact)


def triangle(integrand: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], n_nodes: int = 300) -> float:
    """Integral over 0 < s < t < YEARS of a function of s, t and t - s with power-law ends."""
    x, w = np.polynomial.legendre.leggauss(n_nodes)
    x, w = 0.5 * (x + 1.0), 0.5 * w
    # Nodes crowd at the ends, where x^5 and x^10 flatten the powers: at t = 0, and inside at both s = 0 and s = t.
    t, weight = (YEARS * x**5)[:, None], YEARS * 5.0 * x**4 * w
    short, weight_short = 0.5 * t * x**10, 0.5 * t * (10.0 * x**9 * w)
    inner = (integrand(short, t, t - short) + integrand(t - short, t, short)) * weight_short
    return float(weight @ inner.sum(axis=1))


def rough_quantities() -> tuple[Quantity, ...]:
    """Third moment of the martingale part of the return, and second moment of the realised variance."""
    xi, eta, hurst, rho = ROUGH["xi"], ROUGH["eta"], ROUGH["hurst"], ROUGH["rho"]

    def leverage(s: np.ndarray, t: np.ndarray, gap: np.ndarray) -> np.ndarray:
        kernel = math.sqrt(2.0 * hurst) * gap ** (hurst - 0.5)
        log_mean = 0.5 * eta**2 * driver_covariance(hurst, s, t) - 0.125 * eta**2 * s ** (2.0 * hurst)
        return kernel * xi**1.5 * np.exp(log_mean)

    def product(s: np.ndarray, t: np.ndarray, gap: np.ndarray) -> np.ndarray:
        return xi**2 * np.exp(eta**2 * driver_covariance(hurst, s, t))

    def parts(sums: Sums) -> tuple[Any, Any]:
        realised = sums.variance / (1.0 - rho**2)
        return sums.mean + 0.5 * realised, realised

    def third(sums: Sums) -> tuple[Any, Any]:
        explained, _ = parts(sums)
        # The martingale part is normal given the driver, with mean `explained`.
        return explained**3 + 3.0 * explained * sums.variance, explained

    def second(sums: Sums) -> tuple[Any, Any]:
        realised = parts(sums)[1]
        return realised**2, realised

    return (
        Quantity("E[M^3]", third, 0.0, 3.0 * rho * eta * triangle(leverage)),
        Quantity("E[realised variance^2]", second, xi * YEARS, 2.0 * triangle(product)),
    )


def cases() -> Iterator[Case]:
    """All cases."""
    for name, parameters in PARAMETERS.items():
        quantity = call_quantity(name)
        numbers = {("jump_intensity" if key == "intensity" else key): value for key, value in parameters.items()}
        for scheme, title in SCHEME_NAMES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FellerWarning)
                model = heston(**numbers, scheme=scheme)
            yield Case(name, title, model, (quantity,))
    yield Case("rough Bergomi", "hybrid", rough_bergomi(**ROUGH), rough_quantities())


# ----------------------------------------------------------------------------- runs


def sums_of(model: Any, path: Any, n_steps: int, seed_key: Any) -> Sums:
    """The variances of the paths, summed up; the shocks are never drawn."""
    prepared = model.prepare(sub_steps=1, step_hours=YEARS / n_steps * HOURS_PER_YEAR)
    one = jnp.ones(path.shape, jnp.float32)
    state = model.init(prepared, one, 1, n_steps, Address(seed_key, path, jnp.zeros((), jnp.int32)))

    def open_(prepared, t, state, path):
        return model.open(prepared, t, state, (), Address(seed_key, path, t + 1))

    def step(carry, t):
        state, mean, variance = carry
        state, local = materialised(open_)(prepared, t, state, path)
        moves = [local.shift] + ([] if local.jump is None else [local.jump])
        mean = each_asset(lambda *rows: sum(rows[1:], rows[0]), mean, *moves)
        variance = each_asset(lambda v, f: v + f * f, variance, local.factor)
        return (model.close(prepared, t, state, (), local, ()), mean, variance), None

    zero = (jnp.zeros_like(one),)
    _, mean, variance = lax.scan(step, (state, zero, zero), jnp.arange(n_steps, dtype=jnp.int32))[0]
    return Sums(mean[0], variance[0])


def estimates(case: Case, *, n_steps: int, n_paths: int, seed: int) -> Iterator[tuple[Quantity, float, float]]:
    """Each quantity's estimate and standard error, with the control variate."""
    seed_key = stream_key(seed, Stream.VOLATILITY)
    # The model is closed over: `prepare` refuses steps that are too long only where it sees numbers.
    program = jax.jit(lambda path: sums_of(case.model, path, n_steps, seed_key))
    at_once = min(AT_ONCE, n_paths)
    blocks = [program(jnp.arange(k, k + at_once, dtype=jnp.uint32)) for k in range(0, n_paths, at_once)]
    sums = Sums(*(np.concatenate([np.asarray(block[i], np.float64) for block in blocks]) for i in range(2)))
    for quantity in case.quantities:
        value, control = quantity.sample(sums)
        slope = np.cov(value, control)[0, 1] / control.var()
        value = value - slope * (control - quantity.control)
        yield quantity, float(value.mean()), float(value.std() / math.sqrt(value.size))


def measured(steps: tuple[int, ...], n_paths: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table."""
    for case in cases():
        for n_steps in steps:
            try:
                found = list(estimates(case, n_steps=n_steps, n_paths=n_paths, seed=seed))
            except InputError:
                # Too long a step for the model: Euler's variance would overshoot its mean, or jumps come too often.
                continue
            for quantity, value, error in found:
                bias = value - quantity.exact
                numbers = (
                    f"{value:.5f}",
                    f"{quantity.exact:.5f}",
                    f"{bias:+.5f}",
                    f"{error:.5f}",
                    f"{bias / error:+.1f}",
                )
                yield case.name, case.scheme, quantity.name, str(n_steps), *numbers


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Bias of the stochastic volatility schemes as the step shrinks.")
    parser.add_argument("--paths", type=int, default=N_PATHS, help="paths per row (default %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="steps a year (default: 4 to 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the paths (default %(default)s)")
    options = parser.parse_args(arguments)
    if not (2 <= options.paths <= 2**32 and min(options.steps) >= 1):
        parser.error("--paths must lie in 2 .. 2^32 and --steps must be positive")
    header = ("model", "scheme", "quantity", "steps a year", "estimate", "exact", "bias", "std error", "bias / error")
    print(table(header, list(measured(tuple(options.steps), options.paths, options.seed))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
