r"""Characteristic functions of log-prices, and what follows from them by one integral: call prices and distributions.

Every function here gives $\varphi(u)=E[e^{iuX}]$ of $X=\log(S_T/F)$, F the forward: the drift is the one that makes
$\varphi(-i)=1$. They are the closed forms that simulated paths are held against, and what option quotes are fitted to.

Float64 numpy on the host; u may be complex. Times in years, rates and variances per year. Nothing here is checked:
parameters outside their domain give NaN.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from qpo_sim.types import Array

Characteristic = Callable[[Array], Array]


def lewis_call(characteristic: Characteristic, strike: Any, *, forward: float, discount: float = 1.0) -> np.ndarray:
    r"""Prices of European calls.

    $D\,\big(F-\frac{\sqrt{FK}}{\pi}\int_0^\infty \Re[e^{iuk}\varphi(u-i/2)]\frac{du}{u^2+1/4}\big)$ with $k=\log(F/K)$.
    Absolute error about 1e-10 of the forward. A put is the call less $D(F-K)$. Lewis (2001), "A simple option formula
    for general jump-diffusion and other exponential Levy processes".

    Args:
      characteristic: one of the functions of this module with its parameters bound, a function of u alone.
      strike: one strike or an array of them.
      forward: forward price for the expiry.
      discount: price today of one unit of money at the expiry.

    Returns:
      Prices in the shape of `strike`.
    """
    strike = np.asarray(strike, np.float64)
    k = np.log(forward / strike)

    def integrand(u: float) -> np.ndarray:
        return (np.exp(1j * u * k) * characteristic(np.asarray(u - 0.5j))).real / (u * u + 0.25)

    return discount * (forward - np.sqrt(forward * strike) / np.pi * _half_line(integrand))


def distribution(characteristic: Characteristic, x: Any) -> np.ndarray:
    r"""Distribution function $P(X\le x)$, by the integral of Gil-Pelaez (1951).

    $\frac12-\frac1\pi\int_0^\infty \Im[e^{-iux}\varphi(u)]\frac{du}{u}$.

    Args:
      characteristic: of X, as for `lewis_call`.
      x: one log-return over the forward or an array of them.

    Returns:
      Probabilities in the shape of `x`; absolute error about 1e-9 where the law has a smooth density.
    """
    x = np.asarray(x, np.float64)

    def integrand(u: float) -> np.ndarray:
        return (np.exp(-1j * u * x) * characteristic(np.asarray(u, np.complex128))).imag / u

    return 0.5 - _half_line(integrand) / np.pi


def _half_line(integrand: Callable[[float], np.ndarray]) -> np.ndarray:
    from scipy import integrate

    return integrate.quad_vec(integrand, 0.0, np.inf, epsabs=1e-11, epsrel=1e-11, limit=20_000)[0]


def black_scholes(u: Array, *, years: float, volatility: float) -> Array:
    """Geometric Brownian motion."""
    return np.exp(-0.5 * volatility**2 * years * (u * u + 1j * u))


def heston(u: Array, *, years: float, v0: float, kappa: float, theta: float, vol_of_vol: float, rho: float) -> Array:
    r"""Heston (1993), in the form whose logarithm stays on its branch (Albrecher, Mayer, Schoutens & Tistaert 2007).

    $dv=\kappa(\theta-v)dt+\sigma\sqrt v\,dW$, $dX=-\tfrac12 v\,dt+\sqrt v\,dB$, $d\langle W,B\rangle=\rho\,dt$.

    Args:
      u: argument.
      years: time to the expiry.
      v0: variance at the start.
      kappa: speed at which the variance returns.
      theta: long-run variance.
      vol_of_vol: sigma.
      rho: correlation of price and variance.
    """
    u = np.asarray(u, np.complex128)
    root, beta, d, g = _riccati(u, kappa, vol_of_vol, rho)
    decay = np.exp(-d * years)
    slope = root * (1.0 - decay) / (1.0 - g * decay)
    level = kappa * theta * (root * years - 2.0 / vol_of_vol**2 * np.log((1.0 - g * decay) / (1.0 - g)))
    return np.exp(level + slope * v0)


def _riccati(u: Array, kappa: float, vol_of_vol: float, rho: float) -> tuple[Array, Array, Array, Array]:
    # The coefficient of v solves D' = -(u^2 + iu)/2 - beta D + sigma^2 D^2 / 2; `root` is its fixed point.
    beta = kappa - 1j * rho * vol_of_vol * u
    d = np.sqrt(beta * beta + vol_of_vol**2 * (1j * u + u * u))
    return (beta - d) / vol_of_vol**2, beta, d, (beta - d) / (beta + d)


def bates(u: Array, *, years: float, intensity: float, jump_mean: float, jump_std: float, **of_heston: float) -> Array:
    """Heston with Merton jumps of the price (Bates 1996); parameters of `heston` and `merton`."""
    return heston(u, years=years, **of_heston) * _merton_jumps(u, years, intensity, jump_mean, jump_std)


def svjj(
    u: Array,
    *,
    years: float,
    intensity: float,
    jump_mean: float,
    jump_std: float,
    variance_jump_mean: float,
    jump_leverage: float,
    kappa: float,
    vol_of_vol: float,
    rho: float,
    **of_heston: float,
) -> Array:
    r"""Heston with simultaneous jumps of price and variance, Duffie, Pan & Singleton (2000) sec. 4.

    At rate `intensity` the variance jumps by Y, exponential with mean `variance_jump_mean`, and the log-price by a
    normal with mean `jump_mean` + `jump_leverage` Y and standard deviation `jump_std`.

    Args:
      u: argument.
      years: time to the expiry.
      intensity: jumps per year.
      jump_mean: mean log-jump of the price without the variance's part.
      jump_std: standard deviation of the log-jump given Y.
      variance_jump_mean: mean of Y.
      jump_leverage: slope of the price's log-jump in Y; its product with `variance_jump_mean` must be below 1.
      kappa: as in `heston`.
      vol_of_vol: as in `heston`.
      rho: as in `heston`.
      **of_heston: v0 and theta.
    """
    u = np.asarray(u, np.complex128)
    root, _, d, g = _riccati(u, kappa, vol_of_vol, rho)
    decay = np.exp(-d * years)
    # The jumps add intensity times the integral of E[exp(iu J + D(s) Y)] - 1, with
    # E exp((iu jump_leverage + D) Y) = (1 - g E) / (a - b E), E = exp(-d s).
    c = 1.0 - 1j * u * jump_leverage * variance_jump_mean
    a, b = c - variance_jump_mean * root, c * g - variance_jump_mean * root
    # log((a - bE) / (a - b)) / b, which has a limit at b = 0.
    x = b / a
    near_zero = np.abs(x) < 1e-8
    x = np.where(near_zero, 1e-8, x)
    log_ratio = np.where(near_zero, (1.0 - decay), np.log((1.0 - x * decay) / (1.0 - x)) / x) / a
    integral = years / a + (b / a - g) / d * log_ratio
    normal_part = np.exp(1j * u * jump_mean - 0.5 * jump_std**2 * u * u)
    growth = np.exp(jump_mean + 0.5 * jump_std**2) / (1.0 - jump_leverage * variance_jump_mean) - 1.0
    jumps = intensity * (normal_part * integral - years - 1j * u * growth * years)
    return heston(u, years=years, kappa=kappa, vol_of_vol=vol_of_vol, rho=rho, **of_heston) * np.exp(jumps)


def merton(u: Array, *, years: float, volatility: float, intensity: float, jump_mean: float, jump_std: float) -> Array:
    """Merton (1976): Brownian motion and normal log-jumps, `intensity` of them per year."""
    diffusion = black_scholes(u, years=years, volatility=volatility)
    return diffusion * _merton_jumps(u, years, intensity, jump_mean, jump_std)


def _merton_jumps(u: Array, years: float, intensity: float, jump_mean: float, jump_std: float) -> Array:
    growth = np.expm1(jump_mean + 0.5 * jump_std**2)
    one_jump = np.exp(1j * u * jump_mean - 0.5 * jump_std**2 * u * u) - 1.0
    return np.exp(intensity * years * (one_jump - 1j * u * growth))


def kou(
    u: Array,
    *,
    years: float,
    volatility: float,
    intensity: float,
    up_probability: float,
    up_rate: float,
    down_rate: float,
) -> Array:
    """Kou (2002): log-jumps up with exponential rate `up_rate` (> 1) or down with rate `down_rate`."""

    def one_jump(w: Any) -> Any:
        up = up_probability * up_rate / (up_rate - w)
        return up + (1.0 - up_probability) * down_rate / (down_rate + w) - 1.0

    jumps = np.exp(intensity * years * (one_jump(1j * u) - 1j * u * one_jump(1.0)))
    return black_scholes(u, years=years, volatility=volatility) * jumps


def variance_gamma(u: Array, *, years: float, sigma: float, nu: float, theta: float) -> Array:
    r"""Variance gamma, $\theta G+\sigma W(G)$ with G a gamma clock of mean 1 and variance nu per year.

    Needs $1-\theta\nu-\sigma^2\nu/2>0$. Madan, Carr & Chang (1998).
    """

    def exponent(w: Any) -> Any:
        return -np.log(1.0 - w * theta * nu - 0.5 * sigma**2 * nu * w * w) / nu

    return np.exp(years * (exponent(1j * u) - 1j * u * exponent(1.0)))


def normal_inverse_gaussian(u: Array, *, years: float, alpha: float, beta: float, delta: float) -> Array:
    r"""Normal inverse Gaussian with steepness alpha, asymmetry beta and scale delta per year.

    Needs $|\beta|<\alpha$ and $|\beta+1|<\alpha$. Barndorff-Nielsen (1997).
    """

    def exponent(w: Any) -> Any:
        return delta * (np.sqrt(alpha**2 - beta**2) - np.sqrt(alpha**2 - (beta + w) ** 2))

    return np.exp(years * (exponent(1j * u) - 1j * u * exponent(1.0)))
