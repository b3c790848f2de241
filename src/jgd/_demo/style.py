"""How the pictures look: one colour for each thing throughout the report, and SVG that stands by itself."""

import base64
import io
from typing import Any

from jgd._errors import require

INK = "#1f2933"
FAINT = "#9aa5b1"
BLUE = "#2563a8"
ORANGE = "#d9680f"
GREEN = "#2e8b57"
RED = "#b8323a"
PURPLE = "#7b52ab"

RC: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#7b8794",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "jgd",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
}


def svg_uri(picture: Any) -> str:
    """Draws a picture and gives it as a `data:` address, for the `src` of an image."""
    require("matplotlib", "demo")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=picture.size)
        FigureCanvasSVG(figure)
        picture.draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
