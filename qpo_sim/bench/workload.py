r"""The workloads that speed is measured on, and vectorised NumPy programs of the same models to measure against.

365 steps of 10 assets (W1) or 100 steps of 100 assets (W3): three Markov regimes with drift $\mu_k$ and factor
$C_k = \mathrm{diag}(\sigma_k)\,\mathrm{chol}(\rho_k)$; per step and path one mixing draw $g \sim \chi^2_{\nu_k}$ shared
by all assets, so that $\log P$ grows by $\mu_k + \sqrt{(\nu_k-2)/g}\,C_k z$. One cross-margined account with a wallet
of 1 holds positions of notional $\ell w_i$: equity $E = 1 - \ell + \ell \sum_i w_i P_i$, frozen (and not below 0) from
the first step with $E \le m\,\ell \sum_i w_i P_i$; the running peak and the largest drawdown are kept.

W2 has one asset and the same account: $\log P$ grows by $\mu + x_t$ with $x_t = \sqrt{h_t(\nu-2)/g}\,z$ and the
GARCH(1,1) recursion $h_{t+1} = \omega + \alpha x_t^2 + \beta h_t$ from $h_1 = \omega/(1-\alpha-\beta)$.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qpo_sim.book import Book
    from qpo_sim.market.model import Market

# JAX is imported where it is used: the memory of the NumPy program is measured without it.


def parameters(n_assets: int = 10, seed: int = 7) -> dict[str, Any]:
    """Model by short names: A assets, mu, nu, C, P, cum (transition cuts), w, lev, mm, s0 (first regime).

    `garch` has those of W2: om, al, be, nu, mu, all per step.
    """
    rng = np.random.default_rng(seed)
    per_year = 0.5 + 0.6 * rng.random(n_assets)
    volatility = np.outer([0.6, 1.0, 2.0], per_year / np.sqrt(365.0))
    mu = (np.array([[0.45], [0.05], [-1.2]]) - 0.5 * per_year**2) / 365.0
    factor = []
    for k, rho in enumerate((0.35, 0.55, 0.85)):
        correlation = (1.0 - rho) * np.eye(n_assets) + rho
        factor.append(volatility[k][:, None] * np.linalg.cholesky(correlation))
    transition = np.array([[0.985, 0.013, 0.002], [0.020, 0.970, 0.010], [0.010, 0.060, 0.930]])
    weight = rng.random(n_assets) + 0.5
    return {
        "A": n_assets, "mu": mu, "nu": np.array([6.3, 4.7, 3.4]), "C": np.stack(factor), "P": transition,
        "cum": np.cumsum(transition, axis=1)[:, :2], "w": weight / weight.sum(), "lev": 1.5, "mm": 0.10, "s0": 1,
        "garch": {"om": 2e-5, "al": 0.08, "be": 0.90, "nu": 4.5, "mu": 2e-4},
    }  # fmt: skip


def names(model: dict[str, Any]) -> tuple[str, ...]:
    """Names for the model's assets."""
    return tuple(f"A{i}" for i in range(model["A"]))


def market_of(model: dict[str, Any], assets: tuple[str, ...]) -> Market:
    """The model's market, with the mixing scale left uncut as the NumPy program leaves it."""
    import jax.numpy as jnp

    from qpo_sim.market.model import Market

    volatility = np.sqrt(np.einsum("kij,kij->ki", model["C"], model["C"]))
    parts = (
        np.eye(3)[model["s0"]],
        model["P"],
        model["mu"],
        volatility,
        model["C"] / volatility[:, :, None],
        model["nu"],
    )
    return Market(*(jnp.asarray(part, jnp.float32) for part in parts), assets=assets, mixing_cut=0.0)


def garch_market_of(model: dict[str, Any], assets: tuple[str, ...]) -> Market:
    """The market of W2 for its one asset, with tails as long as the random bits allow.

    The shock is a copula of one asset, that is its Student-t margin: one normal score a step instead of the two that a
    mixing variable shared by several assets takes.
    """
    import jax.numpy as jnp

    from qpo_sim.market.dependence.copula import gaussian_copula
    from qpo_sim.market.model import Market
    from qpo_sim.market.volatility.garch import garch

    p = model["garch"]
    one = jnp.ones((1, 1), jnp.float32)
    return Market(
        initial=one[0], transition=one, drift=jnp.float32(p["mu"]) * one, volatility=one, correlation_cholesky=None,
        dof=None, assets=assets, mixing_cut=0.0,
        volatility_model=garch(
            p["om"], p["al"], p["be"], initial_variance=p["om"] / (1.0 - p["al"] - p["be"]), n_assets=1
        ),
        shock=gaussian_copula(np.eye(1), {"kind": "student_t", "dof": p["nu"]}, cut=0.0),
    )  # fmt: skip


def book_of(model: dict[str, Any], assets: tuple[str, ...]) -> Book:
    """The model's margin account."""
    from qpo_sim.book import build_book
    from qpo_sim.venue import TieredMargin

    account = {
        "name": "account",
        "venue": TieredMargin(tiers={"default": [[0, model["mm"], min(150.0, 1.0 / model["mm"])]]}),
        "mode": "cross",
        "margin": 1.0,
        "positions": dict(zip(assets, (model["lev"] * model["w"]).tolist(), strict=True)),
    }
    return build_book(assets, perpetuals=[account])


def numpy_paths(
    model: dict[str, Any], n_paths: int, n_steps: int, seed: int, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Profit, liquidation and largest drawdown in vectorised NumPy, float32, in chunks that stay in the cache."""
    single = np.float32
    n_assets, dof, start = model["A"], model["nu"], model["s0"]
    factor = np.concatenate(list(model["C"]), axis=1).astype(single)
    drift, cuts, weight = model["mu"].astype(single), model["cum"].astype(single), model["w"].astype(single)
    leverage, rate = single(model["lev"]), single(model["mm"])
    # The fastest generator numpy has.
    rng = np.random.Generator(np.random.SFC64(seed))
    finished = []
    for first in range(0, n_paths, chunk):
        n = min(chunk, n_paths - first)
        log_price, by_regime = np.zeros((n_assets, n), single), np.empty((3 * n_assets, n), single)
        regime = np.full(n, start)
        equity, peak, drawdown, alive = np.ones(n, single), np.ones(n, single), np.zeros(n, single), np.ones(n, bool)
        for _ in range(n_steps):
            u = rng.random(n, dtype=single)
            regime = (u > cuts[regime, 0]).astype(np.intp) + (u > cuts[regime, 1])
            z = rng.standard_normal((n_assets, n), dtype=single)
            chi2 = 2.0 * rng.standard_gamma(0.5 * dof[regime])
            z *= np.sqrt((dof[regime] - 2.0) / chi2).astype(single)
            # One product with the three factors side by side, each fed only the paths in its regime.
            for k in range(3):
                np.multiply(z, regime == k, out=by_regime[k * n_assets : (k + 1) * n_assets])
            log_price += factor @ by_regime
            log_price += drift[regime].T
            value = leverage * (weight @ np.exp(log_price))
            now = 1 - leverage + value
            equity = np.where(alive, now, equity)
            np.maximum(peak, equity, out=peak)
            np.maximum(drawdown, 1 - equity / peak, out=drawdown)
            alive &= now > rate * value
        finished.append((equity - 1, ~alive, drawdown))
    profit, liquidated, drawdown = (np.concatenate(part) for part in zip(*finished, strict=True))
    return profit, liquidated, drawdown


def numpy_garch_paths(
    model: dict[str, Any], n_paths: int, n_steps: int, seed: int, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`numpy_paths` for W2."""
    single = np.float32
    p = model["garch"]
    omega, alpha, beta, drift = (single(p[name]) for name in ("om", "al", "be", "mu"))
    half_dof, numerator = single(0.5 * p["nu"]), single(0.5 * p["nu"] - 1.0)
    leverage, rate = single(model["lev"]), single(model["mm"])
    rng = np.random.Generator(np.random.SFC64(seed))
    finished = []
    for first in range(0, n_paths, chunk):
        n = min(chunk, n_paths - first)
        log_price, variance = np.zeros(n, single), np.full(n, omega / (1 - alpha - beta), single)
        equity, peak, drawdown, alive = np.ones(n, single), np.ones(n, single), np.zeros(n, single), np.ones(n, bool)
        for _ in range(n_steps):
            z = rng.standard_normal(n, dtype=single)
            shock = z * np.sqrt(variance * numerator / rng.standard_gamma(half_dof, n, dtype=single))
            variance *= beta
            variance += omega + alpha * (shock * shock)
            log_price += drift + shock
            value = leverage * np.exp(log_price)
            now = 1 - leverage + value
            equity = np.where(alive, now, equity)
            np.maximum(peak, equity, out=peak)
            np.maximum(drawdown, 1 - equity / peak, out=drawdown)
            alive &= now > rate * value
        finished.append((equity - 1, ~alive, drawdown))
    profit, liquidated, drawdown = (np.concatenate(part) for part in zip(*finished, strict=True))
    return profit, liquidated, drawdown
