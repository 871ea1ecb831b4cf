"""Correlations, factor and dynamic-correlation shocks, tail measures.

Moments hold within 4 standard errors (false alarm 6e-5 each); everything else is exact to rounding, which is that of
single precision where draws are made again outside the component.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from scipy import integrate, special, stats

from qpo_sim.errors import InputError
from qpo_sim.market import shock
from qpo_sim.market.dependence import common_mixing, correlation, dcc, factor, tail
from qpo_sim.numerics import materialised
from qpo_sim.random import MAX_SLOTS, Address, Stream, stream_key

F64 = jnp.float64
KEY = stream_key(7, Stream.MIXING)


def address(n_paths, t=0, mirror=None):
    return Address(KEY, jnp.arange(n_paths, dtype=jnp.uint32), jnp.asarray(t, jnp.int32), 0, mirror)


@partial(jax.jit, static_argnames=("n_paths", "n_steps", "sub_steps", "read", "mirrored"))
def simulate(component, masks=(), *, n_paths, n_steps, sub_steps=1, read=None, mirrored=False):
    """Stacked (steps, assets, paths) shocks, or whatever `read(state before, state after, shocks)` gives."""
    prepared = component.prepare(sub_steps=sub_steps)
    dtype = jax.tree.leaves(component)[0].dtype
    mirror = jnp.full(n_paths, 0xFFFFFFFF, jnp.uint32) if mirrored else None
    state = component.init(prepared, jnp.ones(n_paths, dtype), address(n_paths, 0, mirror))

    def step(state, t):
        after, shocks = component.step(prepared, t, state, masks, address(n_paths, t + 1, mirror))
        return after, jnp.stack(list(shocks.eps)) if read is None else read(state, after, shocks)

    return jax.lax.scan(step, state, jnp.arange(n_steps, dtype=jnp.int32))[1]


@jax.jit
def cumulants(component, masks, scale):
    return component.log_mgf(component.prepare(), masks, scale)


def assert_mc(sample, expected, n_sigma=4.0):
    """Mean over the last axis, in batches along it, so that what is before may be dependent."""
    batches = np.asarray(sample, np.float64).reshape(*np.shape(sample)[:-1], 64, -1).mean(-1)
    error = batches.std(-1, ddof=1) / 8.0
    assert np.all(np.abs(batches.mean(-1) - expected) < n_sigma * error), (batches.mean(-1), expected, error)


def second_moment(dof, cut=shock.MIXING_CUT):
    """E[H^2] of the cut mixing scale by quadrature over the chi-square."""
    low = stats.chi2.ppf(cut, dof)
    above = integrate.quad(lambda x: stats.chi2.pdf(x, dof) / x, low, np.inf, limit=400)[0]
    return (dof - 2.0) * (above + cut / low)


def cumulant(s, dof, cut=shock.MIXING_CUT):
    """log E exp(s eps) of the cut Student-t shock by quadrature over the score."""
    floor = special.ndtri(cut)
    nodes, weights = np.polynomial.legendre.leggauss(600)
    half = 0.5 * (8.0 - floor)
    z = floor + half * (nodes + 1.0)
    h2 = (dof - 2.0) / stats.chi2.ppf(special.ndtr(np.append(z, floor)), dof)
    weight = np.append(half * weights * stats.norm.pdf(z), cut)
    return special.logsumexp(0.5 * np.asarray(s)[..., None] ** 2 * h2, b=weight, axis=-1)


# --- correlation matrices -------------------------------------------------------------------------------------------


def random_correlation(n, seed=0):
    return stats.random_correlation.rvs(np.full(n, 1.0), random_state=seed) if n == 1 else _random(n, seed)


def _random(n, seed):
    rng = np.random.default_rng(seed)
    c = np.cov(rng.standard_normal((n, 3 * n)) + 0.7 * rng.standard_normal((1, 3 * n)))
    d = np.sqrt(np.diag(c))
    return c / d / d[:, None]


@pytest.mark.parametrize("n", [2, 5, 12])
def test_unconstrained_values_and_factors_map_both_ways(n):
    factor_ = np.linalg.cholesky(random_correlation(n))
    x = correlation.unconstrained_from_cholesky(jnp.asarray(factor_))
    np.testing.assert_allclose(correlation.cholesky_from_unconstrained(x), factor_, atol=1e-14)
    batch = jnp.asarray(np.random.default_rng(1).normal(0.0, 2.0, (3, n * (n - 1) // 2)))
    made = correlation.cholesky_from_unconstrained(batch)
    np.testing.assert_allclose(correlation.unconstrained_from_cholesky(made), batch, rtol=1e-9)
    matrices = correlation.correlation_of(made)
    np.testing.assert_allclose(jnp.diagonal(matrices, axis1=1, axis2=2), 1.0, atol=1e-14)
    assert np.linalg.eigvalsh(matrices).min() > 0.0


def test_unconstrained_values_are_partial_correlations():
    c = random_correlation(3, seed=3)
    x = correlation.unconstrained_from_cholesky(jnp.asarray(np.linalg.cholesky(c)))
    partial_12 = (c[1, 2] - c[0, 1] * c[0, 2]) / np.sqrt((1 - c[0, 1] ** 2) * (1 - c[0, 2] ** 2))
    np.testing.assert_allclose(np.tanh(x), [c[0, 1], c[0, 2], partial_12], rtol=1e-12)


def test_the_parametrisation_is_differentiable_and_finite_far_out():
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4)))

    def value(x):
        return jnp.sum(weight.astype(x.dtype) * correlation.cholesky_from_unconstrained(x))

    x = jnp.asarray(np.random.default_rng(3).normal(size=6))
    assert_gradient(value, x)
    far = jnp.array([8.0, -8.0, 20.0, 0.0, 1e-6, -30.0], jnp.float32)
    assert np.all(np.isfinite(jax.jit(jax.grad(value))(far)))
    np.testing.assert_array_equal(correlation.cholesky_from_unconstrained(jnp.zeros(6)), np.eye(4))


def assert_gradient(function, *arguments, step=1e-5, rtol=1e-6):
    """Gradient in all arguments against central differences in every entry."""
    flat, unravel = ravel_pytree(arguments)
    value = jax.jit(lambda x: function(*unravel(x)))
    gradient = np.asarray(jax.grad(value)(flat))
    expected = [(value(flat.at[i].add(step)) - value(flat.at[i].add(-step))) / (2.0 * step) for i in range(flat.size)]
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_nearest_correlation_is_highams():
    """Higham (2002) sec. 4: off-diagonal 0.7607 and 0.1573, at a distance of 0.5278."""
    a = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    made = correlation.nearest_correlation(a)
    np.testing.assert_allclose([made[0, 1], made[0, 2]], [0.7607, 0.1573], atol=5e-5)
    assert abs(np.linalg.norm(made - a) - 0.5278) < 5e-5


def test_nearest_correlation_is_positive_definite_and_nearer_than_clipping():
    from statsmodels.stats.correlation_tools import corr_clipped

    rng = np.random.default_rng(4)
    noise = rng.normal(0.0, 0.35, (12, 12))
    broken = random_correlation(12, seed=5) + (noise + noise.T) / 2.0
    np.fill_diagonal(broken, 1.0)
    assert np.linalg.eigvalsh(broken)[0] < -0.1
    for floor in (1e-8, 1e-2):
        made = correlation.nearest_correlation(broken, floor=floor)
        assert np.linalg.eigvalsh(made)[0] > floor * (1.0 - 1e-6)
        np.testing.assert_array_equal(np.diag(made), 1.0)
        correlation.check_correlation("made", made)
        clipped = corr_clipped(broken, threshold=max(floor, 1e-15))
        assert np.linalg.norm(made - broken) <= np.linalg.norm(clipped - broken) + 1e-9
    valid = random_correlation(6)
    np.testing.assert_allclose(correlation.nearest_correlation(valid), valid, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.ones((2, 3)), "square"),
        ([[1.0, np.nan], [np.nan, 1.0]], "row 1, column 2"),
        ([[1.0, 0.5], [0.4, 1.0]], "not symmetric"),
        ([[2.0, 0.5], [0.5, 1.0]], "diagonal"),
        ([[1.0, 1.2], [1.2, 1.0]], r"\[-1, 1\]"),
        ([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]], "nearest_correlation"),
    ],
)
def test_bad_correlations_are_refused(matrix, words):
    with pytest.raises(InputError, match=words):
        correlation.check_correlation("target", matrix)
    with pytest.raises(InputError, match="assets need"):
        correlation.check_correlation("target", np.eye(3), 4)
    with pytest.raises(InputError, match="n\\(n-1\\)/2"):
        correlation.assets_of(4)


# --- factor shocks --------------------------------------------------------------------------------------------------

LOADINGS = np.array([[0.8, 0.3], [0.7, -0.4], [0.6, 0.0], [-0.2, 0.9]])


def products(eps):
    """(pairs, paths x steps) products of all pairs of rows of (steps, assets, paths)."""
    eps = np.moveaxis(np.asarray(eps, np.float64), 1, 0).reshape(eps.shape[1], -1)
    return np.stack([eps[i] * eps[j] for i in range(len(eps)) for j in range(i + 1)])


def target_of(loadings):
    c = loadings @ loadings.T
    np.fill_diagonal(c, 1.0)
    return np.array([c[i, j] for i in range(len(c)) for j in range(i + 1)])


@pytest.mark.parametrize("dof", [None, 9.0])
def test_factor_shocks_have_the_correlation_of_their_loadings(dof):
    made = factor.factor(LOADINGS, dof=dof, dtype=F64)
    eps = simulate(made, n_paths=1 << 17, n_steps=2)
    scale = 1.0 if dof is None else second_moment(dof)
    assert_mc(products(eps), scale * target_of(LOADINGS))
    assert_mc(np.moveaxis(np.asarray(eps), 1, 0).reshape(4, -1), 0.0)


def test_each_factor_may_have_its_own_scale():
    made = factor.factor(LOADINGS, factor_dof=[7.0, 12.0], dtype=F64)
    eps = simulate(made, n_paths=1 << 17, n_steps=2)
    moments = np.array([second_moment(7.0), second_moment(12.0)])
    c = (LOADINGS * moments) @ LOADINGS.T
    np.fill_diagonal(c, (LOADINGS**2) @ moments + 1.0 - np.sum(LOADINGS**2, axis=1))
    assert_mc(products(eps), np.array([c[i, j] for i in range(4) for j in range(i + 1)]))
    assert not made.is_conditionally_gaussian
    # Only assets with loadings on a factor have its extremes: the third one has the first factor's alone.
    excess = np.mean(np.asarray(eps[:, 2]) ** 4) - 3.0
    assert 0.2 < excess < 1.0


def test_loadings_and_scale_follow_the_regime():
    loadings = np.stack([LOADINGS, 0.5 * LOADINGS, LOADINGS[::-1]])
    made = factor.factor(loadings, dof=[6.0, 9.0, 30.0], dtype=F64)
    n = 1 << 15
    for k in range(3):
        masks = tuple(jnp.full(n, float(k == j)) for j in (1, 2))
        eps = simulate(made, masks, n_paths=n, n_steps=1)
        alone = factor.factor(loadings[k], dof=float(made.dof[k]), dtype=F64)
        np.testing.assert_allclose(eps, simulate(alone, n_paths=n, n_steps=1), rtol=1e-10, atol=1e-12)
        assert abs(made.correlation(made.prepare(), masks, 0, 1)[0] - loadings[k][0] @ loadings[k][1]) < 1e-12


@pytest.mark.parametrize("n_assets", [6, 41])
@pytest.mark.parametrize("n_regimes", [1, 2])
def test_factor_shocks_are_a_numpy_product_of_the_same_draws(n_assets, n_regimes):
    rng = np.random.default_rng(0)
    b = rng.uniform(-0.5, 0.5, (n_regimes, n_assets, 3))
    made = factor.factor(b, dof=4.0, dtype=F64)
    n = 64
    masks = () if n_regimes == 1 else (jnp.asarray(np.arange(n) % 2, F64),)
    prepared = made.prepare()
    where = address(n, 3)
    _, shocks = jax.jit(made.step)(prepared, jnp.asarray(2), (), masks, where)
    f = np.asarray(where.after(1).normals(3), np.float64)
    pairs = where.after(3).normal_pairs((n_assets + 1) // 2)
    if n_assets > 32:
        e = np.array([pair.first for pair in pairs] + [pair.second for pair in pairs], np.float64)[:n_assets]
    else:
        e = np.array([row for pair in pairs for row in pair], np.float64)[:n_assets]
    k = np.zeros(n, int) if n_regimes == 1 else np.asarray(masks[0], int)
    d = np.sqrt(1.0 - np.sum(b**2, axis=-1))
    expected = (np.einsum("pij,jp->ip", b[k], f) + d[k].T * e) * np.asarray(shocks.mixing)
    np.testing.assert_allclose(jnp.stack(list(shocks.eps)), expected, rtol=1e-6, atol=2e-6)
    assert isinstance(shocks.eps, tuple) == (n_assets <= 32)


@pytest.mark.parametrize("n_assets", [4, 36])
def test_the_mirror_of_gaussian_factor_shocks_is_their_negative(n_assets):
    made = factor.factor(np.full((n_assets, 1), 0.6), dtype=F64)
    there, back = (simulate(made, n_paths=32, n_steps=2, mirrored=m) for m in (False, True))
    np.testing.assert_allclose(there, -back, rtol=1e-12)


def test_two_thousand_assets_never_make_a_square_matrix():
    n, n_paths = 2000, 64
    made = factor.example(n)
    run = partial(simulate, n_paths=n_paths, n_steps=3)
    shapes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v, "aval"))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(run)(made).jaxpr)
    assert max(int(np.prod(shape)) for shape in shapes) <= 3 * n * n_paths
    read = partial(simulate, n_paths=n_paths, n_steps=2, read=_last_row)
    memory = simulate.lower(made, n_paths=n_paths, n_steps=2, read=_last_row).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 4 * n * n_paths
    assert np.all(np.isfinite(read(made)))
    prepared = made.prepare()
    assert abs(float(made.correlation(prepared, (), 0, 2)) - float(made.loadings[0, 0] @ made.loadings[0, 2])) < 1e-6


def _last_row(before, after, shocks):
    return shocks.eps[-1]


@pytest.mark.parametrize("kind", ["gaussian", "common", "own"])
@pytest.mark.parametrize("n_assets", [4, 40])
def test_cumulants_are_those_of_the_quadrature(kind, n_assets):
    b = np.tile(LOADINGS, (n_assets // 4, 1))
    options = {"gaussian": {}, "common": {"dof": 3.0}, "own": {"factor_dof": [3.0, 5.0]}}[kind]
    made = factor.factor(b, **options, dtype=F64)
    scale = np.linspace(0.01, 0.25, n_assets)
    rows = jnp.asarray(scale)[:, None] * jnp.ones((1, 3))
    rows = tuple(rows) if n_assets <= 32 else rows
    value = jnp.stack(list(cumulants(made, (), rows)))[:, 1]
    expected = 0.5 * scale**2
    if kind == "common":
        expected = cumulant(scale, 3.0)
    elif kind == "own":
        expected = 0.5 * scale**2 * (1.0 - np.sum(b**2, axis=1))
        expected = expected + cumulant(np.abs(b[:, 0]) * scale, 3.0) + cumulant(np.abs(b[:, 1]) * scale, 5.0)
    np.testing.assert_allclose(value, expected, rtol=4e-4)


def test_mixing_constants():
    for dof in (2.3, 3.0, 4.2, 30.0):
        made = common_mixing.prepare_mixing(jnp.asarray([dof]), 1e-4)
        np.testing.assert_allclose(made.second_moment, second_moment(dof), rtol=1e-4)
    assert common_mixing.prepare_mixing(None, 1e-4) is None


@pytest.mark.slow
def test_factor_gradients():
    """Of a mean over fixed draws, so to rounding and not within standard errors."""
    made = factor.factor(LOADINGS, dof=5.0, dtype=F64)

    def mean_product(loadings, dof, own=None):
        changed = factor.Factor(loadings, dof, own)
        eps = simulate(changed, n_paths=256, n_steps=2)
        return jnp.mean(eps[:, 0] * eps[:, 1]) + jnp.mean(eps[:, 3] ** 2)

    assert_gradient(mean_product, made.loadings, made.dof, rtol=1e-5)
    assert_gradient(lambda x, own: mean_product(x, None, own), made.loadings, jnp.array([4.0, 8.0]), rtol=1e-5)

    def mean_cumulant(dof):
        changed = factor.Factor(made.loadings, dof)
        return changed.log_mgf(changed.prepare(), (), (jnp.array([0.1]),) * 4)[0][0]

    assert_gradient(mean_cumulant, made.dof, step=1e-3, rtol=1e-3)


def test_factor_scale_is_held_over_sub_steps():
    made = factor.factor(LOADINGS, dof=4.0, dtype=F64)
    mixing = simulate(made, n_paths=64, n_steps=12, sub_steps=4, read=_mixing)
    blocks = np.asarray(mixing).reshape(3, 4, -1)
    np.testing.assert_array_equal(blocks, blocks[:, :1] * np.ones((1, 4, 1)))
    assert np.all(blocks[0] != blocks[1])


def _mixing(before, after, shocks):
    return shocks.mixing


def test_principal_factors_find_the_loadings_again():
    b = np.random.default_rng(1).uniform(0.3, 0.7, (30, 2)) * np.array([1.0, 0.6])
    b[::2, 1] *= -1.0
    c = b @ b.T
    np.fill_diagonal(c, 1.0)
    found = factor.principal_factors(c, 2, n_iterations=300)
    np.testing.assert_allclose(found @ found.T, b @ b.T, atol=1e-4)
    one = factor.factor(factor.principal_factors(random_correlation(8), 3))
    assert one.n_factors == 3


def test_factor_standardises_raw_loadings():
    raw, specific = np.array([[0.03], [0.01]]), np.array([0.02, 0.04])
    made = factor.factor(raw, specific=specific, dtype=F64)
    np.testing.assert_allclose(made.loadings[0, :, 0], raw[:, 0] / np.hypot(raw[:, 0], specific), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loadings": np.ones(3)}, "shape"),
        ({"loadings": [[0.9, 0.5]]}, "sum to less than 1"),
        ({"loadings": [[np.nan]]}, "finite"),
        ({"loadings": LOADINGS, "dof": 2.0}, "exceed 2"),
        ({"loadings": LOADINGS, "factor_dof": [3.0, 1.5]}, "exceed 2"),
        ({"loadings": LOADINGS, "factor_dof": [3.0, 4.0, 5.0]}, "shape"),
        ({"loadings": LOADINGS, "dof": 4.0, "factor_dof": 4.0}, "choose one"),
        ({"loadings": LOADINGS, "specific": [1.0, 1.0, 0.0, 1.0]}, "positive"),
        ({"loadings": LOADINGS, "specific": [1.0, 1.0]}, "one number per asset"),
        ({"loadings": np.full((2 * MAX_SLOTS, 1), 0.1)}, "slots"),
        ({"loadings": LOADINGS, "mixing_cut": 0.5}, "mixing_cut"),
    ],
)
def test_bad_factors_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        factor.factor(**options)


def test_bad_numbers_of_factors_are_refused():
    with pytest.raises(InputError, match="1 to 3"):
        factor.principal_factors(random_correlation(4), 4)


# --- dynamic correlations -------------------------------------------------------------------------------------------

TARGET = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]])


def numpy_dcc(target, a, b, z, mixing, *, corrected, moment, initial=None, sub_steps=1):
    """Shocks (steps, assets, paths) by Cholesky factors of R, path by path."""
    n_steps, n, n_paths = z.shape
    eps = np.zeros_like(z)
    for p in range(n_paths):
        q = np.array(target if initial is None else initial)
        total = np.zeros(n)
        for t in range(n_steps):
            root = np.sqrt(np.diag(q))
            eps[t, :, p] = mixing[t, p] * (np.linalg.cholesky(q / root / root[:, None]) @ z[t, :, p])
            total += eps[t, :, p] / np.sqrt(sub_steps)
            if (t + 1) % sub_steps == 0:
                product = np.outer(total, total) * (np.outer(root, root) if corrected else 1.0)
                q = (1.0 - a - b) * target + a * product / moment + b * q
                total = np.zeros(n)
    return eps


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dof", [None, 4.0])
@pytest.mark.parametrize("sub_steps", [1, 3])
def test_dcc_is_the_numpy_loop_on_the_same_draws(corrected, dof, sub_steps):
    initial = np.array([[1.2, 0.9, 0.1], [0.9, 1.1, 0.3], [0.1, 0.3, 0.8]])
    made = dcc.dcc(TARGET, a=0.2, b=0.7, initial=initial, dof=dof, corrected=corrected, dtype=F64)
    n_paths, n_steps = 5, 12
    eps, scale = simulate(made, n_paths=n_paths, n_steps=n_steps, sub_steps=sub_steps, read=_eps_and_scale)
    draws = [address(n_paths, t + 1).after(int(dof is not None)).normals(3) for t in range(n_steps)]
    z = np.asarray(draws, np.float64)
    # The kernel's own moment, which another test holds against quadrature to 1e-4.
    moment = 1.0 if dof is None else float(made.prepare().mixing.second_moment[0])
    expected = numpy_dcc(
        TARGET, 0.2, 0.7, z, np.asarray(scale), corrected=corrected, moment=moment, initial=initial, sub_steps=sub_steps
    )
    np.testing.assert_allclose(eps, expected, rtol=1e-5, atol=5e-6)


def _eps_and_scale(before, after, shocks):
    eps = jnp.stack(shocks.eps)
    return eps, jnp.ones_like(eps[0]) if shocks.mixing is None else shocks.mixing


def _dcc_read(before, after, shocks):
    roots = jnp.stack([jnp.sqrt(column[0]) for column in before.q])
    return jnp.stack(shocks.eps), roots, before.q[0][1]


def test_dcc_keeps_its_target():
    # With these weights E[R] is nearer to S than its standard error: the bias is of the order of var(Q), 2e-4.
    for corrected in (False, True):
        made = dcc.dcc(TARGET, a=0.01, b=0.9, dof=9.0, corrected=corrected, dtype=F64)
        eps = simulate(made, n_paths=1 << 13, n_steps=40)
        c = np.moveaxis(np.asarray(eps), 0, 1).transpose(0, 2, 1).reshape(3, -1)
        moment = second_moment(9.0)
        expected = np.array([TARGET[i, j] for i in range(3) for j in range(i + 1)])
        assert_mc(np.stack([c[i] * c[j] for i in range(3) for j in range(i + 1)]), moment * expected)


def test_corrected_dcc_has_the_target_as_mean_of_q_and_arma_products():
    """Exact for Gaussian shocks: E[p p'] = Q given the past, so p_i p_j is ARMA(1, 1) with phi = a + b, theta = -b."""
    a, b = 0.06, 0.9
    made = dcc.dcc(TARGET, a=a, b=b, corrected=True, dtype=F64)
    eps, roots, q = simulate(made, n_paths=1 << 13, n_steps=260, read=_dcc_read)
    assert_mc(np.asarray(q[150:]).mean(0), TARGET[0, 1])
    x = np.asarray(eps[150:, 0] * eps[150:, 1] * roots[150:, 0] * roots[150:, 1]) - TARGET[0, 1]
    phi = a + b
    first = a * (1.0 - phi * b) / (1.0 - 2.0 * phi * b + b * b)
    for lag in (1, 2, 10):
        expected = first * phi ** (lag - 1)
        assert_mc((x[lag:] * x[:-lag] - expected * x[lag:] ** 2).mean(0), 0.0)


def test_constant_correlation_is_the_limit_of_dcc():
    made = dcc.dcc(TARGET, a=0.0, b=0.0, dtype=F64)
    eps = np.asarray(simulate(made, n_paths=16, n_steps=3))
    z = np.asarray([address(16, t + 1).normals(3) for t in range(3)], np.float64)
    np.testing.assert_allclose(eps, np.einsum("ij,tjp->tip", np.linalg.cholesky(TARGET), z), atol=2e-6)


def test_conditional_correlation_is_that_of_the_step():
    made = dcc.dcc(TARGET, a=0.1, b=0.8, dtype=F64)
    state = made.init(made.prepare(), jnp.ones(2), address(2))
    for i in range(3):
        for j in range(3):
            np.testing.assert_allclose(made.conditional_correlation(state, i, j), TARGET[i, j], rtol=1e-12)
            np.testing.assert_allclose(made.correlation(made.prepare(), (), i, j), TARGET[i, j], rtol=1e-12)
    assert made.is_conditionally_gaussian


@pytest.mark.slow
def test_dcc_gradients():
    made = dcc.dcc(TARGET, a=0.1, b=0.85, dof=6.0, corrected=True, dtype=F64)

    def mean_product(a, b, cholesky, dof):
        changed = dcc.Dcc(jnp.tril(cholesky), a, b, None, dof, True)
        eps = simulate(changed, n_paths=128, n_steps=6)
        return jnp.mean(eps[-2:, 0] * eps[-2:, 2]) + jnp.mean(eps[-1, 1] ** 2 * eps[-1, 0])

    assert_gradient(mean_product, made.a, made.b, made.target_cholesky, made.dof, rtol=1e-5)


@pytest.mark.parametrize("make", [dcc.example, factor.example])
@pytest.mark.slow
def test_ten_thousand_steps_stay_finite(make):
    made = make(3, jnp.float32)
    total = simulate(made, n_paths=64, n_steps=10_000, read=_sum_of_squares)
    assert np.all(np.isfinite(total))
    assert abs(np.mean(total) - 3.0) < 0.2


def _sum_of_squares(before, after, shocks):
    return sum(row * row for row in shocks.eps)


def test_dcc_at_the_edge_stays_finite_in_single_precision():
    close = np.full((6, 6), 0.999) + 0.001 * np.eye(6)
    made = dcc.dcc(close, a=0.09, b=0.9099, dof=2.3)
    assert np.all(np.isfinite(simulate(made, n_paths=64, n_steps=2000, read=_sum_of_squares)))


def test_dcc_cumulants():
    made = dcc.dcc(TARGET, a=0.05, b=0.9, dof=[3.0, 6.0], dtype=F64)
    masks = (jnp.array([0.0, 1.0]),)
    value = cumulants(made, masks, (jnp.array([0.1, 0.1]),) * 3)
    np.testing.assert_allclose(value[1], [cumulant(0.1, 3.0), cumulant(0.1, 6.0)], rtol=4e-4)
    gaussian = dcc.dcc(TARGET, a=0.05, b=0.9, dtype=F64)
    np.testing.assert_allclose(cumulants(gaussian, (), (jnp.array([0.2]),) * 3)[0], 0.02, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"a": 0.1, "b": 0.9}, "a \\+ b below 1"),
        ({"a": -0.1, "b": 0.9}, "at least 0"),
        ({"a": float("nan"), "b": 0.9}, "at least 0"),
        ({"a": 0.1, "b": 0.8, "dof": 2.0}, "exceed 2"),
        ({"a": 0.1, "b": 0.8, "dof": np.ones((2, 2))}, "shape"),
        ({"a": 0.1, "b": 0.8, "initial": -np.eye(3)}, "positive definite"),
        ({"a": 0.1, "b": 0.8, "initial": np.eye(2)}, "3 assets need"),
        ({"a": 0.1, "b": 0.8, "target": [[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]]}, "nearest_correlation"),
        ({"a": 0.1, "b": 0.8, "target": np.eye(33)}, "factor"),
    ],
)
def test_bad_dcc_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        dcc.dcc(**{"target": TARGET, **options})


@pytest.mark.parametrize("module", [dcc, factor])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_examples_run_in_their_precision_and_within_their_slots(module, dtype):
    made = module.example(5, dtype)
    eps = simulate(made, n_paths=8, n_steps=2)
    assert eps.dtype == dtype and eps.shape == (2, 5, 8) and np.all(np.isfinite(eps))
    assert made.n_slots == 1 + (made.n_assets + 1) // 2 + (1 if module is factor else 0)


def test_components_work_inside_a_stored_unit():
    """The line runs a component's step as one of its stored units."""
    made = dcc.example(3)
    prepared = made.prepare()
    state = made.init(prepared, jnp.ones(8, jnp.float32), address(8))
    _, plain = jax.jit(made.step)(prepared, jnp.asarray(0), state, (), address(8, 1))
    _, stored = jax.jit(materialised(made.step))(prepared, jnp.asarray(0), state, (), address(8, 1))
    np.testing.assert_allclose(plain.eps, stored.eps, rtol=1e-5, atol=1e-6)


# --- tail measures --------------------------------------------------------------------------------------------------


def student_sample(n, rho, dof, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 2))
    z[:, 1] = rho * z[:, 0] + np.sqrt(1.0 - rho**2) * z[:, 1]
    return z / np.sqrt(rng.chisquare(dof, n) / dof)[:, None]


def test_tail_dependence_counts_common_extremes():
    x = np.arange(1.0, 101.0)
    # The five worst of x are at its start; y shares three of them. The best five are the same.
    y = x.copy()
    y[3:5], y[50:52] = [51.0, 52.0], [4.0, 5.0]
    found = tail.tail_dependence(np.stack([x, y, -x], axis=1), level=0.05)
    assert found.lower.value[0, 1] == 0.6 and found.upper.value[1, 0] == 1.0
    assert found.lower.value[0, 2] == 0.0 and found.upper.value[2, 0] == 0.0
    np.testing.assert_array_equal(np.diag(found.lower.value), 1.0)


def test_tail_dependence_takes_each_pair_on_its_own_dates():
    x = student_sample(800, 0.7, 4.0)
    third = np.where(np.arange(800) < 500, np.nan, x[:, 0] + x[:, 1])
    short = np.where(np.arange(800) < 750, np.nan, x[:, 0])
    found = tail.tail_dependence(np.column_stack([x, third, short]))
    alone = tail.tail_dependence(np.column_stack([x, third])[500:])
    assert found.lower.value[2, 0] == alone.lower.value[2, 0] and found.n_dates[2, 0] == 300
    assert found.lower.value[0, 1] == tail.tail_dependence(x).lower.value[0, 1]
    assert np.isnan(found.lower.value[3, 0]) and np.isnan(found.upper.std_error[3, 1])


def test_errors_of_tail_dependence_are_those_of_repeated_samples():
    """Spread over 200 samples is known to 5 %; held to 25 %."""
    found = [tail.tail_dependence(student_sample(1500, 0.7, 4.0, seed)) for seed in range(200)]
    values = np.array([f.lower.value[0, 1] for f in found])
    errors = np.array([f.lower.std_error[0, 1] for f in found])
    assert abs(errors.mean() / values.std() - 1.0) < 0.25
    expected = tail.t_copula_tail_dependence(0.7, 4.0, level=0.05)
    assert abs(values.mean() - expected) < 4.0 * values.std() / np.sqrt(200) + 0.003  # bias of ranks, order 1/n
    boot = tail.tail_dependence(student_sample(1500, 0.7, 4.0), method="bootstrap", n_resamples=200)
    assert abs(boot.lower.std_error[0, 1] / values.std() - 1.0) < 0.4


def test_tail_dependence_of_the_t_copula(cases):
    case = cases("models")["A05"]["expected"]["lambda_"]
    for name, expected in case.items():
        dof, rho = (float(part.split("=")[1]) for part in name.split(","))
        assert abs(tail.t_copula_tail_dependence(rho, dof) - expected) < 1e-10
        if dof < 10:
            far = tail.t_copula_tail_dependence(rho, dof, level=1e-9)
            assert abs(far - expected) < 1e-3


def test_tail_dependence_at_a_level():
    # Gaussian orthant at the median is known; the t copula's is the same.
    for dof in (np.inf, 4.0):
        value = tail.t_copula_tail_dependence(0.5, dof, level=0.499999)
        assert abs(value - 2.0 * (0.25 + np.arcsin(0.5) / (2.0 * np.pi))) < 1e-4
    expected = stats.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]]).cdf([special.ndtri(0.05)] * 2) / 0.05
    assert abs(tail.t_copula_tail_dependence(0.6, np.inf, level=0.05) - expected) < 1e-6
    np.testing.assert_array_equal(tail.t_copula_tail_dependence([[1.0, -1.0]], 4.0), [[1.0, 0.0]])


def test_crash_correlation_of_a_gaussian_law():
    """Given X at or below a quantile: rho sqrt(v / (rho^2 v + 1 - rho^2)), v the variance of X there."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200_000, 2))
    rho, edge = 0.8, special.ndtri(0.05)
    z[:, 1] = rho * z[:, 0] + 0.6 * z[:, 1]
    v = stats.truncnorm(-np.inf, edge).var()
    expected = rho * np.sqrt(v / (rho**2 * v + 1.0 - rho**2))
    (found,) = tail.crash_correlation(z, 0)
    value, error = found.correlation.value[0, 1], found.correlation.std_error[0, 1]
    assert abs(value - expected) < 4.0 * error and error < 0.01
    assert found.n_dates[0, 1] == 10_000 and found.correlation.value[0, 0] == pytest.approx(1.0)
    calm, wild = tail.crash_correlation(z, 1, labels=np.where(np.arange(len(z)) % 4 == 0, "wild", "calm"))
    assert (calm.label, wild.label) == ("calm", "wild") and wild.n_dates[0, 0] == 2500


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tail.tail_dependence(np.ones(4)), "table"),
        (lambda: tail.tail_dependence(np.full((4, 2), np.inf)), "infinite"),
        (lambda: tail.tail_dependence(np.ones((9, 2)), level=0.5), "level"),
        (lambda: tail.tail_dependence(np.ones((9, 2)), method="guess"), "method"),
        (lambda: tail.tail_dependence(np.ones((9, 2)), block_length=0), "block_length"),
        (lambda: tail.crash_correlation(np.ones((9, 2)), 2), "columns 0 to 1"),
        (lambda: tail.crash_correlation(np.ones((9, 2)), 0, labels=[1, 2]), "one label each"),
        (lambda: tail.t_copula_tail_dependence(1.5, 4.0), "outside"),
        (lambda: tail.t_copula_tail_dependence(0.5, 0.0), "positive"),
        (lambda: tail.t_copula_tail_dependence(0.5, 4.0, level=0.7), "level"),
    ],
)
def test_bad_tail_questions_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_coins_fall_together_more_than_they_rise(shared):
    """Daily closes 2017-2025: lower tail dependence at 5 % is larger in all 231 pairs, 0.59 v 0.31 in five coins."""
    import pandas as pd

    prices = pd.read_csv(shared / "data" / "prices_daily_close.csv.gz", index_col=0)
    prices = prices.drop(columns=["LUNA", "PAXG", "WBTC", "WBETH", "POL", "MATIC"])
    returns = np.log(prices).diff().iloc[1:]
    found = tail.tail_dependence(returns.to_numpy())
    pairs = np.tril_indices(returns.shape[1], -1)
    lower, upper = found.lower.value[pairs], found.upper.value[pairs]
    assert np.all(lower > upper)
    assert abs(lower.mean() - 0.565) < 0.005 and abs(upper.mean() - 0.281) < 0.005
    few = tail.tail_dependence(returns[["BTC", "ETH", "BNB", "XRP", "LINK"]].to_numpy())
    pairs = np.tril_indices(5, -1)
    assert abs(few.lower.value[pairs].mean() - 0.593) < 0.005
    assert abs(few.upper.value[pairs].mean() - 0.311) < 0.005
