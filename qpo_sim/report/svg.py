"""From a matplotlib drawing to a small, themed, byte-for-byte reproducible SVG.

Text stays text (`svg.fonttype: none`), so the page's system fonts draw it; matplotlib lays it out in DejaVu Sans,
which is wider than those, so nothing overflows. Every colour of `PALETTE` becomes a CSS variable in the page, which
is how the figures follow a dark theme, and stays a plain colour in the stand-alone file.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from qpo_sim.errors import InputError

# Distinct for the common kinds of colour blindness (Okabe and Ito's hues, darkened for white paper).
PALETTE = {
    "ink": "#1c2530",
    "muted": "#5b6876",
    "grid": "#e4e8ed",
    "paper": "#fefefe",
    "blue": "#1f66a8",
    "red": "#c4472b",
    "green": "#14806c",
    "amber": "#b97a0a",
    "purple": "#7d55a3",
    "sky": "#4a9fcf",
    "stone": "#8a95a1",
}
CYCLE = ("blue", "red", "green", "amber", "purple", "sky")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDE, NARROW = 10.0, 4.5  # inches; 72 SVG units each

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qpo_sim",
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.titlecolor": PALETTE["ink"],
    "axes.labelsize": 9.0,
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["stone"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PALETTE["stone"],
    "ytick.color": PALETTE["stone"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.labelcolor": PALETTE["muted"],
    "xtick.major.size": 3.0,
    "xtick.minor.size": 0.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.major.width": 0.6,
    "text.color": PALETTE["ink"],
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
}


class Picture(NamedTuple):
    """One figure, drawn for a wide and for a narrow page."""

    name: str
    description: str
    wide: str  # an <svg> element for the page
    narrow: str
    standalone: str  # a complete SVG file


def picture(name: str, description: str, draw: Callable[[bool], Any]) -> Picture:
    """Draw a figure for both widths.

    Args:
        name: letters and dashes; the prefix of the ids inside the page and the file's name.
        description: what the figure shows, for those who cannot see it.
        draw: makes the matplotlib figure; its argument says whether it is the narrow one.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
    except ImportError as error:
        raise InputError(missing("matplotlib")) from error
    drawn = []
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # The page's fonts draw the text; that DejaVu Sans lacks a letter of a name does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for is_narrow in (False, True):
            figure, stream = draw(is_narrow), io.StringIO()
            for axes in figure.axes:
                # What is drawn inside the axes cannot move them; measuring it would take most of the time.
                for artist in (*axes.lines, *axes.patches, *axes.collections):
                    artist.set_in_layout(False)
            FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
            drawn.append(stream.getvalue())
    wide, narrow = (_inline(text, f"{name}-{kind}", description) for text, kind in zip(drawn, "wn", strict=True))
    return Picture(name, description, wide, narrow, _standalone(drawn[0]))


def missing(package: str) -> str:
    """The message for a package that the report needs and does not find."""
    return f"The report needs {package}, which is not installed; install it with: pip install 'qpo-sim[report]'."


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, laid out automatically."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.06)  # pyright: ignore
    return made


def _tidy(text: str, prefix: str) -> str:
    """The <svg> element alone: no comments, metadata or unused ids; short numbers; ids unique in the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"(?<=[\s\"(,-])(\d+\.\d{3,})", lambda m: f"{float(m[1]):.2f}".rstrip("0").rstrip("."), text)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r"href=\"#([^\"]+)\"", text))
    text = re.sub(r" id=\"([^\"]+)\"", lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"href=\"#([^\"]+)\"", rf'href="#{prefix}-\1"', text)
    text = text.replace("'DejaVu Sans'", FONTS)
    return re.sub(r"\n\s*", "\n", text).strip()


def _standalone(text: str) -> str:
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _tidy(text, "f") + "\n"


def _inline(text: str, prefix: str, description: str) -> str:
    text = _tidy(text, prefix)
    for name, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    # The page decides how large it is; only the shape is the figure's.
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = re.search(r"<svg[^>]*>", text)
    box = re.search(r"viewBox=\"[^\"]*\"", text)
    assert head is not None and box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + text[head.end() :]
