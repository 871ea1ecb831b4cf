r"""Student-t mixing as factor and dynamic-correlation shocks use it: the scale H of `market.shock` with its moments."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qpo_sim.errors import InputError
from qpo_sim.market import mixing_law, shock
from qpo_sim.numerics import Rows
from qpo_sim.types import Array


class Mixing(NamedTuple):
    """Constants of the mixing scale per column (a regime, or a factor).

    `coefficients` and `floor` make H from a score; `second_moment` is E[H^2], below one by what the cut takes away;
    `mgf` is the table of `log_mgf`.
    """

    coefficients: Float[Array, "coefficients columns"]
    floor: Float[Array, ""]
    second_moment: Float[Array, " columns"]
    mgf: Float[Array, "rows columns"]


def prepare_mixing(dof: Float[Array, " columns"] | None, cut: float) -> Mixing | None:
    """Constants for these degrees of freedom; None for Gaussian shocks. Pathwise gradient: dof."""
    if dof is None:
        return None
    return Mixing(
        coefficients=shock.mixing_coefficients(dof),
        floor=np.asarray(shock.score_floor(cut), dof.dtype),
        second_moment=mixing_law.tabulated(mixing_law.MixingTable("student_t", cut), dof)[-1],
        mgf=mixing_law.tabulated(mixing_law.MgfTable("student_t", cut), dof, jnp.zeros_like(dof)),
    )


def column(mixing: Mixing, index: int) -> Mixing:
    """One column alone."""
    return Mixing(
        mixing.coefficients[:, index : index + 1],
        mixing.floor,
        mixing.second_moment[index : index + 1],
        mixing.mgf[:, index : index + 1],
    )


def scale_of(mixing: Mixing, masks: Any, score: Float[Array, " paths"]) -> Float[Array, " paths"]:
    """Scale H of a step from its normal score, for the column that the masks name."""
    return shock.mixing_scale(score, masks, mixing.coefficients, mixing.floor)


def log_mgf(mixing: Mixing, masks: Any, scale: Rows) -> Rows:
    r"""$\log E[e^{s\varepsilon}]$ of the cut Student-t shock of unit variance, for the column that the masks name.

    Accuracy as in `mixing_law.log_mgf_column`. Pathwise gradient: scale, dof.
    """
    return mixing_law.log_mgf_rows(mixing.mgf[:, :, None], masks, scale)


def check_dof(name: str, value: Any, n: int) -> np.ndarray:
    """Degrees of freedom in float64, one number for all or one for each of n.

    Raises:
      InputError: a wrong number of them, or one that is not above 2.
    """
    dof = np.asarray(value, np.float64)
    if dof.ndim > 1 or (dof.ndim == 1 and dof.shape[0] not in (1, n)):
        raise InputError(f"{name} has shape {dof.shape}; give one number, or {n} of them.")
    dof = np.broadcast_to(dof, (n,)).copy()
    if not np.all(dof > 2.0):
        raise InputError(f"{name} is {dof.tolist()}; it must exceed 2 for the variance to exist.")
    # A million is the same to float32 as infinity, and keeps the formulas finite.
    return np.minimum(dof, 1e6)


def check_cut(value: float) -> float:
    """The cut of the mixing variable.

    Raises:
      InputError: outside [0, 0.01].
    """
    if not 0.0 <= value <= 0.01:
        raise InputError(f"mixing_cut is {value}; it is a far quantile in [0, 0.01], e.g. 1e-4.")
    return float(value)
