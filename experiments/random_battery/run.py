r"""Is the addressed generator random? TestU01 on its words in the orders a simulator reads them.

`battery.c` holds the generator a second time, in C, and hands its words to the batteries of TestU01 (L'Ecuyer & Simard
2007). Before any battery runs, the words of every chosen order are compared bit for bit with `qpo_sim.random`.

A p-value outside [1e-3, 1 - 1e-3] is suspicious and expected once in 500 tests; one outside [1e-10, 1 - 1e-10] is a
failure. Ends with 0 when no test failed, 1 when one did, 2 when the program cannot be built.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from qpo_sim import random
from qpo_sim.random import Stream, StreamKey

SOURCE = Path(__file__).with_name("battery.c")
MISSING = """TestU01 is missing. On Debian it is the package libtestu01-0-dev, in the component non-free:
  apt-get install libtestu01-0-dev
An installation elsewhere is named with --testu01 PREFIX (PREFIX/include and PREFIX/lib). The compiler said:
"""
# Upstream's names of the libraries, Debian's, and a shared library that knows what it needs.
LIBRARIES = (
    ("testu01", "probdist", "mylib"),
    ("testu01", "testu01probdist", "testu01mylib"),
    ("testu01",),
)
BATTERIES = ("smallcrush", "crush", "bigcrush", "rabbit", "alphabit")
TAKES_BITS = ("rabbit", "alphabit")
SUSPICIOUS, FAILED = 1e-3, 1e-10


class Order(NamedTuple):
    """How the words are read.

    Attributes:
      address: the parts of the address that run, the fastest first; see `battery.c`.
      words: both words of a block in turn, or only the `first` or the `second`.
      bits: `plain`, or `reversed`, so that tests of high bits see the low ones.
      meaning: who reads in this order.
    """

    address: str
    words: str
    bits: str
    meaning: str


# Every order has a seed of its own, so that the rows of the table are independent.
ORDERS = {
    "paths": Order("seed=1,stream=2,path,step", "both", "plain", "all paths at one address"),
    "paths, first words": Order("seed=2,stream=1,path,step", "first", "plain", "uniforms that pick a regime"),
    "paths, second words": Order("seed=3,stream=1,path,step", "second", "plain", "scores that mix the variance"),
    "paths, bits reversed": Order("seed=4,stream=2,path,step", "both", "reversed", "the same, low bits first"),
    "strided paths": Order("seed=5,stream=2,path*65536:65536,step", "both", "plain", "every 65536th path"),
    "steps": Order("seed=6,stream=2,step,path", "both", "plain", "one long path"),
    "steps, first words": Order("seed=7,stream=3,step,path", "first", "plain", "bridge uniforms along a path"),
    "steps, bits reversed": Order("seed=8,stream=2,step,path", "both", "reversed", "the same, low bits first"),
    "years of days": Order("seed=9,stream=2,step:365,path", "both", "plain", "paths of 365 steps, one after another"),
    "slots": Order("seed=10,stream=2,slot,step,path", "both", "plain", "the counter word counted up"),
    "few slots": Order("seed=11,stream=2,slot:5,path,step", "both", "plain", "ten assets, path by path"),
    "slots, bits reversed": Order("seed=12,stream=2,slot,step,path", "both", "reversed", "the same, low bits first"),
    "simulator": Order(
        "seed=13,stream=2,path:4096,slot:5,step:365,path*4096", "both", "plain", "a block of paths, step after step"
    ),
    "simulator, bits reversed": Order(
        "seed=14,stream=2,path:4096,slot:5,step:365,path*4096", "both", "reversed", "the same, low bits first"
    ),
    "seeds": Order("stream=2,path=17,step=3,slot=1,seed", "both", "plain", "consecutive seeds at a fixed address"),
    "seeds, bits reversed": Order("stream=2,path=18,step=4,slot=1,seed", "both", "reversed", "the same, reversed"),
    "high seeds": Order("stream=2,path=19,step=5,slot=2,seed*4294967296:4294967295", "both", "plain", "the upper half"),
    "few paths of many seeds": Order("stream=2,path:16,seed", "both", "plain", "short runs, one seed after another"),
    "streams": Order("seed=15,stream:4,path,step", "both", "plain", "the four streams in turn"),
    "many streams": Order("seed=16,path=20,step=6,slot=3,stream", "both", "plain", "consecutive stream numbers"),
}


class Outcome(NamedTuple):
    """P-values of one battery on one order, with the seconds it took."""

    order: str
    battery: str
    p_values: dict[str, float]
    seconds: float

    def outside(self, tail: float) -> dict[str, float]:
        """The tests whose p-value lies outside [tail, 1 - tail]."""
        return {name: p for name, p in self.p_values.items() if not tail <= p <= 1.0 - tail}


def build(folder: Path, prefix: Path) -> Path:
    """Compiles `battery.c` into a folder; ends the process with 2 when that fails."""
    compiler, program = shutil.which("cc"), folder / "battery"
    if compiler is None:
        print("No C compiler; on Debian: apt-get install gcc libc6-dev", file=sys.stderr)
        raise SystemExit(2)
    # Debian keeps the headers in a folder of their own.
    where = [f"-I{prefix / 'include'}", f"-I{prefix / 'include' / 'testu01'}", f"-L{prefix / 'lib'}"]
    said = ""
    for names in LIBRARIES:
        command = [compiler, "-std=c11", "-O3", *where, str(SOURCE), "-o", str(program)]
        done = subprocess.run([*command, *(f"-l{name}" for name in names), "-lm"], capture_output=True, text=True)
        if done.returncode == 0:
            return program
        said = said or done.stderr
    print(MISSING + said, file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------- the same words from the package


def addresses(order: str, n: int) -> dict[str, np.ndarray]:
    """The first n addresses of an order, one array per part."""
    part = {axis: np.zeros(n, np.uint64) for axis in ("seed", "stream", "path", "step", "slot")}
    limit = {"stream": 2**32, "path": 2**32, "step": random.MAX_STEPS, "slot": random.MAX_SLOTS, "seed": 2**64}
    index, period = np.arange(n, dtype=np.uint64), 1
    for token in order.split(","):
        if "=" in token:
            axis, _, value = token.partition("=")
            part[axis] += np.uint64(int(value))
            continue
        run, _, count = token.partition(":")
        axis, _, stride = run.partition("*")
        length = int(count) if count else limit[axis] // int(stride or 1)
        # Past n nothing repeats, and a period beyond 64 bits could not be divided by.
        part[axis] += (index // np.uint64(min(period, 2**63)) % np.uint64(min(length, 2**63))) * np.uint64(stride or 1)
        period *= length
    return part


def expected_words(order: Order, n_blocks: int, n_rounds: int) -> np.ndarray:
    """The words of an order as `qpo_sim.random` makes them."""
    part = addresses(order.address, n_blocks)
    origin, which = np.unique(np.stack([part["seed"], part["stream"]]), axis=1, return_inverse=True)
    keys = np.array([_key(int(seed), int(stream)) for seed, stream in origin.T])[which.reshape(-1)]
    word = ((part["step"] << np.uint64(random.SLOT_BITS)) + part["slot"]).astype(np.uint32)
    with np.errstate(over="ignore"):
        pair = random.threefry2x32(
            part["path"].astype(np.uint32), word, StreamKey(keys[:, 0], keys[:, 1]), n_rounds=n_rounds
        )
    chosen = {"both": pair, "first": pair[:1], "second": pair[1:]}[order.words]
    flat = np.stack(chosen, axis=1).reshape(-1)
    if order.bits == "plain":
        return flat
    return np.packbits(np.unpackbits(flat[:, None].view(np.uint8), axis=1, bitorder="little"), axis=1).view(">u4")[:, 0]


def _key(seed: int, stream: int) -> tuple[np.uint32, np.uint32]:
    # `stream_key` only takes the number of a Stream from its argument, and numbers without a name are tested too.
    return random.stream_key(seed, stream)  # pyright: ignore[reportArgumentType]


def check(program: Path, order: Order, n_rounds: int, n_blocks: int = 1 << 17) -> None:
    """Compares the words of the C program with those of the package; raises when a bit differs."""
    if order.address.split(",")[-1].partition("*")[0] == "seed" or order.address.endswith("stream"):
        n_blocks >>= 6  # the package makes a key at a time
    expected = expected_words(order, n_blocks, n_rounds)
    command = [str(program), "dump", *order[:3], str(n_rounds), str(expected.size)]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    got = np.array([int(word, 16) for word in dumped], np.uint32)
    if not np.array_equal(got, expected):
        first = int(np.flatnonzero(got != expected)[0])
        raise AssertionError(f"{order.address}: word {first} is {got[first]:08x}, not {expected[first]:08x}")


def check_bits(program: Path) -> None:
    """Compares single addresses, corners among them, with `qpo_sim.random.bits`; raises when a bit differs."""
    corners = (0, 1, 2**32 - 1)
    for seed in (0, 1, 2**32, 2**64 - 1):
        for stream in Stream:
            key = random.stream_key(seed, stream)
            for path in corners:
                for step, slot in ((0, 0), (1, 1), (random.MAX_STEPS - 1, random.MAX_SLOTS - 1)):
                    address = f"seed={seed},stream={int(stream)},path={path},step={step},slot={slot},path*0:1000"
                    command = [str(program), "dump", address, "both", "plain", "20", "2"]
                    got = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                    words = random.bits(key, jnp.full(1, path, jnp.uint32), jnp.int32(step), slot)
                    if got != [f"{int(word[0]):08x}" for word in words]:
                        raise AssertionError(f"{address}: {got}")


# ----------------------------------------------------------------------------- batteries


def run_battery(program: Path, name: str, battery: str, n_rounds: int, n_bits: int) -> Outcome:
    """Runs one battery on one order."""
    command = [str(program), "run", *ORDERS[name][:3], str(n_rounds), battery]
    start = time.perf_counter()
    done = subprocess.run([*command, str(n_bits)] if battery in TAKES_BITS else command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    p_values: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("pvalue\t"):
            _, value, test = line.split("\t")
            p_values[f"{len(p_values) + 1} {test.strip()}"] = float(value)
    if not p_values:
        raise RuntimeError(f"{' '.join(command)} printed no p-value")
    return Outcome(name, battery, p_values, time.perf_counter() - start)


def row(outcome: Outcome) -> str:
    """A line of the table."""
    suspicious, failed = outcome.outside(SUSPICIOUS), outcome.outside(FAILED)
    named = "; ".join(f"{test} {_shown(p)}" for test, p in suspicious.items())
    return (
        f"| {outcome.order} | {outcome.battery} | {len(outcome.p_values)} | {len(suspicious)} | {len(failed)} "
        f"| {outcome.seconds:.0f} | {named} |"
    )


def _shown(p: float) -> str:
    return f"{p:.1e}" if p < 0.5 else f"1 - {1.0 - p:.1e}"


HEAD = """\
| order | battery | tests | suspicious | failed | seconds | suspicious tests |
|---|---|---:|---:|---:|---:|---|"""


def verdict(outcomes: list[Outcome]) -> str:
    """What the p-values say together."""
    n_tests = sum(len(o.p_values) for o in outcomes)
    n_suspicious = sum(len(o.outside(SUSPICIOUS)) for o in outcomes)
    n_failed = sum(len(o.outside(FAILED)) for o in outcomes)
    expected = 2.0 * SUSPICIOUS * n_tests
    # Poisson tail: how often a perfect source shows at least as many suspicious p-values.
    at_least = 1.0 - math.fsum(math.exp(-expected) * expected**k / math.factorial(k) for k in range(n_suspicious))
    return (
        f"{'FAILED' if n_failed else 'PASSED'}: {n_tests} tests, {n_failed} failed; {n_suspicious} suspicious, "
        f"{expected:.1f} expected of a perfect source (as many or more: {max(at_least, 0.0):.2g})."
    )


def outcomes_of(program: Path, names: list[str], batteries: list[str], n_rounds: int, n_bits: int) -> Iterator[Outcome]:
    """Every battery on every order, one after another."""
    n_runs = len(names) * len(batteries)
    for i, (battery, name) in enumerate((battery, name) for battery in batteries for name in names):
        print(f"[{i + 1}/{n_runs}] {battery}: {name}", file=sys.stderr, flush=True)
        yield run_battery(program, name, battery, n_rounds, n_bits)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and the verdict."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--batteries", nargs="+", choices=BATTERIES, default=["smallcrush"], metavar="BATTERY")
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), metavar="ORDER")
    parser.add_argument("--list", action="store_true", help="list the orders and stop")
    parser.add_argument("--bits", type=int, default=2**26, help="bits for rabbit and alphabit (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the cipher; few must fail (default 20)")
    parser.add_argument("--testu01", type=Path, default=Path("/usr"), help="where TestU01 is installed (default /usr)")
    parser.add_argument("--build", type=Path, help="folder for the program (default: a temporary one)")
    parser.add_argument("--check-only", action="store_true", help="compare the words with the package and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, order in ORDERS.items():
            print(f"{name}: {order.meaning} ({order.address}; {order.words} words, {order.bits} bits)")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.build or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        program = build(folder, options.testu01)
        check_bits(program)
        for name in options.orders:
            check(program, ORDERS[name], options.rounds)
        print(f"The words of {len(options.orders)} orders match qpo_sim.random bit for bit.\n", flush=True)
        if options.check_only:
            return 0
        print(HEAD, flush=True)
        outcomes = []
        for outcome in outcomes_of(program, options.orders, options.batteries, options.rounds, options.bits):
            outcomes.append(outcome)
            print(row(outcome), flush=True)
        print(f"\n{verdict(outcomes)}")
    return 1 if any(o.outside(FAILED) for o in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
