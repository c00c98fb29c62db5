"""HTML pages that stand alone: no script, no network, light or dark, for a screen of any width or paper.

standalone_page("Features of love", "<p>12 features</p>", "<article>…</article>")
"""

from __future__ import annotations

from html import escape

from fgsteer.errors.escaping import escape_text

SHADES = 5  # steps of the colour scale, besides none
LIGHT = {
    "text": "#1b1b1b",
    "page": "#f6f5f2",
    "card": "#ffffff",
    "quiet": "#5c5c5c",
    "line": "#d9d6cf",
    "link": "#0b57a4",
}
LIGHT_SCALE = ("#fff3dc", "#ffe3b0", "#ffcf82", "#ffb957", "#ffa02e")
DARK = {
    "text": "#ececec",
    "page": "#141414",
    "card": "#1f1f1f",
    "quiet": "#a8a8a8",
    "line": "#3a3a3a",
    "link": "#8ec2ff",
}
DARK_SCALE = ("#352a18", "#4a371a", "#5f431a", "#754f18", "#8a5a13")

_STYLE = """
:root{color-scheme:light dark;%(light)s}
@media screen and (prefers-color-scheme:dark){:root{%(dark)s}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--page);color:var(--text);
 font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0 0 .25rem}h2{font-size:1.1rem;margin:0}p{margin:.25rem 0}
a{color:var(--link)}.quiet,dt{color:var(--quiet)}
main{display:grid;gap:1rem;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%%,34rem),1fr));margin-top:1rem}
article{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .75rem;margin:.5rem 0;font-size:.9rem}
dd{margin:0}dd code{background:var(--page);border-radius:.2rem;padding:0 .25rem;font-size:.85rem;white-space:pre-wrap}
ol{list-style:none;margin:.75rem 0 0;padding:0;font-size:.95rem}
li{display:grid;grid-template-columns:3.2rem 1fr;gap:.5rem;padding:.3rem 0;break-inside:avoid;
 border-top:1px solid var(--line)}
li>b{font-weight:400;font-size:.85rem;text-align:right;color:var(--quiet);font-variant-numeric:tabular-nums}
q{quotes:none;unicode-bidi:isolate}q span{border-radius:.15rem;white-space:pre-wrap}
mark{background:none;color:inherit}mark span{font-weight:600;text-decoration:underline;text-underline-offset:.15em}
.scale span{display:inline-block;padding:0 .4rem;color:var(--text)}.scale>span{white-space:nowrap;padding:0}
%(shades)s
@media print{html{font-size:9pt}body{padding:0;max-width:none;background:none}main{display:block}
 article{margin-bottom:.75rem}h2,dl{break-after:avoid}
 span{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def style() -> str:
    """The style sheet of a page, light or dark as the reader's screen is."""
    themes = {
        name: ";".join(f"--{key}:{value}" for key, value in [*plain.items(), *((f"s{n}", c) for n, c in shades)])
        for name, plain, shades in (
            ("light", LIGHT, enumerate(LIGHT_SCALE, 1)),
            ("dark", DARK, enumerate(DARK_SCALE, 1)),
        )
    }
    shades = "".join(f".s{n}{{background:var(--s{n})}}" for n in range(1, SHADES + 1))
    return _STYLE % {**themes, "shades": shades}


def standalone_page(heading: str, above: str, main: str, more_style: str = "") -> str:
    """An HTML page without links to other files, from a plain heading and markup that goes under and below it."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape_html(heading)}</title><style>{style()}{more_style}</style></head>\n"
        f"<body><header><h1>{escape_html(heading)}</h1>{above}</header>\n<main>{main}</main></body></html>\n"
    )


def escape_html(text: str) -> str:
    """Text as HTML that shows it and nothing else; control characters come out as escapes."""
    return escape(escape_text(text, keep=""))


def visible(text: str) -> str:
    """The text with signs in place of line breaks, control and direction characters."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "·" for c in text)
