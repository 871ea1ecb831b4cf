r"""Self- and cross-exciting jumps: a multivariate Hawkes process with exponential kernels and marked events.

Events of type d come at the intensity $\lambda_d = \mu_d + x_d$ with
$dx_d = -\beta_d x_d\,dt + \sum_j \alpha_{dj}\,dN_j$, all per year. An event of type j triggers on average
$\alpha_{dj}/\beta_d$ events of type d directly; the branching ratio is the spectral radius of that matrix.

**Events are exact.** Within a step they are found by thinning (Ogata 1981): between events the intensities only fall,
so the total just after the last proposal bounds them until the next. A proposal draws a waiting time at that bound and
one uniform that decides whether there is an event and of which type. The loop over proposals ends when every path has
reached the end of the step; a path that has is not touched any more, so its numbers do not depend on its company.
Proposal p of a step has slot p (slots 2p and 2p + 1 with double-exponential marks) of the component's address. At most
`max_proposals` are made per step: where they do not suffice the rest of the step has no events, and
`HawkesState.overflow` counts the steps of the path in which that happened.

**Marks.** An event of type d has a normal or double-exponential log-size. Without loadings event type i is asset i's
own jump. With loadings $\ell_{id}$ (common marks) one size moves every asset by $\ell_{id}$ times it; own normal noise
may be added to each.

**Compensator.** The process is affine, so $\log E[e^{J_i} | x] = a_i + \sum_d b_{id} x_d$ for the sum J of a step. From
zero, $b_d' = -\beta_d b_d + \phi_{id} e^{\sum_l b_l \alpha_{ld}} - 1$ and
$a' = \sum_d \mu_d (\phi_{id} e^{\sum_l b_l\alpha_{ld}} - 1)$, with $\phi_{id}$ the mean of exp of the mark (Errais,
Giesecke & Goldberg 2010). That is exact but for the Runge-Kutta steps (relative error below 1e-7, in float32 3e-6) and
the events that an overflow drops.

Hawkes (1971); Ogata (1981); Dassios & Zhao (2013); Da Fonseca & Zaatour (2014).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market.jump import poisson
from qpo_sim.market.jump.base import Jump
from qpo_sim.market.jump.kou import DoubleExponentialSizes, double_exponential_sizes
from qpo_sim.market.jump.merton import NormalSizes, normal_sizes
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Rows, each_asset, regime_rows, rounded
from qpo_sim.random import MAX_SLOTS, Address, uniform
from qpo_sim.types import HOURS_PER_YEAR, Array

STARTS = ("cold", "mean")

_TINY = 1e-30
_MAX_ODE_STEPS = 1024
# Up to this many event types a matrix-vector product is written out: a call of a matrix product costs more.
_MAX_UNROLLED_TYPES = 4


class HawkesState(NamedTuple):
    """State of a path.

    Attributes:
      excess: intensity above its floor by event type, in events per simulation step.
      overflow: number of steps so far whose proposals did not suffice (see the module).
    """

    excess: Float[Array, "types paths"]
    overflow: Float[Array, " paths"]


class Prepared(NamedTuple):
    """Constants of a step; intensities, kernels and decays are per simulation step."""

    floor: Float[Array, "regimes types"]
    alpha: Float[Array, "types types"]
    beta: Float[Array, " decays"]
    start: Float[Array, " types"]
    sizes: Any
    loading: Float[Array, "assets types"] | None
    own_sd: Float[Array, " assets"] | None
    log_mean_exp: Float[Array, "regimes assets"] | None
    log_mean_exp_slope: Float[Array, "assets types"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hawkes:
    """Hawkes jumps (see the module); everything per year.

    Attributes:
      mu: floor of the intensities by regime and event type.
      alpha: jump of the intensity of the row's type at an event of the column's type.
      beta: decay of each type's intensity, or one for all.
      sizes: law of the log-sizes, a column per event type.
      loading: how far asset i moves per unit of size of an event of type d; None: type i is asset i's own jump.
      own_sd: standard deviation by asset of the own noise that every event with a loading on it adds, or None.
      start: excess of the intensity over the floor before the first step, by type.
      n_assets: number of assets (static).
      max_proposals: proposals per step (static).
      n_ode_steps: Runge-Kutta steps of the compensator (static).
      step_hours: longest simulation step (static).
      martingale: give the compensator (static).

    Pathwise gradient: mean and sd, or eta_up and eta_down, of the sizes, loading, own_sd. None: mu, alpha, beta, start,
    up_share (events are discrete), except in the compensator.
    """

    mu: Float[Array, "regimes types"]
    alpha: Float[Array, "types types"]
    beta: Float[Array, " decays"]
    sizes: Any
    loading: Float[Array, "assets types"] | None
    own_sd: Float[Array, " assets"] | None
    start: Float[Array, " types"]
    n_assets: int = field(metadata={"static": True})
    max_proposals: int = field(metadata={"static": True})
    n_ode_steps: int = field(metadata={"static": True})
    step_hours: float = field(metadata={"static": True})
    martingale: bool = field(default=False, metadata={"static": True})

    @property
    def n_types(self) -> int:
        """Number of event types."""
        return self.alpha.shape[0]

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        noise = 0 if self.own_sd is None else (self.n_assets + 1) // 2
        return self._first_after_loop() + noise

    def _slots_per_proposal(self) -> int:
        return 2 if isinstance(self.sizes, DoubleExponentialSizes) else 1

    def _first_after_loop(self) -> int:
        sizes = self.sizes.n_slots(self.n_types, 1) if isinstance(self.sizes, NormalSizes) else 0
        return self._slots_per_proposal() * self.max_proposals + sizes

    def branching_ratio(self) -> float:
        """Spectral radius of alpha / beta: expected direct offspring per event, below 1 for a stationary process."""
        return _branching_ratio(*self._host()[1:])

    def _host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mu, alpha, beta = (np.asarray(x, np.float64) for x in (self.mu, self.alpha, self.beta))
        return mu, alpha, np.broadcast_to(beta, (self.n_types,))

    def mean_intensity(self, regime: int = 0) -> np.ndarray:
        """Stationary mean of the intensities per year, if the market stayed in the regime."""
        mu, alpha, beta = self._host()
        return _mean_intensity(mu[regime], alpha, beta)

    def expected_events(self, years: float, *, excess: Any = None, regime: int = 0) -> np.ndarray:
        """Expected events by type within a time, from the closed form of the linear equation of the mean intensity.

        Args:
          years: length of the time.
          excess: intensity above the floor at its start, per year; the component's start when omitted.
          regime: whose floor holds.
        """
        from scipy import linalg

        mu, alpha, beta = self._host()
        start = np.asarray(self.start if excess is None else excess, np.float64)
        n = self.n_types
        # Rows: excess, expected events, and the constant 1.
        system = np.zeros((2 * n + 1, 2 * n + 1))
        system[:n, :n], system[:n, -1] = alpha - np.diag(beta), alpha @ mu[regime]
        system[n : 2 * n, :n], system[n : 2 * n, -1] = np.eye(n), mu[regime]
        return (linalg.expm(system * years) @ np.concatenate([start, np.zeros(n), [1.0]]))[n : 2 * n]

    def prepare(self, *, sub_steps: int, step_hours: float) -> Prepared:
        """Constants for simulation steps of `step_hours`."""
        years = poisson.years_of(step_hours, self.step_hours)
        floor, alpha, beta = (lax.stop_gradient(x) * years for x in (self.mu, self.alpha, self.beta))
        level, slope = None, None
        if self.martingale:
            exponents = (self.mu * years, self.alpha * years, self.beta * years)
            level, slope = self._cumulant(*exponents, n_steps=self.n_ode_steps)
        start = lax.stop_gradient(self.start) * years
        return Prepared(floor, alpha, beta, start, self.sizes, self.loading, self.own_sd, level, slope)

    def _cumulant(self, floor: Array, alpha: Array, beta: Array, *, n_steps: int) -> tuple[Array, Array]:
        # Level by regime and asset, and slope in the excess by asset and type, of log E[exp(jumps of one step)].
        gain = _mark_gain(self.sizes, self.loading, self.own_sd, self.n_assets)

        def step(carry, _):
            return _runge_kutta(carry, gain, alpha, beta, 1.0 / n_steps), None

        zero = jnp.zeros_like(gain)
        (slope, events), _ = lax.scan(step, (zero, zero), None, length=n_steps)
        return jnp.einsum("kd,id->ki", floor, events, precision=lax.Precision.HIGHEST), slope

    def log_mean_exp(self, prepared: Prepared, masks: Any, excess: Float[Array, "types paths"]) -> Rows:
        """Log E[exp(jumps of the step)] by asset, given the excess intensity; for a component with `martingale`."""
        level = regime_rows(poisson.regime_masks(masks, self.mu.shape[0]), prepared.log_mean_exp, self._like(excess[0]))
        slope = self._container(_matvec(prepared.log_mean_exp_slope, excess))
        return poisson.add_rows(level, slope)

    def _like(self, row: Array) -> Rows:
        return poisson.in_rows([row] * self.n_assets)

    def _container(self, rows: Float[Array, "assets paths"]) -> Rows:
        return tuple(rows[i] for i in range(self.n_assets)) if self.n_assets <= MAX_UNROLLED_ASSETS else rows

    def init(self, prepared: Prepared, one: Array, n_assets: int, address: Address) -> HawkesState:
        """State before the first step.

        Raises:
          InputError: built for another number of assets.
        """
        poisson.check_assets(n_assets, self.n_assets)
        return HawkesState(prepared.start[:, None] * one[None], 0.0 * one)

    def step(self, prepared: Prepared, t: Array, state: HawkesState, masks: Any, address: Address):
        """Jumps of one step and, with `martingale`, their compensator."""
        dtype = prepared.beta.dtype
        masks = poisson.regime_masks(masks, self.mu.shape[0])
        frozen = lax.stop_gradient((prepared.floor, prepared.alpha, prepared.beta, state.excess))
        share = self.sizes.up_share if isinstance(self.sizes, DoubleExponentialSizes) else None
        excess, left, counts, units = _events(
            *frozen,
            masks,
            address,
            up_share=None if share is None else lax.stop_gradient(prepared.sizes.up_share),
            max_proposals=self.max_proposals,
        )
        after = HawkesState(excess, state.overflow + (left > 0.0).astype(dtype))

        if isinstance(self.sizes, NormalSizes):
            at = address.after(self._slots_per_proposal() * self.max_proposals)
            rows = tuple(counts[d] for d in range(self.n_types))
            draws = self.sizes.draws(at, self.n_types, 1, dtype)
            totals = each_asset(self.sizes.total, poisson.in_rows(rows), *prepared.sizes.parameters, *draws)
        else:
            up, down = units[0], units[1]
            rates = prepared.sizes.eta_up[:, None], prepared.sizes.eta_down[:, None]
            totals = up / rates[0] - down / rates[1]
        totals = totals if hasattr(totals, "ndim") else jnp.stack(totals)
        if prepared.loading is not None:
            totals = _matvec(prepared.loading, totals)
        size = self._container(totals)
        if prepared.own_sd is not None:
            hits = 1.0 if prepared.loading is None else (prepared.loading != 0.0).astype(dtype)
            n = counts if prepared.loading is None else _matvec(hits, counts)
            at = address.after(self._first_after_loop())
            z = poisson.in_rows([row.astype(dtype) for row in poisson.draw_normals(at, self.n_assets)])
            noise = each_asset(lambda n, z, sd: jnp.sqrt(n) * sd * z, self._container(n), z, prepared.own_sd)
            size = poisson.add_rows(size, noise)
        compensator = None
        if self.martingale:
            compensator = each_asset(lambda x: -x, self.log_mean_exp(prepared, masks, frozen[3]))
        return after, Jump(size, compensator)


def _matvec(matrix: Float[Array, "rows columns"], values: Float[Array, "columns paths"]) -> Array:
    n = matrix.shape[1]
    if n <= _MAX_UNROLLED_TYPES:
        return sum(matrix[:, j, None] * values[j][None] for j in range(n))
    return lax.dot_general(matrix, values, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _events(floor, alpha, beta, excess, masks, address: Address, *, up_share, max_proposals: int) -> tuple[Any, ...]:
    # Excess at the end of the step, time left when the proposals ended, events by type, and for double-exponential
    # marks the sums of their unit exponentials (up, down) by type.
    dtype = excess.dtype
    n_types = excess.shape[0]
    floor = regime_rows(masks, floor, excess)
    cumulate = jnp.tril(jnp.ones((n_types, n_types), dtype))
    zero = jnp.zeros_like(excess)

    def unfinished(carry):
        p, left = carry[:2]
        return (p < max_proposals) & jnp.any(left > 0.0)

    def propose(carry):
        p, left, excess, counts, units = carry
        slot = p if up_share is None else 2 * p
        word_time, word_type = poisson.words_at(address, slot)
        bound = jnp.sum(floor + excess, axis=0)
        # From a uniform with full precision near 0: the short waits that fire within a short step are resolved.
        wait = -jnp.log1p(-poisson.tail_uniform(word_time).astype(dtype)) / jnp.maximum(bound, _TINY)
        fires = wait < left
        excess = excess * jnp.exp(-beta[:, None] * jnp.where(fires, wait, left)[None])
        mark = poisson.tail_uniform(word_type).astype(dtype) * bound
        below = (mark[None] < _matvec(cumulate, floor + excess)) & fires[None]
        first = below & ~jnp.concatenate([jnp.zeros_like(below[:1]), below[:-1]])
        hits = first.astype(dtype)
        left = jnp.where(fires, left - wait, 0.0)
        if up_share is not None:
            u = uniform(poisson.words_at(address, slot + 1)[0]).astype(dtype)[None]
            down_share = (1.0 - up_share)[:, None]
            is_down = u < down_share
            ratio = jnp.where(is_down, u / jnp.maximum(down_share, _TINY), (1.0 - u) / (1.0 - down_share + _TINY))
            unit = -hits * jnp.log(jnp.where(first, ratio, 1.0))
            units = units[0] + jnp.where(is_down, 0.0, unit), units[1] + jnp.where(is_down, unit, 0.0)
        return p + 1, left, excess + _matvec(alpha, hits), counts + hits, units

    start = (jnp.zeros((), jnp.int32), jnp.ones_like(excess[0]), excess, zero, () if up_share is None else (zero, zero))
    _, left, excess, counts, units = lax.while_loop(unfinished, propose, start)
    return excess * jnp.exp(-beta[:, None] * left[None]), left, counts, units


def _mark_gain(sizes: Any, loading: Array | None, own_sd: Array | None, n_assets: int) -> Float[Array, "assets types"]:
    # E[exp(move of asset i at an event of type d)] - 1.
    if loading is None:
        unit = jnp.eye(n_assets, dtype=sizes.parameters[0].dtype)
        noise = 0.0 if own_sd is None else jnp.expm1(0.5 * own_sd * own_sd)
        own = sizes.mean_exp_minus_one()
        return unit * (own + noise + own * noise)
    gain = sizes.mean_exp_minus_one(loading)
    if own_sd is None:
        return gain
    noise = jnp.where(loading != 0.0, jnp.expm1(0.5 * own_sd * own_sd)[:, None], 0.0)
    return gain + noise + gain * noise


def _slope(b: Array, gain: Array, alpha: Array, beta: Array) -> tuple[Array, Array]:
    events = gain + (1.0 + gain) * jnp.expm1(jnp.matmul(b, alpha, precision=lax.Precision.HIGHEST))
    return events - beta * b, events


def _runge_kutta(carry: tuple[Array, Array], gain: Array, alpha: Array, beta: Array, h: float) -> tuple[Array, Array]:
    b, total = carry
    k1 = _slope(b, gain, alpha, beta)
    k2 = _slope(b + 0.5 * h * k1[0], gain, alpha, beta)
    k3 = _slope(b + 0.5 * h * k2[0], gain, alpha, beta)
    k4 = _slope(b + h * k3[0], gain, alpha, beta)
    return tuple(
        x + h / 6.0 * (p + 2.0 * q + 2.0 * r + s) for x, p, q, r, s in zip((b, total), k1, k2, k3, k4, strict=True)
    )


def _branching_ratio(alpha: np.ndarray, beta: np.ndarray) -> float:
    return float(np.max(np.abs(np.linalg.eigvals(alpha / beta[:, None]))))


def _mean_intensity(mu: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    return np.linalg.solve(np.eye(mu.size) - alpha / beta[:, None], mu)


def hawkes(
    n_assets: int,
    *,
    mu: Any,
    alpha: Any,
    beta: Any,
    mean: Any = 0.0,
    sd: Any = 0.0,
    up_share: Any = None,
    eta_up: Any = None,
    eta_down: Any = None,
    loading: Any = None,
    own_sd: Any = 0.0,
    start: Any = "cold",
    martingale: bool = False,
    step_hours: float = 24.0,
    max_proposals: int | None = None,
    dtype: Any = jnp.float32,
) -> Hawkes:
    """Self-exciting jumps; the number of event types is that of the rows of `alpha` (a number: one type).

    Args:
      n_assets: number of assets.
      mu: floor of the intensities, events per year: a number, one per type, or a table (regimes, types).
      alpha: (target, source) jump of the intensity of the target at an event of the source, per year.
      beta: decay per year, a number or one per target.
      mean: mean log-size of an event, a number or one per type.
      sd: its standard deviation.
      up_share: probability of an upward event; give it with `eta_up` and `eta_down` for double-exponential sizes.
      eta_up: rate of upward log-sizes, above the largest loading.
      eta_down: rate of downward log-sizes.
      loading: (assets, types) common marks, or one per asset for one type. None: each type is the own jump of the
        asset in its place, and one type alone moves every asset by the same size.
      own_sd: standard deviation by asset of the noise added to each common mark.
      start: intensities before the first step: "cold" (at the floor), "mean" (at the stationary mean of the first
        regime), or intensities per year by type, not below the floor.
      martingale: give the compensator that makes expected prices independent of the jumps.
      step_hours: longest simulation step.
      max_proposals: proposals per step; chosen from the mean number of events and its overdispersion when omitted.
      dtype: precision of the paths.

    Raises:
      InputError: a negative parameter, a branching ratio of 1 or more, a wrong shape, eta_up not above the loadings, or
        an expected price that is infinite within a step.
    """
    matrix = np.atleast_2d(poisson.check_numbers(alpha, "alpha", low=0.0))
    n = matrix.shape[0]
    if matrix.shape != (n, n):
        raise InputError(f"alpha has shape {matrix.shape}; it must be square, (target, source).")
    decay = poisson.check_vector(beta, n, "beta", low=0.0, is_open=True)
    floor = poisson.check_intensity(mu, n, "mu")
    ratio = _branching_ratio(matrix, decay)
    if ratio >= 1.0:
        raise InputError(
            f"alpha and beta have a branching ratio (spectral radius of alpha/beta) of {ratio:.4g}; it must be below "
            "1, or events multiply without end: lower alpha or raise beta."
        )
    loads = _check_loading(loading, n_assets, n)
    noise = poisson.check_vector(own_sd, n_assets, "own_sd", low=0.0)
    sizes: Any
    if eta_up is None and eta_down is None and up_share is None:
        sizes = normal_sizes(mean, sd, n, dtype=dtype)
    elif eta_up is None or eta_down is None or up_share is None:
        raise InputError("double-exponential sizes need all of up_share, eta_up and eta_down.")
    else:
        largest = 1.0 if loads is None else loads
        sizes = double_exponential_sizes(up_share, eta_up, eta_down, n, loading=largest, dtype=dtype)
    years = float(poisson.check_numbers(step_hours, "step_hours", low=0.0, is_open=True)) / HOURS_PER_YEAR
    n_ode_steps = int(np.clip(np.ceil(16.0 * decay.max() * years), 16, _MAX_ODE_STEPS))
    made = Hawkes(
        mu=rounded(floor, dtype),
        alpha=rounded(matrix, dtype),
        beta=rounded(decay[:1] if np.all(decay == decay[0]) else decay, dtype),
        sizes=sizes,
        loading=None if loads is None else rounded(loads, dtype),
        own_sd=rounded(noise, dtype) if np.any(noise > 0.0) else None,
        start=rounded(_start(start, floor, matrix, decay), dtype),
        n_assets=n_assets,
        max_proposals=_proposals(max_proposals, floor, matrix, decay, years, ratio),
        n_ode_steps=n_ode_steps,
        step_hours=float(step_hours),
        martingale=martingale,
    )
    if made.n_slots > MAX_SLOTS // 2:
        raise InputError(
            f"max_proposals is {made.max_proposals}, which takes {made.n_slots} draws per step; at most "
            f"{MAX_SLOTS // 2} are left to jumps: take shorter steps or fewer proposals."
        )
    if martingale:
        slope = np.asarray(made.prepare(sub_steps=1, step_hours=step_hours).log_mean_exp_slope)
        if not np.all(np.isfinite(slope)) or np.max(slope) > 1e3:
            raise InputError(
                "the expected price is infinite within a step: excitation multiplies large marks. Lower alpha, the "
                "sizes, or the step."
            )
    return made


def _check_loading(loading: Any, n_assets: int, n_types: int) -> np.ndarray | None:
    if loading is None and n_types == n_assets:
        return None
    if loading is None and n_types == 1:
        loading = np.ones(n_assets)
    if loading is None:
        raise InputError(
            f"{n_types} event types for {n_assets} assets need loadings (assets, types), or one type per asset."
        )
    array = poisson.check_numbers(loading, "loading")
    array = array[:, None] if array.ndim == 1 and n_types == 1 else array
    if array.shape != (n_assets, n_types):
        raise InputError(f"loading has shape {array.shape}; it must be (assets, types), ({n_assets}, {n_types}).")
    return array


def _start(start: Any, floor: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    if isinstance(start, str):
        if start not in STARTS:
            raise InputError(f"start is {start!r}; it must be one of {', '.join(STARTS)}, or intensities per year.")
        return np.zeros(beta.size) if start == "cold" else _mean_intensity(floor[0], alpha, beta) - floor[0]
    excess = poisson.check_vector(start, beta.size, "start", low=0.0) - floor[0]
    if np.any(excess < 0.0):
        raise InputError(f"start is below the floor mu {floor[0].tolist()}; intensities never are.")
    return excess


def _proposals(
    given: int | None, floor: np.ndarray, alpha: np.ndarray, beta: np.ndarray, years: float, ratio: float
) -> int:
    if given is not None:
        if not 1 <= given <= MAX_SLOTS // 4:
            raise InputError(f"max_proposals is {given}; it must lie in 1 .. {MAX_SLOTS // 4}.")
        return int(given)
    # Clusters spread the count by 1/(1 - branching ratio); up to two proposals per event, and room for the far tail.
    mean = max(float(_mean_intensity(row, alpha, beta).sum()) for row in floor) * years
    return int(min(np.ceil(2.0 * (mean + 10.0 * np.sqrt(mean) / (1.0 - ratio)) + 32.0), MAX_SLOTS // 4))


def example(n_assets: int, dtype: Any = jnp.float32) -> Hawkes:
    """Market-wide falls that come in clusters of a day or two: half of them are set off by others."""
    loading = np.linspace(0.8, 1.3, n_assets) if n_assets > 1 else np.ones(1)
    return hawkes(
        n_assets, mu=6.0, alpha=100.0, beta=200.0, mean=-0.03, sd=0.04, loading=loading, own_sd=0.01, start="mean",
        dtype=dtype,
    )  # fmt: skip
