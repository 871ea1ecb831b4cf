"""From plain values to dataclasses: what is converted, what is refused, and in which words."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from qpo_sim.config.build import build, is_in_schema
from qpo_sim.errors import InputError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Shape:
    kind: str


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    kind: Literal["square"] = "square"
    side: float | dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    title: str
    n_copies: int = 1
    is_final: bool = False
    paper: Literal["auto", True, False] = "auto"
    shapes: tuple[Shape, ...] = ()
    corner: tuple[float, float] | None = None
    colours: dict[str, int] = field(default_factory=dict)


def test_builds_all_the_way_down():
    drawing = build(
        Drawing,
        {
            "title": 7,
            "n_copies": 2e6,
            "paper": True,
            "shapes": [{"kind": "circle", "radius": 2}, {"kind": "square", "side": {"a": 1}}],
            "corner": [0, 1.5],
            "colours": {"red": 3},
        },
    )
    assert drawing == Drawing(
        title="7",
        n_copies=2_000_000,
        paper=True,
        shapes=(Circle(radius=2.0), Square(side={"a": 1.0})),
        corner=(0.0, 1.5),
        colours={"red": 3},
    )
    assert isinstance(drawing.n_copies, int)
    assert isinstance(drawing.shapes[0].radius, float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"titel": "x"}, ["titel is not an option", "did you mean 'title'?"]),
        ({"title": None}, ["title is null", "text"]),
        ({"title": ["x"]}, ["title must be text", "['x']"]),
        ({"n_copies": 1.5}, ["n_copies must be a whole number", "1.5"]),
        ({"n_copies": True}, ["n_copies must be a whole number", "True"]),
        ({"n_copies": "many"}, ["n_copies must be a whole number", "'many'"]),
        ({"n_copies": float("inf")}, ["n_copies must be finite"]),
        ({"n_copies": 10**400}, ["n_copies must be finite"]),
        ({"is_final": 1}, ["is_final must be true or false"]),
        ({"paper": 1}, ["paper=1", "auto, true, false"]),
        ({"paper": "atuo"}, ["did you mean 'auto'?"]),
        ({"shapes": "circle"}, ["shapes must be a list"]),
        ({"shapes": [{"kind": "circle"}]}, ["shapes[0].radius is missing"]),
        ({"shapes": [{"kind": "cirle", "radius": 1}]}, ["shapes[0].kind='cirle'", "did you mean 'circle'?"]),
        ({"shapes": [{"radius": 1}]}, ["shapes[0].kind is missing", "circle, square"]),
        ({"shapes": [{"kind": "square", "side": float("nan")}]}, ["shapes[0].side must be finite"]),
        ({"shapes": [{"kind": "square", "side": {"a": "b"}}]}, ["shapes[0].side.a must be a number", "'b'"]),
        ({"shapes": [3]}, ["shapes[0] must hold named options"]),
        ({"corner": [1]}, ["corner must have 2 entries, got 1"]),
        ({"colours": {True: 1}}, ["colours has the name True", "quotes"]),
        ({"colours": [1]}, ["colours must map names to values"]),
    ],
)
def test_refuses_naming_key_value_and_rule(change, words):
    with pytest.raises(InputError) as refused:
        build(Drawing, {"title": "x"} | change)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_field():
    with pytest.raises(InputError, match="title is missing"):
        build(Drawing, {})


def test_did_you_mean_ignores_case_and_lists_the_few():
    assert did_you_mean("btc", ["ETH", "BTC"]) == "did you mean 'BTC'?"
    assert did_you_mean("zzz", ["ETH", "BTC"]) == "choose from ETH, BTC"
    assert did_you_mean("zzz", []) == "there is none to choose from"
    assert did_you_mean("zzz", [f"a{i}" for i in range(30)]).endswith(", ...")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("title", True),
        ("titel", False),
        ("shapes.0.radius", True),
        ("shapes.0.side.anything", True),
        ("shapes.first.radius", False),
        ("colours.green", True),
        ("colours.green.dark", False),
    ],
)
def test_is_in_schema_follows_kinds_lists_and_tables(key, expected):
    assert is_in_schema(Drawing, key) is expected
