"""Correlation matrices: a parametrisation without constraints, the nearest valid one, and the checks at the border."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.types import Array

# Smallest eigenvalue that counts as positive definite: below it a Cholesky factor in float32 is noise.
EIGENVALUE_FLOOR = 1e-10


def cholesky_from_unconstrained(values: Float[Array, "... angles"]) -> Float[Array, "... assets assets"]:
    r"""Lower Cholesky factor of a correlation matrix from any real numbers.

    With $z_{ij}=\tanh x_{ij}$ the partial correlation of assets i and j given the assets before j,
    $L_{ij}=z_{ij}\prod_{k<j}\sqrt{1-z_{ik}^2}$ and $L_{ii}=\prod_{k<i}\sqrt{1-z_{ik}^2}$; equally the hyperspherical
    coordinates $z=\cos\theta$. Every row has length one and a positive last entry: the map is a smooth bijection onto
    the factors of positive definite correlation matrices. Lewandowski, Kurowicka & Joe (2009); Pinheiro & Bates (1996).

    Args:
      values: n(n-1)/2 numbers per matrix, rows of the lower triangle one after the other; zeros give the identity.

    Pathwise gradient: values.
    """
    n = assets_of(values.shape[-1])
    rows, columns = np.tril_indices(n, -1)
    x = jnp.zeros((*values.shape[:-1], n, n), values.dtype).at[..., rows, columns].set(values)
    # log sqrt(1 - tanh^2 x) = -log cosh x, which neither overflows nor loses digits where tanh x rounds to one.
    log_cosh = jnp.abs(x) + jnp.log1p(jnp.exp(-2.0 * jnp.abs(x))) - np.log(2.0)
    before = jnp.cumsum(log_cosh, axis=-1) - log_cosh
    return (jnp.tanh(x) + jnp.eye(n, dtype=values.dtype)) * jnp.exp(-before)


def unconstrained_from_cholesky(cholesky: Float[Array, "... assets assets"]) -> Float[Array, "... angles"]:
    r"""Inverse of `cholesky_from_unconstrained`: $x_{ij}=\sinh^{-1}(L_{ij}/\sqrt{\sum_{k>j}L_{ik}^2})$.

    Pathwise gradient: cholesky.
    """
    n = cholesky.shape[-1]
    rows, columns = np.tril_indices(n, -1)
    square = cholesky * cholesky
    after = jnp.flip(jnp.cumsum(jnp.flip(square, -1), axis=-1), -1) - square
    return jnp.arcsinh(cholesky[..., rows, columns] / jnp.sqrt(after[..., rows, columns]))


def assets_of(n_values: int) -> int:
    """Number of assets whose correlation matrix has this many free entries.

    Raises:
      InputError: not a triangular number.
    """
    n = (1 + round((1 + 8 * n_values) ** 0.5)) // 2
    if n * (n - 1) // 2 != n_values:
        raise InputError(
            f"{n_values} numbers do not fill a correlation matrix; n assets need n(n-1)/2 of them, such as "
            f"{n * (n - 1) // 2} for {n} assets."
        )
    return n


def correlation_of(cholesky: Float[Array, "... assets assets"]) -> Float[Array, "... assets assets"]:
    """Correlation matrix of a Cholesky factor. Pathwise gradient: cholesky."""
    return jnp.einsum("...ij,...kj->...ik", cholesky, cholesky, precision=lax.Precision.HIGHEST)


def check_square(name: str, value: Any, n_assets: int | None = None) -> np.ndarray:
    """A finite symmetric matrix in float64.

    Args:
      name: of the field, for messages.
      value: anything numpy takes for a matrix.
      n_assets: number of rows it must have, any when omitted.

    Raises:
      InputError: not square, of the wrong size, not finite, or not symmetric to 1e-6.
    """
    matrix = np.asarray(value, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise InputError(f"{name} has shape {matrix.shape}; it must be a square matrix.")
    if n_assets is not None and matrix.shape[0] != n_assets:
        raise InputError(f"{name} is {matrix.shape[0]} x {matrix.shape[0]}; {n_assets} assets need {n_assets} rows.")
    if not np.all(np.isfinite(matrix)):
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(f"{name} has {matrix[i, j]} at row {i + 1}, column {j + 1}; every entry must be a number.")
    gap = np.abs(matrix - matrix.T)
    if gap.max() > 1e-6:
        i, j = np.unravel_index(int(np.argmax(gap)), gap.shape)
        raise InputError(
            f"{name} is not symmetric: row {i + 1}, column {j + 1} is {matrix[i, j]:.6g} and its mirror "
            f"{matrix[j, i]:.6g}."
        )
    return 0.5 * (matrix + matrix.T)


def check_correlation(name: str, value: Any, n_assets: int | None = None) -> np.ndarray:
    """A positive definite correlation matrix in float64, with a diagonal of exactly one.

    Args:
      name: of the field, for messages.
      value: anything numpy takes for a matrix.
      n_assets: number of rows it must have, any when omitted.

    Raises:
      InputError: as `check_square`; a diagonal that is not one, an entry outside [-1, 1], or not positive definite.
    """
    matrix = check_square(name, value, n_assets)
    diagonal = np.diag(matrix)
    if np.abs(diagonal - 1.0).max() > 1e-6:
        i = int(np.argmax(np.abs(diagonal - 1.0)))
        raise InputError(
            f"{name} has {diagonal[i]:.6g} on its diagonal in row {i + 1}; a correlation matrix has 1 there: divide a "
            "covariance by the standard deviations first."
        )
    np.fill_diagonal(matrix, 1.0)
    if np.abs(matrix).max() > 1.0:
        i, j = np.unravel_index(int(np.argmax(np.abs(matrix))), matrix.shape)
        raise InputError(f"{name} has {matrix[i, j]:.6g} at row {i + 1}, column {j + 1}; it must lie in [-1, 1].")
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if smallest < EIGENVALUE_FLOOR:
        raise InputError(
            f"{name} is not positive definite: its smallest eigenvalue is {smallest:.3g} and must exceed "
            f"{EIGENVALUE_FLOOR:g}; repair it with nearest_correlation."
        )
    return matrix


def correlation_cholesky(name: str, value: Any, n_assets: int | None = None) -> np.ndarray:
    """Lower Cholesky factor, in float64, of a matrix that passes `check_correlation`."""
    return np.linalg.cholesky(check_correlation(name, value, n_assets))


def nearest_correlation(
    matrix: Any, *, floor: float = 1e-8, tolerance: float = 1e-9, max_iterations: int = 5000
) -> np.ndarray:
    r"""Correlation matrix with eigenvalues of at least `floor` that is nearest in the Frobenius norm.

    Alternating projections on the matrices with eigenvalues above the floor and on those with unit diagonal, with
    Dykstra's correction: Higham (2002), "Computing the nearest correlation matrix - a problem from finance",
    algorithm 3.3. They converge linearly; what misses the floor at the end is mixed with the identity.

    Args:
      matrix: symmetric, for instance correlations each estimated from the days that two assets share.
      floor: smallest eigenvalue of the result, in (0, 1).
      tolerance: relative change of the iterates at which they stop.
      max_iterations: after which they stop in any case.

    Returns:
      float64 matrix, symmetric, with a diagonal of exactly one.

    Raises:
      InputError: not square, finite and symmetric, or a floor outside (0, 1).
    """
    if not 0.0 < floor < 1.0:
        raise InputError(f"floor is {floor}; the smallest eigenvalue must lie strictly between 0 and 1, e.g. 1e-8.")
    y = check_square("correlation", matrix)
    correction = np.zeros_like(y)
    for _ in range(max_iterations):
        last, shifted = y, y - correction
        values, vectors = np.linalg.eigh(shifted)
        x = (vectors * np.maximum(values, floor)) @ vectors.T
        correction = x - shifted
        y = x.copy()
        np.fill_diagonal(y, 1.0)
        change = max(np.linalg.norm(y - last), np.linalg.norm(y - x))
        if change <= tolerance * np.linalg.norm(y):
            break
    y = 0.5 * (y + y.T)
    missing = floor - float(np.linalg.eigvalsh(y)[0])
    if missing > 0.0:
        share = missing / (1.0 - floor + missing)
        y = (1.0 - share) * y
        np.fill_diagonal(y, 1.0)
    return y
