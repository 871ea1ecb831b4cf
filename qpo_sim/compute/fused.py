"""One GPU kernel for the whole time loop, traced from the same stages as the scan.

XLA makes several kernels per simulation step, and the state of all paths passes through device memory between them.
Here a group of 128 threads takes a block of paths through all steps: its state stays in registers, its random bits are
made from path numbers on the way, and only what is recorded is written.

Parameters of market and book are literals of the kernel: a multiply-add takes its constant from the instruction, where
hundreds of loaded scalars would not fit the registers beside the state. The price is that another market or book is
another program. Stream keys and the first path number are read at run time: seeds and batches share a program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpo_sim import numerics
from qpo_sim.book.ledger import Book
from qpo_sim.errors import InputError
from qpo_sim.market.model import Market, Prepared
from qpo_sim.random import Stream, StreamKey
from qpo_sim.simulate import Outcome, Plan, context_of, finish, line_step, outcome_of, stage_line
from qpo_sim.types import Array

# Threads of a program (a warpgroup), and paths of a program: each thread carries BLOCK / THREADS of them.
THREADS = 128
BLOCK = 256


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Window:
    # What one program sees of an output (*shape, n_paths): the columns of its own paths. Without a reference (see
    # `_Kernel`) nothing is stored. To a loop it is no part of the state.
    number: int
    ref: Any
    columns: Any

    def store(self, index: Array, rows: Any) -> None:
        if self.ref is None:
            return
        if isinstance(rows, list | tuple):
            for k, row in enumerate(rows):
                self.ref[index, k, self.columns] = row
        else:
            self.ref[index, self.columns] = rows

    def store_row(self, row: Array) -> None:
        if self.ref is not None:
            self.ref[self.columns] = row


class _Kernel:
    # A program while it is traced (see `numerics.Kernel`): gives out its arguments (tables) and outputs in the order in
    # which they are asked for. Without references it only notes which ones those are.
    def __init__(self, tables: Any = None, outputs: Any = None, columns: Any = None):
        self._table_refs, self._output_refs, self._columns = tables, outputs, columns
        self.tables: list[np.ndarray] = []
        self.shapes: list[tuple[int, ...]] = []

    def lookup(self, table: np.ndarray, index: Array) -> Array:
        # Most tables are constants or counters, which need no memory.
        if np.all(table == table[0]):
            return table[0]
        if np.issubdtype(table.dtype, np.integer) and np.array_equal(table, np.arange(table.size) + table[0]):
            return index + table[0]
        number = next((k for k, known in enumerate(self.tables) if np.array_equal(known, table)), len(self.tables))
        if number == len(self.tables):
            self.tables.append(table)
        return jnp.asarray(table)[index] if self._table_refs is None else self._table_refs[number][index]

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> _Window:
        number = len(self.shapes)
        self.shapes.append(shape)
        return _Window(number, None if self._output_refs is None else self._output_refs.get(number), self._columns)


def refusal(market: Market, plan: Plan, book: Book) -> str | None:
    """Why there is no kernel for this model, as far as it can be said without lowering it; None when nothing is."""
    if market.drift.dtype != jnp.float32:
        return f"the model is in {market.drift.dtype} and the kernel in float32"
    if market.is_composed or market.regime_of is not None:
        return "it knows regimes with constant volatility and Student-t or Gaussian shocks, this market has more"
    if book.is_path_dependent:
        return "positions of this book change along a path"
    if market.n_assets > numerics.MAX_UNROLLED_ASSETS:
        return f"{market.n_assets} assets need matrix products, the kernel takes {numerics.MAX_UNROLLED_ASSETS} assets"
    if not plan.drawn or plan.record_paths:
        return "the kernel keeps neither whole paths nor the survival branch alone"
    return None


def fused_paths(
    market: Market,
    prepared: Prepared,
    book: Book,
    plan: Plan,
    n_paths: int,
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> Callable[[Array, Any], Outcome]:
    """Function (first path number, stream keys) -> outcome of `n_paths` consecutive paths; traceable.

    It gives what `simulate.simulate_prepared` gives of the same paths, to float32 rounding, without `account_equity`
    and `conditional`, which a streaming run does not keep.

    Args:
      market: static shape of the market.
      prepared: its constants, concrete.
      book: see `book`, concrete.
      plan: steps and what is kept.
      n_paths: how many paths a call simulates.
      block: paths per program, a multiple of 128.
      interpret: run the kernel's program on the CPU, slowly, instead of compiling it for a GPU.

    Raises:
      InputError: a model or block the kernel does not take.
    """
    # Here, so that a run by scan neither waits for Pallas nor needs it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    reason = refusal(market, plan, book)
    if reason is not None:
        raise InputError(f"there is no fused kernel: {reason}.")
    if block < THREADS or block % THREADS:
        raise InputError(f"block is {block}; it must be a multiple of {THREADS}.")
    # Concrete numpy scalars become literals wherever a stage picks them out of their arrays.
    prepared, book = jax.tree.map(np.asarray, (prepared, book))
    line = stage_line(market, book, plan)
    n_programs = -(-n_paths // block)
    in_registers = (
        (lambda x: x)
        if interpret
        # What a thread holds: a constant too takes a register as soon as a loop carries it.
        else lambda x: plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED((block,), vec_size=1))
    )

    def program(kernel: _Kernel, keys: Any, path: Array) -> Any:
        with numerics.inside(kernel):
            context = context_of(market, prepared, book, keys, path, plan)
            step = line_step(line, context)
            held = partial(jax.tree.map, in_registers)
            states = lax.fori_loop(
                np.int32(0),
                np.int32(plan.n_steps),
                lambda t, states: held(step(states, t)[0]),
                held([stage.init(context) for stage in line]),
            )
            closing, seen = finish(line, states, context, plan)
            assert seen is not None
            # What is not kept is not written.
            result = closing._replace(conditional=None, account_equity=None), seen._replace(peak=None)
            rows, tree = jax.tree.flatten(result, is_leaf=lambda x: isinstance(x, _Window))
            numbers = []
            for row in rows:
                window = row
                if not isinstance(row, _Window):
                    window = kernel.buffer((), row.dtype)
                    window.store_row(in_registers(row))
                numbers.append(window.number)
        return tree, numbers

    # A first trace on the side tells the kernel's arguments and outputs.
    needs, found = _Kernel(), []
    word = jax.ShapeDtypeStruct((), jnp.uint32)
    jax.eval_shape(
        lambda keys, path: found.extend(program(needs, keys, path)),
        {stream: StreamKey(word, word) for stream in Stream},
        jax.ShapeDtypeStruct((block,), jnp.uint32),
    )
    tree, numbers = found

    # An output without rows (of a book without accounts) is none of the kernel's.
    written = [number for number, shape in enumerate(needs.shapes) if 0 not in shape]

    def body(number: Any, scalars: Any, *refs: Any) -> None:
        tables, outputs = refs[: len(needs.tables)], dict(zip(written, refs[len(needs.tables) :], strict=True))
        keys = {stream: StreamKey(scalars[1 + 2 * k], scalars[2 + 2 * k]) for k, stream in enumerate(Stream)}
        start = number * np.int32(block)
        path = in_registers(lax.broadcasted_iota(jnp.uint32, (block,), 0)) + (scalars[0] + start.astype(jnp.uint32))
        program(_Kernel(tables, outputs, pl.ds(start, block)), keys, path)

    shapes = [jax.ShapeDtypeStruct((*shape, n_programs * block), jnp.float32) for shape in needs.shapes]
    out = [shapes[number] for number in written]
    if interpret:
        call = pl.pallas_call(
            lambda *refs: body(pl.program_id(0), *refs), grid=(n_programs,), out_shape=out, interpret=True
        )
    else:
        call = plgpu.kernel(
            lambda *refs: body(lax.axis_index("program"), *refs),
            out_type=out,
            grid=(n_programs,),
            grid_names=("program",),
            # A thread reads tables that nobody writes, and what it writes nobody reads.
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        )

    def paths(first: Array, keys: Any) -> Outcome:
        words = [word for stream in Stream for word in keys[stream]]
        scalars = jnp.stack([jnp.asarray(word, jnp.uint32) for word in (first, *words)])
        outputs = dict(zip(written, call(scalars, *needs.tables), strict=True))
        for number, shape in enumerate(shapes):
            outputs.setdefault(number, jnp.zeros(shape.shape, shape.dtype))
        closing, seen = tree.unflatten([outputs[number][..., :n_paths] for number in numbers])
        return outcome_of(closing, seen)

    return paths
