import math

import pytest

from qpo_sim.report import formatting as fmt
from qpo_sim.report.figures import spread


@pytest.mark.parametrize(
    ("value", "std_error", "scale", "expected"),
    [
        (0.3124, 0.0015, 100.0, "31.2 ± 0.3"),  # the error's one digit decides
        (0.1234, 0.0008, 100.0, "12.34 ± 0.16"),  # a leading one shows two
        (0.00022, 0.0015, 100.0, "0.0 ± 0.3"),  # an error larger than the value
        (0.3124, math.nan, 100.0, "31.2"),  # three significant digits
        (0.3124, 0.0, 100.0, "31.2 ± 0"),
        (-0.3124, 0.0015, 100.0, "-31.2 ± 0.3"),
        (1234567.0, 1600.0, 1.0, "1,235,000 ± 3,000"),
        (0.0, 0.0, 1.0, "0.00 ± 0"),
        (0.0, 1e-6, 100.0, "0.0000 ± 0.0002"),
        (0.5, 1e-9, 1.0, "0.50000 ± <0.00001"),  # never more than five digits
        (math.nan, 0.1, 1.0, "n/a ± 0.2"),
        (math.inf, math.nan, 1.0, "inf"),
    ],
)
def test_error_decides_the_digits(value, std_error, scale, expected):
    assert str(fmt.show(value, std_error, scale=scale)) == expected


def test_half_width_is_two_sided_95_percent():
    from scipy.stats import norm

    assert norm.ppf(0.975) == pytest.approx(fmt.Z95, rel=1e-14)


def test_no_minus_zero_and_no_cents_on_money():
    assert fmt.number(-0.0004, 2) == "0.00"
    assert str(fmt.show(12345.678, 0.1, unit="USD", whole=True)) == "12,346 ± <1 USD"


def test_names_and_levels():
    assert fmt.label("value_at_risk", 0.999) == "Value at risk, 99.9 %"
    assert fmt.label("conditional_value_at_risk", 0.975, short=True) == "CVaR 97.5 %"
    assert fmt.label("my_own_measure") == "my own measure"
    assert fmt.percent(0.99) == "99 %"
    assert fmt.join(["a", "b", "c"]) == "a, b and c"
    assert fmt.plural(1, "path") == "1 path"
    assert fmt.plural(2000, "path") == "2,000 paths"


def test_spread_labels_keep_order_distance_and_range():
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    crowded = spread([0.0, 0.01, 0.02, 0.99, 1.0], 0.08)
    assert all(b - a >= 0.08 - 1e-12 for a, b in zip(crowded[:-1], crowded[1:], strict=True))
    assert crowded[0] >= 0.0
    assert crowded[-1] <= 1.0
