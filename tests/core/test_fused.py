"""The fused kernel: interpreted it makes the scan's paths, and Mosaic GPU takes its program."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from reference.builders import lending, single_market, spot_book, tiered

from qpo_sim import numerics, random
from qpo_sim.book import build_book
from qpo_sim.compute import fused
from qpo_sim.compute.run import KERNELS, build_engine, compile_fused, device_mesh, fused_batch, kept
from qpo_sim.config.compose import conf_folder
from qpo_sim.errors import InputError
from qpo_sim.market import gbm, model
from qpo_sim.market.model import Market
from qpo_sim.simulate import Plan, simulate_paths, simulate_prepared

F32 = jnp.float32
SEED = 11
running = importlib.import_module("qpo_sim.compute.run")


def _market(n_assets, *, step_hours=24.0, dtype=F32):
    """Three regimes with Student-t shocks."""
    rng = np.random.default_rng(3)
    volatility = np.outer([0.6, 1.0, 2.0], (0.6 + 0.6 * rng.random(n_assets)) / np.sqrt(365.0))
    cholesky = [np.linalg.cholesky((1.0 - r) * np.eye(n_assets) + r) for r in (0.35, 0.55, 0.85)]
    transition = [[0.9, 0.08, 0.02], [0.05, 0.85, 0.1], [0.02, 0.08, 0.9]]
    return Market(
        initial=jnp.asarray([0.2, 0.5, 0.3], dtype),
        transition=jnp.asarray(transition, dtype),
        drift=jnp.asarray(-0.5 * volatility**2, dtype),
        volatility=jnp.asarray(volatility, dtype),
        correlation_cholesky=jnp.asarray(np.stack(cholesky), dtype),
        dof=jnp.asarray([6.3, 4.7, 3.4], dtype),
        assets=tuple("ABCDEFGHIJ"[:n_assets]),
        step_hours=step_hours,
    )


def _cross_account(market):
    """One cross account at five times its margin."""
    weights = np.linspace(0.5, 1.5, market.n_assets)
    positions = dict(zip(market.assets, (5.0 * weights / weights.sum()).tolist(), strict=True))
    account = dict(name="account", venue=tiered(0.1, funding_rate=1e-4), margin=1.0, positions=positions)
    return build_book(market.assets, perpetuals=[account])


def _mixed_book(market):
    """Spot, a cross account with a short, an isolated one and a loan with debt in cash and in an asset."""
    a, b, c = market.assets[:3]
    tiers = [[0.0, 0.02], [0.4, 0.05]]
    venue = tiered(tiers=[[row[0] * 1e6, row[1]] for row in tiers], funding_rate=1e-4, liquidation_fee_rate=0.01)
    return build_book(
        market.assets,
        capital=1e6,
        spot={a: 0.2},
        perpetuals=[
            dict(name="cross", venue=venue, margin=0.2, positions={a: 0.9, b: -0.4}),
            dict(name="alone", venue=venue, mode="isolated", margin=0.05, positions={c: 0.3}),
        ],
        loans=[dict(name="loan", venue=lending(), collateral={c: 0.4}, debt={"USD": 0.25, b: 0.05})],
    )


def _shipped():
    described = yaml.safe_load((conf_folder() / "book" / "leveraged_mixed.yaml").read_text())
    held = [described["spot"], *(p["positions"] for p in described["perpetuals"])]
    held += [side for loan in described["loans"] for side in (loan["collateral"], loan["debt"])]
    assets = tuple(sorted({asset for positions in held for asset in positions} - {"USD"}))
    market = dataclasses.replace(_market(len(assets)), assets=assets)
    return market, build_book(assets, **described), Plan(30)


def _small():
    market = single_market(dtype=F32)
    return market, spot_book(market), Plan(2)


def _w1(n_assets=10):
    market = _market(n_assets)
    return market, _cross_account(market), Plan(25, monitoring="step", attribution=False, dates=(25,))


def _mixed():
    market = _market(3)
    return market, _mixed_book(market), Plan(12, dates=(1, 2, 5, 12))


def _sub_steps():
    market = _market(3)
    # Three funding stamps fall into two steps of 6 hours or none: the kernel reads both its tables from memory.
    return market, _cross_account(market), Plan(60, step_hours=6.0, dates=(2, 3, 60), attribution=False)


def _gbm():
    market = gbm(("A", "B", "C"), [1.5, 1.2, 2.0], 0.5 + 0.5 * np.eye(3))
    return market, _cross_account(market), Plan(9)


# Fewer assets: the same program in half the time that XLA:CPU takes to compile it.
INTERPRETED = {"spot": _small, "w1": lambda: _w1(5), "mixed": _mixed, "sub_steps": _sub_steps, "gbm": _gbm}
LOWERED = {"spot": _small, "w1": _w1, "shipped": _shipped, "sub_steps": _sub_steps, "gbm": _gbm}


def _prepared(market, plan):
    return model.prepare(market, sub_steps=round(market.step_hours / plan.step_hours))


def _interpreted(market, book, plan, n_paths, first, **options):
    paths = fused.fused_paths(market, _prepared(market, plan), book, plan, n_paths, interpret=True, **options)
    # Compiled without optimisation: seconds instead of a quarter of a minute.
    program = jax.jit(paths).lower(np.uint32(0), random.stream_keys(0))
    program = program.compile(compiler_options={"xla_backend_optimization_level": 0})
    return program(np.uint32(first), random.stream_keys(SEED))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_makes_the_paths_of_the_scan(name):
    market, book, plan = INTERPRETED[name]()
    first, n_paths = 70, 700  # the last program is not full
    got = kept(_interpreted(market, book, plan, n_paths, first, block=256))
    want = kept(simulate_paths(market, book, first + np.arange(n_paths), plan, seed=SEED))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    # A liquidation is a comparison: only a tie to float rounding could turn out otherwise, and these seeds have none.
    liquidated = np.asarray(want["is_liquidated"])
    np.testing.assert_array_equal(got["is_liquidated"], liquidated)
    assert np.all(liquidated.any(axis=1)) and (name == "spot" or not liquidated.all())
    np.testing.assert_array_equal(got["is_finite"], want["is_finite"])
    np.testing.assert_allclose(got["equity"], want["equity"], rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(got["max_drawdown"], want["max_drawdown"], rtol=0, atol=3e-6)
    np.testing.assert_allclose(got["hit_probability"], want["hit_probability"], rtol=2e-4, atol=1e-5)
    for part in ("accounts", "components"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-6), got[part], want[part])


def _lowered(function):
    return jax.jit(function).trace(np.uint32(0), random.stream_keys(0)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("name", "block"), [("spot", 256), ("w1", 128), ("w1", 512), ("shipped", 256), ("sub_steps", 256), ("gbm", 256)]
)
def test_mosaic_lowers_the_kernel(name, block):
    market, book, plan = LOWERED[name]()
    paths = fused.fused_paths(market, _prepared(market, plan), book, plan, 1024, block=block)
    assert "mosaic_gpu" in _lowered(paths)


def test_batch_of_kernels_lowers_for_a_mesh():
    market, book, plan = _w1()
    paths = fused.fused_paths(market, _prepared(market, plan), book, plan, 512)
    assert "mosaic_gpu" in _lowered(fused_batch(paths, device_mesh(2), 512))


def test_batch_puts_the_paths_of_all_devices_in_order():
    """What `fused_batch` does around the kernel, with the scan in the kernel's place."""
    market, book, plan = _small()

    def paths(first, keys):
        path = first + jnp.arange(256, dtype=jnp.uint32)
        return simulate_prepared(market, _prepared(market, plan), book, keys, path, plan)

    got = jax.jit(fused_batch(paths, device_mesh(2), 256))(np.uint32(40), random.stream_keys(SEED))
    want = kept(simulate_paths(market, book, 40 + np.arange(512), plan, seed=SEED))
    np.testing.assert_allclose(got["equity"], want["equity"], rtol=0, atol=3e-6)


# ----------------------------------------------------------------------------- which kernel runs


def test_auto_is_the_scan_where_there_is_no_gpu():
    market, book, plan = _small()
    engine = build_engine(market, book, plan, n_paths=256, kernel="auto")
    assert engine.kernel == "scan" and "needs a GPU" in engine.kernel_reason


def test_fused_says_that_it_needs_a_gpu():
    market, book, plan = _small()
    with pytest.raises(InputError, match="simulation.kernel is fused.*needs a GPU.*auto or scan"):
        build_engine(market, book, plan, n_paths=256, kernel="fused")


def test_unknown_kernel_is_refused():
    market, book, plan = _small()
    with pytest.raises(InputError, match=f"'fast'.*{', '.join(KERNELS)}"):
        build_engine(market, book, plan, n_paths=256, kernel="fast")


def test_model_that_does_not_compile_falls_back_to_the_scan_and_says_so(monkeypatch, caplog):
    market, book, plan = _small()

    def fail(*arguments, **options):
        raise NotImplementedError("no rule for sort\nand much more")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(running, "compile_fused", fail)
    engine = build_engine(market, book, plan, n_paths=256, kernel="auto")
    assert engine.kernel == "scan"
    assert engine.kernel_reason == "the kernel does not compile (NotImplementedError: no rule for sort)"
    assert engine.kernel_reason in caplog.text
    with pytest.raises(InputError, match="no rule for sort"):
        build_engine(market, book, plan, n_paths=256, kernel="fused")


def test_fused_engine_takes_its_own_book_only(monkeypatch):
    market, book, plan = _small()

    def stand_in(market, prepared, book, plan, n_paths):
        def paths(first, keys):
            return simulate_prepared(market, prepared, book, keys, first + jnp.arange(n_paths, dtype=jnp.uint32), plan)

        return paths

    monkeypatch.setattr(fused, "fused_paths", stand_in)
    keys, prepared = random.stream_keys(SEED), _prepared(market, plan)
    batch = compile_fused(market, prepared, book, plan, device_mesh(1), n_local=256, keys=keys)
    assert batch(np.uint32(0), keys, market, prepared, book)["equity"].shape == (2, 256)
    with pytest.raises(InputError, match="holds the numbers of the book"):
        batch(np.uint32(0), keys, market, prepared, dataclasses.replace(book, cash=2.0 * book.cash + 1.0))


@pytest.mark.parametrize(
    ("market", "plan", "words"),
    [
        (_market(3, dtype=jnp.float64), Plan(2), "float64"),
        (gbm([f"A{i}" for i in range(40)], [0.5] * 40), Plan(2), "40 assets"),
        (_market(3), Plan(2, record_paths=True), "whole paths"),
        (_market(3), Plan(2, drawn=False), "survival branch"),
    ],
)
def test_models_without_a_kernel_say_why(market, plan, words):
    book = build_book(market.assets)
    assert words in fused.refusal(market, plan, book)
    with pytest.raises(InputError, match=words):
        fused.fused_paths(market, None, book, plan, 256)


def test_block_must_be_a_multiple_of_the_threads():
    market, book, plan = _small()
    with pytest.raises(InputError, match="multiple of 128"):
        fused.fused_paths(market, _prepared(market, plan), book, plan, 256, block=200)


# ----------------------------------------------------------------------------- what both routes share


class _Notebook:
    """A kernel that only writes down what it is asked."""

    def __init__(self):
        self.stored = []

    def lookup(self, table, index):
        return ("lookup", table.tolist(), index)

    def buffer(self, shape, dtype):
        return self

    def store(self, index, rows):
        self.stored.append((index, rows))


def test_kernel_mode_ends_with_its_block():
    x = jnp.asarray([0.0, 1e-20, 0.25, 4.0], F32)
    kernel = _Notebook()
    with numerics.inside(kernel):
        root = numerics.sqrt(x)
        assert numerics.lookup(np.arange(3), 2) == ("lookup", [0, 1, 2], 2)
        assert numerics.put(numerics.buffer((2,), x), 1, x) is kernel and kernel.stored[0][0] == 1
        function = lambda x: x  # noqa: E731
        assert numerics.materialised(function) is function
    np.testing.assert_allclose(root[1:], jnp.sqrt(x)[1:], rtol=3e-7)
    assert root[0] <= 1e-15
    assert not numerics.is_inside_kernel()
    assert numerics.lookup(np.arange(3), 2) == 2
    rows = numerics.put(numerics.buffer((2, 2), x), 1, [x, 2.0 * x])
    np.testing.assert_array_equal(rows, jnp.stack([jnp.zeros((2, 4), F32), jnp.stack([x, 2.0 * x])]))
    np.testing.assert_array_equal(numerics.put(numerics.buffer((2,), x), 0, x)[0], x)
