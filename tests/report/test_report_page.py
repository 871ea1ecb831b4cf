import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from qpo_sim.errors import InputError
from qpo_sim.report import RunReport
from qpo_sim.report import page as page_module
from qpo_sim.report.page import render_page
from qpo_sim.report.svg import PALETTE

VOID = {"meta", "br", "link", "img", "hr", "input"}
SECTIONS = {
    "numbers": ("measures",),
    "equity": ("fan",),
    "losses": ("loss_histogram",),
    "liquidation": ("hazard", "measures"),
    "attribution": ("attribution",),
    "ledger": ("ledger",),
    "weights": ("weights",),
    "comparison": ("comparison",),
    "regimes": ("regime_history", "regime_table"),
    "correlation": ("correlation",),
    "convergence": ("convergence",),
    "worst": ("worst_paths",),
}


class Walk(HTMLParser):
    """Collects elements and checks that every one that opens closes, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.ids, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def walk(page):
    return Walk(page)


def sections(html):
    return set(re.findall(r'<section id="([a-z]+)">', html))


def test_page_is_well_formed_and_ids_are_unique(walk):
    assert len(walk.ids) == len(set(walk.ids))
    targets = {
        attrs[name][1:]
        for _, attrs in walk.elements
        for name in ("href", "xlink:href")
        if attrs.get(name, "").startswith("#")
    }
    assert targets <= set(walk.ids)


def test_page_is_one_file_without_script(page, walk):
    assert {tag for tag, _ in walk.elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "img", "base"})
    for tag, attrs in walk.elements:
        assert "src" not in attrs, tag
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,")), attrs
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|@font-face", without_namespaces)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(page.encode()) < 1_500_000


def test_page_is_accessible(walk):
    pictures = [attrs for tag, attrs in walk.elements if tag == "svg"]
    assert len(pictures) == 2 * 9
    assert all(attrs.get("role") == "img" and len(attrs.get("aria-label", "")) > 20 for attrs in pictures)
    heads = [attrs for tag, attrs in walk.elements if tag == "th"]
    assert heads
    assert all("scope" in attrs for attrs in heads)
    assert ("html", {"lang": "en"}) in walk.elements


def test_every_section_appears_and_has_its_sentence(page):
    assert sections(page) == {*SECTIONS, "made"}
    for block in re.findall(r'<section id="[a-z]+">(.*?)</section>', page, flags=re.S):
        lead = re.search(r'<p class="lead">(.*?)</p>', block, flags=re.S)
        assert lead is not None
        assert len(lead[1]) > 30
        assert "nan" not in lead[1].lower()


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_a_section_without_data_is_left_out(make_report, name):
    keep = {
        field: None
        for key, fields in SECTIONS.items()
        if key != name
        for field in fields
        if field not in SECTIONS[name]
    }
    alone = make_report(**keep)
    expected = {key for key, fields in SECTIONS.items() if set(fields) & set(SECTIONS[name])}
    assert sections(render_page(alone)[0]) == expected | {"made"}
    gone = make_report(**{field: None for fields in SECTIONS.values() for field in fields})
    assert name not in sections(render_page(gone)[0])


def test_empty_tables_count_as_absent(full_report):
    empty = RunReport("risk", "x", 1.0, 1.0, ledger=full_report.ledger.iloc[:0])
    assert sections(render_page(empty)[0]) == {"made"}


def test_replay_page(replay_report):
    html = render_page(replay_report)[0]
    Walk(html)
    assert sections(html) == {"replay", "regimes", "made"}
    assert "isolated DOGE liquidated" in html


def test_limit_chips_carry_words_not_only_colour(page):
    for kind, words in (("bad", "✕ breached"), ("near", "≈ within error"), ("good", "✓ within limit")):
        assert f'<span class="chip {kind}">{words}</span>' in page


def test_hostile_names_stay_text(make_report, full_report):
    evil = "<script>alert('x')</script>\"&--><b>$\\frac{1}{2}$"
    short = "<b>$x_1$"
    rename = {"account": {"cross margin": evil}}
    report = make_report(
        title=evil,
        hazard=full_report.hazard.replace(rename),
        measures=full_report.measures.replace(rename),
        attribution=full_report.attribution.replace({"position": {"SOL perpetual": evil}}),
        weights=full_report.weights.replace({"position": {"BTC": short}}),
        correlation={evil: full_report.correlation["calm"].rename(index={"BTC": evil}, columns={"BTC": evil})},
        limits=full_report.limits.assign(name=evil),
        worst_paths=full_report.worst_paths.assign(liquidated=evil),
        manifest={"note": evil, "config": {"name": evil}},
    )
    html = render_page(report)[0]
    walk = Walk(html)
    assert "<script" not in html
    assert {"script", "b"} & {tag for tag, _ in walk.elements} <= {"b"}
    assert all(attrs.get("style", "").startswith("left:") for tag, attrs in walk.elements if tag == "b")
    # Shown as it is, in tables and in figures (a dollar is a dollar, not mathematics).
    assert sum(evil in words for words in walk.words) > 8
    assert short in walk.words


def test_strange_alphabets_do_not_warn(make_report, full_report):
    render_page(make_report(weights=full_report.weights.assign(position=[f"比特{i}" for i in range(10)])))


def test_colours_follow_the_theme(page):
    body = page.split("</style>", 1)[1]
    assert "var(--blue)" in body
    assert not any(colour in body for colour in PALETTE.values())
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("n_assets", [1, 2, 40])
def test_any_number_of_assets_and_one_account(make_report, n_assets):
    names = [f"A{i}" for i in range(n_assets)]
    rng = np.random.default_rng(0)
    matrix = np.corrcoef(rng.standard_normal((n_assets, 50))) if n_assets > 1 else np.ones((1, 1))
    one = pd.DataFrame(
        {
            "account": [""],
            "day": [1],
            "hazard": [0.0],
            "hazard_std_error": [np.nan],
            "cumulative": [0.0],
            "cumulative_std_error": [np.nan],
        }
    )
    report = make_report(
        hazard=one,
        correlation={"only": pd.DataFrame(matrix, names, names)},
        weights=pd.DataFrame({"position": names, "before": 1.0 / n_assets, "after": np.nan, "equal": np.nan}),
        attribution=pd.DataFrame(
            {"position": names, "account": "", "contribution": 0.1, "std_error": np.nan, "share": 1.0 / n_assets}
        ),
    )
    html = render_page(report)[0]
    Walk(html)
    assert len(html.encode()) < 1_500_000


def test_long_histories_are_thinned(make_report):
    index = pd.date_range("2020-01-01", periods=40_000, freq="h")
    share = pd.DataFrame(0.5, index, ["calm", "wild"])
    price = pd.Series(np.linspace(1.0, 2.0, len(index)), index, name="BTC")
    html = render_page(make_report(regime_history=share, price_history=price))[0]
    assert len(html.encode()) < 1_500_000


def test_missing_package_is_one_sentence(full_report, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(InputError, match=r"needs jinja2.*pip install 'qpo-sim\[report\]'"):
        render_page(full_report)


def test_numbers_are_not_torn_from_their_units():
    assert (
        page_module.unbroken("a loss of 3.1 ± 0.2 % over 30 days")
        == "a loss of 3.1\u00a0±\u00a00.2\u00a0% over 30\u00a0days"
    )
