"""Numbers and names for people: the error decides how many digits a value shows."""

from __future__ import annotations

import math
from typing import NamedTuple

Z95 = 1.959963984540054  # two-sided 95 % of a standard normal
_MOST_DIGITS = 5

LABELS = {
    "value_at_risk": "Value at risk",
    "conditional_value_at_risk": "Conditional value at risk",
    "expected_max_drawdown": "Mean maximum drawdown",
    "max_drawdown_quantile": "Maximum drawdown, quantile",
    "liquidation_probability": "Probability of liquidation",
    "expected_time_to_liquidation": "Mean time to liquidation, if any",
    "time_to_liquidation_quantile": "Day by which a share of the liquidations has happened",
    "expected_bad_debt": "Mean loss borne by others",
    "bad_debt_if_liquidated": "Loss borne by others, if liquidated",
    "expected_liquidation_cost": "Mean cost of liquidation",
    "liquidation_cost_if_liquidated": "Cost of liquidation, if any",
    "needless_liquidation_probability": "Probability of a needless liquidation",
    "mean_return": "Mean return",
    "volatility": "Volatility of the return",
    "sharpe_ratio": "Sharpe ratio",
    "sortino_ratio": "Sortino ratio",
    "probability_of_loss": "Probability of loss",
}
SHORT_LABELS = {
    **LABELS,
    "value_at_risk": "VaR",
    "conditional_value_at_risk": "CVaR",
    "expected_max_drawdown": "Mean max drawdown",
    "max_drawdown_quantile": "Max drawdown",
    "liquidation_probability": "P(liquidation)",
    "expected_time_to_liquidation": "Time to liquidation",
}
PERCENT_UNITS = ("fraction of capital", "fraction of peak", "probability")
HIGHER_IS_BETTER = frozenset({"mean_return", "sharpe_ratio", "sortino_ratio", "expected_time_to_liquidation"})
_UNIT_OF = {
    "liquidation_probability": "probability",
    "probability_of_loss": "probability",
    "expected_time_to_liquidation": "days",
    "time_to_liquidation_quantile": "days",
    "needless_liquidation_probability": "probability",
    "venue_liquidation_probability": "probability",
    "sharpe_ratio": "per year ratio",
    "sortino_ratio": "per year ratio",
}


class Shown(NamedTuple):
    """An estimate in text: the value, its 95 % half-width ("" if unknown) and the unit, which may be ""."""

    value: str
    half_width: str
    unit: str

    def __str__(self) -> str:
        """Value, error and unit on one line: `31.2 ± 0.3 %`."""
        error = f" ± {self.half_width}" if self.half_width else ""
        return f"{self.value}{error}{' ' + self.unit if self.unit else ''}"


# Per cent below which a number and its error are nothing.
_NO_PERCENT = 5e-6


def decimals(value: float, half_width: float = math.nan) -> int:
    """Decimal places to show (negative: tens, hundreds, ...).

    The half-width shows one significant digit, two if it starts with a one; without it the value shows three
    significant digits. The value never shows more than five.
    """
    size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else None
    if not (math.isfinite(half_width) and half_width > 0.0):
        return 2 if size is None else 2 - size
    exponent = math.floor(math.log10(half_width))
    places = -exponent + (1 if half_width / 10.0**exponent < 1.95 else 0)
    return places if size is None else min(places, _MOST_DIGITS - 1 - size)


def number(value: float, places: int) -> str:
    """A number rounded to `places` (may be negative), with thousands separators and no minus zero."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else ("inf" if value > 0.0 else "-inf")
    text = f"{round(value, places):,.{max(places, 0)}f}"
    return text.lstrip("-") if not any(digit in text for digit in "123456789") else text


def significant(value: float, digits: int = 3) -> str:
    """A number with no known error, at this many significant digits."""
    return number(value, decimals(value) + digits - 3)


def show(
    value: float, std_error: float = math.nan, *, scale: float = 1.0, unit: str = "", whole: bool = False
) -> Shown:
    """An estimate as text.

    Args:
        value: the estimate.
        std_error: its standard error; NaN if unknown. The text shows 1.96 times it.
        scale: factor from the value to what is shown, e.g. 100 for per cent.
        unit: what to print behind it.
        whole: show no decimal places (money).
    """
    value, half = value * scale, Z95 * std_error * scale
    if unit == "%" and abs(value) < _NO_PERCENT and half < _NO_PERCENT:
        value, half = 0.0, 0.0
    places = decimals(value, half)
    if whole:
        places = min(places, 0)
    if not math.isfinite(half):
        error = ""
    elif half == 0.0:
        error = "0"
    else:
        error = number(half, places)
        if not any(digit in error for digit in "123456789"):  # the cap on digits hid it
            error = f"<{number(10.0**-places, places)}"
    return Shown(number(value, places), error, unit)


def base(measure: str) -> str:
    """The measure of a name like `liquidation_probability:account`."""
    return measure.partition(":")[0]


def unit_of(measure: str) -> str:
    """The unit that a measure has when its table does not say."""
    return _UNIT_OF.get(base(measure), "fraction of capital")


def show_in_unit(value: float, std_error: float, unit: str) -> Shown:
    """An estimate in its own unit: fractions and probabilities in per cent."""
    if unit in PERCENT_UNITS:
        return show(value, std_error, scale=100.0, unit="%")
    if unit == "USD":
        return show(value, std_error, unit="USD", whole=True)
    return show(value, std_error, unit="days" if unit == "days" else "")


def percent(level: float) -> str:
    """A confidence level or a share without error: 0.999 -> `99.9 %`."""
    return f"{round(100.0 * level, 6):g} %"


def label(measure: str, level: float = math.nan, *, short: bool = False) -> str:
    """A measure's name for people, with its level if it has one."""
    names = SHORT_LABELS if short else LABELS
    what, _, account = measure.partition(":")
    name = names.get(what, what.replace("_", " ")) + (f", {account}" if account else "")
    if level is None or not math.isfinite(level):
        return name
    return f"{name} {percent(level)}" if short else f"{name}, {percent(level)}"


def plural(count: int, noun: str) -> str:
    """`1 path`, `2,000 paths`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shorten(name: str, length: int) -> str:
    """A name for a figure: cut with an ellipsis where it would leave no room for the drawing."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def join(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def days(value: float) -> str:
    """A number of days: `30 days`, `1 day`, `0.5 days`."""
    return f"{value:g} {'day' if value == 1 else 'days'}"
