r"""Vine copulas: the dependence of many assets from pair copulas, each tail of each pair its own.

An R-vine is a sequence of trees. The edges of the first are pairs of assets; an edge of tree t couples two assets given
t - 1 others. A vine cut after a few trees makes all further pairs conditionally independent, and is what data can tell:
one tree with asymmetric pairs already has lower tails that are heavier than the upper. Bedford & Cooke (2002); Aas,
Czado, Frigessi & Bakken (2009); Dissmann, Brechmann, Czado & Kurowicka (2013).

Assets are drawn one after the other, each from the inverse of its conditional distribution given those before it
(inverse Rosenblatt transform, see `pair_copula`). Shocks are standard normal in each margin, or have the margins of a
map given to the builder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qpo_sim.errors import InputError, did_you_mean
from qpo_sim.market.dependence import pair_copula as pairs
from qpo_sim.market.dependence.pair_copula import PairCopula
from qpo_sim.market.dependence.shocks import Shocks
from qpo_sim.numerics import MAX_UNROLLED_ASSETS, Rows, each_asset, materialised, rounded, select
from qpo_sim.random import Address
from qpo_sim.types import Array

_N_POINTS = 4096
_KINDS = {"c-vine": "c", "cvine": "c", "c": "c", "d-vine": "d", "dvine": "d", "d": "d"}


class Edge(NamedTuple):
    """One pair of a vine: two assets (in the order of the copula's arguments), those given, family and rotation."""

    pair: tuple[int, int]
    given: tuple[int, ...]
    family: str
    rotation: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Vine:
    """A vine with its parameters, in one set or one per regime; build it with `vine`.

    Attributes:
      parameter: first parameter of each edge's pair copula (0 for independence).
      dof: degrees of freedom of the Student-t edges, in the order of the edges; None where there are none.
      margin: None for normal margins, or a pytree with a method `apply(rows)` that takes normal scores to standardised
        shocks, and `log_mgf(scale)` where their moment generating function exists.
      edges: by tree (static).
      n_assets: number of assets (static).

    Pathwise gradient: parameter, dof, margin.
    """

    parameter: Float[Array, "regimes edges"]
    dof: Float[Array, "regimes student_edges"] | None
    margin: Any = None
    edges: tuple[Edge, ...] = field(default=(), metadata={"static": True})
    n_assets: int = field(default=2, metadata={"static": True})

    @property
    def n_slots(self) -> int:
        """Slots of draws per step."""
        return (self.n_assets + 1) // 2

    @property
    def is_conditionally_gaussian(self) -> bool:
        """False: no scale makes the shocks jointly Gaussian."""
        return False

    @property
    def needs_base_step(self) -> bool:
        """True: sums of draws from a copula have another one."""
        return True

    def prepare(self, *, sub_steps: int = 1) -> "PreparedVine":
        """Constants per step.

        Raises:
          InputError: more than one sub-step.
        """
        if sub_steps != 1:
            raise InputError(f"sub_steps is {sub_steps}; a vine is the copula of whole base steps: use 1.")
        own = more = None
        if self.dof is not None:
            own, more = pairs.student_table(self.dof), pairs.student_table(self.dof + 1.0)
        prepared = PreparedVine(self.parameter, self.dof, own, more, None)
        return prepared._replace(correlation=_implied_correlation(self, prepared))

    def init(self, prepared: "PreparedVine", one: Float[Array, " paths"], address: Address) -> tuple[()]:
        """No state: the shocks of different steps are independent."""
        return ()

    def step(
        self, prepared: "PreparedVine", t: Array, state: Any, masks: tuple[Array, ...], address: Address
    ) -> tuple[Any, Shocks]:
        """Shocks of step t."""
        made = materialised(lambda at: at.normal_pairs(self.n_slots))(address)
        normals = [row.astype(self.parameter.dtype) for pair in made for row in pair][: self.n_assets]
        return state, Shocks(self._standardised(self.scores(prepared, masks, normals)))

    def scores(self, prepared: "PreparedVine", masks: tuple[Array, ...], normals: Sequence[Array]) -> list[Array]:
        """Dependent normal scores from one independent row of normals per asset."""
        masks = tuple(masks) if self.parameter.shape[0] > 1 else ()
        places = {e: k for k, e in enumerate(e for e, edge in enumerate(self.edges) if edge.family == "student")}
        known: dict[_Key, Array] = {}
        for step in _program(self.n_assets, self.edges):

            def unit(prepared, masks, fresh, rows, step=step):
                local = dict(zip(step.inputs, rows, strict=True))
                for op in step.ops:
                    z = fresh if op.source is None else local[op.source]
                    if op.edge is None or op.given is None:
                        local[op.target] = z
                        continue
                    edge = self.edges[op.edge]
                    apply = pairs.inverse_conditional if op.is_inverse else pairs.conditional
                    local[op.target] = apply(
                        edge.family,
                        edge.rotation,
                        op.is_first,
                        z,
                        local[op.given],
                        select(masks, prepared.parameter[:, op.edge]),
                        _student(prepared, masks, places.get(op.edge)),
                    )
                return tuple(local[key] for key in step.outputs)

            rows = tuple(known[key] for key in step.inputs)
            out = materialised(unit)(prepared, masks, normals[step.asset], rows)
            known.update(zip(step.outputs, out, strict=True))
        return [known[(i, ())] for i in range(self.n_assets)]

    def log_mgf(self, prepared: "PreparedVine", masks: tuple[Array, ...], scale: Rows) -> Rows | None:
        r"""$\log E[e^{s_i\varepsilon_i}]$ by asset: that of the margins; None where the margin map has none."""
        if self.margin is None:
            return each_asset(lambda s: 0.5 * s * s, scale)
        return self.margin.log_mgf(scale) if hasattr(self.margin, "log_mgf") else None

    def correlation(self, prepared: "PreparedVine", masks: tuple[Array, ...], i: int, j: int) -> Array:
        """Linear correlation of the shocks of assets i and j in the regime, from 4096 Sobol points (error 2e-3)."""
        return select(tuple(masks) if self.parameter.shape[0] > 1 else (), prepared.correlation[:, i, j])

    def _standardised(self, scores: list[Array]) -> Rows:
        rows = tuple(scores) if self.n_assets <= MAX_UNROLLED_ASSETS else jnp.stack(scores)
        return rows if self.margin is None else self.margin.apply(rows)


class PreparedVine(NamedTuple):
    """Constants of `Vine`: parameters, the tables of Student-t quantiles for dof and dof + 1, and correlations."""

    parameter: Float[Array, "regimes edges"]
    dof: Float[Array, "regimes student_edges"] | None
    own: Float[Array, "coefficients regimes student_edges"] | None
    more: Float[Array, "coefficients regimes student_edges"] | None
    correlation: Any


def _student(prepared: PreparedVine, masks: Any, place: int | None) -> Any:
    if place is None or prepared.dof is None:
        return None
    own, more = (
        pairs.student_map([select(masks, row[:, place]) for row in table])
        for table in (prepared.own, prepared.more)
        if table is not None
    )
    return own, more, select(masks, prepared.dof[:, place])


@jax.jit
def _implied_correlation(vine: Vine, prepared: PreparedVine) -> Float[Array, "regimes assets assets"]:
    from scipy.special import ndtri
    from scipy.stats import qmc

    dtype, n_regimes = vine.parameter.dtype, vine.parameter.shape[0]
    points = qmc.Sobol(vine.n_assets, scramble=False).random(_N_POINTS) + 0.5 / _N_POINTS
    normals = [jnp.asarray(row, dtype) for row in ndtri(points).T]
    matrices = []
    for k in range(n_regimes):
        masks = tuple(jnp.asarray(float(k == j), dtype) for j in range(1, n_regimes))
        rows = jnp.stack(list(vine._standardised(vine.scores(prepared, masks, normals))))
        rows = rows - rows.mean(axis=1, keepdims=True)
        rows = rows / jnp.sqrt(jnp.mean(rows * rows, axis=1, keepdims=True))
        matrices.append(jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST) / _N_POINTS)
    return jnp.stack(matrices)


# A conditional distribution: an asset, and those given (sorted).
_Key = tuple[int, tuple[int, ...]]


class _Op(NamedTuple):
    # target = h or inverse h of source given `given`, by an edge; a source of None is the asset's own normal.
    target: _Key
    source: _Key | None
    given: _Key | None = None
    edge: int | None = None
    is_inverse: bool = False
    is_first: bool = True


class _Step(NamedTuple):
    asset: int
    ops: tuple[_Op, ...]
    inputs: tuple[_Key, ...]
    outputs: tuple[_Key, ...]


@lru_cache(maxsize=64)
def _program(n_assets: int, edges: tuple[Edge, ...]) -> tuple[_Step, ...]:
    """What to compute for one asset after the other: each needs its predecessors' conditional distributions."""
    known: set[_Key] = set()
    seen: set[int] = set()
    work: list[tuple[int, list[_Op]]] = []
    for asset in _sampling_order(n_assets, edges):
        ops: list[_Op] = []

        def resolve(key: _Key, ops: list[_Op] = ops) -> _Key:
            if key not in known:
                asset, given = key
                # The edge that has brought the last of the given assets in.
                place = next(
                    e for e, edge in enumerate(edges) if asset in edge.pair and _union(edge) == {asset, *given}
                )
                edge = edges[place]
                other = edge.pair[1] if edge.pair[0] == asset else edge.pair[0]
                source, beside = resolve((asset, edge.given)), resolve((other, edge.given))
                ops.append(_Op(key, source, beside, place, False, edge.pair[0] == asset))
                known.add(key)
            return key

        own = [e for e, edge in enumerate(edges) if asset in edge.pair and _union(edge) <= seen | {asset}]
        source = None
        for place in sorted(own, key=lambda e: -len(edges[e].given)):
            edge = edges[place]
            is_first = edge.pair[0] == asset
            given = resolve((edge.pair[1] if is_first else edge.pair[0], edge.given))
            target = (asset, edge.given)
            ops.append(_Op(target, source, given, place, True, is_first))
            known.add(target)
            source = target
        if source is None:
            ops.append(_Op((asset, ()), None))
            known.add((asset, ()))
        seen.add(asset)
        work.append((asset, ops))
    return _with_borders(work)


def _with_borders(work: list[tuple[int, list[_Op]]]) -> tuple[_Step, ...]:
    steps = []
    for number, (asset, ops) in enumerate(work):
        made = {op.target for op in ops}
        read = {key for op in ops for key in (op.source, op.given) if key is not None}
        later = {key for _, more in work[number + 1 :] for op in more for key in (op.source, op.given)}
        outputs = {key for key in made if key in later} | {(asset, ())}
        steps.append(_Step(asset, tuple(ops), tuple(sorted(read - made)), tuple(sorted(outputs))))
    return tuple(steps)


def _union(edge: Edge) -> set[int]:
    return {*edge.pair, *edge.given}


def _sampling_order(n_assets: int, edges: tuple[Edge, ...]) -> list[int]:
    # Backwards: the asset taken off last has at most one edge in each tree and is given in none.
    left, live, order = set(range(n_assets)), list(edges), []
    while left:
        for asset in sorted(left, reverse=True):
            own = [edge for edge in live if asset in edge.pair]
            is_given = any(asset in edge.given for edge in live)
            if not is_given and len({len(edge.given) for edge in own}) == len(own):
                break
        else:
            raise InputError("the vine's edges allow no order of the assets; its trees are not those of an R-vine.")
        live = [edge for edge in live if asset not in edge.pair]
        left.remove(asset)
        order.append(asset)
    return order[::-1]


def vine(
    structure: Any,
    trees: Sequence[Any],
    *,
    order: Sequence[int] | None = None,
    margin: Any = None,
    dtype: Any = jnp.float32,
) -> Vine:
    """A vine copula from plain lists.

    Args:
      structure: "c-vine" (every edge of tree t holds the t-th asset of the order), "d-vine" (neighbours of the order),
        a square R-vine matrix as pyvinecopulib writes it (assets from 1; the edge of column e in tree t couples the
        antidiagonal entry with row t, given the rows above; rows of trees that are cut may be zero), or for each tree a
        list of edges (i, j, given...) with assets from 0.
      trees: for each tree, from the first, the pair copulas in the order of the edges: C-vine (order[t], order[j]) for
        j > t; D-vine (order[i], order[i + t]) for i = 0, 1, ...; matrix by columns. A pair copula is a mapping with
        the arguments of `pair_copula` (family, parameters, rotation, tau, dof), a family's name, or a `PairCopula`;
        one in place of a list stands for all edges of its tree (if the tree has any). A mapping with `regimes`, a list
        of mappings, one per regime, has the parameters by regime. Trees that are not there are independent.
      order: of the assets in a C- or D-vine, 0, 1, ... when omitted.
      margin: see `Vine`.
      dtype: precision of the paths.

    Raises:
      InputError: a structure that is no R-vine, a number of pair copulas that does not fit it, or a bad pair copula.
    """
    if not isinstance(trees, Sequence) or isinstance(trees, str) or len(trees) == 0:
        raise InputError("trees must be a list with the pair copulas of each tree, the first tree first.")
    if isinstance(structure, str) and order is not None:
        # One pair copula for all edges of a tree that few assets do not have stands for none.
        trees = [tree for t, tree in enumerate(trees) if t < len(order) - 1 or not _is_single(tree)]
        if not trees and [int(x) for x in order] == [0]:
            return Vine(rounded(np.zeros((1, 0)), dtype), None, margin, n_assets=1)
    shapes = _edges_of(structure, trees, order)
    n_assets = len(shapes[0]) + 1
    _check_trees(n_assets, shapes)
    if len(trees) != len(shapes):
        raise InputError(f"trees has {len(trees)} trees and the structure {len(shapes)}; give pair copulas for each.")
    edges, by_regime = [], []
    for number, (tree, shape) in enumerate(zip(trees, shapes, strict=True), start=1):
        if _is_single(tree):
            tree = [tree] * len(shape)
        if len(tree) != len(shape):
            raise InputError(f"tree {number} has {len(tree)} pair copulas; {n_assets} assets need {len(shape)}.")
        for (pair, given), item in zip(shape, tree, strict=True):
            copulas = _by_regime(item, f"the pair {pair[0]}, {pair[1]} of tree {number}")
            edges.append(Edge(pair, given, copulas[0].family, copulas[0].rotation))
            by_regime.append(copulas)
    n_regimes = max(len(copulas) for copulas in by_regime)
    if any(len(copulas) not in (1, n_regimes) for copulas in by_regime):
        raise InputError(
            f"some pair copulas have {n_regimes} regimes and others fewer; give 1 or {n_regimes} for each."
        )
    rows = [copulas * (n_regimes if len(copulas) == 1 else 1) for copulas in by_regime]
    dof = [[copula.dof for copula in row] for row in rows if row[0].family == "student"]

    def cast(values: list[list[float | None]]) -> Array:
        table = np.asarray(values, np.float64).reshape(len(values), n_regimes).T
        return rounded(table, dtype)

    return Vine(
        parameter=cast([[copula.parameter for copula in row] for row in rows]),
        dof=cast(dof) if dof else None,
        margin=margin,
        edges=tuple(edges),
        n_assets=n_assets,
    )


def _is_single(tree: Any) -> bool:
    return isinstance(tree, str | Mapping | PairCopula)


def _by_regime(item: Any, where: str) -> list[PairCopula]:
    try:
        if isinstance(item, PairCopula):
            return [item]
        if isinstance(item, str):
            return [pairs.pair_copula(item)]
        fields = dict(item)
        regimes = fields.pop("regimes", None)
        unknown = sorted(set(fields) - {"family", "parameters", "rotation", "tau", "dof"})
        if unknown:
            options = ("family", "parameters", "rotation", "tau", "dof", "regimes")
            raise InputError(f"there is no {unknown[0]!r} in a pair copula; {did_you_mean(unknown[0], options)}")
        if "family" not in fields:
            raise InputError(f"a pair copula needs a family; {did_you_mean('', pairs.FAMILIES)}")
        copulas = [pairs.pair_copula(**{**fields, **dict(own)}) for own in (regimes or [{}])]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if len({(copula.family, copula.rotation) for copula in copulas}) > 1:
        raise InputError(f"{where}: family and rotation must be the same in all regimes, only parameters may differ.")
    return copulas


_Shape = list[list[tuple[tuple[int, int], tuple[int, ...]]]]


def _edges_of(structure: Any, trees: Sequence[Any], order: Sequence[int] | None) -> _Shape:
    if isinstance(structure, str):
        kind = _KINDS.get(structure.lower())
        if kind is None:
            raise InputError(f"structure is {structure!r}; {did_you_mean(structure, ('c-vine', 'd-vine'))}")
        return _regular(kind, trees, order)
    if order is not None:
        raise InputError("order belongs to a C- or D-vine; a matrix or list of edges has its own.")
    try:
        depth = np.ndim(structure[0][0])
    except (TypeError, IndexError, KeyError) as error:
        raise InputError(
            'structure must be "c-vine", "d-vine", a square matrix or a list of edges per tree.'
        ) from error
    if depth == 0:
        return _of_matrix(structure, len(trees))
    shapes: _Shape = []
    for number, tree in enumerate(structure, start=1):
        shapes.append([])
        for edge in tree:
            edge = tuple(int(x) for x in edge)
            if len(edge) != number + 1:
                raise InputError(f"edge {edge} of tree {number} has {len(edge)} assets; a pair and {number - 1} given.")
            shapes[-1].append(((edge[0], edge[1]), tuple(sorted(edge[2:]))))
    return shapes


def _regular(kind: str, trees: Sequence[Any], order: Sequence[int] | None) -> _Shape:
    if order is None:
        if _is_single(trees[0]):
            raise InputError("one pair copula for the whole first tree leaves the number of assets open: give order.")
        order = range(len(trees[0]) + 1)
    path = [int(x) for x in order]
    n = len(path)
    if sorted(path) != list(range(n)):
        raise InputError(f"order is {path}; it must hold each asset from 0 to {n - 1} once.")
    if n < 2 or len(trees) > n - 1:
        raise InputError(
            f"{n} assets have at most {max(n - 1, 0)} trees (and a vine needs 2 assets); got {len(trees)}."
        )
    if kind == "c":
        return [[((path[t], path[j]), tuple(sorted(path[:t]))) for j in range(t + 1, n)] for t in range(len(trees))]
    return [
        [((path[i], path[i + t + 1]), tuple(sorted(path[i + 1 : i + t + 1]))) for i in range(n - t - 1)]
        for t in range(len(trees))
    ]


def _of_matrix(structure: Any, n_trees: int) -> _Shape:
    try:
        matrix = np.asarray(structure, np.int64)
    except (TypeError, ValueError) as error:
        raise InputError("the structure matrix must be square and hold whole numbers.") from error
    n = matrix.shape[0]
    if matrix.ndim != 2 or matrix.shape != (n, n) or n < 2:
        raise InputError(f"the structure matrix has shape {matrix.shape}; it must be square with at least 2 rows.")
    if n_trees > n - 1:
        raise InputError(f"{n} assets have at most {n - 1} trees; got {n_trees}.")
    own = matrix[n - 1 - np.arange(n), np.arange(n)]
    if sorted(own.tolist()) != list(range(1, n + 1)):
        raise InputError(
            f"the antidiagonal of the structure matrix is {own.tolist()}; it must hold 1 to {n} once each."
        )
    shapes: _Shape = []
    for t in range(n_trees):
        shapes.append([])
        for e in range(n - t - 1):
            entries = [int(x) - 1 for x in (own[e], *matrix[: t + 1, e])]
            if min(entries) < 0 or max(entries) >= n:
                raise InputError(
                    f"column {e + 1} of the structure matrix needs assets from 1 to {n} in its first rows."
                )
            shapes[-1].append(((entries[0], entries[-1]), tuple(sorted(entries[1:-1]))))
    return shapes


def _check_trees(n_assets: int, shapes: _Shape) -> None:
    """Checks that each tree spans the edges of the tree before it and joins neighbours only (proximity condition)."""
    nodes: dict[frozenset[int], tuple[int, ...]] = {frozenset([i]): (i,) for i in range(n_assets)}
    for number, shape in enumerate(shapes, start=1):
        if len(shape) != n_assets - number:
            raise InputError(f"tree {number} has {len(shape)} edges; {n_assets} assets need {n_assets - number}.")
        parent = {node: node for node in nodes}

        def root(node: frozenset[int], parent: dict = parent) -> frozenset[int]:
            while parent[node] != node:
                node = parent[node]
            return node

        following: dict[frozenset[int], tuple[int, ...]] = {}
        for pair, given in shape:
            name = f"edge {pair[0]}, {pair[1]}" + (f" given {', '.join(map(str, given))}" if given else "")
            members = frozenset((*pair, *given))
            if len(members) != number + 1 or not all(0 <= i < n_assets for i in members):
                raise InputError(
                    f"{name} of tree {number} must name {number + 1} different assets from 0 to {n_assets - 1}."
                )
            ends = []
            for asset in pair:
                node = members - ({*pair} - {asset})
                # F(asset | given) must come from an edge of the tree before, which couples that asset.
                if node not in nodes or asset not in nodes[node]:
                    raise InputError(
                        f"{name} of tree {number} needs the law of {asset} given {', '.join(map(str, given))}, which "
                        f"no edge of tree {number - 1} has: the structure is not an R-vine."
                    )
                ends.append(root(node))
            if ends[0] == ends[1]:
                raise InputError(f"{name} closes a circle in tree {number}; its edges must form a tree.")
            parent[ends[0]] = ends[1]
            following[members] = pair
        nodes = following


def example(n_assets: int, dtype: Any = jnp.float32) -> Vine:
    """A C-vine around the first coin: lower tails heavier than the upper, and a weak Gaussian second tree."""
    first: list[Any] = [
        {"family": "clayton", "tau": 0.5} if j % 3 == 0 else {"family": "student", "tau": 0.55, "dof": 4.0}
        for j in range(n_assets - 2)
    ]
    first.append({"family": "gumbel", "rotation": 180, "tau": 0.5})
    trees = [first, {"family": "gaussian", "parameters": 0.3}] if n_assets > 1 else ["independence"]
    return vine("c-vine", trees, order=range(n_assets), dtype=dtype)
