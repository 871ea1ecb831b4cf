"""Covariances from few or incomplete rows, against cases, other packages, explicit loops and what must hold always."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from qpo_sim.calibration.covariance import (
    clip_to_positive_definite,
    ewma_covariance,
    ledoit_wolf,
    marchenko_pastur,
    nonlinear_shrinkage,
    oracle_approximating,
    pairwise_covariance,
)
from qpo_sim.errors import InputError


def constant_correlation(returns):
    return ledoit_wolf(returns, target="constant_correlation")


METHODS = [
    ledoit_wolf,
    constant_correlation,
    oracle_approximating,
    nonlinear_shrinkage,
    marchenko_pastur,
    ewma_covariance,
    pairwise_covariance,
]
WHOLE_ROWS = METHODS[:5]


def sample_of(n_rows, n_assets, seed):
    """Returns of a few per cent with one common factor and unequal variances."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n_rows, 1))
    own = rng.standard_normal((n_rows, n_assets))
    return 0.02 * (0.6 * common + own) * np.linspace(0.5, 2.0, n_assets) + 0.001


def test_ewma_of_two_indices(cases):
    """Case D09, covariance."""
    pd = pytest.importorskip("pandas")
    sources = [pytest.importorskip(f"arch.data.{name}") for name in ("sp500", "nasdaq")]
    case = cases("models")["D09"]
    closes = [source.load()["Adj Close"] for source in sources]
    returns = pd.concat([100.0 * close.pct_change().dropna() for close in closes], axis=1, join="inner").to_numpy()
    assert len(returns) == case["expected"]["n_joint"]
    found = ewma_covariance(returns, decay=0.94, n_seed=25)
    rel = case["tolerance"]["rel"]
    assert_allclose(found.covariance, case["expected"]["cov_matrix"], rtol=rel)
    assert_allclose(found.correlation[0, 1], case["expected"]["corr"], rtol=rel)
    assert_allclose(np.log(0.5) / np.log(0.94), case["expected"]["half_life"], rtol=rel)
    assert_allclose(ewma_covariance(returns[:, 0]).covariance, [[case["expected"]["variance_sp500"]]], rtol=rel)


@pytest.mark.parametrize("shape", [(40, 5), (30, 60)])
@pytest.mark.parametrize("is_centred", [False, True])
def test_identity_target_is_scikit_learns(shape, is_centred):
    covariance = pytest.importorskip("sklearn.covariance")
    returns = sample_of(*shape, seed=1)
    theirs = covariance.LedoitWolf(assume_centered=is_centred).fit(returns)
    ours = ledoit_wolf(returns, is_centred=is_centred)
    assert_allclose(ours.shrinkage, theirs.shrinkage_, rtol=1e-9)
    assert_allclose(ours.covariance, theirs.covariance_, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("shape", [(40, 5), (30, 60)])
def test_oracle_without_its_small_terms_is_scikit_learns(shape):
    covariance = pytest.importorskip("sklearn.covariance")
    returns = sample_of(*shape, seed=2)
    theirs = covariance.OAS().fit(returns)
    ours = oracle_approximating(returns, has_small_terms=False)
    assert_allclose(ours.shrinkage, theirs.shrinkage_, rtol=1e-9)
    assert_allclose(ours.covariance, theirs.covariance_, rtol=1e-9, atol=1e-15)


def test_constant_correlation_intensity_by_plain_sums():
    returns = sample_of(25, 4, seed=3)
    x = returns - returns.mean(axis=0)
    n, p = x.shape
    s = x.T @ x / n
    r = np.mean([s[i, j] / np.sqrt(s[i, i] * s[j, j]) for i in range(p) for j in range(p) if i != j])
    target = np.array([[s[i, i] if i == j else r * np.sqrt(s[i, i] * s[j, j]) for j in range(p)] for i in range(p)])
    pi = rho = 0.0
    for i in range(p):
        for j in range(p):
            product = x[:, i] * x[:, j] - s[i, j]
            pi += np.mean(product**2)
            if i == j:
                rho += np.mean(product**2)
            else:
                theta_i = np.mean((x[:, i] ** 2 - s[i, i]) * product)
                theta_j = np.mean((x[:, j] ** 2 - s[j, j]) * product)
                rho += 0.5 * r * (np.sqrt(s[j, j] / s[i, i]) * theta_i + np.sqrt(s[i, i] / s[j, j]) * theta_j)
    intensity = (pi - rho) / np.sum((target - s) ** 2) / n
    found = constant_correlation(returns)
    assert 0.0 < intensity < 1.0
    assert_allclose(found.shrinkage, intensity, rtol=1e-10)
    assert_allclose(found.target, target, rtol=1e-12)


def test_two_assets_are_their_own_constant_correlation():
    found = constant_correlation(sample_of(30, 2, seed=4))
    assert found.shrinkage == 0.0
    assert_allclose(found.covariance, found.sample, rtol=1e-14)


def test_oracle_of_two_assets_in_closed_form():
    """p = 2, so 1 - 2/p = 0: tr^2 S / (n (tr S^2 - tr^2 S / 2))."""
    rows = np.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -2.0], [-1.0, 2.0], [3.0, 0.0], [-3.0, 0.0]])
    a, b, c = (rows[:, 0] ** 2).mean(), (rows[:, 1] ** 2).mean(), (rows[:, 0] * rows[:, 1]).mean()
    expected = (a + b) ** 2 / (6.0 * (a * a + b * b + 2.0 * c * c - 0.5 * (a + b) ** 2))
    assert_allclose(oracle_approximating(rows).shrinkage, min(1.0, expected), rtol=1e-12)
    rows = np.vstack([rows] * 20)
    assert_allclose(oracle_approximating(rows).shrinkage, expected / 20.0, rtol=1e-12)


def nonlinear_by_loops(x, n):
    """Ledoit & Wolf (2020), definitions 4.1 to 4.3, one eigenvalue at a time; p <= n."""
    values, vectors = np.linalg.eigh(x.T @ x / n)
    p, moved = len(values), []
    for value in values:
        density = hilbert = 0.0
        for other in values:
            h = other * n ** (-1.0 / 3.0)
            at = (value - other) / h
            density += 0.75 / np.sqrt(5.0) * max(1.0 - at**2 / 5.0, 0.0) / h / p
            tail = np.log(abs((np.sqrt(5.0) - at) / (np.sqrt(5.0) + at)))
            hilbert += (-0.3 / np.pi * at + 0.75 / np.sqrt(5.0) / np.pi * (1.0 - at**2 / 5.0) * tail) / h / p
        c = p / n
        real = 1.0 - c - np.pi * c * value * hilbert
        moved.append(value / ((np.pi * c * value * density) ** 2 + real**2))
    return vectors @ np.diag(moved) @ vectors.T


def test_nonlinear_by_loops():
    returns = sample_of(50, 12, seed=5)
    x = returns - returns.mean(axis=0)
    assert_allclose(nonlinear_shrinkage(returns).covariance, nonlinear_by_loops(x, 49), rtol=1e-9, atol=1e-15)
    found = nonlinear_shrinkage(x, is_centred=True)
    assert_allclose(found.covariance, nonlinear_by_loops(x, 50), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("shape", [(120, 60), (60, 120)])
def test_nonlinear_finds_equal_eigenvalues_equal(shape):
    """With the identity as truth the moved eigenvalues lie far nearer to 1 than the sample's."""
    returns = np.random.default_rng(6).standard_normal(shape)
    found = nonlinear_shrinkage(returns)
    assert np.abs(found.eigenvalues - 1.0).mean() < 0.15 * np.abs(found.sample_eigenvalues - 1.0).mean()


@pytest.mark.parametrize("method", [ledoit_wolf, oracle_approximating, nonlinear_shrinkage, marchenko_pastur])
def test_error_is_below_the_samples(method):
    """Mean over 20 records of squared Frobenius error: every method beats the sample on a near-diagonal truth."""
    truth = np.diag(np.linspace(0.8, 1.2, 30))
    errors = []
    for seed in range(20):
        returns = np.random.default_rng(seed).standard_normal((60, 30)) * np.sqrt(np.diag(truth))
        sample = np.cov(returns, rowvar=False, bias=True)
        errors.append([np.sum((c - truth) ** 2) for c in (method(returns).covariance, sample)])
    ours, samples = np.mean(errors, axis=0)
    assert ours < 0.5 * samples


def test_edge_of_pure_noise():
    """No more than a stray eigenvalue of independent columns passes the edge, and a planted factor does."""
    noise = np.random.default_rng(7).standard_normal((400, 100))
    found = marchenko_pastur(noise)
    assert_allclose(found.edge, (1.0 + np.sqrt(100 / 399)) ** 2, rtol=1e-12)
    assert found.n_signal <= 1
    planted = noise + 1.0 * np.random.default_rng(8).standard_normal((400, 1))
    found = marchenko_pastur(planted)
    assert found.n_signal == 1
    # All but the factor is one number: the correlations are nearly equal, and near the true 1/2.
    off = found.correlation[np.tril_indices(100, -1)]
    # The mean of 4950 correlations that share one factor: standard error below (1 - rho^2) / sqrt(n).
    assert abs(off.mean() - 0.5) < 4.5 * 0.75 / np.sqrt(400)
    found = marchenko_pastur(planted, noise_variance=None)
    assert 0.4 < found.noise_variance < 0.6


def test_clipping_keeps_variances_and_trace():
    returns = sample_of(60, 20, seed=9)
    found = marchenko_pastur(returns)
    assert 0 < found.n_signal < 20
    assert_allclose(np.diag(found.covariance), returns.var(axis=0), rtol=1e-12)
    assert_allclose(np.diag(found.correlation), 1.0)


def with_holes(returns, seed, share=0.15):
    holed = returns.copy()
    holed[np.random.default_rng(seed).random(returns.shape) < share] = np.nan
    return holed


def test_pairwise_entries_are_pandas():
    pd = pytest.importorskip("pandas")
    holed = with_holes(sample_of(80, 4, seed=10), seed=11)
    found = pairwise_covariance(holed)
    assert not found.is_repaired
    table = pd.DataFrame(holed)
    assert_allclose(found.correlation, table.corr(), rtol=1e-10)
    assert_allclose(np.diag(found.covariance), table.var(ddof=0), rtol=1e-12)


def test_pairwise_that_does_not_fit_together_is_repaired():
    """Three pairs on three different stretches: correlations near 1, 1 and -1, which no three assets have."""
    rng = np.random.default_rng(12)
    base, noise = rng.standard_normal(60), 0.05 * rng.standard_normal((60, 3))
    returns = np.full((60, 3), np.nan)
    for start, (i, j), sign in ((0, (0, 1), 1.0), (20, (1, 2), 1.0), (40, (0, 2), -1.0)):
        rows = slice(start, start + 20)
        returns[rows, i], returns[rows, j] = base[rows] + noise[rows, i], sign * base[rows] + noise[rows, j]
    found = pairwise_covariance(returns)
    assert found.is_repaired
    assert np.linalg.eigvalsh(found.correlation)[0] >= 0.99e-8
    assert_allclose(np.diag(found.covariance), np.nanvar(returns, axis=0), rtol=1e-12)


def test_ewma_with_holes_by_recursion():
    holed = with_holes(sample_of(90, 3, seed=13), seed=14)
    found = ewma_covariance(holed, decay=0.97, n_seed=5)
    for i in range(3):
        for j in range(3):
            product = holed[:, i] * holed[:, j]
            product = product[~np.isnan(product)]
            value = product[:5].mean()
            for p in product:
                value = 0.97 * value + 0.03 * p
            assert_allclose(found.covariance[i, j], value, rtol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 2), (60, 8), (40, 50)])
def test_positive_definite_and_symmetric(method, shape):
    found = method(sample_of(*shape, seed=15))
    assert_allclose(found.covariance, found.covariance.T, rtol=0.0, atol=0.0)
    np.linalg.cholesky(found.covariance)
    if hasattr(found, "shrinkage"):
        assert 0.0 <= found.shrinkage <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_order_of_assets_and_unit_do_not_matter(method):
    returns = sample_of(60, 6, seed=16)
    order = np.array([3, 0, 5, 1, 4, 2])
    plain = method(returns).covariance
    assert_allclose(method(returns[:, order]).covariance, plain[np.ix_(order, order)], rtol=1e-8, atol=1e-14)
    assert_allclose(method(100.0 * returns).covariance, 1e4 * plain, rtol=1e-8, atol=1e-12)
    assert_allclose(method(-returns).covariance, plain, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("method", [ledoit_wolf, oracle_approximating, nonlinear_shrinkage])
def test_rotation_of_the_assets_rotates_the_estimate(method):
    returns = sample_of(60, 6, seed=17)
    turn = np.linalg.qr(np.random.default_rng(18).standard_normal((6, 6)))[0]
    expected = turn.T @ method(returns).covariance @ turn
    assert_allclose(method(returns @ turn).covariance, expected, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("method", WHOLE_ROWS)
def test_rows_with_holes_are_left_out(method):
    returns = sample_of(60, 4, seed=19)
    holed = returns.copy()
    holed[[3, 17, 41], [0, 2, 3]] = np.nan
    found = method(holed)
    assert (found.n_rows, found.n_dropped) == (57, 3)
    assert_allclose(found.covariance, method(np.delete(returns, [3, 17, 41], axis=0)).covariance, rtol=1e-12)


def test_large_samples_need_no_shrinkage():
    """The truth is apart from every target, equal correlations among them: the weight then falls as 1/n."""
    returns = np.random.default_rng(20).standard_normal((100_000, 4)) * [1.0, 2.0, 3.0, 4.0]
    returns[:, 1] += returns[:, 0]
    assert all(method(returns).shrinkage < 0.01 for method in WHOLE_ROWS[:3])


def test_clip_leaves_a_good_matrix_alone_and_mends_a_bad_one():
    good = np.array([[4.0, 1.0], [1.0, 9.0]])
    assert_allclose(clip_to_positive_definite(good), good, rtol=0.0)
    bad = np.array([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    mended = clip_to_positive_definite(bad, floor=1e-3)
    assert np.linalg.eigvalsh(mended)[0] >= 0.999e-3
    assert_allclose(np.diag(mended), 1.0)
    # By symmetry the two equal correlations stay equal and the third keeps its sign.
    assert_allclose(mended[0, 1], mended[1, 2], rtol=1e-12)
    assert mended[0, 2] < 0.0 < mended[0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_refuses_what_has_no_covariance(method):
    returns = sample_of(60, 3, seed=21)
    constant, block, infinite = returns.copy(), returns.copy(), returns.copy()
    constant[:, 1] = 0.01
    block[:, 2] = np.nan
    infinite[5, 0] = np.inf
    with pytest.raises(InputError, match="asset_1.*0.01 in every row"):
        method(constant)
    with pytest.raises(InputError, match="asset_2"):
        method(block)
    with pytest.raises(InputError, match="row 5.*inf"):
        method(infinite)
    with pytest.raises(InputError, match="at least"):
        method(returns[:2])


def test_collinear_assets():
    returns = sample_of(60, 3, seed=22)
    twice = np.column_stack([returns, 2.0 * returns[:, 0]])
    for method in (ledoit_wolf, oracle_approximating, ewma_covariance, pairwise_covariance):
        np.linalg.cholesky(method(twice).covariance)
    with pytest.raises(InputError, match="combination of others"):
        nonlinear_shrinkage(twice)
    with pytest.raises(InputError, match="asset_0.*asset_1.*correlation 1.0"):
        constant_correlation(returns[:, [0]] * [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ledoit_wolf(x, target="zero"), "target.*'zero'.*identity"),
        (lambda x: ledoit_wolf(x[:, :1]), "1 asset"),
        (lambda x: nonlinear_shrinkage(x[:12]), "12 rows.*13"),
        (lambda x: marchenko_pastur(x, noise_variance=1.5), "noise_variance is 1.5"),
        (lambda x: ewma_covariance(x, decay=1.0), "decay is 1.0"),
        (lambda x: ewma_covariance(x, n_seed=0), "n_seed is 0"),
        (lambda x: ewma_covariance(x[:20]), "share 20 rows; at least 25"),
        (lambda x: pairwise_covariance(x, min_shared=2), "min_shared is 2"),
        (lambda x: pairwise_covariance(x, floor=0.0), "floor is 0.0"),
        (lambda x: clip_to_positive_definite([[1.0, 0.2], [0.1, 1.0]]), "not symmetric"),
        (lambda x: clip_to_positive_definite([[0.0, 0.0], [0.0, 1.0]]), "diagonal in row 1"),
    ],
)
def test_messages(call, words):
    with pytest.raises(InputError, match=words):
        call(sample_of(60, 3, seed=23))
