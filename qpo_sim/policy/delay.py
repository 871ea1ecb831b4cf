"""Delay between what a policy sees and when its orders are filled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qpo_sim import policy as policy_kinds
from qpo_sim.errors import InputError
from qpo_sim.policy.orders import DeskView, Orders, muted
from qpo_sim.types import Array, Context

BUILDERS = ("delayed",)

_MOST_STEPS = 24


class State(NamedTuple):
    """The state of the policy behind, and the views that it has not seen yet, oldest first."""

    policy: Any
    views: tuple[DeskView, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Delayed:
    """A policy whose orders are filled some steps after the end of the step on which it decided.

    The orders are in units, values and shares as they were decided, filled at the prices of the later step; transfers
    are limited by the cash of then.

    Attributes:
      policy: that decides.
      steps: the delay, at least 1 (static).

    Pathwise gradient: as the policy.
    """

    policy: Any
    steps: int = field(metadata={"static": True})

    def init(self, view: DeskView) -> State:
        """Nothing decided yet."""
        return State(self.policy.init(view), (view,) * self.steps)

    def halts(self, state: State) -> Array:
        """See `shutdown.Shutdown.halts`; 0 of a policy that never halts."""
        if hasattr(self.policy, "halts"):
            return self.policy.halts(state.policy)
        return jnp.zeros_like(state.views[0].cash)

    def step(self, context: Context, t: Array, state: State, view: DeskView) -> tuple[State, Orders]:
        """Orders after step t, decided after step t - `steps`."""
        seen, *later = state.views
        decided = t - self.steps
        after, orders = self.policy.step(context, jnp.maximum(decided, 0), state.policy, seen)
        acts = decided >= 0
        after = jax.tree.map(lambda new, old: jnp.where(acts, new, old), after, state.policy)
        return State(after, (*later, view)), muted(orders, acts * jnp.ones_like(view.cash))


def delayed(
    *,
    policy: Mapping[str, Any],
    steps: int = 1,
    accounts: Sequence[str],
    loans: Sequence[str],
    assets: Sequence[str],
    spot: Sequence[str],
    account_assets: Sequence[Sequence[int]],
    account_options: Sequence[Sequence[int]],
    n_positions: Sequence[int],
    capital: float,
    dtype: Any = jnp.float32,
) -> Delayed:
    """Another policy, its orders filled later.

    Args:
      policy: its description, as in a book.
      steps: of delay, 1 to 24; left out of the book's description, a policy has none.
      accounts: known by the book, as everything that follows.
      loans: see there.
      assets: see there.
      spot: see there.
      account_assets: see there.
      account_options: see there.
      n_positions: see there.
      capital: see there.
      dtype: precision of the paths.

    Raises:
      InputError: a delay out of bounds, or what the policy's builder refuses.
    """
    if int(steps) != steps or not 1 <= steps <= _MOST_STEPS:
        raise InputError(f"delayed: steps is {steps}; it must be a whole number in 1..{_MOST_STEPS}.")
    if not isinstance(policy, Mapping):
        raise InputError(f"delayed: policy is {policy!r}; describe one policy, e.g. {{kind: rebalance, ...}}.")
    known = {
        "accounts": accounts,
        "loans": loans,
        "assets": assets,
        "spot": spot,
        "account_assets": account_assets,
        "account_options": account_options,
        "n_positions": n_positions,
        "capital": capital,
        "dtype": dtype,
    }
    return Delayed(policy_kinds.build(policy, "delayed.policy", known), int(steps))
