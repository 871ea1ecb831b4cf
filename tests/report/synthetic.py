"""A made-up but plausible run: ten assets, three regimes, four accounts, a million paths. No simulator needed.

Run as a script to look at the page: `python tests/report/synthetic.py FOLDER`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd

from qpo_sim.report import RunReport

ASSETS = ("BTC", "ETH", "SOL", "BNB", "XRP", "ADA", "AVAX", "DOGE", "LINK", "LTC")
ACCOUNTS = ("cross margin", "isolated SOL", "isolated DOGE", "Aave loan")
REGIMES = ("calm", "normal", "turbulent")
HORIZON, N_PATHS, CAPITAL = 30, 1_000_000, 1_000_000.0


def make_report(**changes: Any) -> RunReport:
    """The whole synthetic report; `changes` replace fields."""
    rng = np.random.default_rng(20231231)
    losses = _losses(rng)
    content: dict[str, Any] = {
        "job": "optimize",
        "title": "Leveraged crypto book, 2020-2023 market",
        "capital": CAPITAL,
        "horizon_days": float(HORIZON),
        "n_paths": N_PATHS,
        "n_steps": HORIZON,
        "step_hours": 24.0,
        "assets": ASSETS,
        "measures": _measures(losses),
        "fan": _fan(rng, losses),
        "loss_histogram": _histogram(losses),
        "hazard": _hazard(),
        **_regimes(rng),
        "correlation": _correlation(rng),
        "weights": _weights(),
        "comparison": _comparison(losses),
        "attribution": _attribution(losses),
        "attribution_level": 0.99,
        "ledger": _ledger(),
        "convergence": _convergence(rng, losses),
        "optimizer_trace": _trace(rng),
        "worst_paths": _worst(rng),
        "limits": _limits(losses),
        "manifest": _manifest(),
    }
    content.update(changes)
    return RunReport(**content)


def make_replay() -> RunReport:
    """A report of job=replay: one path, one liquidation."""
    rng = np.random.default_rng(7)
    day = np.arange(HORIZON + 1)
    turbulent = (day >= 12) & (day < 20)
    common = np.where(turbulent, -0.035, 0.004) + 0.02 * rng.standard_normal(day.size)
    frame = pd.DataFrame(index=pd.Index(day, name="day"))
    for i, name in enumerate(ASSETS):
        moves = common * (0.8 + 0.06 * i) + 0.015 * rng.standard_normal(day.size)
        frame[f"price:{name}"] = np.exp(np.cumsum(np.where(day == 0, 0.0, moves)))
    market = frame.mean(axis=1).to_numpy()
    frame["equity"] = np.maximum(1.0 + 1.9 * (market - 1.0), 0.12)
    frame["regime"] = np.where(turbulent, 2, np.where(day >= 8, 1, 0))
    for name, level in zip(ACCOUNTS, (2.6, 1.9, 1.7, 1.6), strict=True):
        frame[f"margin_ratio:{name}"] = np.maximum(level + 3.0 * (market - 1.0), 0.9)
    events = pd.DataFrame(
        {
            "day": [12, 15, 18],
            "event": ["regime turns turbulent", "isolated DOGE liquidated", "isolated SOL liquidated"],
        }
    )
    return RunReport(
        "replay", "Path 417203 of the default run", CAPITAL, float(HORIZON), 1, HORIZON, 24.0, ASSETS,
        regime_table=_regimes(rng)["regime_table"], replay=frame, replay_events=events, manifest=_manifest(),
    )  # fmt: skip


def _losses(rng: np.random.Generator) -> np.ndarray:
    scale = np.where(rng.random(200_000) < 0.25, 0.2, 0.085)
    return 1.0 - np.maximum(np.exp(scale * rng.standard_t(4.0, scale.size) + 0.012), 0.09)


def _tail(losses: np.ndarray, level: float) -> tuple[float, float]:
    var = float(np.quantile(losses, level))
    return var, float(losses[losses >= var].mean())


def _measures(losses: np.ndarray) -> pd.DataFrame:
    nan, rows = np.nan, []
    for horizon in (10.0, 30.0):
        shrink = np.sqrt(horizon / HORIZON)
        for level in (0.95, 0.99, 0.999):
            var, cvar = _tail(losses * shrink, level)
            error = 0.0006 / np.sqrt(1.0 - level) * 0.25
            rows.append(("value_at_risk", "", horizon, level, var, error, "fraction of capital"))
            rows.append(("conditional_value_at_risk", "", horizon, level, cvar, 1.3 * error, "fraction of capital"))
    fraction, ratio = "fraction of capital", "per year ratio"
    rows += [
        ("expected_max_drawdown", "", 30.0, nan, 0.1672, 0.00011, fraction),
        ("max_drawdown_quantile", "", 30.0, 0.95, 0.3911, 0.0005, fraction),
        ("mean_return", "", 30.0, nan, 0.0123, 0.00017, fraction),
        ("volatility", "", 30.0, nan, 0.1713, 0.0003, fraction),
        ("sharpe_ratio", "", 30.0, nan, 0.25, 0.0035, ratio),
        ("sortino_ratio", "", 30.0, nan, 0.41, 0.006, ratio),
        ("probability_of_loss", "", 30.0, nan, 0.4634, 0.0005, "probability"),
        ("liquidation_probability", "", 30.0, nan, 0.1391, 0.00034, "probability"),
    ]
    for account, probability, time in zip(
        ACCOUNTS, (0.0231, 0.0874, 0.1204, 0.0009), (18.2, 14.9, 13.1, 21.4), strict=True
    ):
        error = np.sqrt(probability * (1.0 - probability) / N_PATHS)
        rows.append(("liquidation_probability", account, 30.0, nan, probability, error, "probability"))
        rows.append(
            ("expected_time_to_liquidation", account, 30.0, nan, time, 7.0 / np.sqrt(probability * N_PATHS), "days")
        )
    names = ["measure", "account", "horizon_days", "level", "value", "std_error", "unit"]
    return pd.DataFrame(rows, columns=names)


def _fan(rng: np.random.Generator, losses: np.ndarray) -> pd.DataFrame:
    day = np.arange(HORIZON + 1)
    levels = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}
    final = {name: np.log(np.quantile(1.0 - losses, level)) for name, level in levels.items()}
    frame = pd.DataFrame({"day": day, "mean": 1.0 + 0.0123 * day / HORIZON})
    for name, end in final.items():
        frame[name] = np.exp(end * np.sqrt(day / HORIZON))
    return frame


def _histogram(losses: np.ndarray) -> pd.DataFrame:
    density, edges = np.histogram(losses, bins=300, range=(-2.0, 1.0), density=True)
    return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "density": density})


def _hazard() -> pd.DataFrame:
    day, frames = np.arange(1, HORIZON + 1), []
    for account, total, peak in zip(ACCOUNTS, (0.0231, 0.0874, 0.1204, 0.0009), (14.0, 10.0, 8.0, 20.0), strict=True):
        shape = day * np.exp(-day / peak)
        hazard = total * shape / shape.sum()
        cumulative = np.cumsum(hazard)
        frames.append(
            pd.DataFrame(
                {
                    "account": account,
                    "day": day,
                    "hazard": hazard,
                    "hazard_std_error": np.sqrt(hazard / N_PATHS),
                    "cumulative": cumulative,
                    "cumulative_std_error": np.sqrt(cumulative * (1.0 - cumulative) / N_PATHS),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _regimes(rng: np.random.Generator) -> dict[str, Any]:
    n, state, states = 1460, 0, []
    transition = np.array([[0.97, 0.03, 0.0], [0.02, 0.95, 0.03], [0.0, 0.09, 0.91]])
    for _ in range(n):
        state = int(rng.choice(3, p=transition[state]))
        states.append(state)
    path = np.array(states)
    index = pd.date_range("2020-01-01", periods=n, name="date")
    sharp = np.eye(3)[path]
    smooth = pd.DataFrame(sharp).rolling(7, center=True, min_periods=1).mean().to_numpy()
    smooth = 0.02 / 3 + 0.98 * smooth
    returns = np.array([0.0025, 0.001, -0.004])[path] + np.array([0.017, 0.034, 0.07])[path] * rng.standard_normal(n)
    table = pd.DataFrame(
        {
            "regime": REGIMES,
            "share": [0.37, 0.47, 0.16],
            "mean_duration_days": [33.4, 19.8, 11.2],
            "dof": [4.8, 3.9, 3.1],
            "mean_volatility_per_year": [0.43, 0.79, 1.71],
            "mean_correlation": [0.48, 0.61, 0.79],
        }
    )
    return {
        "regime_history": pd.DataFrame(smooth / smooth.sum(axis=1, keepdims=True), index, list(REGIMES)),
        "price_history": pd.Series(7200.0 * np.exp(np.cumsum(returns)), index, name="BTC"),
        "regime_table": table,
    }


def _correlation(rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    n, out = len(ASSETS), {}
    for name, strength in zip(REGIMES, (0.68, 0.78, 0.89), strict=True):
        loading = np.clip(strength + 0.09 * rng.standard_normal(n), 0.3, 0.97)
        matrix = np.outer(loading, loading)
        np.fill_diagonal(matrix, 1.0)
        out[name] = pd.DataFrame(matrix, ASSETS, ASSETS)
    return out


def _weights() -> pd.DataFrame:
    before = np.array([0.24, 0.2, 0.14, 0.08, 0.06, 0.05, 0.06, 0.08, 0.05, 0.04])
    after = np.array([0.41, 0.17, 0.02, 0.18, 0.07, 0.03, 0.0, 0.0, 0.02, 0.1])
    return pd.DataFrame({"position": ASSETS, "before": before, "after": after, "equal": 0.1})


def _comparison(losses: np.ndarray) -> pd.DataFrame:
    cvar = _tail(losses, 0.99)[1]
    start = {
        "conditional_value_at_risk": cvar,
        "liquidation_probability": 0.1391,
        "mean_return": 0.0123,
        "sharpe_ratio": 0.25,
    }
    change = {
        "starting weights": (np.nan, np.nan, np.nan, np.nan),
        "optimised": (-0.142, -0.0813, -0.0009, 0.052),
        "equal weights": (0.021, 0.0112, 0.0002, -0.008),
    }
    error = (0.0011, 0.0003, 0.0004, 0.004)
    rows = []
    for portfolio, differences in change.items():
        for (measure, base), difference, std_error in zip(start.items(), differences, error, strict=True):
            is_start = not np.isfinite(difference)
            value = base + (0.0 if is_start else difference)
            level = 0.99 if measure == "conditional_value_at_risk" else np.nan
            rows.append(
                (portfolio, measure, level, value, 1.4 * std_error, difference, np.nan if is_start else std_error)
            )
    names = ["portfolio", "measure", "level", "value", "std_error", "difference", "difference_std_error"]
    return pd.DataFrame(rows, columns=names)


def _attribution(losses: np.ndarray) -> pd.DataFrame:
    share = np.array([0.11, 0.17, 0.29, 0.05, 0.04, 0.05, 0.08, 0.24, 0.04, -0.07])
    account = [
        "cross margin",
        "cross margin",
        "isolated SOL",
        *["cross margin"] * 4,
        "isolated DOGE",
        "cross margin",
        "Aave loan",
    ]
    position = [f"{name} perpetual" if i < 8 else f"{name} spot" for i, name in enumerate(ASSETS)]
    cvar = _tail(losses, 0.99)[1]
    return pd.DataFrame(
        {
            "position": position,
            "account": account,
            "contribution": share * cvar,
            "std_error": 0.0012 + 0.01 * abs(share) * cvar,
            "share": share,
        }
    )


def _ledger() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "account": ["price", "funding", "interest", "fees", "liquidation", "total"],
            "mean": [0.0261, -0.0058, -0.0011, -0.0009, -0.006, 0.0123],
            "std_error": [0.00017, 0.00001, 0.000002, 0.000001, 0.00003, 0.00017],
            "tail_mean": [-0.611, -0.0041, -0.001, -0.0014, -0.0725, -0.69],
        }
    )


def _convergence(rng: np.random.Generator, losses: np.ndarray) -> pd.DataFrame:
    counts, rows = np.unique(np.geomspace(4096, N_PATHS, 40).astype(int)), []
    goals = {
        ("value_at_risk", 0.99): (_tail(losses, 0.99)[0], 1.6),
        ("conditional_value_at_risk", 0.99): (_tail(losses, 0.99)[1], 2.0),
        ("conditional_value_at_risk", 0.999): (_tail(losses, 0.999)[1], 4.0),
        ("liquidation_probability", np.nan): (0.1391, 0.34),
    }
    for (measure, level), (value, sigma) in goals.items():
        steps = np.diff(counts, prepend=0)
        noise = np.cumsum(np.sqrt(steps) * rng.standard_normal(counts.size)) / counts
        rows += [
            (count, measure, level, value + sigma * z, sigma / np.sqrt(count))
            for count, z in zip(counts.tolist(), noise.tolist(), strict=True)
        ]
    return pd.DataFrame(rows, columns=["n_paths", "measure", "level", "value", "std_error"])


def _trace(rng: np.random.Generator) -> pd.DataFrame:
    step = np.arange(150)
    return pd.DataFrame(
        {"step": step, "objective": 0.53 + 0.15 * np.exp(-step / 25.0) + 0.004 * rng.standard_normal(step.size)}
    )


def _worst(rng: np.random.Generator) -> pd.DataFrame:
    loss = np.sort(0.85 + 0.06 * rng.random(10))[::-1]
    return pd.DataFrame(
        {
            "path": rng.integers(0, N_PATHS, 10),
            "loss": loss,
            "max_drawdown": loss + 0.02,
            "liquidated": ["cross margin, isolated SOL, isolated DOGE"] * 6
            + ["isolated SOL, isolated DOGE"] * 3
            + [""],
        }
    )


def _limits(losses: np.ndarray) -> pd.DataFrame:
    cvar = _tail(losses, 0.99)[1]
    return pd.DataFrame(
        {
            "name": ["CVaR 99 % over 30 days", "Liquidation of any account", "Mean max drawdown"],
            "measure": ["conditional_value_at_risk", "liquidation_probability", "expected_max_drawdown"],
            "limit": [0.45, 0.139, 0.25],
            "value": [cvar, 0.1391, 0.1672],
            "std_error": [0.00195, 0.00034, 0.00011],
            "status": ["breached", "within error", "ok"],
        }
    )


def _manifest() -> dict[str, Any]:
    return {
        "seed": 20240101,
        "versions": {"qpo_sim": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "numpy": "2.4.6"},
        "devices": ["cpu:0", "cpu:1"],
        "timings": {"calibration": 3.21, "compilation": 6.8, "simulation": 21.4, "report": 1.9},
        "fingerprints": {"data": "9f2c3b64d1f7a8e5".ljust(64, "0"), "config": "51ab90".ljust(64, "f")},
        "config": {
            "job": "optimize",
            "market": {"n_regimes": 3, "drift": "shrunk", "tail_cut": 0.99999},
            "simulation": {"n_paths": N_PATHS, "n_steps": HORIZON, "chunk_size": 65536},
            "risk": {"levels": [0.95, 0.99, 0.999]},
        },
    }


if __name__ == "__main__":
    from qpo_sim.report import terminal_summary, write_report

    root = sys.argv[1] if len(sys.argv) > 1 else "synthetic-report"
    for folder, report in ((root, make_report()), (f"{root}/replay", make_replay())):
        print(terminal_summary(report, write_report(report, folder)), end="\n\n")
