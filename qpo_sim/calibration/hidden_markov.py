"""Hidden Markov recursions in log space: likelihood, filter, smoother and expected transition counts.

Nothing here knows what is observed: a model hands in log-densities per step and regime.
"""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from qpo_sim.types import Array

# A probability below this is treated as this: its logarithm stays finite and nothing else in double precision changes.
_SMALLEST_PROBABILITY = 1e-300


class Posterior(NamedTuple):
    r"""What the whole record says about the regimes at fixed parameters.

    Attributes:
      log_likelihood: $\log p(x_{1:T})$.
      filtered: $P(s_t = k \mid x_{1:t})$.
      smoothed: $P(s_t = k \mid x_{1:T})$.
      transition_counts: expected number of steps from regime i (row) to j, $\sum_t P(s_t=i, s_{t+1}=j \mid x_{1:T})$.
    """

    log_likelihood: Float[Array, ""]
    filtered: Float[Array, "steps regimes"]
    smoothed: Float[Array, "steps regimes"]
    transition_counts: Float[Array, "regimes regimes"]


def log_probability(probability: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Logarithm of a probability, finite at 0."""
    return jnp.log(jnp.maximum(probability, _SMALLEST_PROBABILITY))


def posterior(
    start: Float[Array, " regimes"],
    transition: Float[Array, "regimes regimes"],
    log_density: Float[Array, "steps regimes"],
) -> Posterior:
    r"""Filter and smoother of a hidden Markov chain; Hamilton (1989), Kim (1994), Rabiner (1989).

    The filter is $a_t(j) \propto f_t(j) \sum_i a_{t-1}(i) P_{ij}$. The backward weights $h_t(i) = f_t(i) b_t(i)$ obey
    the same recursion on reversed time with $P$ transposed, so both run side by side in one scan of half the steps.

    Args:
      start: law of the regime at the first step (before its observation).
      transition: row i, column j: probability of going from regime i to regime j in one step.
      log_density: log-density of each step's observation under each regime; a step without observation is 0.
    """
    log_transition = log_probability(transition)
    both = jnp.stack([log_transition, log_transition.T])
    density = jnp.stack([log_density, log_density[::-1]], axis=1)

    def absorb(prior, density):
        weight = prior + density
        total = _log_sum([weight[:, k] for k in range(weight.shape[1])])
        return weight - total[:, None], (prior, total)

    def step(state, density):
        prior = _log_sum([state[:, i, None] + both[:, i] for i in range(both.shape[1])])
        return absorb(prior, density)

    first = jnp.stack([log_probability(start), jnp.zeros_like(start)])
    state, (prior, total) = absorb(first, density[0])
    _, (priors, totals) = lax.scan(step, state, density[1:])
    priors, totals = jnp.concatenate([prior[None], priors]), jnp.concatenate([total[None], totals])

    log_filtered = priors[:, 0] + log_density - totals[:, :1]
    log_backward = priors[::-1, 1]
    pair = (log_filtered[:-1, :, None] + log_transition[None]) + (log_density[1:] + log_backward[1:])[:, None, :]
    return Posterior(
        jnp.sum(totals[:, 0]),
        jnp.exp(log_filtered),
        _normalise(log_filtered + log_backward, (1,)),
        jnp.sum(_normalise(pair, (1, 2)), axis=0),
    )


def _log_sum(terms: list[Array]) -> Array:
    # Unrolled over the few regimes: one fused kernel per step instead of a reduction each for max and sum.
    largest = reduce(jnp.maximum, terms)
    return largest + jnp.log(sum(jnp.exp(term - largest) for term in terms))


def _normalise(log_weight: Array, axes: tuple[int, ...]) -> Array:
    weight = jnp.exp(log_weight - jnp.max(log_weight, axis=axes, keepdims=True))
    return weight / jnp.sum(weight, axis=axes, keepdims=True)
