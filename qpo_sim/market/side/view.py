"""What a side process sees of the market in one step, and what its outputs are called."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qpo_sim.numerics import Rows


class View(NamedTuple):
    """The market after the step.

    Attributes:
      log_return: log-return of the step by asset.
      log_price: cumulative log-return since the start by asset.
      masks: one-hot masks of the regime (without regime 0).
      volatility: conditional standard deviation of the step's return by asset.
      jump: sum of the step's log-jumps by asset, None without jumps.
      side: outputs of the side processes before this one, by name.
    """

    log_return: Rows
    log_price: Rows
    masks: tuple[Any, ...]
    volatility: Rows
    jump: Rows | None
    side: dict[str, Any]


def named(component: Any, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a side component by the names that other components, drivers and records use.

    They are those that the component gives them, preceded by `<name>_` where it has another name than its kind's own:
    a second `peg` named `dai` gives `dai_peg`.
    """
    prefix = "" if component.name == type(component).name else f"{component.name}_"
    return {prefix + output: rows for output, rows in outputs.items()}
