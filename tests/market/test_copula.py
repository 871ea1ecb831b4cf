"""Copulas and margins: published figures, the laws asked for, dependence, gradients.

Statistical checks are at 4 standard errors (false alarm 6e-5 each, about a hundred), Kolmogorov-Smirnov at 1e-4.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.builders import assert_frequency, assert_lower_tail_mean, assert_mc, assert_quantile
from reference.dependence import draw, paths_of, tail_frequency
from scipy import integrate, optimize, special, stats

from qpo_sim import numerics
from qpo_sim.errors import InputError
from qpo_sim.market import compose, marginal
from qpo_sim.market.dependence import copula, mixture
from qpo_sim.random import Stream, stream_key

F64 = np.float64
ONE = [[1.0]]
N = 1 << 18
LEVELS = np.array([1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999, 0.9999])
RETURNS = stats.t.rvs(3.5, size=2000, random_state=np.random.default_rng(1)) * 0.03 + 0.001

MARGINS = {
    "gaussian": marginal.Gaussian(),
    "t": marginal.StudentT(3.0),
    "hansen": marginal.HansenSkewT(3.3, -0.2),
    "hansen right": marginal.HansenSkewT(6.0, 0.6),
    "semi-parametric": marginal.semi_parametric(RETURNS),
    "given tails": marginal.semi_parametric(
        RETURNS, lower=marginal.GpdTail(-0.05, 0.08, 0.25, 0.02), upper=marginal.GpdTail(0.06, 0.06, 0.15, 0.02)
    ),
    "bounded tail": marginal.semi_parametric(RETURNS, lower=marginal.GpdTail(-0.05, 0.08, -0.2, 0.03), upper=None),
    "exponential tail": marginal.semi_parametric(RETURNS, lower=None, upper=marginal.GpdTail(0.06, 0.05, 0.0, 0.02)),
    "empirical": marginal.empirical(RETURNS),
}


def pair(rho):
    return [[1.0, rho], [rho, 1.0]]


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_is_standardised_and_its_two_functions_are_inverse(name):
    margin = MARGINS[name]
    u = np.concatenate([LEVELS, [1e-7, 1.0 - 1e-7]])
    np.testing.assert_allclose(margin.cdf(margin.quantile(u)), u, rtol=1e-6)
    assert np.all(np.diff(margin.quantile(np.sort(u))) > 0.0)
    assert margin.cdf(-1e9) == pytest.approx(0.0, abs=1e-15) and margin.cdf(1e9) == pytest.approx(1.0)
    # Both moments by trapezoids in the normal score, which resolve the steps of data and reach a probability of 1e-12.
    score = np.linspace(-7.0, 7.0, 400_001)
    x = margin.quantile(np.where(score < 0.0, special.ndtr(score), 1.0 - special.ndtr(-score)))
    weight = stats.norm.pdf(score) * (score[1] - score[0])
    assert weight @ x == pytest.approx(0.0, abs=1e-4)
    # Where the variance hardly exists, a part of it is farther out than any quadrature goes.
    if name != "semi-parametric":
        assert weight @ x**2 == pytest.approx(1.0, abs=2e-3)


def test_hansen_law_is_its_density():
    """Hansen (1994) eq. (10)."""
    dof, skew = 4.0, -0.3
    margin = marginal.HansenSkewT(dof, skew)
    c = special.gamma((dof + 1) / 2) / (np.sqrt(np.pi * (dof - 2)) * special.gamma(dof / 2))
    a = 4 * skew * c * (dof - 2) / (dof - 1)
    b = np.sqrt(1 + 3 * skew**2 - a**2)

    def density(z):
        side = 1 - skew if z < -a / b else 1 + skew
        return b * c * (1 + ((b * z + a) / side) ** 2 / (dof - 2)) ** (-(dof + 1) / 2)

    for x in (-4.0, -1.0, -a / b, 0.4, 3.0):
        assert margin.cdf(x) == pytest.approx(integrate.quad(density, -np.inf, x)[0], abs=1e-9)
    symmetric = marginal.HansenSkewT(dof, 0.0)
    np.testing.assert_allclose(symmetric.quantile(LEVELS), marginal.StudentT(dof).quantile(LEVELS), atol=1e-12)


def test_gpd_tail_formula(cases):
    case = cases("models")["C07"]
    p = case["inputs"]
    body = np.linspace(-2.0, 2.7, p["n"] - p["n_exceed"])
    tail = marginal.GpdTail(p["u"], p["n_exceed"] / p["n"], p["xi"], p["beta"])
    margin = marginal.semi_parametric(body, lower=None, upper=tail, standardise=False)
    for level, value in case["expected"]["VaR"].items():
        assert margin.quantile(float(level)) == pytest.approx(value, abs=1e-9)
    for level, value in case["expected"]["ES"].items():
        a = float(level)
        mean = integrate.quad(lambda s, a=a: margin.quantile(1.0 - (1.0 - a) * np.exp(-s)) * np.exp(-s), 0.0, 27.0)[0]
        assert mean == pytest.approx(value, rel=1e-6)


def test_semi_parametric_margin_is_that_of_the_data():
    margin = marginal.semi_parametric(RETURNS, lower=0.1, upper=0.1)
    z = (RETURNS - margin.location) / margin.scale
    # 2000 fitted observations: far closer than a fresh sample would be.
    assert stats.kstest(z, margin.cdf).statistic < 0.01
    assert abs(margin.location - RETURNS.mean()) < 0.1 * RETURNS.std()
    assert margin.lower is not None and 0.0 < margin.lower.xi < 0.5
    raw = marginal.semi_parametric(RETURNS, standardise=False)
    np.testing.assert_allclose(raw.quantile(LEVELS), margin.location + margin.scale * margin.quantile(LEVELS))
    with_gaps = np.append(RETURNS, [np.nan] * 50)
    np.testing.assert_array_equal(marginal.empirical(with_gaps).quantile(LEVELS), MARGINS["empirical"].quantile(LEVELS))


SCORES = {
    "gaussian": mixture.gaussian(ONE, dtype=F64),
    "t 4": mixture.student_t(4.0, ONE, cut=0.0, dtype=F64),
    "t 2.5": mixture.student_t(2.5, ONE, cut=0.0, dtype=F64),
    "skew t": mixture.skew_t(6.0, -0.4, ONE, cut=0.0, dtype=F64),
    "nig": mixture.nig(0.5, -0.4, ONE, dtype=F64),
}


def score_quantiles(score):
    if score.shape is None:
        return special.ndtri(LEVELS)
    if score.family == "student_t":
        dof = float(score.shape[0, 0])
        return stats.t.ppf(LEVELS, dof) * np.sqrt((dof - 2.0) / dof)
    shape, beta = float(score.shape[0, 0]), float(score.skew[0, 0])
    law = copula._ScoreLaw(score.family, 0.0)
    return np.sinh(
        [optimize.brentq(lambda y, s=s: law.scores(np.array([y]), shape, beta)[0] - s, -14, 14, xtol=1e-13)
         for s in special.ndtri(LEVELS)]
    )  # fmt: skip


@pytest.mark.parametrize("margin", ["gaussian", "t", "hansen", "semi-parametric"])
@pytest.mark.parametrize("score", SCORES)
def test_error_of_the_tabulated_map(score, margin):
    """Relative to the quantile, 1e-4 at 99.99 %; inside a body of data its steps are not resolved (5e-3 absolute)."""
    x, exact = score_quantiles(SCORES[score]), MARGINS[margin].quantile(LEVELS)
    for dtype in (F64, np.float32):
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), SCORES[score])
        made = copula.copula(cast, MARGINS[margin], cut=0.0)
        prepared = made.prepare()
        found = np.asarray(made.shocks_of(prepared, (), (jnp.asarray(x, dtype),))[0], F64)
        # The quadrature of t laws ends at a score of 5.6, of probability 1e-8.
        np.testing.assert_allclose(found[[0, -1]], exact[[0, -1]], rtol=1e-4)
        tolerance = 5e-3 if margin == "semi-parametric" else 1e-4
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=tolerance)


def test_tail_dependence_coefficient(cases):
    case = cases("models")["A05"]
    for name, expected in case["expected"]["lambda_"].items():
        dof, rho = (float(part.split("=")[1]) for part in name.split(","))
        assert copula.tail_dependence_t(dof, rho) == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("dof", "rho"), [(2.5, 0.5), (4.0, 0.0), (4.0, 0.9), (10.0, 0.5)])
def test_joint_tail_of_the_t_copula(dof, rho):
    """Joint exceedances against the bivariate t law, and their way down to the coefficient of tail dependence."""
    made = copula.t_copula(dof, pair(rho), [marginal.StudentT(3.0), marginal.HansenSkewT(5.0, -0.3)])
    x = np.concatenate([draw(made, N, seed=seed)[0] for seed in range(4)], axis=1)
    levels, found = (0.05, 0.01, 0.001), []
    for level in levels:
        q = stats.t.ppf(level, dof)

        # P(both below) = integral of the conditional law of one given the other.
        def conditional(t, q=q):
            scale = np.sqrt((dof + t**2) / (dof + 1.0) * (1.0 - rho**2))
            return special.stdtr(dof + 1.0, (q - rho * t) / scale) * stats.t.pdf(t, dof)

        both = integrate.quad(conditional, -np.inf, q, epsabs=1e-12)[0]
        count = np.count_nonzero((x[0] < made_quantile(0, level)) & (x[1] < made_quantile(1, level)))
        assert_frequency(count, x.shape[1], both)
        found.append(both / level)
    limit = copula.tail_dependence_t(dof, rho)
    assert np.all(np.diff(found) < 0.0) and found[-1] > limit and abs(found[-1] - limit) < abs(found[0] - limit)


def made_quantile(asset, level):
    return float((marginal.StudentT(3.0), marginal.HansenSkewT(5.0, -0.3))[asset].quantile(level))


def test_kendall_tau_of_the_t_copula(cases):
    expected = cases("models")["A05"]["expected"]["kendall_tau_rho05"]
    x = draw(copula.t_copula(4.0, pair(0.5), marginal.StudentT(3.0)), 40_000)[0]
    found = [stats.kendalltau(*part).statistic for part in np.split(x, 40, axis=1)]
    assert_mc(found, expected)


def test_meta_t_portfolio(cases):
    case = cases("models")["A07"]
    p, expected = case["inputs"], case["expected"]
    made = copula.t_copula(p["nu_copula"], pair(p["rho"]), [marginal.StudentT(nu) for nu in p["margin_nu"]], cut=0.0)
    x = np.concatenate([draw(made, N, seed=seed)[0] for seed in range(4)], axis=1)
    result = np.asarray(p["weights"]) * np.asarray(p["margin_sd"]) @ x
    for level, value in expected["VaR"].items():
        assert_quantile(result, 1.0 - float(level), -value)
    for level, value in expected["ES"].items():
        assert_lower_tail_mean(result, 1.0 - float(level), -value)


@pytest.mark.slow
def test_margins_by_kolmogorov_smirnov():
    names = list(MARGINS)
    n = len(names)
    correlation = 0.5 + 0.5 * np.eye(n)
    margins = [MARGINS[name] for name in names]
    for made in (
        copula.t_copula(4.0, correlation, margins),
        copula.t_copula(np.linspace(3.0, 9.0, n), correlation, margins, mixing="grouped"),
        copula.skew_t_copula(6.0, np.linspace(-0.8, 0.4, n), correlation, margins),
    ):
        x = draw(made, 20_000, seed=7)[0]
        for i in range(n):
            assert stats.kstest(x[i], margins[i].cdf).pvalue > 1e-4, names[i]
            assert_mc(x[i], 0.0)


def test_skew_t_copula_falls_together():
    x = draw(copula.skew_t_copula(6.0, -0.6, pair(0.5), marginal.StudentT(4.0)), N)[0]
    lower, upper = tail_frequency(x, 0.05), tail_frequency(x, 0.05, upper=True)
    assert lower[0] - upper[0] > 20.0 * np.hypot(lower[1], upper[1])
    # Its margins are symmetric all the same.
    assert_frequency(np.count_nonzero(x[0] < 0.0), N, 0.5)


def test_exponential_moment_of_held_margins():
    made = copula.t_copula(
        4.0, np.eye(3), [MARGINS["t"], MARGINS["hansen right"], MARGINS["semi-parametric"]], cut=1e-3
    )
    x = draw(made, N)[0]
    scale = (0.05, 0.15, 0.3)
    prepared = made.prepare()
    value = made.log_mgf(prepared, (), tuple(jnp.full((1,), s, jnp.float32) for s in scale))
    for row, s, log_mgf in zip(x, scale, value, strict=True):
        assert_mc(row, 0.0)
        assert_mc(np.exp(s * row - float(log_mgf[0])), 1.0)
    for row, variance in zip(x, made.variance()[0], strict=True):
        assert_mc(row**2, variance)
    free = copula.t_copula(4.0, ONE, MARGINS["t"], cut=0.0)
    assert free.log_mgf(free.prepare(), (), (jnp.ones(1),)) is None


@pytest.mark.parametrize("name", ["gaussian", "t", "hansen", "semi-parametric"])
def test_log_mgf_of_a_held_margin(name):
    cut, margin = 1e-5, MARGINS[name]
    made = copula.gaussian_copula(ONE, margin, cut=cut, dtype=F64)
    bound = -special.ndtri(cut)
    s_nodes = np.linspace(-bound, bound, 20_001)
    u = np.where(s_nodes < 0.0, special.ndtr(s_nodes), 1.0 - special.ndtr(-s_nodes))
    value = margin.quantile(u)
    weight = stats.norm.pdf(s_nodes) * (s_nodes[1] - s_nodes[0])
    weight[[0, -1]] = weight[[0, -1]] / 2.0 + cut
    value = value - weight @ value
    scale = np.geomspace(0.01, 1.0, 60)
    exact = special.logsumexp(scale[:, None] * value, b=weight, axis=1)
    found = np.asarray(made.log_mgf(made.prepare(), (), (jnp.asarray(scale),))[0])
    np.testing.assert_allclose(found, exact, rtol=5e-4)


def parity(path):
    return ((path % 2).astype(jnp.float64),)


def test_each_regime_has_its_own_copula_and_margins():
    rho, margins = np.stack([pair(0.2), pair(0.8)]), [["t", "hansen"], ["gaussian", "t"]]
    given = [[MARGINS[name] for name in row] for row in margins]
    both = copula.t_copula([3.0, 8.0], rho, given, dtype=F64)
    assert both.n_regimes == 2
    mixed = draw(both, 64, 3, masks_of=parity)
    for k, dof in enumerate((3.0, 8.0)):
        single = copula.t_copula(dof, rho[k], given[k], dtype=F64)
        np.testing.assert_allclose(mixed[..., k::2], draw(single, 64, 3)[..., k::2], rtol=1e-7, atol=1e-9)
    # Margins that change under a copula that does not, and the other way round.
    changing = copula.t_copula(3.0, rho[0], given, dtype=F64)
    mixed = draw(changing, 64, masks_of=parity)
    fixed = draw(copula.t_copula(3.0, rho[0], given[1], dtype=F64), 64)
    np.testing.assert_allclose(mixed[..., 1::2], fixed[..., 1::2], rtol=1e-7, atol=1e-9)
    value = changing.log_mgf(changing.prepare(), parity(jnp.arange(4)), (jnp.full((4,), 0.1),) * 2)
    assert np.ptp(value[0][::2]) == 0.0 and value[0][0] != value[0][1]


@pytest.mark.slow
def test_many_assets_are_computed_as_few(monkeypatch):
    n = 4
    margins = [[marginal.HansenSkewT(3.0 + i + k, 0.1 * i - 0.2) for i in range(n)] for k in range(2)]
    made = copula.skew_t_copula(7.0, np.linspace(-0.5, 0.2, n), 0.4 + 0.6 * np.eye(n), margins, dtype=F64)
    few = draw(made, 64, masks_of=parity)
    monkeypatch.setattr(numerics, "MAX_UNROLLED_ASSETS", 2)
    # Another number of paths, or the compiled program of the first call would be used again.
    np.testing.assert_allclose(draw(made, 66, masks_of=parity)[..., :64], few, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_thirty_three_assets():
    n = 33
    margins = [marginal.StudentT(3.0 + i / 8.0) for i in range(n)]
    made = copula.t_copula(5.0, 0.4 + 0.6 * np.eye(n), margins)
    x = draw(made, 4000)[0]
    for i in (0, 16, 32):
        assert stats.kstest(x[i], margins[i].cdf).pvalue > 1e-4


def _smooth(made, key):
    prepared = made.prepare()
    x = paths_of(made, prepared, key, n_paths=2048)[0]
    value = jnp.mean(jnp.tanh(x[0]) + 0.3 * jnp.sin(x[1]) * x[0] + 0.05 * x[1] * jnp.abs(x[1]))
    scale = tuple(jnp.full((2,), s) for s in (0.05, 0.2))
    return value + sum(jnp.sum(row) for row in made.log_mgf(prepared, (), scale))


@pytest.mark.parametrize("kind", ["t", "skew t"])
@pytest.mark.slow
def test_pathwise_gradient(kind):
    """In the correlation; and in dof and skew, through the score and through the map.

    The table is linear between its points: its slope, and what moves with it, is exact to the error of the table.
    """
    margins = [marginal.HansenSkewT(3.5, -0.2), marginal.StudentT(5.0)]
    if kind == "t":
        made = copula.t_copula(4.0, pair(0.5), margins, dtype=F64)
    else:
        made = copula.skew_t_copula(7.0, [-0.4, 0.2], pair(0.5), margins, dtype=F64)
    key = stream_key(5, Stream.MIXING)
    gradient = jax.jit(jax.grad(_smooth))(made, key)
    # The draws of a path do not move across a cell for the smaller step; the map in dof is smooth for the larger one.
    entries = [("cholesky", (0, 1, 0), 1e-6, 1e-5), ("shape", (0, 0), 0.02, 5e-3)]
    entries += [("skew", (0, 0), 5e-3, 5e-3)] if kind == "skew t" else []
    for field, index, h, tolerance in entries:
        leaf = getattr(made.score, field)

        def moved(step, field=field, index=index, leaf=leaf):
            score = dataclasses.replace(made.score, **{field: leaf.at[index].add(step)})
            return float(_smooth(dataclasses.replace(made, score=score), key))

        difference = (moved(h) - moved(-h)) / (2.0 * h)
        assert float(getattr(gradient.score, field)[index]) == pytest.approx(difference, rel=tolerance, abs=2e-6), field
    # Declared: nothing flows into the margins.
    assert float(jnp.abs(gradient.quantiles).max()) == 0.0


def test_slope_of_the_map():
    made = copula.t_copula(4.0, ONE, marginal.StudentT(3.0), dtype=F64)
    prepared = made.prepare()
    x = jnp.linspace(-6.0, 6.0, 25) + 0.013

    def total(x):
        return jnp.sum(made.shocks_of(prepared, (), (x,))[0])

    scale = np.sqrt(0.5)
    u = stats.t.cdf(np.asarray(x) / scale, 4.0)
    exact = stats.t.pdf(np.asarray(x) / scale, 4.0) / scale / stats.t.pdf(stats.t.ppf(u, 3.0), 3.0) * np.sqrt(1.0 / 3.0)
    np.testing.assert_allclose(jax.grad(total)(x), exact, rtol=2e-2)
    # Held beyond the cut: no slope; not a number stays one.
    far = jax.grad(total)(jnp.asarray([-1e6, 1e6, 0.0]))
    assert float(far[0]) == float(far[1]) == 0.0 and float(far[2]) > 0.1
    assert np.isnan(made.shocks_of(prepared, (), (jnp.asarray([np.nan]),))[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: copula.t_copula(2.0, pair(0.5), marginal.Gaussian()), "dof"),
        (lambda: copula.t_copula(4.0, pair(1.0), marginal.Gaussian()), "positive definite"),
        (lambda: copula.t_copula(4.0, pair(0.5), marginal.Gaussian(), cut=0.1), "cut"),
        (lambda: copula.t_copula(4.0, pair(0.5), [marginal.Gaussian()] * 3), "3 margins"),
        (lambda: copula.t_copula([4.0, 5.0], pair(0.5), [[marginal.Gaussian()] * 2] * 3), "regimes"),
        (lambda: copula.t_copula(4.0, ONE, marginal.Gaussian(), n_cells=8), "n_cells"),
        (lambda: copula.gaussian_copula(ONE, marginal.empirical(RETURNS, standardise=False)), "standardised"),
        (lambda: copula.gaussian_copula(ONE, {"kind": "gauss"}), "kind"),
        (lambda: copula.gaussian_copula(ONE, {"kind": "student_t", "nu": 3.0}), "student_t"),
        (lambda: copula.gaussian_copula(pair(0.1), {"kind": "student_t", "dof": [3.0] * 3}), "dof"),
        (lambda: copula.gaussian_copula(ONE, [3.0]), "margin"),
        (lambda: copula.example(2).prepare(sub_steps=4), "base step"),
        (lambda: marginal.StudentT(2.0), "dof"),
        (lambda: marginal.HansenSkewT(4.0, 1.0), "skew"),
        (lambda: marginal.semi_parametric(RETURNS, lower=marginal.GpdTail(-0.05, 0.1, 0.6, 0.02)), "xi"),
        (lambda: marginal.semi_parametric(RETURNS, upper=marginal.GpdTail(0.05, 0.1, 1, 1), standardise=False), "xi"),
        (lambda: marginal.semi_parametric(RETURNS, lower=marginal.GpdTail(-0.05, 0.1, 0.2, 0.0)), "beta"),
        (lambda: marginal.semi_parametric(RETURNS, lower=0.6), "probability"),
        (lambda: marginal.semi_parametric(RETURNS[:100], lower=0.1), "fewer than 20"),
        (lambda: marginal.semi_parametric(RETURNS, lower=marginal.GpdTail(0.2, 0.1, 0.2, 0.02)), "overlap"),
        (lambda: marginal.semi_parametric(RETURNS, lower={"threshold": -0.05}), "probability"),
        (lambda: marginal.empirical([1.0]), "observations"),
        (lambda: marginal.empirical([1.0, 1.0]), "variance"),
    ],
)  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_infinite_variance_is_a_law_where_no_variance_is_needed():
    margin = marginal.semi_parametric(RETURNS, lower=marginal.GpdTail(-0.05, 0.1, 0.6, 0.02), standardise=False)
    np.testing.assert_allclose(margin.cdf(margin.quantile(LEVELS)), LEVELS, rtol=1e-9)
    assert margin.raw_moments()[1] == np.inf


def test_described_margins_and_examples():
    returns = np.stack([RETURNS, RETURNS[::-1] * 2.0], axis=1)
    assets = ("A", "B")
    data = compose.Statistics(assets, 24.0, returns, np.asarray(pair(0.5)), None)
    described = {
        "kind": "t_copula",
        "dof": 4.0,
        "correlation": "data.correlation",
        "margins": {"kind": "semi_parametric", "data": "data.returns", "lower": 0.1},
    }
    made = compose.component("dependence", described, "market.shock", data, dtype=jnp.float32)
    own = marginal.semi_parametric(RETURNS, lower=0.1)
    np.testing.assert_allclose(made.quantiles[0, 0, 1000], own.quantile(special.ndtr(copula._NODES[1000])), rtol=1e-5)
    skewed = marginal.margins({"kind": "hansen_skew_t", "dof": [3.0, 4.0], "skew": -0.1}, 2)
    assert [margin.dof for margin in skewed] == [3.0, 4.0]
    for dtype in (jnp.float32, jnp.float64):
        assert np.all(np.isfinite(draw(copula.example(3, dtype), 100)))
