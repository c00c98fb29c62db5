"""Texts that Markdown and HTML could take for markup, and a reader of pages."""

from __future__ import annotations

from html.parser import HTMLParser

MARKS = ["# a", "a\n# b", "<script>alert(1)</script>", "[a](http://b.c)", "![a](b)", "**a**", "`a`", "```\n# b", "a|b"]
MARKS += [
    "http://evil.example",
    "<http://evil.example>",
    "&lt;",
    "- a",
    "1. a",
    "> a",
    "a\n---",
    "===",
    "\\",
    "a\\",
    " ",
]
MARKS += [
    "[a]: http://b.c",
    "~~a~~",
    "| a |",
    "$x$",
    "_a_",
    "``",
    "` `",
    "\u2028# b",
    "a\r# b",
    "    a",
    "@b",
    "a\x00b",
]


class Checker(HTMLParser):
    """Tags opened, closed in order, and their attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def luminance(colour):
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
