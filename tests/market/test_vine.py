"""Pair copulas and vines. Frequencies and moments within 4 standard errors (false alarm 6e-5 each)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

from qpo_sim.errors import InputError
from qpo_sim.market.dependence import pair_copula as pairs
from qpo_sim.market.dependence import vine as vines
from qpo_sim.market.dependence.pair_copula import pair_copula
from qpo_sim.market.dependence.vine import vine
from qpo_sim.random import Address, Stream, stream_key

F64 = jnp.float64
KEY = stream_key(11, Stream.MIXING)
N = 1 << 16


def address(n_paths, t=0):
    return Address(KEY, jnp.arange(n_paths, dtype=jnp.uint32), jnp.asarray(t, jnp.int32))


@partial(jax.jit, static_argnames=("n_paths", "n_steps"))
def simulate(component, masks=(), *, n_paths=N, n_steps=1):
    """(steps, assets, paths) shocks."""
    prepared = component.prepare(sub_steps=1)
    state = component.init(prepared, jnp.ones(n_paths, component.parameter.dtype), address(n_paths))

    def step(state, t):
        state, shocks = component.step(prepared, t, state, masks, address(n_paths, t + 1))
        return state, jnp.stack(list(shocks.eps))

    return jax.lax.scan(step, state, jnp.arange(n_steps, dtype=jnp.int32))[1]


def scores_of(component, **options):
    return np.asarray(simulate(component, **options)[0], np.float64)


def assert_tau(x, y, expected):
    """Kendall's tau of 64 batches; its bias is zero."""
    taus = [stats.kendalltau(a, b)[0] for a, b in zip(x.reshape(64, -1), y.reshape(64, -1), strict=True)]
    assert abs(np.mean(taus) - expected) < 4.0 * np.std(taus, ddof=1) / 8.0, (np.mean(taus), expected)


def assert_frequency(hits, expected):
    n = hits.size
    assert abs(hits.mean() - expected) < 4.0 * np.sqrt(expected * (1.0 - expected) / n) + 1e-12, (hits.mean(), expected)


def student_of(dof, dtype=F64):
    if dof is None:
        return None
    own, more = (pairs.student_map(pairs.student_table(jnp.asarray(x, dtype))) for x in (dof, dof + 1.0))
    return own, more, jnp.asarray(dof, dtype)


@partial(jax.jit, static_argnames=("family", "rotation", "is_first", "inverse"))
def conditional(family, rotation, is_first, z, given, parameter, student, inverse=False):
    function = pairs.inverse_conditional if inverse else pairs.conditional
    return function(family, rotation, is_first, z, given, parameter, student)


# --- pair copulas ---------------------------------------------------------------------------------------------------

COPULAS = [
    pair_copula("independence"),
    pair_copula("gaussian", 0.7),
    pair_copula("gaussian", -0.95),
    pair_copula("student", [0.6, 2.0]),
    pair_copula("student", [-0.8, 3.7]),
    pair_copula("student", [0.9, 25.0]),
    pair_copula("clayton", 0.05),
    pair_copula("clayton", 2.0),
    pair_copula("clayton", 15.0),
    pair_copula("gumbel", 1.0),
    pair_copula("gumbel", 1.7),
    pair_copula("gumbel", 9.0),
    pair_copula("frank", 4.0),
    pair_copula("frank", -12.0),
    pair_copula("frank", 30.0),
]


def name_of(copula):
    return f"{copula.family}-{copula.parameter:g}" + (f"-{copula.dof:g}" if copula.dof else "")


def distribution(copula, u, v):
    """C(u, v) of the unrotated copula in closed form (not Student-t)."""
    theta = copula.parameter
    if copula.family == "independence":
        return u * v
    if copula.family == "gaussian":
        law = stats.multivariate_normal([0.0, 0.0], [[1.0, theta], [theta, 1.0]])
        return law.cdf(np.stack([special.ndtri(u), special.ndtri(v)], axis=-1))
    if copula.family == "clayton":
        return (u**-theta + v**-theta - 1.0) ** (-1.0 / theta)
    if copula.family == "gumbel":
        return np.exp(-(((-np.log(u)) ** theta + (-np.log(v)) ** theta) ** (1.0 / theta)))
    assert copula.family == "frank"
    return -np.log1p(np.expm1(-theta * u) * np.expm1(-theta * v) / np.expm1(-theta)) / theta


def assert_round_trip(copula, is_first):
    rng = np.random.default_rng(0)
    w, given = rng.normal(size=(2, 4096)).clip(-5.3, 5.3) * np.array([[1.0], [1.2]])
    tail = np.array([[-5.3, -5.3], [5.3, 5.3], [-5.3, 5.3], [5.3, -5.3], [0.0, 0.0]]).T
    w, given = np.concatenate([w, tail[0]]), np.concatenate([given, tail[1]])
    which = copula.family, copula.rotation, is_first
    student = student_of(copula.dof)
    z = conditional(*which, w, given, copula.parameter, student, inverse=True)
    back = conditional(*which, z, given, copula.parameter, student)
    inside = np.abs(z) < pairs.SCORE_LIMIT
    assert np.all(np.isfinite(z)) and inside.mean() > 0.999
    np.testing.assert_allclose(special.ndtr(back)[inside], special.ndtr(w)[inside], atol=1e-6)


@pytest.mark.parametrize("copula", COPULAS, ids=name_of)
def test_inverse_then_conditional_gives_the_probability_back(copula):
    assert_round_trip(copula, True)


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("is_first", [True, False])
def test_turned_copulas_give_the_probability_back(rotation, is_first):
    assert_round_trip(pair_copula("gumbel", 1.7, rotation=rotation), is_first)


@pytest.mark.parametrize("copula", [c for c in COPULAS if c.family != "student" and c.parameter != 30.0], ids=name_of)
def test_conditional_is_the_derivative_of_the_copula(copula):
    u, v = (x.ravel() for x in np.meshgrid([0.02, 0.3, 0.5, 0.9, 0.99], [0.01, 0.2, 0.6, 0.95]))
    step = 1e-5 * np.minimum(v, 1.0 - v)
    expected = (distribution(copula, u, v + step) - distribution(copula, u, v - step)) / (2.0 * step)
    z, given = special.ndtri(u), special.ndtri(v)
    value = special.ndtr(conditional(copula.family, 0, True, z, given, copula.parameter, None))
    # scipy's bivariate normal integral is good to 1e-8 or so, which the step divides.
    np.testing.assert_allclose(value, expected, atol=2e-3 if copula.family == "gaussian" else 1e-6)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotations_reflect_the_arguments(rotation):
    """h of c(1-u, v) at 90 degrees, c(1-u, 1-v) at 180, c(u, 1-v) at 270, with either argument given."""
    z, given = np.random.default_rng(1).normal(size=(2, 50))
    first, second = {90: (-1, 1), 180: (-1, -1), 270: (1, -1)}[rotation]
    plain = conditional("clayton", 0, True, first * z, second * given, 2.0, None)
    np.testing.assert_allclose(conditional("clayton", rotation, True, z, given, 2.0, None), first * plain, rtol=1e-12)
    plain = conditional("clayton", 0, False, second * z, first * given, 2.0, None)
    np.testing.assert_allclose(conditional("clayton", rotation, False, z, given, 2.0, None), second * plain, rtol=1e-12)


@pytest.mark.parametrize("dof", [2.0, 2.5, 3.7, 8.0, 100.0])
def test_student_quantiles_are_as_accurate_as_they_say(dof):
    z = np.linspace(-7.5, 7.5, 3001)
    own, _, _ = student_of(dof)
    exact = np.sign(z) * -special.stdtrit(dof, special.ndtr(-np.abs(z)))
    bound = 1e-7 if dof < 2.5 else 2e-8
    np.testing.assert_allclose(pairs._quantile(own, jnp.asarray(z)), exact, rtol=bound, atol=1e-14)
    np.testing.assert_allclose(pairs._quantile_score(own, jnp.asarray(exact), dof), z, rtol=bound, atol=1e-14)
    single = pairs._quantile(student_of(dof, jnp.float32)[0], jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(single, exact, rtol=1e-5, atol=1e-5)


def test_student_conditional_is_the_conditional_t_law():
    z, given = np.random.default_rng(2).normal(size=(2, 400))
    nu, rho = 3.7, 0.6
    x, y = (special.stdtrit(nu, special.ndtr(score)) for score in (z, given))
    expected = special.stdtr(nu + 1, (x - rho * y) / np.sqrt((nu + y * y) * (1 - rho**2) / (nu + 1)))
    value = conditional("student", 0, True, z, given, rho, student_of(nu))
    np.testing.assert_allclose(special.ndtr(value), expected, atol=1e-8)


@pytest.mark.parametrize("copula", [c for c in COPULAS if abs(pairs.kendall_tau(c)) < 0.97], ids=name_of)
def test_kendalls_tau_and_tails_of_draws(copula):
    """Draws in single precision, at 0 and 180 degrees; the tails at a level, where the copula is known."""
    q = 0.02
    for rotation in (0, 180):
        turned = copula._replace(rotation=rotation)
        w, x = np.random.default_rng(rotation).normal(size=(2, 2 * N)).astype(np.float32)
        student, parameter = student_of(copula.dof, jnp.float32), np.float32(copula.parameter)
        y = np.asarray(conditional(copula.family, rotation, False, w, x, parameter, student, inverse=True))
        assert y.dtype == np.float32
        assert_tau(x, y, pairs.kendall_tau(turned))
        if copula.family == "student":
            joint = stats.multivariate_t([0, 0], [[1, copula.parameter], [copula.parameter, 1]], df=copula.dof)
            below = above = joint.cdf([special.stdtrit(copula.dof, q)] * 2)
        else:
            below = distribution(copula, np.array(q), np.array(q))
            above = 2.0 * q - 1.0 + distribution(copula, np.array(1.0 - q), np.array(1.0 - q))
        below, above = (above, below) if rotation == 180 else (below, above)
        edge = special.ndtri(q)
        assert_frequency((x <= edge) & (y <= edge), below)
        assert_frequency((x >= -edge) & (y >= -edge), above)


@pytest.mark.parametrize("rotation", [90, 270])
@pytest.mark.parametrize("family", ["clayton", "gumbel"])
def test_quarter_turns_make_negative_dependence(family, rotation):
    turned = pair_copula(family, rotation=rotation, tau=-0.4)
    x, y = scores_of(vine([[(0, 1)]], [[turned]]))
    assert abs(pairs.kendall_tau(turned) + 0.4) < 1e-12
    assert_tau(x, y, -0.4)
    # Clayton's corner (0, 0) goes to (1, 0) at 90 degrees and to (0, 1) at 270; Gumbel's (1, 1) to (0, 1) and (1, 0).
    edge = special.ndtri(0.02)
    right_low, left_high = ((x > -edge) & (y < edge)).mean(), ((x < edge) & (y > -edge)).mean()
    assert (right_low > 1.5 * left_high) == ((family == "clayton") == (rotation == 90))


def test_tail_dependence_is_the_limit_of_the_copula():
    far = np.array(1e-9)
    clayton, gumbel = pair_copula("clayton", 2.0), pair_copula("gumbel", 1.7)
    assert abs(pairs.tail_dependence(clayton)[0] - distribution(clayton, far, far) / far) < 1e-6
    q = np.array(1e-5)
    upper = (2.0 * q - 1.0 + distribution(gumbel, 1.0 - q, 1.0 - q)) / q
    assert abs(pairs.tail_dependence(gumbel)[1] - upper) < 1e-4
    assert pairs.tail_dependence(gumbel)[0] == 0.0 and pairs.tail_dependence(clayton)[1] == 0.0
    assert pairs.tail_dependence(clayton._replace(rotation=180)) == (0.0, pairs.tail_dependence(clayton)[0])
    assert pairs.tail_dependence(clayton._replace(rotation=90)) == (0.0, 0.0)
    lower, upper = pairs.tail_dependence(pair_copula("student", [0.5, 4.0]))
    assert lower == upper and abs(lower - 0.2531699951003227) < 1e-10
    assert pairs.tail_dependence(pair_copula("frank", 4.0)) == (0.0, 0.0)


def test_draws_reach_the_limit_of_their_tails():
    """Clayton and survival Gumbel at 0.2 %: nearer to the limit than a standard error."""
    for copula, shift in ((pair_copula("clayton", 2.0), 0), (pair_copula("gumbel", 2.0, rotation=180), 4e-3)):
        x, y = np.moveaxis(np.asarray(simulate(vine([[(0, 1)]], [[copula]]), n_steps=8)), 1, 0).reshape(2, -1)
        edge = special.ndtri(2e-3)
        share = np.count_nonzero((x < edge) & (y < edge)) / np.count_nonzero(x < edge)
        expected = pairs.tail_dependence(copula)[0]
        n = np.count_nonzero(x < edge)
        assert abs(share - expected) < 4.0 * np.sqrt(expected * (1.0 - expected) / n) + shift


@pytest.mark.parametrize("family", ["gaussian", "student", "clayton", "gumbel", "frank"])
def test_parameters_come_from_tau_and_back(family):
    for tau in (0.15, 0.5, 0.75):
        made = pair_copula(family, tau=tau, dof=4.0 if family == "student" else None)
        assert abs(pairs.kendall_tau(made) - tau) < 1e-9


@pytest.mark.parametrize("copula", [COPULAS[k] for k in (1, 4, 7, 10, 12)], ids=name_of)
def test_pair_copulas_are_differentiable(copula):
    """In scores, parameter and dof, against central differences."""
    w, given = jnp.array([-2.3, -0.4, 0.7, 2.1]), jnp.array([1.1, -1.9, 0.2, 2.4])

    def value(inverse, w, given, parameter, dof):
        student = None
        if copula.dof is not None:
            own, more = (pairs.student_map(pairs.student_table(x)) for x in (dof, dof + 1.0))
            student = own, more, dof
        return jnp.sum(jnp.sin(conditional(copula.family, 0, True, w, given, parameter, student, inverse=inverse)))

    arguments = (w, given, jnp.asarray(copula.parameter), jnp.asarray(copula.dof or 0.0))
    for inverse in (False, True):
        assert_gradient(partial(value, inverse), *arguments, rtol=2e-4 if copula.dof else 1e-5)


def test_gumbel_is_differentiable_where_it_is_independence():
    """At its edge theta = 1 the parameter has one side only."""
    w, given = jnp.array([-2.3, 0.7]), jnp.array([1.1, 2.4])

    def value(theta):
        return jnp.sum(conditional("gumbel", 0, True, w, given, theta, None, inverse=True))

    slope = (value(1.0 + 1e-6) - value(1.0)) / 1e-6
    np.testing.assert_allclose(jax.grad(value)(1.0), slope, rtol=1e-4)


def assert_gradient(function, *arguments, step=1e-5, rtol=1e-6):
    """Gradient in all arguments against central differences in every entry."""
    flat, unravel = ravel_pytree(arguments)
    value = jax.jit(lambda x: function(*unravel(x)))
    gradient = np.asarray(jax.grad(value)(flat))
    expected = [(value(flat.at[i].add(step)) - value(flat.at[i].add(-step))) / (2.0 * step) for i in range(flat.size)]
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"family": "clyton", "parameters": 1.0}, "did you mean 'clayton'"),
        ({"family": "clayton", "parameters": -1.0}, "rotate"),
        ({"family": "gumbel", "parameters": 0.5}, "rotate"),
        ({"family": "frank", "parameters": 0.0}, "independence"),
        ({"family": "gaussian", "parameters": 1.0}, "must lie in"),
        ({"family": "gaussian", "parameters": np.nan}, "must lie in"),
        ({"family": "student", "parameters": [0.5, 1.5]}, "at least 2"),
        ({"family": "student", "parameters": [0.5]}, "takes 2"),
        ({"family": "gaussian", "parameters": 0.5, "rotation": 45}, "rotation"),
        ({"family": "clayton", "tau": -0.3}, "rotate"),
        ({"family": "clayton", "tau": 1.0}, "strictly"),
        ({"family": "clayton", "tau": 0.3, "parameters": 1.0}, "give one"),
        ({"family": "frank", "tau": 0.99}, "reaches"),
    ],
)
def test_bad_pair_copulas_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        pair_copula(**arguments)


# --- vines ----------------------------------------------------------------------------------------------------------

PARTIALS = {(0, 1): 0.7, (0, 2): 0.5, (0, 3): -0.3, (1, 2, 0): 0.4, (1, 3, 0): 0.6, (2, 3, 0, 1): -0.5}


def gaussian_target():
    """Correlations of a Gaussian C-vine with these partial correlations, by the recursion."""
    p = PARTIALS
    c = np.eye(4)

    def up(partial_, a, b):
        return partial_ * np.sqrt((1 - a**2) * (1 - b**2)) + a * b

    c[0, 1], c[0, 2], c[0, 3] = p[0, 1], p[0, 2], p[0, 3]
    c[1, 2] = up(p[1, 2, 0], c[0, 1], c[0, 2])
    c[1, 3] = up(p[1, 3, 0], c[0, 1], c[0, 3])
    c[2, 3] = up(up(p[2, 3, 0, 1], p[1, 2, 0], p[1, 3, 0]), c[0, 2], c[0, 3])
    return c + np.triu(c, 1).T


def test_a_gaussian_vine_is_the_normal_law_of_its_partial_correlations():
    trees = [
        [{"family": "gaussian", "parameters": r} for key, r in PARTIALS.items() if len(key) == n] for n in (2, 3, 4)
    ]
    made = vine("c-vine", trees, dtype=F64)
    x, target = scores_of(made), gaussian_target()
    products = np.stack([x[i] * x[j] for i in range(4) for j in range(4)])
    error = products.std(axis=1) / np.sqrt(N)
    assert np.all(np.abs(products.mean(axis=1) - target.ravel()) < 4.0 * error)
    prepared = made.prepare()
    implied = [[float(made.correlation(prepared, (), i, j)) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(implied, target, atol=2e-3)
    assert not made.is_conditionally_gaussian and made.needs_base_step
    # A third tree of its own changes only the last pair.
    cut = scores_of(vine("c-vine", trees[:2], dtype=F64))
    np.testing.assert_allclose(cut[:3], x[:3], rtol=1e-6, atol=1e-6)
    partial_ = np.linalg.inv(np.corrcoef(cut))
    assert abs(partial_[2, 3] / np.sqrt(partial_[2, 2] * partial_[3, 3])) < 4.0 / np.sqrt(N)


def test_every_margin_is_standard_normal():
    """Kolmogorov-Smirnov at 1e-5 for each of nine margins."""
    for x in scores_of(vines.example(9, F64)):
        assert stats.kstest(x, "norm").pvalue > 1e-5


FIVE = [
    [(0, 1), (1, 2), (1, 3), (3, 4)],
    [(0, 2, 1), (2, 3, 1), (1, 4, 3)],
]


def test_a_vine_of_any_shape_has_the_pairs_of_both_its_trees():
    """Neither C nor D: given what its first tree knows, the second tree's pairs have their own tau."""
    first = [
        {"family": "clayton", "tau": 0.4},
        {"family": "gumbel", "rotation": 180, "tau": 0.5},
        {"family": "student", "tau": 0.45, "dof": 3.0},
        {"family": "clayton", "rotation": 90, "tau": -0.3},
    ]
    second = [
        {"family": "frank", "tau": 0.35},
        {"family": "gaussian", "tau": -0.25},
        {"family": "gumbel", "rotation": 270, "tau": -0.3},
    ]
    made = vine(FIVE, [first, second])
    x = scores_of(made)
    for (i, j), copula in zip(FIVE[0], first, strict=True):
        assert_tau(x[i], x[j], copula["tau"])

    def given(i, j):
        """Score of x_i given x_j, by the first tree's pair."""
        place = next(k for k, edge in enumerate(FIVE[0]) if {i, j} == set(edge))
        copula = pair_copula(**first[place])
        student = student_of(copula.dof)
        is_first = FIVE[0][place][0] == i
        return np.asarray(conditional(copula.family, copula.rotation, is_first, x[i], x[j], copula.parameter, student))

    for (i, j, k), copula in zip(FIVE[1], second, strict=True):
        assert_tau(given(i, k), given(j, k), copula["tau"])
        # The simplifying assumption: the conditional law does not depend on what is given.
        assert abs(stats.kendalltau(given(i, k), x[k])[0]) < 4.0 * np.sqrt(4.0 / 9.0 / N)


def test_structures_are_read_alike():
    """The example of the documentation of pyvinecopulib: (1,4) (2,4) (3,4); (1,3;4) (2,3;4); (1,2;3,4)."""
    matrix = [[4, 4, 4, 4], [3, 3, 3, 0], [2, 2, 0, 0], [1, 0, 0, 0]]
    taus = [[0.3, 0.4, 0.5], [0.2, 0.1], [0.15]]
    trees = [[{"family": "clayton", "tau": tau} for tau in row] for row in taus]
    made = vine(matrix, trees)
    assert [(edge.pair, edge.given) for edge in made.edges] == [
        ((0, 3), ()),
        ((1, 3), ()),
        ((2, 3), ()),
        ((0, 2), (3,)),
        ((1, 2), (3,)),
        ((0, 1), (2, 3)),
    ]
    edges = [[(0, 3), (1, 3), (2, 3)], [(0, 2, 3), (1, 2, 3)], [(0, 1, 2, 3)]]
    np.testing.assert_array_equal(scores_of(vine(edges, trees), n_paths=64), scores_of(made, n_paths=64))
    star = vine("c-vine", [trees[0][::-1], trees[1][::-1], trees[2]], order=[3, 2, 1, 0])
    np.testing.assert_allclose(scores_of(star, n_paths=64), scores_of(made, n_paths=64), rtol=1e-5, atol=1e-5)
    assert len(vine("c-vine", ["indep", CLAYTON, CLAYTON], order=[1, 0]).edges) == 1
    path = vine("D-vine", ["independence"], order=[2, 0, 1])
    assert [edge.pair for edge in path.edges] == [(2, 0), (0, 1)]


def test_parameters_follow_the_regime():
    by_regime = [{"parameters": [0.8, 3.0]}, {"parameters": [0.2, 12.0]}]
    first = [{"family": "student", "regimes": by_regime}, {"family": "clayton", "parameters": 1.5}]
    made = vine("d-vine", [first], dtype=F64)
    assert made.parameter.shape == (2, 2) and made.dof.shape == (2, 1)
    n = 512
    for k, own in enumerate(by_regime):
        masks = (jnp.full(n, float(k)),)
        alone = vine("d-vine", [[{"family": "student", **own}, first[1]]], dtype=F64)
        both = simulate(made, masks, n_paths=n)
        np.testing.assert_allclose(both, simulate(alone, n_paths=n), rtol=1e-7, atol=1e-9)
        together, single = made.prepare(), alone.prepare()
        expected = alone.correlation(single, (), 0, 2)
        np.testing.assert_allclose(made.correlation(together, masks, 0, 2)[0], expected, rtol=1e-7)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Doubled:
    scale: jax.Array

    def apply(self, rows):
        return tuple(self.scale * row for row in rows) if isinstance(rows, tuple) else self.scale * rows


class WithCumulant(Doubled):
    def log_mgf(self, scale):
        return tuple(2.0 * s * s for s in scale)


def test_margins_are_applied_to_the_scores():
    trees = [[{"family": "clayton", "tau": 0.5}] * 2]
    plain, mapped = (vine("c-vine", trees, margin=m, dtype=F64) for m in (None, Doubled(jnp.asarray(2.0))))
    np.testing.assert_allclose(scores_of(mapped, n_paths=32), 2.0 * scores_of(plain, n_paths=32), rtol=1e-12)
    scale = (jnp.array([0.1]),) * 3
    np.testing.assert_allclose(plain.log_mgf(None, (), scale)[0], 0.005)
    assert mapped.log_mgf(None, (), scale) is None
    jax.tree_util.register_dataclass(WithCumulant, ["scale"], [])
    known = vine("c-vine", trees, margin=WithCumulant(jnp.asarray(2.0)), dtype=F64)
    np.testing.assert_allclose(known.log_mgf(None, (), scale)[0], 0.02)


@pytest.mark.slow
def test_vine_gradients():
    first = [{"family": "student", "parameters": [0.6, 4.0]}, {"family": "clayton", "parameters": 1.5}]
    second = [{"family": "gumbel", "parameters": 1.4}]
    made = vine("d-vine", [first, second], dtype=F64)

    def mean_product(parameter, dof):
        changed = vines.Vine(parameter, dof, None, made.edges, 3)
        eps = simulate(changed, n_paths=128)[0]
        return jnp.mean(eps[0] * eps[2]) + jnp.mean(jnp.minimum(eps[0] * eps[1], 1.0))

    assert_gradient(mean_product, made.parameter, made.dof, rtol=1e-4)


@pytest.mark.parametrize("n_assets", [1, 2, 5, 34])
def test_examples_run_in_their_precision(n_assets):
    made = vines.example(n_assets)
    if n_assets > 32:
        made = vine("c-vine", [{"family": "gaussian", "parameters": 0.5}], order=range(n_assets))
    x = simulate(made, n_paths=16)
    assert made.n_slots == (n_assets + 1) // 2
    assert x.shape == (1, n_assets, 16) and x.dtype == jnp.float32 and np.all(np.isfinite(x))


@pytest.mark.slow
def test_ten_thousand_steps_stay_finite():
    x = np.asarray(simulate(vines.example(3), n_paths=32, n_steps=10_000))
    assert np.all(np.isfinite(x)) and abs(x.std() - 1.0) < 0.02


CLAYTON = {"family": "clayton", "tau": 0.3}


@pytest.mark.parametrize(
    ("structure", "trees", "options", "words"),
    [
        ("x-vine", [[CLAYTON]], {}, "structure"),
        ("c-vine", [], {}, "trees"),
        ("c-vine", [CLAYTON], {}, "give order"),
        ("c-vine", [[CLAYTON] * 2], {"order": [0, 1, 1]}, "order"),
        ("c-vine", [[CLAYTON] * 2, [CLAYTON] * 2], {}, "tree 2 has 2 pair copulas"),
        ("d-vine", [[CLAYTON] * 2, [CLAYTON], ["indep"]], {}, "at most 2 trees"),
        ([[4, 4, 4, 4], [3, 3, 3, 0], [2, 2, 0, 0], [4, 0, 0, 0]], [[CLAYTON] * 3], {}, "antidiagonal"),
        ([[4, 4, 0, 4], [3, 3, 3, 0], [2, 2, 0, 0], [1, 0, 0, 0]], [[CLAYTON] * 3], {}, "column 3"),
        ([[2, 3, 4, 4], [4, 4, 3, 0], [3, 2, 0, 0], [1, 0, 0, 0]], [[CLAYTON] * 3, [CLAYTON] * 2], {}, "not an R-vine"),
        ([[1, 1], [2, 2], [3, 3]], [[CLAYTON]], {}, "square"),
        ([[(0, 1), (1, 0)]], [[CLAYTON] * 2], {}, "circle"),
        ([[(0, 1), (1, 3)]], [[CLAYTON] * 2], {}, "different assets"),
        ([[(0, 1), (1, 2)], [(0, 1, 2)]], [[CLAYTON] * 2, [CLAYTON]], {}, "not an R-vine"),
        ([[(0, 1), (1, 2)], [(0, 2)]], [[CLAYTON] * 2, [CLAYTON]], {}, "a pair and 1 given"),
        ([[(0, 1), (1, 2)], [(0, 2, 1)]], [[CLAYTON] * 2], {}, "give pair copulas for each"),
        ([[(0, 1)]], [[CLAYTON]], {"order": [0, 1]}, "order belongs"),
        (3, [[CLAYTON]], {}, "structure must be"),
        ("c-vine", [[{"tau": 0.3}]], {}, "needs a family"),
        ("c-vine", [[{"family": "clayton", "theta": 0.3}]], {}, "no 'theta'"),
        ("c-vine", [[{"family": "clayton", "parameters": -2.0}]], {}, "the pair 0, 1 of tree 1"),
        (
            "c-vine",
            [[{"family": "clayton", "regimes": [{"tau": 0.3}, {"tau": 0.3, "rotation": 180}]}]],
            {},
            "same in all",
        ),
        (
            "c-vine",
            [
                [
                    {"family": "clayton", "regimes": [{"tau": 0.3}, {"tau": 0.4}]},
                    {"family": "clayton", "regimes": [{"tau": 0.3}] * 3},
                ]
            ],
            {},
            "regimes",
        ),
    ],
)
def test_bad_vines_are_refused(structure, trees, options, words):
    with pytest.raises(InputError, match=words):
        vine(structure, trees, **options)


def test_sub_steps_are_refused():
    with pytest.raises(InputError, match="whole base steps"):
        vines.example(3).prepare(sub_steps=2)
