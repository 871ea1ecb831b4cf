"""Starting points of the fit: splits of the rows by rolling volatility."""

import numpy as np
from jaxtyping import Float, Int

from qpo_sim.calibration.regime_student_t import Params

_LONGEST_WINDOW = 60
_SHARE_OF_ALL = 0.1  # every row belongs this much to all regimes, so that none starts empty or singular


def starting_params(
    values: Float[np.ndarray, "steps assets"], *, n_regimes: int, n_restarts: int, seed: int, dof: float
) -> Params:
    """Moments of the rows in each split, one restart per leading index.

    Args:
      values: returns in units in which every asset has mean 0 and variance 1; NaN where missing.
      n_regimes: number of regimes.
      n_restarts: number of starting points.
      seed: of the random ones.
      dof: of all regimes at the start; infinity for Gaussian regimes.
    """
    labels = starting_labels(values, n_regimes=n_regimes, n_restarts=n_restarts, seed=seed)
    one_hot = np.eye(n_regimes)[labels]
    counts = np.einsum("rti,rtj->rij", one_hot[:, :-1], one_hot[:, 1:]) + 1.0
    weight = (1.0 - _SHARE_OF_ALL) * one_hot + _SHARE_OF_ALL / n_regimes
    weight = weight / weight.sum(axis=1, keepdims=True)

    # A missing value enters as the pooled law does: with mean 0 and variance 1.
    filled, is_missing = np.nan_to_num(values), np.isnan(values).astype(np.float64)
    mean = np.einsum("rtk,ta->rka", weight, filled)
    square = np.einsum("rtk,ta,tb->rkab", weight, filled, filled, optimize=True)
    square += np.einsum("rtk,ta->rka", weight, is_missing)[..., None] * np.eye(values.shape[1])
    covariance = square - mean[..., :, None] * mean[..., None, :]
    return Params(
        start=np.full((n_restarts, n_regimes), 1.0 / n_regimes),
        transition=counts / counts.sum(axis=2, keepdims=True),
        mean=mean,
        scale=covariance * (1.0 if np.isinf(dof) else (dof - 2.0) / dof) + 1e-6 * np.eye(values.shape[1]),
        dof=np.full((n_restarts, n_regimes), dof),
    )


def starting_labels(
    values: Float[np.ndarray, "steps assets"], *, n_regimes: int, n_restarts: int, seed: int
) -> Int[np.ndarray, "restarts steps"]:
    """Split the rows by rolling volatility into classes from 0 (calm) to n_regimes - 1.

    The first restart cuts a 21-row score into equal shares; the others draw the window, the shares and the noise on
    the score. All assets count alike and the noise is per row, so the split does not depend on their order.

    Args:
      values: returns in units in which every asset has mean 0 and variance 1; NaN where missing.
      n_regimes: number of classes.
      n_restarts: number of splits.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    n_steps = len(values)
    counts = (~np.isnan(values)).sum(axis=1)
    size = np.where(counts > 0, np.nansum(values**2, axis=1) / np.maximum(counts, 1), 1.0)
    labels = np.empty((n_restarts, n_steps), dtype=np.int64)
    for restart in range(n_restarts):
        window, share, noise = 21, np.full(n_regimes, 1.0 / n_regimes), 0.0
        if restart:
            window = int(np.exp(rng.uniform(0.0, np.log(_LONGEST_WINDOW))))
            share, noise = rng.dirichlet(np.full(n_regimes, 5.0)), rng.uniform(0.0, 0.5)
        kernel = np.ones(min(window, n_steps))
        rolled = np.convolve(size, kernel, "same") / np.convolve(np.ones(n_steps), kernel, "same")
        score = np.log(rolled + 1e-12)
        score = score + noise * np.std(score) * rng.standard_normal(n_steps)
        rank = np.argsort(np.argsort(score, kind="stable"), kind="stable")
        labels[restart] = np.searchsorted(np.cumsum(share)[:-1] * n_steps, rank, side="right")
    return labels
