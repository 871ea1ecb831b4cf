from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import logsumexp

from qpo_sim.calibration.hidden_markov import posterior


def random_chain(seed, n_steps=6, n_regimes=3):
    rng = np.random.default_rng(seed)
    start = rng.dirichlet(np.ones(n_regimes))
    return start, rng.dirichlet(np.ones(n_regimes), n_regimes), rng.normal(size=(n_steps, n_regimes)) * 3.0


def by_enumeration(start, transition, log_density):
    """Every path of regimes, one by one."""
    n_steps, n_regimes = log_density.shape
    paths = np.array(list(product(range(n_regimes), repeat=n_steps)))
    with np.errstate(divide="ignore"):
        weight = np.log(start)[paths[:, 0]] + np.log(transition)[paths[:, :-1], paths[:, 1:]].sum(axis=1)
    weight += log_density[np.arange(n_steps), paths].sum(axis=1)
    total = logsumexp(weight)
    share = np.exp(weight - total)
    smoothed = np.stack([[share[paths[:, t] == k].sum() for k in range(n_regimes)] for t in range(n_steps)])
    counts = np.zeros((n_regimes, n_regimes))
    for t in range(n_steps - 1):
        np.add.at(counts, (paths[:, t], paths[:, t + 1]), share)
    return total, smoothed, counts


@pytest.mark.parametrize("n_regimes", [1, 2, 3])
def test_posterior_equals_enumeration_of_all_paths(n_regimes):
    chain = random_chain(n_regimes, n_regimes=n_regimes)
    found, (total, smoothed, counts) = posterior(*chain), by_enumeration(*chain)
    assert_allclose(found.log_likelihood, total, rtol=1e-13)
    assert_allclose(found.smoothed, smoothed, atol=1e-13)
    assert_allclose(found.transition_counts, counts, atol=1e-12)


def test_filter_is_the_smoother_of_the_record_so_far():
    start, transition, log_density = random_chain(4)
    found = posterior(start, transition, log_density)
    for t in range(1, len(log_density) + 1):
        assert_allclose(found.filtered[t - 1], by_enumeration(start, transition, log_density[:t])[1][-1], atol=1e-13)
    assert_allclose(found.filtered[-1], found.smoothed[-1], atol=1e-14)


def test_one_step_is_bayes_rule():
    start, transition, log_density = random_chain(5, n_steps=1)
    found = posterior(start, transition, log_density)
    weight = start * np.exp(log_density[0])
    assert_allclose(found.smoothed[0], weight / weight.sum(), rtol=1e-13)
    assert_allclose(found.log_likelihood, np.log(weight.sum()), rtol=1e-13)
    assert not found.transition_counts.any()


def test_densities_beyond_the_range_of_a_double_do_not_underflow():
    start, transition, log_density = random_chain(6)
    tilt = np.array([-2000.0, 0.0, 1500.0, -900.0, 400.0, 3000.0])[:, None]
    plain, tilted = posterior(start, transition, log_density), posterior(start, transition, log_density + tilt)
    assert_allclose(tilted.smoothed, plain.smoothed, atol=1e-10)
    assert_allclose(tilted.log_likelihood, plain.log_likelihood + tilt.sum(), rtol=1e-12)


def test_a_move_that_cannot_happen_does_not_even_under_overwhelming_evidence():
    start, transition = np.array([1.0, 0.0]), np.eye(2)
    log_density = np.array([[0.0, 0.0], [-300.0, 300.0], [0.0, 0.0]])
    found = posterior(start, transition, log_density)
    assert_allclose(found.smoothed, [[1.0, 0.0]] * 3, atol=1e-30)
    assert_allclose(found.log_likelihood, -300.0)
