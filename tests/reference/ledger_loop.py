"""Margin accounts and loans path by path in plain numpy, from the definitions of the domain reference (float64).

Written against the rules, not against the kernel: a loop over steps and nothing else. Money in units of the capital,
prices relative to the start.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class PerpetualAccount:
    margin: float
    quantity: np.ndarray
    entry: np.ndarray
    tiers: list  # rows (notional floor, maintenance rate), in units of the capital
    funding_rate: float = 0.0
    fee: float = 0.0
    slippage: float = 0.0
    interval_hours: float = 8.0


@dataclass
class LoanAccount:
    collateral: np.ndarray
    threshold: np.ndarray
    bonus: np.ndarray
    debt_cash: float
    debt: np.ndarray
    rate_per_hour: float = 0.0
    close_factor: float = 0.5
    full_close_health: float = 0.95
    small: float = 0.0


@dataclass
class Story:
    equity: list = field(default_factory=list)
    hit_probability: list = field(default_factory=list)
    accounts: dict = field(
        default_factory=lambda: dict.fromkeys(
            ("price", "funding", "interest", "fees", "liquidation", "trading", "income"), 0.0
        )
    )
    components: np.ndarray | None = None
    liquidated: bool = False
    start_equity: float = 0.0


def bracket_margin(tiers, notional: float) -> float:
    """Maintenance margin as the integral of the marginal rate."""
    total, edges = 0.0, [*(f for f, _ in tiers[1:]), np.inf]
    for (low, rate), high in zip(tiers, edges, strict=True):
        total += rate * max(min(notional, high) - low, 0.0)
    return total


def _tier(tiers, notional: float) -> tuple[float, float]:
    """Rate and deduction of the tier that holds the notional."""
    deduction, chosen = 0.0, (tiers[0][1], 0.0)
    for (_, before), (floor, rate) in zip(tiers[:-1], tiers[1:], strict=True):
        deduction += floor * (rate - before)
        if notional > floor:
            chosen = (rate, deduction)
    return chosen


def _crossing(x0: float, x1: float, variance: float) -> float:
    return 1.0 if x0 <= 0.0 or x1 <= 0.0 else float(np.exp(-2.0 * x0 * x1 / variance))


def stamps(step_hours: float, interval: float, n_steps: int) -> list[int]:
    """Funding stamps in each step (start, end], the first one a full interval after the start."""
    times = [interval * k for k in range(1, int(n_steps * step_hours / interval + 1e-9) + 1)]
    return [sum(1 for s in times if t * step_hours + 1e-9 < s <= (t + 1) * step_hours + 1e-9) for t in range(n_steps)]


def perpetual_path(account, prices, covariance, uniforms, *, step_hours, bridge) -> Story:
    """prices (steps + 1, positions), covariance (steps, positions, positions) of the log-returns, uniforms (steps,)."""
    q, entry, n_steps = account.quantity, account.entry, len(uniforms)
    due = stamps(step_hours, account.interval_hours, n_steps)
    wallet = account.margin
    story = Story(start_equity=wallet + float(q @ (1.0 - entry)))
    alive, payoff, survival = True, 0.0, 1.0

    def sides(p, m):
        up = down = 0.0
        w_up, w_down = np.zeros(q.size), np.zeros(q.size)
        cash = m - float(q @ entry)
        for i in range(q.size):
            rate, deduction = _tier(account.tiers, abs(q[i]) * p[i])
            cash += deduction
            if q[i] > 0:
                w_up[i] = q[i] * (1.0 - rate) * p[i]
            else:
                w_down[i] = -q[i] * (1.0 + rate) * p[i]
        up, down = w_up.sum() + max(cash, 0.0), w_down.sum() + max(-cash, 0.0)
        return np.log(up / down), w_up / up - w_down / down

    before, _ = sides(prices[0], wallet)
    for t in range(n_steps):
        p = prices[t + 1]
        payment = due[t] * account.funding_rate * float(q @ p)
        wallet -= payment
        if alive:
            story.accounts["funding"] -= payment
        equity = wallet + float(q @ (p - entry))
        maintenance = sum(bracket_margin(account.tiers, abs(q[i]) * p[i]) for i in range(q.size))
        x, w = sides(p, wallet)
        assert (x <= 0.0) == (equity <= maintenance) or abs(x) < 1e-12  # the log distance is the margin rule
        hit_at = p
        if bridge:
            slope = covariance[t] @ w
            variance = float(w @ slope)
            crossing = _crossing(before, x, variance)
            hit_at = p * np.exp(-x * slope / variance)
        else:
            crossing = float(equity <= maintenance)
        survival *= 1.0 - crossing
        if alive and uniforms[t] < crossing:
            alive = False
            at_hit = wallet + float(q @ (hit_at - entry))
            gross = float(np.abs(q) @ hit_at)
            payoff = max(at_hit - account.fee * gross - account.slippage * gross, 0.0)
            story.accounts["fees"] -= account.fee * gross
            story.accounts["liquidation"] += payoff - at_hit + account.fee * gross
            story.accounts["price"] = float(q @ (hit_at - 1.0))
            story.components = q * (hit_at - 1.0)
        if alive:
            story.accounts["price"] = float(q @ (p - 1.0))
            story.components = q * (p - 1.0)
        story.equity.append(equity if alive else payoff)
        story.hit_probability.append(1.0 - survival)
        before = x
    story.liquidated = not alive
    return story


def loan_path(account, collateral_prices, debt_prices, covariance, uniforms, *, step_hours, bridge) -> Story:
    """Prices (steps + 1, assets); covariance over collateral then debt assets."""
    n_c = account.collateral.size
    held, owed = 1.0, 1.0  # shares of collateral and debt left
    story = Story(start_equity=float(account.collateral.sum() - account.debt_cash - account.debt.sum()))
    story.components = np.zeros(n_c + account.debt.size)
    survival, first_x = 1.0, None

    def growth(t):
        return np.exp(account.rate_per_hour * step_hours * t)

    def sides(t, pc, pd):
        weighted = account.threshold * account.collateral * pc
        debts = growth(t) * account.debt * pd
        debt = growth(t) * account.debt_cash + debts.sum()
        return np.log(weighted.sum() / debt), np.concatenate([weighted / weighted.sum(), -debts / debt])

    first_x, _ = sides(0, collateral_prices[0], debt_prices[0])
    for t in range(len(uniforms)):
        pc, pd = collateral_prices[t + 1], debt_prices[t + 1]
        pc0, pd0 = collateral_prices[t], debt_prices[t]
        is_open = held > 1e-6 and owed > 1e-6
        x, w = sides(t + 1, pc, pd)
        shift = np.log(held / owed) if is_open else 0.0
        if bridge:
            slope = covariance[t] @ w
            variance = float(w @ slope)
            crossing = _crossing(first_x + shift, x + shift, variance)
            first = _crossing(first_x, x, variance)
        else:
            crossing, first = float(x + shift <= 0.0), float(x <= 0.0)
        survival *= 1.0 - first
        # interest on what was owed at the step's start, at its prices
        g0, g1 = growth(t), growth(t + 1)
        story.accounts["interest"] -= owed * (g1 - g0) * (account.debt_cash + float(account.debt @ pd0))
        hit_c, hit_d, held_after, owed_after = pc, pd, held, owed
        if is_open and uniforms[t] < crossing:
            health = np.exp(x + shift)
            if bridge:
                factor = np.exp(-(x + shift) * slope / variance)
                hit_c, hit_d, health = pc * factor[:n_c], pd * factor[n_c:], 1.0
            value = account.collateral * hit_c
            collateral = held * value.sum()
            debt = owed * g1 * (account.debt_cash + float(account.debt @ hit_d))
            bonus = float(account.bonus @ value) / value.sum()
            ordinary = health > account.full_close_health and collateral >= account.small and debt >= account.small
            repaid = debt * (account.close_factor if ordinary else 1.0)
            bad = 0.0
            if repaid * (1.0 + bonus) >= collateral:
                repaid = collateral / (1.0 + bonus)
                bad = debt - repaid
            seized = min(repaid * (1.0 + bonus), collateral)
            held_after, owed_after = held * (1.0 - seized / collateral), owed * (1.0 - (repaid + bad) / debt)
            story.accounts["liquidation"] += repaid + bad - seized
            story.liquidated = True
        moves = np.concatenate(
            [
                account.collateral * (held * (hit_c - pc0) + held_after * (pc - hit_c)),
                -g1 * account.debt * (owed * (hit_d - pd0) + owed_after * (pd - hit_d)),
            ]
        )
        story.components = story.components + moves
        story.accounts["price"] += float(moves.sum())
        held, owed = held_after, owed_after
        story.equity.append(
            held * float(account.collateral @ pc) - owed * g1 * (account.debt_cash + float(account.debt @ pd))
        )
        story.hit_probability.append(1.0 - survival)
        first_x = x
    return story
