r"""Pair copulas: conditional distributions ("h-functions") and their inverses, between normal scores.

A uniform u is carried as its normal score $\Phi^{-1}(u)$: both tails keep their digits in float32, and Gaussian pairs
cost two multiplications. `conditional` is $h(u|v)=\partial C(u,v)/\partial v$, the law of the one given the other.

Families: independence, gaussian (rho), student (rho, dof), clayton (theta > 0, lower tail), gumbel (theta >= 1, upper
tail), frank (theta, no tail). Rotations turn them as in the R and Python packages VineCopula and pyvinecopulib: with
the first argument of the copula u and the second v, the density is $c(1-u,1-v)$ at 180 degrees (the survival copula),
$c(1-u,v)$ at 90 and $c(u,1-v)$ at 270. Joe (2014), "Dependence modeling with copulas", ch. 4.

**Student-t.** Quantiles of non-integer dof are polynomials, fitted on the host in float64 for each dof, of the score
z (log of quantile over z, in z^2) and back (log of z^2 over $\log(1+x^2/\nu)$, in the latter). For |z| up to 7.5 the
relative error is below 1e-7 at dof 2 and below 2e-8 from dof 2.5 on (in float64; in float32 rounding, 1e-6).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Float
from numpy.polynomial import chebyshev

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market.dependence.copula import tail_dependence_t
from qpo_sim.market.mixing_law import tabulated
from qpo_sim.numerics import polynomial
from qpo_sim.types import Array

FAMILIES = ("independence", "gaussian", "student", "clayton", "gumbel", "frank")
ROTATIONS = (0, 90, 180, 270)
_ALIASES = {
    "indep": "independence",
    "normal": "gaussian",
    "t": "student",
    "student-t": "student",
    "student_t": "student",
}

# Largest score in absolute value; beyond it a probability (3e-14) is held there.
SCORE_LIMIT = 7.5
_SMALLEST = 3.19e-14
_FORWARD_DEGREE = 20
_BACK_DEGREE = 16
_GUMBEL_STEPS = 4

# Where float32 still tells the parameter from a limit case, and the kernels' formulas from rounding.
_BOUNDS = {
    "gaussian": (-0.9999, 0.9999),
    "student": (-0.9999, 0.9999),
    "clayton": (1e-3, 50.0),
    "gumbel": (1.0, 50.0),
    "frank": (-35.0, 35.0),
}
_MIN_DOF = 2.0


class PairCopula(NamedTuple):
    """Static description of one pair copula, and its parameters as plain numbers."""

    family: str
    rotation: int
    parameter: float
    dof: float | None = None


class StudentMap(NamedTuple):
    """Polynomials from scores to Student-t quantiles and back, lowest power first, and the span of the second."""

    forward: Any
    back: Any
    span: Any


def pair_copula(
    family: str, parameters: Any = None, *, rotation: int = 0, tau: float | None = None, dof: float | None = None
) -> PairCopula:
    """A pair copula from its family's name and parameters.

    Args:
      family: one of `FAMILIES`; "indep", "normal" and "t" are understood too.
      parameters: the family's parameters in a flat list, or one number: rho; rho and dof; theta.
      rotation: 0, 90, 180 or 270 degrees.
      tau: Kendall's tau, from which the first parameter is made instead; of the rotated copula.
      dof: degrees of freedom of a Student-t pair, where `parameters` does not hold them.

    Raises:
      InputError: an unknown family, a rotation or parameter out of its range, too few or too many of them.
    """
    name = str(family).lower()
    name = _ALIASES.get(name, name)
    if name not in FAMILIES:
        raise InputError(f"the pair copula's family is {family!r}; {did_you_mean(name, FAMILIES)}")
    if rotation not in ROTATIONS:
        raise InputError(f"rotation is {rotation}; it must be 0, 90, 180 or 270 degrees.")
    values = [] if parameters is None else [float(x) for x in np.ravel(np.asarray(parameters, np.float64))]
    if tau is not None:
        if values and not (name == "student" and len(values) == 1 and dof is None):
            raise InputError(f"the {name} pair has both tau and parameters; give one of them.")
        dof = values[0] if values else dof
        values = [] if name == "independence" else [parameter_of_tau(name, tau if rotation in (0, 180) else -tau)]
    if dof is not None:
        values.append(float(dof))
    wanted = {"independence": 0, "student": 2}.get(name, 1)
    if len(values) != wanted:
        raise InputError(f"the {name} pair has {len(values)} parameters; it takes {wanted}.")
    if name == "independence":
        return PairCopula(name, 0, 0.0)
    low, high = _BOUNDS[name]
    if not low <= values[0] <= high or (name == "frank" and abs(values[0]) < 1e-3):
        hint = {
            "clayton": "; for negative dependence rotate it by 90 or 270 degrees",
            "gumbel": "; for negative dependence rotate it by 90 or 270 degrees",
            "frank": " and be at least 0.001 in size (else it is independence)",
        }.get(name, "")
        raise InputError(
            f"the parameter of the {name} pair is {values[0]:g}; it must lie in [{low:g}, {high:g}]{hint}."
        )
    if name == "student" and not values[1] >= _MIN_DOF:
        raise InputError(f"the dof of the student pair is {values[1]:g}; it must be at least {_MIN_DOF:g}.")
    return PairCopula(name, int(rotation), values[0], min(values[1], 1e6) if name == "student" else None)


def parameter_of_tau(family: str, tau: float) -> float:
    """First parameter of an unrotated family with this Kendall's tau.

    Raises:
      InputError: tau outside (-1, 1), or negative for a family that has none.
    """
    if not -1.0 < tau < 1.0:
        raise InputError(f"tau is {tau}; Kendall's tau of a pair copula lies strictly between -1 and 1.")
    if family in ("gaussian", "student"):
        return float(np.sin(0.5 * np.pi * tau))
    if family in ("clayton", "gumbel") and tau < 0.0:
        raise InputError(f"tau is {tau} and {family} has positive dependence; rotate it by 90 or 270 degrees.")
    if family == "clayton":
        return 2.0 * tau / (1.0 - tau)
    if family == "gumbel":
        return 1.0 / (1.0 - tau)
    from scipy import optimize

    reachable = _frank_tau(35.0)
    if abs(tau) >= reachable:
        raise InputError(f"tau is {tau}; the frank pair reaches {reachable:.4f}.")
    if tau == 0.0:
        return 0.0
    return float(np.sign(tau) * optimize.brentq(lambda theta: _frank_tau(theta) - abs(tau), 1e-6, 35.0))


def kendall_tau(pair: PairCopula) -> float:
    r"""Kendall's tau: $\tfrac2\pi\sin^{-1}\rho$, $\theta/(\theta+2)$, $1-1/\theta$, $1-4(1-D_1(\theta))/\theta$."""
    theta = pair.parameter
    value = {
        "independence": lambda: 0.0,
        "gaussian": lambda: 2.0 / np.pi * np.arcsin(theta),
        "student": lambda: 2.0 / np.pi * np.arcsin(theta),
        "clayton": lambda: theta / (theta + 2.0),
        "gumbel": lambda: 1.0 - 1.0 / theta,
        "frank": lambda: np.sign(theta) * _frank_tau(abs(theta)),
    }[pair.family]()
    return float(-value if pair.rotation in (90, 270) else value)


def tail_dependence(pair: PairCopula) -> tuple[float, float]:
    r"""Lower and upper tail dependence, $\lim P(U\le q\,|\,V\le q)$ as q falls to 0 and its mirror.

    Clayton has $2^{-1/\theta}$ below, Gumbel $2-2^{1/\theta}$ above, Student-t `copula.tail_dependence_t` in both, the
    others none; at 90 and 270 degrees Student-t alone.
    """
    theta, lower, upper = pair.parameter, 0.0, 0.0
    if pair.family == "student":
        lower = upper = float(tail_dependence_t(pair.dof, -theta if pair.rotation in (90, 270) else theta))
    elif pair.rotation in (0, 180):
        lower = 2.0 ** (-1.0 / theta) if pair.family == "clayton" else 0.0
        upper = 2.0 - 2.0 ** (1.0 / theta) if pair.family == "gumbel" else 0.0
    return (upper, lower) if pair.rotation == 180 else (lower, upper)


def _frank_tau(theta: float) -> float:
    from scipy import integrate

    debye = integrate.quad(lambda t: t / np.expm1(t) if t > 0.0 else 1.0, 0.0, theta)[0] / theta
    return 1.0 - 4.0 / theta * (1.0 - debye)


def conditional(
    family: str, rotation: int, is_first: bool, z: Array, given: Array, parameter: Any, student: Any = None
) -> Array:
    r"""Score of $h(u|v)$, u with score `z` and v with score `given`.

    Args:
      family: one of `FAMILIES`.
      rotation: in degrees.
      is_first: whether z is the first argument of the copula and `given` the second, or the other way round.
      z: scores.
      given: scores of what is known.
      parameter: the family's first parameter, a number or a row.
      student: `StudentMap` of dof and of dof + 1, and dof, for the student family.

    Pathwise gradient: z, given, parameter, dof.
    """
    flip, flip_given = _flips(rotation, is_first)
    value = _H[family](_flip(z, flip), _flip(given, flip_given), parameter, student)
    return _flip(jnp.clip(value, -SCORE_LIMIT, SCORE_LIMIT), flip)


def inverse_conditional(
    family: str, rotation: int, is_first: bool, w: Array, given: Array, parameter: Any, student: Any = None
) -> Array:
    """Score z for which `conditional` of z is `w`: draws u given v from an independent score w.

    Pathwise gradient: w, given, parameter, dof.
    """
    flip, flip_given = _flips(rotation, is_first)
    value = _H_INVERSE[family](_flip(w, flip), _flip(given, flip_given), parameter, student)
    return _flip(jnp.clip(value, -SCORE_LIMIT, SCORE_LIMIT), flip)


def _flips(rotation: int, is_first: bool) -> tuple[bool, bool]:
    first, second = rotation in (90, 180), rotation in (180, 270)
    return (first, second) if is_first else (second, first)


def _flip(z: Array, flip: bool) -> Array:
    return -z if flip else z


def _minus_log_cdf(z: Array) -> Array:
    # -log Phi(z), to full relative accuracy on both sides.
    tail = ndtr(-jnp.abs(z))
    return jnp.where(z < 0.0, -jnp.log(tail), -jnp.log1p(-tail))


def _score_of_minus_log(x: Array) -> Array:
    # The score of exp(-x), from whichever tail is the smaller.
    u, above = jnp.exp(-x), -jnp.expm1(-x)
    return _score(u, above)


def _score(u: Array, above: Array) -> Array:
    # The score of u, given 1 - u beside it.
    is_low = u < above
    z = ndtri(jnp.maximum(jnp.where(is_low, u, above), _SMALLEST))
    return jnp.where(is_low, z, -z)


def _independent(z: Array, given: Array, parameter: Any, student: Any) -> Array:
    return z


def _gaussian_h(z: Array, given: Array, rho: Any, student: Any) -> Array:
    return (z - rho * given) / jnp.sqrt((1.0 - rho) * (1.0 + rho))


def _gaussian_inverse(w: Array, given: Array, rho: Any, student: Any) -> Array:
    return w * jnp.sqrt((1.0 - rho) * (1.0 + rho)) + rho * given


def _student_scale(y: Array, rho: Any, dof: Any) -> Array:
    return jnp.sqrt((dof + y * y) * ((1.0 - rho) * (1.0 + rho) / (dof + 1.0)))


def _student_h(z: Array, given: Array, rho: Any, student: Any) -> Array:
    # Given Y = y, (X - rho y) / scale is Student-t with one degree of freedom more.
    own, more, dof = student
    x, y = _quantile(own, z), _quantile(own, given)
    return _quantile_score(more, (x - rho * y) / _student_scale(y, rho, dof), dof + 1.0)


def _student_inverse(w: Array, given: Array, rho: Any, student: Any) -> Array:
    own, more, dof = student
    y = _quantile(own, given)
    return _quantile_score(own, _quantile(more, w) * _student_scale(y, rho, dof) + rho * y, dof)


def _quantile(student: StudentMap, z: Array) -> Array:
    z = jnp.clip(z, -SCORE_LIMIT, SCORE_LIMIT)
    return z * jnp.exp(polynomial(student.forward, z * z * (2.0 / SCORE_LIMIT**2) - 1.0))


def _quantile_score(student: StudentMap, x: Array, dof: Any) -> Array:
    square = x * x / dof
    is_small = square < 1e-4
    safe = jnp.where(is_small, 1.0, square)
    s = jnp.minimum(jnp.log1p(square), student.span)
    ratio = jnp.where(is_small, 1.0 - square * (0.5 - square / 3.0), jnp.minimum(jnp.log1p(safe), student.span) / safe)
    return x * jnp.sqrt(ratio) * jnp.exp(0.5 * polynomial(student.back, s * (2.0 / student.span) - 1.0))


def _log_expm1(x: Array) -> Array:
    return x + jnp.log(-jnp.expm1(-x))


def _clayton_h(z: Array, given: Array, theta: Any, student: Any) -> Array:
    # With x = -log u and y = -log v: -log h = (1 + 1/theta) log(1 + expm1(theta x) e^(-theta y)).
    x, y = _minus_log_cdf(z), _minus_log_cdf(given)
    return _score_of_minus_log((1.0 + 1.0 / theta) * _log_one_plus_exp(_log_expm1(theta * x) - theta * y))


def _clayton_inverse(w: Array, given: Array, theta: Any, student: Any) -> Array:
    r, y = _minus_log_cdf(w), _minus_log_cdf(given)
    return _score_of_minus_log(_log_one_plus_exp(_log_expm1(r * (theta / (1.0 + theta))) + theta * y) / theta)


def _log_one_plus_exp(x: Array) -> Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _gumbel_h(z: Array, given: Array, theta: Any, student: Any) -> Array:
    # With s = (x^theta + y^theta)^(1/theta) = y e^d: -log h = y expm1(d) + (theta - 1) d.
    x, y = _minus_log_cdf(z), _minus_log_cdf(given)
    d = _log_one_plus_exp(theta * (jnp.log(x) - jnp.log(y))) / theta
    return _score_of_minus_log(y * jnp.expm1(d) + (theta - 1.0) * d)


def _gumbel_inverse(w: Array, given: Array, theta: Any, student: Any) -> Array:
    # The equation of `_gumbel_h` for d, convex and increasing: Halley's steps from a bound above its root. The last
    # step is Newton's with only its residual differentiated, which gives the derivative of the root.
    r, y, a = _minus_log_cdf(w), _minus_log_cdf(given), theta - 1.0
    r0, y0, a0 = lax.stop_gradient((r, y, a))
    d = jnp.minimum(r0 / (a0 + y0), jnp.log1p(r0 / y0))
    for _ in range(_GUMBEL_STEPS):
        residual = y0 * jnp.expm1(d) + a0 * d - r0
        bend = y0 * jnp.exp(d)
        newton = residual / (bend + a0)
        d = d - newton / (1.0 - 0.5 * newton * bend / (bend + a0))
    d = d - (y * jnp.expm1(d) + a * d - r) / (y0 * jnp.exp(d) + a0)
    # x = y (e^(theta d) - 1)^(1/theta).
    return _score_of_minus_log(y * jnp.exp(_log_expm1(theta * d) / theta))


def _frank_h(z: Array, given: Array, theta: Any, student: Any) -> Array:
    # h = A e^(-theta v) / (A e^(-theta v) + B e^(-theta u)), A = 1 - e^(-theta u), B = 1 - e^(-theta (1 - u)).
    u, above, v = ndtr(z), ndtr(-z), ndtr(given)
    low = -jnp.expm1(-theta * u) * jnp.exp(-theta * v)
    high = -jnp.expm1(-theta * above) * jnp.exp(-theta * u)
    return _score(low / (low + high), high / (low + high))


def _frank_inverse(w: Array, given: Array, theta: Any, student: Any) -> Array:
    # Radially symmetric: 1 - u is the same function of 1 - w and 1 - v.
    def root(p, p_above, v):
        decay = p_above * jnp.exp(-theta * v)
        x = p * jnp.expm1(-theta) / (p + decay)
        is_far = x < -0.5
        near = jnp.log1p(jnp.where(is_far, 0.0, x))
        far = jnp.log(p * jnp.exp(-theta) + decay) - jnp.log(p + decay)
        return -jnp.where(is_far, far, near) / theta

    p, above, v, v_above = ndtr(w), ndtr(-w), ndtr(given), ndtr(-given)
    return _score(root(p, above, v), root(above, p, v_above))


_H = {
    "independence": _independent,
    "gaussian": _gaussian_h,
    "student": _student_h,
    "clayton": _clayton_h,
    "gumbel": _gumbel_h,
    "frank": _frank_h,
}
_H_INVERSE = {
    "independence": _independent,
    "gaussian": _gaussian_inverse,
    "student": _student_inverse,
    "clayton": _clayton_inverse,
    "gumbel": _gumbel_inverse,
    "frank": _frank_inverse,
}

_N_NODES = 160


def _fit(nodes: np.ndarray, values: np.ndarray, degree: int) -> np.ndarray:
    monomials = chebyshev.cheb2poly(chebyshev.chebfit(nodes, values, degree))
    return np.pad(monomials, (0, degree + 1 - monomials.size))


@dataclass(frozen=True)
class StudentTable:
    """Coefficients of a `StudentMap` by dof: forward, back, span."""

    n_rows: int = _FORWARD_DEGREE + _BACK_DEGREE + 3

    def column(self, dof: float) -> np.ndarray:
        """Column of one dof."""
        from scipy import special

        nodes = np.cos(np.pi * (np.arange(_N_NODES) + 0.5) / _N_NODES)
        score = SCORE_LIMIT * np.sqrt(0.5 * (nodes + 1.0))
        forward = _fit(nodes, np.log(-special.stdtrit(dof, special.ndtr(-score)) / score), _FORWARD_DEGREE)
        end = -special.stdtrit(dof, special.ndtr(-SCORE_LIMIT))
        span = np.log1p(end * end / dof)
        s = 0.5 * (nodes + 1.0) * span
        # z^2 over dof s, which tends to 1 as dof grows.
        score = -special.ndtri(special.stdtr(dof, -np.sqrt(dof * np.expm1(s))))
        back = _fit(nodes, np.log(score**2 / (dof * s)), _BACK_DEGREE)
        return np.concatenate([forward, back, [span]])

    def steps(self, dof: np.ndarray) -> tuple[np.ndarray]:
        """Step in dof."""
        return (1e-4 * dof,)


def student_table(dof: Float[Array, "..."]) -> Float[Array, "coefficients ..."]:
    """Columns of `StudentTable` for each dof. Pathwise gradient: dof, first order only."""
    return tabulated(StudentTable(), dof)


def student_map(table: Any) -> StudentMap:
    """The map of one dof from its rows of `student_table`: numbers, or rows of paths."""
    rows = list(table)
    return StudentMap(rows[: _FORWARD_DEGREE + 1], rows[_FORWARD_DEGREE + 1 : -1], rows[-1])
