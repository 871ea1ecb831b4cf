"""Primitives that stay finite, keep their gradients, and keep XLA's loops cheap. Nothing here knows finance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from qpo_sim.types import Array, Context

# Up to this many assets a matrix-vector product per path is unrolled into rows of fused multiply-adds, which XLA:CPU
# vectorises over paths; beyond it one matrix product is both faster and much cheaper to compile.
MAX_UNROLLED_ASSETS = 32

# One row per asset: a tuple of (paths,) arrays while assets are few, one (assets, paths) array when they are many.
Rows = Any

_TINY = 1e-30


class Pair(NamedTuple):
    """Two real arrays of one shape that come out of one computation, such as both normals of a Box-Muller pair."""

    first: Array
    second: Array


class Kernel(Protocol):
    """What a GPU kernel offers the stages that are traced into it (see `inside`)."""

    def lookup(self, table: np.ndarray, index: Array) -> Array:
        """Entry of a one-dimensional table."""
        ...

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory of `shape` rows of paths, with a method `store(index, rows)`."""
        ...


_kernel: ContextVar[Kernel | None] = ContextVar("kernel", default=None)


@contextmanager
def inside(kernel: Kernel) -> Iterator[None]:
    """While it lasts, what is traced goes into a kernel: rows of paths in registers, no stacks of rows, no gathers.

    The functions here and in `random` that name kernels then take another way to the same numbers.
    """
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def is_inside_kernel() -> bool:
    """Whether a kernel is being traced."""
    return _kernel.get() is not None


def lookup(table: np.ndarray, index: Array) -> Array:
    """Entry of a one-dimensional table that is known when the program is made."""
    kernel = _kernel.get()
    return jnp.asarray(table)[index] if kernel is None else kernel.lookup(table, index)


def stamps(context: Context, every_hours: float, t: Array) -> Array:
    """Number of multiples of a time, counted from the start, that lie in (start, end] of step t; the start is none."""
    ends = np.arange(context.n_steps + 1) * context.step_hours / every_hours
    counts = np.diff(np.floor(ends + 1e-9))
    return lookup(counts.astype(context.market.drift.dtype), t)


def buffer(shape: tuple[int, ...], row: Array) -> Any:
    """Zeros of shape (*shape, paths), to be filled with `put`; in a kernel, memory outside it without a value yet."""
    kernel = _kernel.get()
    return jnp.zeros((*shape, *row.shape), row.dtype) if kernel is None else kernel.buffer(shape, row.dtype)


def put(target: Any, index: Array, rows: Any) -> Any:
    """`target`, which `buffer` made, with `rows` (one row or a sequence of rows) at `index` of its leading axis."""
    if is_inside_kernel():
        target.store(index, rows)
        return target
    rows = jnp.stack(list(rows)) if isinstance(rows, list | tuple) else rows
    return lax.dynamic_update_index_in_dim(target, rows, index, 0)


def sqrt(x: Array) -> Array:
    """Square root of x >= 0; in a kernel, which has none, x times the reciprocal root: the last bit may differ."""
    if not is_inside_kernel():
        return jnp.sqrt(x)
    x = jnp.maximum(x, np.float32(_TINY))
    return x * lax.rsqrt(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A `Pair` stored as one complex array; its parts are taken out where they are read."""

    value: Array

    @property
    def first(self) -> Array:
        """Real part."""
        return self.value.real

    @property
    def second(self) -> Array:
        """Imaginary part."""
        return self.value.imag

    def __iter__(self) -> Iterator[Array]:
        """First and second part."""
        return iter((self.first, self.second))


def materialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` (pytrees in, pytree out) as a unit whose results are stored before another unit reads them.

    XLA:CPU fuses elementwise work along chains of consumers and computes a value once per consumer: in a loop body
    whose values have many readers the work multiplies, and `lax.optimization_barrier` is dropped before fusion. A call
    that is not inlined is a border that no fusion crosses, and costs nothing itself. Inside such a unit every output is
    a loop of its own, so a `Pair` leaves it `Packed` into one complex number: what its parts share is computed once.

    Reverse mode stores the inputs of a unit and computes it again: what happens inside would leave it through outputs,
    each a loop of its own, and fill memory that is slower than the arithmetic.

    Elsewhere than on CPU, and in a kernel, the function itself.
    """
    if jax.default_backend() != "cpu" or is_inside_kernel():
        return function

    def pack(x: Any) -> Any:
        return Packed(lax.complex(*x)) if isinstance(x, Pair) else x

    @jax.jit
    @partial(jax.checkpoint, prevent_cse=False)
    def unit(*arguments):
        # "false" belongs to the call of the unit alone. Calls inside it, also those of its derivative, are traced while
        # that is set, so they say the contrary of it.
        with set_xla_metadata(inlineable="true"):
            return jax.tree.map(pack, function(*arguments), is_leaf=lambda x: isinstance(x, Pair))

    def call(*arguments):
        with set_xla_metadata(inlineable="false"):
            return unit(*arguments)

    return call


def safe_log(x: Array) -> Array:
    """Natural logarithm that treats x <= 1e-30 as 1e-30, with gradient zero there."""
    positive = x > _TINY
    return jnp.log(jnp.where(positive, x, _TINY))


def safe_sqrt(x: Array) -> Array:
    """Square root that is 0 with gradient 0 for x <= 0."""
    positive = x > 0.0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def polynomial(coefficients: Sequence[Array], x: Array) -> Array:
    """Value of sum_k coefficients[k] x^k by Horner's rule."""
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def select(masks: Sequence[Array], table: Any) -> Array:
    """Entry of `table` for the state whose one-hot mask is set; state 0 is the one without a mask.

    A sum of masked differences instead of a gather: one multiply-add per further state and no memory indirection, which
    is several times faster on CPU and exact for one-hot masks up to one rounding.
    """
    value = table[0]
    for mask, entry in zip(masks, table[1:], strict=True):
        value = value + mask * (entry - table[0])
    return value


def regime_matvec(factors: Array, masks: Sequence[Array], z: Rows) -> Rows:
    """Rows of F_k z for the state k that the one-hot masks name.

    Args:
      factors: (states, rows, columns) matrices, lower triangular.
      masks: states - 1 rows of shape (paths,), see `select`.
      z: `columns` rows of shape (paths,).

    Returns:
      A tuple of rows when there are few, else one (rows, paths) array; both index alike.
    """
    n_states, n_rows, n_columns = factors.shape
    if n_rows <= MAX_UNROLLED_ASSETS:
        steps = [factors[0]] + [factors[k] - factors[0] for k in range(1, n_states)]
        rows = []
        for i in range(n_rows):
            row = sum(steps[0][i, j] * z[j] for j in range(i + 1))
            for mask, step in zip(masks, steps[1:], strict=True):
                row = row + mask * sum(step[i, j] * z[j] for j in range(i + 1))
            rows.append(row)
        return tuple(rows)
    columns = jnp.stack(list(z)) if not hasattr(z, "ndim") else z
    steps = jnp.concatenate([factors[0]] + [factors[k] - factors[0] for k in range(1, n_states)], axis=1)
    masked = jnp.concatenate([columns] + [mask * columns for mask in masks], axis=0)
    return lax.dot_general(steps, masked, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def rows_like(rows: Rows, values: Sequence[Array]) -> Rows:
    """`values` in the container of `rows`: a tuple of rows, or one (rows, paths) array."""
    return jnp.stack(list(values)) if hasattr(rows, "ndim") else tuple(values)


def bridge_crossing(x0: Array, x1: Array, variance: Array) -> Array:
    r"""Probability that a Brownian bridge from x0 to x1 touches 0, $\exp(-2 x_0 x_1/\sigma^2)$; 1 when an end is <= 0.

    It does not depend on the drift. Glasserman (2003) eq. (6.55).

    Args:
      x0: distance to the barrier at the start of the step.
      x1: distance at its end.
      variance: variance of the step (sigma^2 dt).

    Pathwise gradient: x0, x1, variance where both ends are above 0; zero elsewhere.
    """
    above = (x0 > 0.0) & (x1 > 0.0)
    product = jnp.where(above, x0 * x1, 0.0)
    return jnp.where(above, jnp.exp(-2.0 * product / jnp.maximum(variance, _TINY)), jnp.ones_like(x1))


def weighted_quantile(value: Array, weight: Array, upper_weight: Array, *, n_halvings: int = 40) -> Array:
    """Smallest x with weight(value > x) <= upper_weight, by bisection on the range of the values.

    Sums only: on CPU it is an order of magnitude cheaper than a sort and it partitions over devices. Exact to the range
    times 2^-40 (or one rounding). No gradient.
    """
    value, weight = lax.stop_gradient(value), lax.stop_gradient(weight)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        is_enough = jnp.sum(jnp.where(value > middle, weight, 0.0)) <= upper_weight
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    bounds = jnp.min(value) - 1e-6 * (1.0 + jnp.abs(jnp.min(value))), jnp.max(value)
    return lax.fori_loop(0, n_halvings, halve, bounds)[1]


def rounded(value: Any, dtype: Any) -> Array:
    """A parameter in the precision of the paths; rounded by NumPy, as JAX would compile a program for each shape."""
    return jax.device_put(np.asarray(value, np.float64).astype(dtype))


def each_asset(function: Callable[..., Any], *columns: Any) -> Any:
    """`function` of one asset's values, for every asset.

    Args:
      function: takes one value per column (a row of paths, or a parameter's number) and gives a row, or a tuple of
        rows.
      columns: containers of rows (see `Rows`), or (assets,) vectors of parameters.

    Returns:
      The rows in the container of the columns; when `function` gives a tuple, a tuple of such containers.
    """
    rows = next(c for c in columns if isinstance(c, tuple | list) or c.ndim == 2)
    if hasattr(rows, "ndim"):
        return function(*(c[:, None] if c.ndim == 1 else c for c in columns))
    values = [function(*(c[i] for c in columns)) for i in range(len(rows))]
    if isinstance(values[0], tuple):
        return tuple(tuple(row[k] for row in values) for k in range(len(values[0])))
    return tuple(values)


def regime_rows(masks: Sequence[Array], table: Array, like: Rows) -> Rows:
    """Rows of a (states, assets) table for the state that the one-hot masks name, in the container of `like`."""
    if hasattr(like, "ndim"):
        value = table[0][:, None] * jnp.ones_like(like[:1])
        return value + sum(mask * (entry - table[0])[:, None] for mask, entry in zip(masks, table[1:], strict=True))
    one = jnp.ones_like(like[0])
    return tuple(select(masks, table[:, i]) * one for i in range(len(like)))
