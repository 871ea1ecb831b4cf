"""Normal mixtures against the laws of scipy, their moments, tails, gradients and the log moment generating function.

Statistical checks are at 4 standard errors (false alarm 6e-5 each, some hundred of them), Kolmogorov-Smirnov at 1e-4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import assert_frequency, assert_mc, assert_quantile
from reference.dependence import draw, paths_of, tail_frequency
from scipy import integrate, optimize, special, stats

from qpo_sim import numerics
from qpo_sim.errors import InputError
from qpo_sim.market import mixing_law, shock
from qpo_sim.market.dependence import levy, mixture
from qpo_sim.random import Stream, stream_key

F64 = np.float64
ONE = [[1.0]]
R3 = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.6], [0.3, 0.6, 1.0]])
LEVELS = np.array([1e-4, 1e-3, 0.01, 0.05, 0.3, 0.7, 0.95, 0.99, 0.999, 0.9999])
N = 1 << 18

# Gauss-Legendre over the scores: far below the errors that are tested.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(500)


def kernel_cdf(component):
    """Distribution function of asset 0 as the kernel draws it: its polynomial at a fine grid of scores."""
    prepared = component.prepare()
    dtype = component.cholesky.dtype
    score = 5.42 * _NODES
    weight = 5.42 * _WEIGHTS * stats.norm.pdf(score)
    y = jnp.minimum(jnp.asarray(score / shock.SCORE_RANGE, dtype), prepared.ceiling)
    root = np.asarray(jnp.exp(0.5 * numerics.polynomial(list(prepared.coefficients[:, 0, 0]), y)), F64)
    if prepared.skewness is None:
        shift, slope, scale = 0.0, 0.0, 1.0
    else:
        shift, slope, scale = (float(x[0, 0]) for x in prepared.skewness)

    def cdf(x):
        z = (x - shift - slope * root**2) / (scale * root)
        lower, upper = weight @ special.ndtr(z), weight @ special.ndtr(-z)
        return lower if lower < 0.5 else 1.0 - upper

    return cdf


def mixed_cdf(density, end, shape, beta, variance):
    """Distribution function of the standardised mixture by adaptive quadrature over log V with its density."""
    scale = np.sqrt(1.0 + beta**2 * variance)

    def cdf(x):
        def integrand(log_v):
            v = np.exp(log_v)
            return special.ndtr((x * scale - beta * (v - 1.0)) / np.sqrt(v)) * density(v) * v

        low, high = end
        parts = [integrate.quad(integrand, a, b, epsabs=1e-13, limit=400)[0] for a, b in ((low, 0.0), (0.0, high))]
        return sum(parts)

    return cdf


def reference(family, shape, beta):
    """Distribution function of the exact law."""
    if family == "student_t":
        return lambda x: stats.t.cdf(x / np.sqrt((shape - 2.0) / shape), shape)
    if family == "nig":
        scale, root = np.sqrt(1.0 + beta**2 / shape), np.sqrt(shape)
        return stats.norminvgauss(root * np.hypot(root, beta), beta * root, loc=-beta / scale, scale=root / scale).cdf
    if family == "skew_t":
        law = stats.invgamma(shape / 2.0, scale=(shape - 2.0) / 2.0)
        return mixed_cdf(law.pdf, (-6.0, 25.0), shape, beta, 2.0 / (shape - 4.0))
    law = stats.gamma(shape, scale=1.0 / shape)
    return mixed_cdf(law.pdf, (-40.0 / min(shape, 1.0), np.log(80.0 / shape + 20.0)), shape, beta, 1.0 / shape)


def quantile_of(cdf, level):
    return optimize.brentq(lambda x: cdf(x) - level, -80.0, 80.0, xtol=1e-11)


LAWS = [
    ("student_t", 2.1, 0.0),
    ("student_t", 3.0, 0.0),
    ("student_t", 30.0, 0.0),
    ("skew_t", 4.5, -0.3),
    ("skew_t", 7.0, 1.0),
    ("nig", 0.05, 0.0),
    ("nig", 0.5, -0.4),
    ("nig", 10.0, 0.3),
    ("variance_gamma", 0.1, 0.0),
    ("variance_gamma", 0.5, -0.4),
    ("variance_gamma", 5.0, 0.3),
]


def made(family, shape, beta, correlation=ONE, **options):
    if family == "student_t":
        return mixture.student_t(shape, correlation, **{"cut": 0.0, **options})
    if family == "skew_t":
        return mixture.skew_t(shape, beta, correlation, **{"cut": 0.0, **options})
    return getattr(mixture, family)(shape, beta, correlation, **options)


@pytest.mark.parametrize(("family", "shape", "beta"), LAWS)
def test_quantiles_are_those_of_the_law(family, shape, beta):
    exact = reference(family, shape, beta)
    for dtype, tolerance in ((F64, 5e-4), (np.float32, 1e-3)):
        cdf = kernel_cdf(made(family, shape, beta, dtype=dtype))
        for level in LEVELS:
            x = quantile_of(cdf, level)
            error = tolerance * abs(x) + 1e-4
            # The exact quantile lies within the error of the kernel's.
            assert exact(x - error) < level < exact(x + error), (dtype, level)


def test_the_skew_t_is_the_generalised_hyperbolic_one():
    """scipy's law with its a = |b| (a little above, where it has no division by zero): an independent density."""
    nu, beta = 7.0, -0.5
    scale = np.sqrt(1.0 + beta**2 * 2.0 / (nu - 4.0))
    # X = beta V + sqrt(V) z with V = (nu-2)/chi2 is genhyperbolic with delta^2 = nu - 2.
    delta = np.sqrt(nu - 2.0)
    law = stats.genhyperbolic(-nu / 2.0, abs(beta) * delta * (1.0 + 1e-6), beta * delta, loc=-beta, scale=delta)
    cdf = kernel_cdf(made("skew_t", nu, beta, dtype=F64))
    for x in (-6.0, -2.0, -0.5, 0.3, 1.5, 3.0):
        assert cdf(x) == pytest.approx(float(law.cdf(x * scale)), rel=1e-4), x


@pytest.mark.parametrize("cut", [1e-4, 1e-3])
def test_cut_leaves_the_quantiles_it_does_not_reach(cut):
    for family, shape, beta in (("student_t", 3.0, 0.0), ("skew_t", 6.0, -0.3)):
        free, held = (kernel_cdf(made(family, shape, beta, cut=c, dtype=F64)) for c in (0.0, cut))
        for level in (10.0 * cut, 0.05, 0.5, 0.95):
            assert held(quantile_of(free, level)) == pytest.approx(level, rel=0.03), (family, level)


COMPONENTS = {
    "gaussian": mixture.gaussian(R3),
    "t": mixture.student_t(8.5, R3),
    "t asset": mixture.student_t([8.5, 9.0, 12.0], R3, mixing="asset"),
    "t grouped": mixture.student_t([8.5, 14.0], R3, mixing="grouped", groups=[0, 1, 0]),
    "skew t": mixture.skew_t(18.0, [-0.8, 0.0, 0.5], R3),
    "skew t matched": mixture.skew_t(18.0, [-0.8, -0.4, -0.6], R3, correlation_of="shock"),
    "nig": mixture.nig(0.7, [-0.3, 0.1, 0.4], R3),
    "nig asset": mixture.nig([0.7, 1.0, 3.0], -0.4, R3, mixing="asset"),
    "variance gamma": mixture.variance_gamma(0.5, [-0.3, 0.1, 0.4], R3),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_moments_correlation_and_exponential_moment(name):
    component = COMPONENTS[name]
    x = draw(component, N)[0]
    variance, correlation = component.variance()[0], component.shock_correlation()[0]
    assert np.all(np.abs(variance - 1.0) < 2e-3)
    for i in range(3):
        assert_mc(x[i], 0.0)
        assert_mc(x[i] ** 2, variance[i])
        for j in range(i):
            assert_mc(x[i] * x[j], correlation[i, j] * np.sqrt(variance[i] * variance[j]))
    scale = (0.05, 0.15, 0.3)
    log_mgf = component.log_mgf(component.prepare(), (), tuple(jnp.full((1,), s, jnp.float32) for s in scale))
    for row, s, value in zip(x, scale, log_mgf, strict=True):
        assert_mc(np.exp(s * row - float(value[0])), 1.0)


def test_correlation_of_the_shocks_is_met():
    matched = COMPONENTS["skew t matched"].shock_correlation()[0]
    np.testing.assert_allclose(matched, R3, atol=1e-6)
    plain = mixture.skew_t(18.0, [-0.8, -0.4, -0.6], R3)
    assert plain.shock_correlation()[0, 0, 1] > 0.51


@pytest.mark.parametrize("name", ["t asset", "skew t", "nig", "variance gamma"])
def test_margins_by_kolmogorov_smirnov(name):
    component = COMPONENTS[name]
    x = draw(component, 20_000, seed=3)[0]
    for i in range(3):
        shape = float(component.shape[0, component.groups[i]])
        beta = 0.0 if component.skew is None else float(component.skew[0, i])
        cdf = kernel_cdf(made(component.family, shape, beta, dtype=F64, **_cut(component)))
        grid = np.linspace(-15.0, 15.0, 3001)
        table = np.array([cdf(g) for g in grid])
        assert stats.kstest(x[i], lambda v, table=table, grid=grid: np.interp(v, grid, table)).pvalue > 1e-4


def _cut(component):
    return {"cut": component.cut} if component.law.is_cut else {}


def test_tail_dependence():
    """Joint exceedances of the 5 % quantile: equal for the t, more below for the skew t, few for independent V."""
    pair = [[1.0, 0.5], [0.5, 1.0]]
    x = draw(mixture.student_t(3.0, pair, cut=0.0), N)[0]
    lower, upper = tail_frequency(x, 0.05), tail_frequency(x, 0.05, upper=True)
    assert abs(lower[0] - upper[0]) < 4.0 * np.hypot(lower[1], upper[1])
    x = draw(mixture.skew_t(6.0, -0.6, pair), N)[0]
    below, above = tail_frequency(x, 0.05), tail_frequency(x, 0.05, upper=True)
    assert below[0] - above[0] > 20.0 * np.hypot(below[1], above[1])
    x = draw(mixture.student_t(3.0, pair, mixing="asset", cut=0.0), N)[0]
    assert tail_frequency(x, 0.05)[0] < lower[0] - 0.1


def test_grouped_mixing_is_comonotone():
    component = mixture.student_t([3.0, 9.0], np.eye(2), mixing="grouped")
    x = draw(component, N)[0]
    # Uncorrelated Gaussian parts, but large moves come together.
    assert stats.spearmanr(np.abs(x[0]), np.abs(x[1])).statistic > 0.05
    assert abs(np.corrcoef(np.sign(x) * np.abs(x) ** 0.5)[0, 1]) < 5.0 / np.sqrt(N)


def test_nig_process(cases):
    case = cases("models")["A32"]
    p, expected = case["inputs"], case["expected"]
    made_step = levy.nig_levy(p["alpha"], p["beta"], p["delta_per_year"], step_hours=8760.0 * p["T"], dtype=F64)
    component, mean, deviation = made_step.shock, made_step.mean[0], made_step.volatility[0]
    prepared = component.prepare()
    log_mgf = float(component.log_mgf(prepared, (), (jnp.full((1,), deviation),))[0][0])
    # E[S_T] = exp(mu T): the log-return has this mean.
    centre = p["mu"] * p["T"] - log_mgf
    assert centre == pytest.approx(expected["mean"], abs=1e-6)
    assert deviation**2 == pytest.approx(expected["var"], rel=1e-6)
    assert mean == pytest.approx(p["beta"] * p["delta_per_year"] * p["T"] / np.sqrt(p["alpha"] ** 2 - p["beta"] ** 2))
    cdf = kernel_cdf(component)
    x = centre + deviation * draw(component, N)[0, 0]
    for level, quantile in expected["log_quantiles"].items():
        u = float(level)
        z = quantile_of(cdf, u)
        assert centre + deviation * z == pytest.approx(quantile, rel=1e-4, abs=2e-6), level
        assert_quantile(x, u, quantile)
    assert_mc(x, expected["mean"])
    assert_mc((x - expected["mean"]) ** 2, expected["var"])
    price = np.exp(x)
    below = price[price < np.quantile(price, 0.05)] - 1.0
    # The error of a tail mean with its quantile estimated, of the order of the error of the mean below it.
    assert abs(below.mean() - expected["mean_simple_below_5pct"]) < 8.0 * below.std() / np.sqrt(below.size)


def test_variance_gamma_process():
    sigma, theta, nu, hours = 0.6, -0.4, 0.01, 24.0 * 5
    component, mean, volatility = levy.variance_gamma_levy(sigma, theta, nu, step_hours=hours, dtype=F64)
    years = hours / 8760.0
    assert mean[0] == pytest.approx(theta * years)
    assert volatility[0] == pytest.approx(np.sqrt((sigma**2 + theta**2 * nu) * years))
    # E exp(X) = (1 - nu (theta + sigma^2/2))^(-T/nu), Madan, Carr & Chang (1998).
    log_mgf = float(component.log_mgf(component.prepare(), (), (jnp.full((1,), volatility[0]),))[0][0])
    assert mean[0] + log_mgf == pytest.approx(-years / nu * np.log(1.0 - nu * (theta + 0.5 * sigma**2)), rel=1e-10)


def test_student_t_barrier(cases):
    case = cases("models")["B17"]
    p = case["inputs"]
    x = draw(mixture.student_t(p["nu"], ONE, cut=0.0), 1 << 17, 30)[:, 0]
    low = np.minimum.accumulate(np.cumsum(p["daily_mean"] + p["daily_sd"] * x, axis=0), axis=0)
    for name, expected in case["expected"].items():
        barrier, days = (float(part.split("=")[1]) for part in name.split(","))
        assert_frequency(np.count_nonzero(low[int(days) - 1] <= np.log(barrier)), x.shape[1], expected)


@pytest.mark.parametrize(
    ("dof", "beta", "cut", "tolerance"),
    [(2.5, 0, 1e-4, 2e-4), (3, 0, 1e-4, 2e-4), (6, 0.4, 1e-4, 1e-5), (6, -0.4, 1e-4, 1e-6), (5, -1, 1e-3, 1e-6)],
)
@pytest.mark.parametrize("dtype", [F64, np.float32])
def test_log_mgf_is_that_of_the_cut_law(dof, beta, cut, tolerance, dtype):
    family = "skew_t" if beta else "student_t"
    component = made(family, dof, beta, cut=cut, dtype=dtype)
    prepared = component.prepare()
    value, weight = mixing_law.mixing_law(family, cut, float(dof))
    square = 1.0 + beta**2 * 2.0 / (dof - 4.0) if beta else 1.0
    slope = beta / np.sqrt(square)
    s = np.geomspace(1e-3, 0.99 * float(prepared.mgf[1, 0, 0]), 300)
    exponent = (s * slope + 0.5 * s**2 / square)[:, None] * (value - weight @ value)
    mean_part = 0.5 * s**2 / square * (weight @ value)
    exact = special.logsumexp(exponent, b=weight, axis=1) + mean_part
    found = np.asarray(component.log_mgf(prepared, (), (jnp.asarray(s, dtype),))[0], F64)
    np.testing.assert_allclose(found, exact, rtol=tolerance + (1e-6 if dtype == np.float32 else 1e-8))


def test_log_mgf_where_there_is_none():
    assert made("student_t", 4.0, 0.0).log_mgf(made("student_t", 4.0, 0.0).prepare(), (), (jnp.ones(1),)) is None
    for component in (mixture.nig(0.5, 0.0, ONE, dtype=F64), mixture.variance_gamma(0.5, 0.0, ONE, dtype=F64)):

        def total(s, component=component):
            return component.log_mgf(component.prepare(), (), (s[None],))[0][0]

        assert np.isfinite(total(jnp.asarray(0.5))) and np.isposinf(total(jnp.asarray(1.5)))
        assert np.isfinite(jax.grad(total)(jnp.asarray(0.5))) and not np.isnan(jax.grad(total)(jnp.asarray(1.5)))


def test_sub_steps_add_up_to_the_base_step():
    component = mixture.skew_t(7.0, -0.6, ONE, dtype=F64)
    parts = draw(component, N // 2, 8, sub_steps=4)[:, 0]
    whole = parts.reshape(2, 4, -1).sum(axis=1) / 2.0
    cdf = kernel_cdf(component)
    for row in whole:
        assert_mc(row, 0.0)
        for level in (0.001, 0.05, 0.95, 0.999):
            assert_quantile(row, level, quantile_of(cdf, level))
    # V is one within a base step and another one in the next.
    size = np.abs(parts)
    within, across = np.corrcoef(size[2], size[3])[0, 1], np.corrcoef(size[3], size[4])[0, 1]
    assert within > 0.1 and abs(across) < 5.0 / np.sqrt(size.shape[1])
    base, cut = component.prepare(), component.prepare(sub_steps=4)
    np.testing.assert_allclose(
        4.0 * np.asarray(component.log_mgf(cut, (), (jnp.asarray([0.05]),))[0]),
        np.asarray(component.log_mgf(base, (), (jnp.asarray([0.1]),))[0]),
        rtol=1e-12,
    )


@jax.jit
def mgf_rows(component, prepared, masks, scale):
    return component.log_mgf(prepared, masks, scale)


def parity(path):
    return ((path % 2).astype(jnp.float64),)


def test_each_regime_has_its_own_law():
    other = np.array([[1.0, -0.2, 0.0], [-0.2, 1.0, 0.1], [0.0, 0.1, 1.0]])
    both = mixture.skew_t([6.0, 9.0], [[-0.3, 0.0, 0.2], [0.4, -0.5, 0.0]], np.stack([R3, other]), dtype=F64)
    ones = [
        mixture.skew_t(6.0, [-0.3, 0.0, 0.2], R3, dtype=F64),
        mixture.skew_t(9.0, [0.4, -0.5, 0.0], other, dtype=F64),
    ]
    mixed = draw(both, 64, 3, masks_of=parity)
    for k in range(2):
        np.testing.assert_allclose(mixed[..., k::2], draw(ones[k], 64, 3)[..., k::2], rtol=1e-9, atol=1e-12)
    masks = parity(jnp.arange(64, dtype=jnp.uint32))
    scale = tuple(jnp.full((64,), s) for s in (0.02, 0.1, 0.4))
    rows = mgf_rows(both, both.prepare(), masks, scale)
    for k in range(2):
        single = mgf_rows(ones[k], ones[k].prepare(), (), scale)
        for row, expected in zip(rows, single, strict=True):
            np.testing.assert_allclose(row[k::2], expected[k::2], rtol=1e-9)
        entry = both.correlation(both.prepare(), masks, 0, 1)
        np.testing.assert_allclose(entry[k::2], (R3, other)[k][0, 1], rtol=1e-12)
    # One set of parameters serves any number of regimes.
    np.testing.assert_array_equal(draw(ones[0], 64, masks_of=parity), draw(ones[0], 64))
    assert (both.n_regimes, ones[0].n_regimes) == (2, 1)


@pytest.mark.parametrize("mixing", ["shared", "grouped", "asset"])
@pytest.mark.slow
def test_many_assets_are_computed_as_few(mixing, monkeypatch):
    """One array of rows instead of a tuple: with the limit lowered, as a test of 33 assets compiles for a minute."""
    n = 5
    shape = {"shared": 7.0, "grouped": [6.0, 8.0, 12.0], "asset": np.linspace(5.0, 12.0, n)}[mixing]
    groups = [0, 1, 2, 1, 0] if mixing == "grouped" else None
    skew = np.stack([np.linspace(-0.5, 0.5, n), np.linspace(0.3, -0.3, n)])
    component = mixture.skew_t(shape, skew, 0.4 + 0.6 * np.eye(n), mixing=mixing, groups=groups, dtype=F64)
    prepared = component.prepare()
    scale = jnp.asarray(np.linspace(0.01, 0.3, n)[:, None] * np.ones((1, 64)))
    masks = parity(jnp.arange(64, dtype=jnp.uint32))
    few, few_mgf = draw(component, 64, masks_of=parity), mgf_rows(component, prepared, masks, tuple(scale))
    monkeypatch.setattr(numerics, "MAX_UNROLLED_ASSETS", 2)
    # Another number of paths, or the compiled program of the first call would be used again.
    many = draw(component, 66, masks_of=parity)
    np.testing.assert_allclose(many[..., :64], few, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mgf_rows(component, prepared, masks, scale), few_mgf, rtol=1e-10)


@pytest.mark.slow
def test_thirty_three_assets():
    n, size = 33, 4000
    correlation = 0.4 + 0.6 * np.eye(n)
    component = mixture.student_t(np.linspace(9.0, 16.0, n), correlation, mixing="asset", cut=0.0, dtype=F64)
    x = draw(component, size)[0]
    for i in (0, 16, 32):
        dof = 9.0 + 7.0 * i / 32.0
        assert stats.kstest(x[i] / np.sqrt((dof - 2.0) / dof), stats.t(dof).cdf).pvalue > 1e-4
    assert_mc(x[0] * x[32], component.shock_correlation()[0, 0, 32])


GRADIENTS = {
    "t": mixture.student_t(4.0, R3, dtype=F64),
    "t grouped": mixture.student_t([4.5, 9.0], R3, mixing="grouped", groups=[0, 1, 0], dtype=F64),
    "skew t": mixture.skew_t(7.0, [-0.4, 0.0, 0.2], R3, dtype=F64),
    "nig": mixture.nig(0.5, [-0.3, 0.1, 0.2], R3, mixing="asset", dtype=F64),
    "variance gamma": mixture.variance_gamma(0.5, [-0.3, 0.1, 0.2], R3, dtype=F64),
}


def _smooth(component, key):
    """A smooth function of shocks and of the log moment generating function."""
    prepared = component.prepare()
    x = paths_of(component, prepared, key, n_paths=512)[0]
    scale = tuple(jnp.full((4,), s) for s in (0.03, 0.1, 0.3))
    cumulant = component.log_mgf(prepared, (), scale)
    return jnp.mean(jnp.tanh(x[0]) + 0.3 * jnp.sin(x[1]) * x[2]) + 10.0 * sum(jnp.sum(row) for row in cumulant)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.slow
def test_pathwise_gradient(name):
    component, key = GRADIENTS[name], stream_key(5, Stream.MIXING)
    gradient = jax.jit(jax.grad(_smooth))(component, key)
    for field in ("shape", "skew", "cholesky"):
        leaf = getattr(component, field)
        if leaf is None:
            continue
        index = (0, 1, 0) if field == "cholesky" else (0, leaf.shape[1] - 1)
        h = 1e-4 if field == "cholesky" else 3e-4

        def moved(step, field=field, index=index, leaf=leaf):
            return float(_smooth(dataclasses.replace(component, **{field: leaf.at[index].add(step)}), key))

        difference = (moved(h) - moved(-h)) / (2.0 * h)
        assert float(getattr(gradient, field)[index]) == pytest.approx(difference, rel=1e-5, abs=1e-9), field


def test_gradient_outside_a_program_is_the_same():
    component = GRADIENTS["skew t"]

    def total(component):
        prepared = component.prepare()
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(prepared._replace(sub_steps=None)))

    inside, outside = jax.jit(jax.grad(total))(component), jax.grad(total)(component)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), outside, inside)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture.student_t(2.0, ONE), "dof"),
        (lambda: mixture.student_t(np.nan, ONE), "dof"),
        (lambda: mixture.skew_t(4.0, -0.1, ONE), "dof"),
        (lambda: mixture.nig(0.01, 0.0, ONE), "shape"),
        (lambda: mixture.variance_gamma(0.05, 0.0, ONE), "shape"),
        (lambda: mixture.student_t(4.0, ONE, cut=-1e-6), "cut"),
        (lambda: mixture.student_t(4.0, ONE, cut=0.02), "cut"),
        (lambda: mixture.gaussian([[1.0, 1.2], [1.2, 1.0]]), "correlation"),
        (lambda: mixture.gaussian(0.9 * np.ones((3, 3)) - np.diag([0, 0, 1.8]) + 0.1 * np.eye(3)), "correlation"),
        (lambda: mixture.gaussian(-0.6 * np.ones((3, 3)) + 1.6 * np.eye(3)), "positive definite"),
        (lambda: mixture.gaussian(np.ones(3)), "shape"),
        (lambda: mixture.student_t([4.0, 5.0], R3, mixing="asset"), "dof"),
        (lambda: mixture.student_t([4.0, 5.0], np.stack([R3] * 3)), "regimes"),
        (lambda: mixture.skew_t(6.0, [0.1, 0.2], R3), "skew"),
        (lambda: mixture.skew_t(6.0, np.nan, R3), "skew"),
        (lambda: mixture.student_t(4.0, R3, mixing="grouped", groups=[0, 2, 0]), "groups"),
        (lambda: mixture.student_t(4.0, R3, mixing="grouped", groups=[0, 1]), "groups"),
        (lambda: mixture.student_t(4.0, R3, groups=[0, 0, 0]), "groups"),
        (lambda: mixture.student_t(4.0, R3, mixing="assets"), "did you mean"),
        (lambda: mixture.skew_t(6.0, [3.0, -3.0], [[1, 0.9], [0.9, 1]], correlation_of="shock"), "lower the skew"),
        (lambda: levy.nig_levy(1.0, -1.5, 0.5), "alpha"),
        (lambda: levy.nig_levy([8.0, 9.0], -1.5, 0.9), "shared"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_example_draws():
    for dtype in (jnp.float32, jnp.float64):
        component = mixture.example(3, dtype)
        assert np.all(np.isfinite(draw(component, 100)))
        assert component.n_slots == 3
