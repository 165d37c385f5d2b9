"""The colours of the series, the same on the page and in figures for papers."""

from __future__ import annotations

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""The colour-blind-safe palette of Okabe and Ito; each colour goes with a hatch, a marker and a dash of its own."""
ON_DARK = ("#3F93CF", "#B47C00", "#1F9B76", "#B56A93", "#C4622D", "#2F7FAE")
"""The same hues, on a dark page."""


def style_sheet() -> str:
    """Return the colours as CSS variables `--s0`, `--s1`, ... for screens, dark screens, and print."""
    light, dark = (
        "".join(f" --s{number}: {colour};" for number, colour in enumerate(colours)) for colours in (COLOURS, ON_DARK)
    )
    return (
        f":root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"
        f"@media print {{ :root {{{light} }} }}\n"
    )
