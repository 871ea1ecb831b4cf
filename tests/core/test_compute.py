"""Streaming runs: the same digits whoever computed which paths, exact merging, constant memory, honest counting."""

import dataclasses
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.builders import F64, lending, single_market, spot_book, tiered, touch_book

from qpo_sim import random, simulate
from qpo_sim.book import build_book
from qpo_sim.compute import histogram, partial
from qpo_sim.compute.run import compile_batch, device_mesh, kept, run
from qpo_sim.errors import InputError
from qpo_sim.market import gbm, model
from qpo_sim.simulate import Plan, default_dates, simulate_paths

F32 = jnp.float32
# the module: the package shows the function of the same name
running = importlib.import_module("qpo_sim.compute.run")


def _market(dtype=F32):
    rho = np.array([[1.0, 0.6, 0.3], [0.6, 1.0, 0.5], [0.3, 0.5, 1.0]])
    return model.Market(
        initial=jnp.asarray([0.7, 0.3], dtype),
        transition=jnp.asarray([[0.9, 0.1], [0.3, 0.7]], dtype),
        drift=jnp.zeros((2, 3), dtype),
        volatility=jnp.asarray([[0.04, 0.05, 0.06], [0.08, 0.1, 0.1]], dtype),
        correlation_cholesky=jnp.asarray(np.stack([np.linalg.cholesky(rho)] * 2), dtype),
        dof=jnp.asarray([5.0, 3.5], dtype),
        assets=("A", "B", "C"),
    )


def _book(dtype=F32):
    return build_book(
        ("A", "B", "C"),
        spot={"A": 0.2},
        perpetuals=[dict(name="x", venue=tiered(0.01, funding_rate=1e-4), margin=0.2, positions={"A": 0.5, "B": -0.4})],
        loans=[dict(name="l", venue=lending(), collateral={"C": 0.5}, debt={"USD": 0.35})],
        dtype=dtype,
    )


def _assert_same(a, b):
    """Exact equality of every field of two partial results."""
    assert (a.n_paths, a.n_not_finite, a.tail_size) == (b.n_paths, b.n_not_finite, b.tail_size)
    assert a.sums.keys() == b.sums.keys()
    for name in a.sums:
        assert np.array_equal(a.sums[name], b.sums[name]), name
    for x, y in ((a.equity, b.equity), (a.losses, b.losses)):
        np.testing.assert_array_equal(x.counts, y.counts)
        if x.sums is not None:
            np.testing.assert_array_equal(x.sums, y.sums)
    assert len(a.tails) == len(b.tails)
    for x, y in zip(a.tails, b.tails, strict=True):
        np.testing.assert_array_equal(x.loss, y.loss)
        np.testing.assert_array_equal(x.path, y.path)
        for name in x.extra:
            np.testing.assert_array_equal(x.extra[name], y.extra[name], err_msg=name)


@pytest.fixture(scope="module")
def big_run():
    return run(
        _market(), _book(), n_paths=70_001, n_steps=3, chunk_size=1024, devices=1, levels=(0.95, 0.99), horizons=(1,)
    )


@pytest.mark.parametrize(("chunk_size", "devices"), [(256, 1), (4096, 2), (1024, 2)])
def test_run_does_not_depend_on_chunks_or_devices(big_run, chunk_size, devices):
    other = run(
        _market(),
        _book(),
        n_paths=70_001,
        n_steps=3,
        chunk_size=chunk_size,
        devices=devices,
        levels=(0.95, 0.99),
        horizons=(1,),
    )
    assert other.engine.mesh.devices.size == devices
    _assert_same(big_run.partial, other.partial)


def test_run_is_the_reduction_of_the_paths_it_names(big_run):
    plan = Plan(3, dates=(1, 2, 3))
    outcome = simulate_paths(_market(), _book(), 70_001, plan)
    loss = 1.0 - np.asarray(outcome.equity[-1], np.float64)
    worst = np.argsort(-loss, kind="stable")[: big_run.partial.tail_size]
    got = big_run.partial.tails[-1]
    np.testing.assert_allclose(got.loss, loss[worst], atol=2e-7)
    assert np.mean(np.isin(got.path, worst)) > 0.999
    np.testing.assert_allclose(big_run.partial.total("r1")[-1], -loss.sum(), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(
        big_run.partial.total("hit")[-1], np.asarray(outcome.hit_probability[-1], np.float64).sum(axis=1), rtol=1e-6
    )
    assert big_run.partial.n_paths == 70_001


def test_a_path_is_the_same_whichever_others_are_asked_for():
    # The drawn branch (equity, accounts, components, liquidations, drawdown) agrees to the bit. The survival weight of
    # one path alone is compiled for scalars, whose exp rounds differently from the vector one: it agrees to rounding.
    plan = Plan(3)
    whole = simulate_paths(_market(), _book(), 1000, plan, seed=3)
    for chosen in ([17], [999, 17, 3], list(range(8, 24))):
        part = simulate_paths(_market(), _book(), np.array(chosen), plan, seed=3)
        for name in kept(whole):
            a, b = getattr(whole, name), getattr(part, name)
            if name == "hit_probability":
                np.testing.assert_allclose(np.asarray(a)[..., chosen], b, rtol=2e-5, atol=1e-7)
            else:
                jax.tree.map(lambda x, y, c=chosen: np.testing.assert_array_equal(np.asarray(x)[..., c], y), a, b)


def test_a_path_alone_is_its_row_of_the_run(big_run):
    worst = big_run.partial.tails[-1]
    alone = simulate_paths(_market(), _book(), worst.path[:1], Plan(3, dates=(1, 2, 3)))
    assert np.float32(1.0) - np.asarray(alone.equity)[-1, 0] == worst.loss[0]
    np.testing.assert_array_equal(-alone.components[:, 0], worst.extra["components"][:, 0])


def test_seeds_differ_and_repeat():
    plan = Plan(2)
    a, b, c = (np.asarray(simulate_paths(_market(), _book(), 64, plan, seed=s).equity) for s in (1, 1, 2**40 + 1))
    np.testing.assert_array_equal(a, b)
    assert not np.any(a == c)


# ----------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def batch():
    outcome = kept(simulate_paths(_market(), _book(), 1000, Plan(3), seed=1))
    arrays = jax.tree.map(np.asarray, outcome)
    # Rounded so that losses tie within and across blocks; a few paths are broken on purpose.
    arrays["equity"] = np.round(arrays["equity"], 2).astype(np.float32)
    arrays["is_finite"] = arrays["is_finite"].copy()
    arrays["is_finite"][[0, 500, 501]] = False
    arrays["equity"][:, [0, 500, 501]] = np.nan
    return arrays


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(partial, "PATH_BLOCK", 50)
    monkeypatch.setattr(partial, "FINE_BITS", 12)
    monkeypatch.setattr(partial, "COARSE_BITS", 10)


def _part(batch, first, last, keep=40):
    return partial.partial_of(jax.tree.map(lambda x: x[..., first:last], batch), first, horizons=(0, 2), keep=keep)


@pytest.mark.parametrize("broken", [False, True])
def test_merge_is_associative_and_commutative(batch, broken, small_blocks):
    if not broken:
        batch = {k: v for k, v in batch.items()}
        batch["equity"] = np.where(np.isnan(batch["equity"]), np.float32(1.0), batch["equity"])
        batch["is_finite"] = np.ones(1000, bool)
    whole = _part(batch, 0, 1000)
    assert whole.n_not_finite == (3 if broken else 0) and whole.n_used == 1000 - whole.n_not_finite

    @settings(max_examples=25, deadline=None)
    @given(cuts=st.sets(st.integers(1, 19)), seed=st.integers(0, 2**32 - 1))
    def check(cuts, seed):
        rng = np.random.default_rng(seed)
        edges = [0, *sorted(50 * c for c in cuts), 1000]
        parts = [_part(batch, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)] + [partial.zero(40)]
        while len(parts) > 1:
            a = parts.pop(rng.integers(len(parts)))
            b = parts.pop(rng.integers(len(parts)))
            parts.append(a.merge(b))
        _assert_same(parts[0], whole)

    check()


def test_zero_is_the_unit(batch, small_blocks):
    p = _part(batch, 0, 500)
    _assert_same(p.merge(partial.zero(40)), p)
    _assert_same(partial.zero(40).merge(p), p)
    assert partial.zero(40).merge(partial.zero(40)).n_paths == 0


def _copy(p):
    """What can be used up without harm to the original."""
    equity, losses = (
        histogram.LogHistogram(h.counts.copy(), None if h.sums is None else h.sums.copy()) for h in (p.equity, p.losses)
    )
    return dataclasses.replace(p, equity=equity, losses=losses)


@pytest.mark.parametrize("cuts", [[0, 500, 1000], [0, 50, 600, 1000], [0, 950, 1000], [0, 1000]])
@pytest.mark.parametrize("keep", [1, 40, 1000])
def test_adding_to_a_partial_result_is_merging(batch, cuts, keep, small_blocks):
    whole = _part(batch, 0, 1000, keep)
    parts = [jax.tree.map(lambda x, a=a, b=b: x[..., a:b], batch) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    first = _part(batch, 0, cuts[1], keep)
    merged = first.merge(_part(batch, cuts[1], 1000, keep)) if cuts[1] < 1000 else first
    _assert_same(merged, whole)
    # at once, and one after the other
    _assert_same(partial.add(partial.zero(keep), parts, 0, horizons=(0, 2)), whole)
    seen = _copy(first)
    for start, part in zip(cuts[1:-1], parts[1:], strict=True):
        seen = partial.add(seen, [part], start, horizons=(0, 2))
    _assert_same(seen, whole)


def test_worst_paths_are_in_order_whatever_ties(batch, small_blocks):
    for p in (_part(batch, 0, 1000, 1000), _part(batch, 600, 1000, 1000).merge(_part(batch, 0, 600, 1000))):
        for k, tail in enumerate(p.tails):
            loss = np.float32(1.0) - batch["equity"][(0, 2)[k]]
            path = np.flatnonzero(batch["is_finite"])
            order = path[np.lexsort((path, -loss[path]))]
            np.testing.assert_array_equal(tail.path, order)
            np.testing.assert_array_equal(tail.loss, loss[order])


def test_merging_partial_results_of_double_precision_runs(small_blocks):
    arrays = jax.tree.map(np.asarray, kept(simulate_paths(_market(F64), _book(F64), 1000, Plan(3), seed=1)))
    thirds = [_part(arrays, 0, 300), _part(arrays, 300, 650), _part(arrays, 650, 1000)]
    _assert_same(thirds[0].merge(thirds[1]).merge(thirds[2]), thirds[2].merge(thirds[0]).merge(thirds[1]))


def test_exact_sums_against_fsum(batch, small_blocks):
    import math

    p = _part(batch, 0, 1000)
    returns = (batch["equity"] - np.float32(1.0))[-1][batch["is_finite"]].astype(np.float64)
    for name, values in (
        ("r1", returns),
        ("r2", returns**2),
        ("r4", returns**4),
        ("d3", returns * np.minimum(returns, 0) ** 2),
    ):
        assert p.total(name)[-1] == pytest.approx(math.fsum(values), rel=1e-14)


@pytest.mark.parametrize("bits", [10, 13, 17])
def test_histogram_bins_are_ordered_and_as_wide_as_stated(bits):
    x = np.concatenate([[-0.0, 0.0], np.geomspace(1e-6, 10.0, 5000), -np.geomspace(1e-6, 10.0, 5000)]).astype(
        np.float32
    )
    h = histogram.zero(1, bits, with_sums=True)
    histogram.count(h, [np.sort(x)])
    assert h.bits == bits and h.counts.sum() == x.size
    used = np.flatnonzero(h.counts[0])
    left, right = histogram.edges(bits, used), histogram.edges(bits, used + 1)
    mean = h.sums[0, used] / h.counts[0, used]
    assert np.all((left <= mean) & (mean <= right))
    width = (right - left) / np.maximum(np.abs(mean), 1e-30)
    assert np.all(width[np.abs(mean) > 1e-5] <= 2.0 ** (6 - bits) * 1.01)
    for p in (0.001, 0.25, 0.9, 0.999):
        assert h.quantile(0, p) == pytest.approx(
            np.quantile(x, p, method="inverted_cdf"), rel=2.0 ** (6 - bits), abs=1e-6
        )


def test_histogram_holds_what_is_too_small_or_too_large():
    x = np.array([-1e30, -5000.0, -4096.0, -1e-9, -0.0, 0.0, 1e-40, 1e-9, 4095.9, 4096.0, 1e30], np.float32)
    h = histogram.zero(1, 17, with_sums=True)
    histogram.count(h, [x])
    half = 1 << 16
    assert {k: int(h.counts[0, k]) for k in np.flatnonzero(h.counts)} == {0: 3, half - 1: 2, half: 3, 2 * half - 1: 3}
    assert h.sums[0, 0] == -3 * 4096.0 and h.sums[0, half - 1] == h.sums[0, half] == 0.0
    assert h.sums[0, -1] == np.float64(np.float32(4095.9)) + 2 * 4096.0
    edges = histogram.edges(17, np.arange(2 * half + 1))
    assert edges[0] == -4096.0 and edges[half] == 0.0 and edges[-1] == 4096.0 and np.all(np.diff(edges) > 0.0)


@pytest.mark.parametrize("bits", [10, 13, 17])
def test_histogram_sums_do_not_depend_on_the_order(bits):
    x = np.random.default_rng(0).standard_t(2, 20_000).astype(np.float32)
    x[:3] = 1e20, 1e-30, 3e-7
    one, other = (histogram.zero(1, bits, with_sums=True) for _ in range(2))
    histogram.count(one, [x])
    for part in np.array_split(x[::-1], 7):
        histogram.count(other, [part])
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_array_equal(one.sums, other.sums)


# ----------------------------------------------------------------------------- precision


def test_single_precision_against_double_on_the_same_draws():
    # The bits are the same, so paths can be compared one by one. Prices carry the rounding of 20 added log-returns
    # and of exp; a liquidation flips only where the drawn uniform falls within that error of the crossing probability.
    n, plan = 1 << 13, Plan(20, attribution=False)
    single, double = (simulate_paths(_market(d), _book(d), n, plan, seed=7) for d in (F32, F64))
    flipped = np.any(np.asarray(single.is_liquidated != double.is_liquidated), axis=0)
    assert flipped.mean() < 1e-3
    error = np.abs(np.asarray(single.equity, np.float64) - np.asarray(double.equity))[:, ~flipped]
    scale = 1.0 + np.abs(np.asarray(double.equity))[:, ~flipped]
    assert np.quantile(error / scale, 0.999) < 5e-6
    f = np.abs(np.asarray(single.hit_probability, np.float64) - np.asarray(double.hit_probability))
    assert np.abs(f.mean()) < 1e-6 and f.max() < 1e-2


# ----------------------------------------------------------------------------- memory and compilation


class _StopError(Exception):
    pass


def test_program_does_not_depend_on_the_number_of_paths(monkeypatch):
    asked = []

    def spy(*args, chunk_size, chunks):
        asked.append((chunk_size, chunks))
        raise _StopError

    monkeypatch.setattr(running, "compile_batch", spy)
    for n in (200_000, 1_000_000, 2**32):
        with pytest.raises(_StopError):
            run(_market(), _book(), n_paths=n, n_steps=3)
    assert len(set(asked)) == 1


def test_temporary_memory_does_not_grow_with_the_batch():
    market, book, plan, mesh = _market(), _book(), Plan(3), device_mesh(1)
    prepared, keys = model.prepare(market), random.stream_keys(0)
    sizes = []
    for chunks in (2, 16):
        program = compile_batch(market, book, plan, mesh, chunk_size=256, chunks=chunks)
        memory = program.lower(np.uint32(0), keys, market, prepared, book).compile().memory_analysis()
        # what is not output
        sizes.append((memory.temp_size_in_bytes, memory.output_size_in_bytes))
    (small, out_small), (large, out_large) = sizes
    assert out_large == pytest.approx(8 * out_small, rel=0.05)
    # The rows are put in path order once, so a copy of the output is allowed, nothing per step.
    assert large - small <= 2.2 * (out_large - out_small), sizes


def test_new_seeds_and_parameters_do_not_retrace():
    market, book, plan = _market(), _book(), Plan(3)
    simulate_paths(market, book, 64, plan, seed=0)
    traced = simulate._simulate._cache_size()
    simulate_paths(market, book, 64, plan, seed=99)
    simulate_paths(dataclasses.replace(market, volatility=2.0 * market.volatility), book, 64, Plan(3), seed=1)
    simulate_paths(market, dataclasses.replace(book, spot=0.5 * book.spot), np.arange(64) + 7, plan, seed=1)
    assert simulate._simulate._cache_size() == traced


# ----------------------------------------------------------------------------- broken paths


def test_a_book_without_margin_accounts_runs():
    market = single_market(volatility=0.03, dtype=F32)
    result = run(market, spot_book(market), n_paths=1000, n_steps=4, levels=(0.95,)).partial
    assert result.n_used == 1000
    assert result.total("r1")[-1] == pytest.approx(
        float(
            np.sum(np.asarray(simulate_paths(market, spot_book(market), 1000, Plan(4)).equity[-1], np.float64) - 1.0)
        ),
        abs=1e-3,
    )


def _spot_with_idle_account(market):
    # Overflowing spot beside a small far-away account.
    account = dict(name="x", venue=tiered(0.004), margin=0.1, positions={"X": 0.01})
    return build_book(("X",), spot={"X": 0.9}, perpetuals=[account], dtype=market.drift.dtype)


def test_broken_paths_are_counted_and_left_out():
    market = single_market(volatility=40.0, dtype=F32)  # exp overflows on a share of the paths
    book = _spot_with_idle_account(market)
    outcome = simulate_paths(market, book, 1000, Plan(4))
    broken = ~np.asarray(outcome.is_finite)
    assert 0.05 < broken.mean() < 0.5
    np.testing.assert_array_equal(broken, ~np.isfinite(np.asarray(outcome.equity)).all(axis=0))
    result = run(market, book, n_paths=1000, n_steps=4, levels=(0.95,)).partial
    assert result.n_not_finite == broken.sum() and result.n_used == 1000 - broken.sum()
    assert result.losses.counts[0].sum() == result.n_used


def test_a_run_in_which_every_path_is_broken_says_so():
    market = single_market(drift=200.0, volatility=1.0, dtype=F32)
    result = run(market, _spot_with_idle_account(market), n_paths=300, n_steps=2, levels=(0.95,)).partial
    assert result.n_not_finite == 300 and result.n_used == 0


def test_a_finite_path_has_finite_numbers_everywhere():
    # A short closed long ago, then a price that overflows: the equity is finite, the rest must be or be flagged.
    market = single_market(volatility=40.0, dtype=F32)
    outcome = simulate_paths(market, touch_book(market, 1.5), 2000, Plan(6))
    finite = np.asarray(outcome.is_finite)
    for rows in (*outcome.accounts.values(), outcome.components, outcome.account_equity, outcome.equity):
        assert np.all(np.isfinite(np.asarray(rows)[..., finite]))


# ----------------------------------------------------------------------------- borders


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n_steps=0), "n_steps"),
        (dict(n_steps=2**20), "n_steps"),
        (dict(n_steps=3, monitoring="daily"), "monitoring"),
        (dict(n_steps=3, dates=(1, 2)), "dates"),
        (dict(n_steps=3, dates=(2, 1, 3)), "dates"),
        (dict(n_steps=3, dates=(1, 1, 3)), "dates"),
        (dict(n_steps=3, dates=(0, 3)), "dates"),
        (dict(n_steps=3, dates=(1, 4)), "dates"),
        (dict(n_steps=3, step_hours=0.0), "step_hours"),
        (dict(n_steps=3, step_hours=-24.0), "step_hours"),
        (dict(n_steps=3, step_hours=float("nan")), "step_hours"),
        (dict(n_steps=3, step_hours=7.0), "step_hours"),
        (dict(n_steps=3, step_hours=48.0), "step_hours"),
    ],
)
def test_plans_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        simulate_paths(_market(), _book(), 8, Plan(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n_paths=0), "n_paths"),
        (dict(n_paths=2**32 + 1), "n_paths"),
        (dict(levels=(1.0,)), "confidence level"),
        (dict(levels=(0.0, 0.9)), "confidence level"),
        (dict(levels=()), "level"),
        (dict(chunk_size=300), "chunk_size"),
        (dict(chunk_size=128), "chunk_size"),
        (dict(chunk_size=2**17), "chunk_size"),
        (dict(horizons=(0,)), "horizons"),
        (dict(horizons=(4,)), "horizons"),
        (dict(devices=3), "devices"),
        (dict(devices=0), "devices"),
        (dict(step_hours=5.0), "step_hours"),
        (dict(step_hours=0.0), "step_hours"),
        (dict(monitoring="never"), "monitoring"),
    ],
)
def test_runs_that_cannot_be_are_refused(options, words, monkeypatch):
    monkeypatch.setattr(running, "compile_batch", lambda *a, **k: pytest.fail("the border let it through"))
    with pytest.raises(InputError, match=words):
        run(_market(), _book(), **{**dict(n_paths=100, n_steps=3), **options})


def test_market_and_book_must_agree():
    with pytest.raises(InputError, match="built for"):
        simulate_paths(gbm(("A", "B"), [0.5, 0.5]), _book(), 8, Plan(1))


def test_default_dates_hold_what_was_wanted():
    assert default_dates(5) == (1, 2, 3, 4, 5)
    dates = default_dates(720, (24, 168))
    assert {24, 168, 720} <= set(dates) and len(dates) <= simulate.MAX_DATES + 2
    assert list(dates) == sorted(set(dates))


def test_tail_size_holds_the_level_and_its_error():
    for n, level in ((1000, 0.95), (10**6, 0.99), (10**6, 0.999), (50, 0.999)):
        keep = partial.tail_size(n, level)
        assert min(n, n * (1 - level) + 3 * np.sqrt(n * level * (1 - level)) + 1) <= keep <= n


def test_progress_is_told_of_every_batch(monkeypatch):
    monkeypatch.setattr(running, "BATCH", 16_384)
    seen = []
    run(_market(), _book(), n_paths=40_000, n_steps=1, chunk_size=1024, levels=(0.95,), progress=seen.append)
    assert [s.n_done for s in seen] == [16_384, 32_768, 40_000]
    assert all(s.partial.n_paths == s.n_done for s in seen) and isinstance(seen[0].seconds, float)
    assert SimpleNamespace(**dataclasses.asdict(seen[-1])).n_paths == 40_000
