"""Controls of the noise of simulated markets that act on paths already made."""

import jax.numpy as jnp
from jaxtyping import Float

from qpo_sim.types import Array


def matched_means(
    log_price: Float[Array, "steps assets paths"], growth_per_step: Float[Array, " assets"]
) -> Float[Array, "steps assets paths"]:
    r"""Log-prices moved so that the sample mean of every price is exactly $e^{g t}$ (moment matching).

    Each date and asset is moved by one constant, $g t - \log\overline{e^{x_t}}$: what is linear in the prices has no
    sampling error left, what is nearly so has little; tail measures gain next to nothing. The paths are no longer
    independent: standard errors come from independent repetitions. Needs all paths of the sample at once. Glasserman
    (2003) sec. 4.5.

    Args:
      log_price: cumulative log-returns of all paths of the sample.
      growth_per_step: g, log growth of each asset's expected price.

    Pathwise gradient: yes.
    """
    steps = jnp.arange(1, log_price.shape[0] + 1, dtype=log_price.dtype)
    target = steps[:, None] * growth_per_step[None, :]
    highest = jnp.max(log_price, axis=-1, keepdims=True)
    mean = highest[..., 0] + jnp.log(jnp.mean(jnp.exp(log_price - highest), axis=-1))
    return log_price + (target - mean)[..., None]
