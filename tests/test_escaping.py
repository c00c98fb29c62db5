"""Text that is not trusted: on a terminal, in JSON and in Markdown, and without a secret."""

from __future__ import annotations

import base64
import html
import io
import json
import sys
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

import fgsteer as fg
from fgsteer.cli.printing import console, say
from fgsteer.cli.printing import json_text as terminal_json
from fgsteer.errors.escaping import escape_markdown, escape_text, json_text, markdown_code, redact
from fgsteer.features.cards import html_page
from fgsteer.features.description import FeatureRow
from fgsteer.saes.examples import Excerpt
from fgsteer.storage.files import write_tensors
from tests.helpers.cli import run_on_console
from tests.helpers.pages import MARKS
from tests.helpers.saes import make_sae

# an escape sequence, a bell, a carriage return, C1's CSI, directions, an end of line, half a character, tags
ACTING = "\x1b[2J \x1b]0;title\x07 a\rb \x9b31m \u202eabc\u2066 \u2028 \udc80 \U000e0041 \x7f \x00"
ENGLISH = "é 王　\u00a0👩\u200d🔬 می\u200cخواهم\n\tend"  # a space of Japanese, a joined emoji, a word of Persian
FEW = settings(deadline=None, max_examples=60)


def acts(text):
    return [
        c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200c\u200d"
    ]


@FEW
@given(st.text())
def test_escaped_text_acts_on_nothing_and_tells_all(text):
    shown = escape_text(text)
    assert not acts(shown)
    assert escape_text(shown) == shown
    if not acts(text):
        assert shown == text
    assert "\n" not in escape_text(text, keep="")


def test_what_is_escaped_and_what_is_not():
    assert escape_text("\x1b[2Ja\rb\x9b\u202e\x07") == r"\x1b[2Ja\rb\x9b\u202e\x07"
    assert escape_text(ENGLISH) == ENGLISH


@settings(FEW, max_examples=25)
@given(st.recursive(st.text() | st.integers() | st.none(), lambda of: st.lists(of) | st.dictionaries(st.text(), of)))
def test_json_stays_json(value):
    for options in ({}, {"indent": 1}, {"ensure_ascii": True}):
        text = json_text(value, **options)
        assert json.loads(text) == value
        assert not acts(text)
        assert "indent" in options or "\n" not in text


@FEW
@given(st.text() | st.sampled_from(MARKS) | st.text("#*_`[]<>()!|\\~&: a\n-"))
def test_markdown_reads_back_as_the_text_alone(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for made, expected in (
        (escape_markdown(text), " ".join(escape_text(text).split())),
        (markdown_code(text), escape_text(text, "")),
    ):
        heading, inline, _ = parser.parse(f"# x{made}x")
        assert heading.tag == "h1"
        assert {token.type for token in inline.children} <= {"text", "text_special", "code_inline"}
        assert "".join(token.content for token in inline.children) == f"x{expected or ' ' * bool(made)}x"
    cells = [t for t in parser.parse(f"| x |\n|---|\n| {escape_markdown(text)} |\n") if t.type == "td_open"]
    assert len(cells) == 1


KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=60)
WAYS: dict[str, Callable[[str], str]] = {
    "plain": lambda key: key,
    "JSON": json.dumps,
    "JSON in JSON": lambda key: json.dumps(json.dumps({"authorization": f"Bearer {key}"})),
    "URL": lambda key: quote(key, safe=""),
    "HTML": html.escape,
    "base64": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64, for URLs": lambda key: base64.urlsafe_b64encode(f"x{key}".encode()).decode().rstrip("="),
    "first half": lambda key: key[: max(12, len(key) // 2)],
    "last half": lambda key: key[-max(12, len(key) // 2) :],
}


@pytest.mark.parametrize("way", WAYS)
@FEW
@given(KEYS, st.text(max_size=20), st.text(max_size=20))
def test_a_secret_is_found_however_it_is_told(way, key, before, after):
    told = WAYS[way](key)
    left = redact(key, f"{before} {told} {after}")
    assert told not in left
    assert key not in left


def test_texts_without_the_secret_stay():
    key = "sk-proj-0123456789abcdef"
    for text in ("model not found: sk-proj-****cdef", "{'error': 'aGVsbG8gd29ybGQ='}", ""):
        assert redact(key, text) == text
    assert redact(key, f"bad {key}!") == "bad (key)!"
    assert redact("", "a") == redact("x", "a") == "a"  # servers without keys are given none, or an x


def test_pages_hold_no_control_characters_and_no_markup_of_others():
    text = f"{ACTING}\n<script>alert(1)</script>"
    excerpt = Excerpt((text, "a"), (1.0, 0.5), 0, 0)
    row = FeatureRow(1, 1.0, 0.5, (text,), text, (text,), "", (excerpt,), (text,))
    page = html_page(text, [row], [text])
    assert not acts(page)
    assert "<script" not in page
    assert page.count("&lt;script") >= 8


# ---------------------------------------------------------------- the terminal


def test_say_and_consoles_print_no_control_characters(capsys):
    say(ACTING)
    say(ACTING, err=True)
    screen = console()
    table = Table("name [bold]x[/bold]")
    table.add_row(Text(ACTING))
    table.add_row(ACTING)
    for shown in (ACTING, Text.assemble(("dim ", "dim"), ACTING), table, Markdown(f"| {ACTING} |\n|---|\n")):
        screen.print(shown)
    screen.print("[red]as it is[/red] :smile:")
    printed = capsys.readouterr()
    assert not acts(printed.out + printed.err)
    assert r"\x1b[2J" in printed.out
    assert "[red]as it is[/red] :smile:" in printed.out
    assert "[bold]x[/bold]" in printed.out


def test_json_for_a_terminal_is_json_without_control_characters(monkeypatch):
    for encoding in ("utf-8", "ascii", "latin-1"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        for value in (ACTING, ACTING.replace("\udc80", "")):  # half a character cannot be encoded
            text = terminal_json({value: [value]}, indent=2)
            assert json.loads(text) == {value: [value]}
            assert not acts(text)


def test_errors_and_warnings_hold_no_control_characters():
    for kind in (fg.FgsteerError, fg.DataError, fg.MissingError, fg.JudgeError, fg.PairingWarning):
        assert not acts(str(kind(ACTING)))
        assert r"\x1b[2J" in str(kind(ACTING))
    with pytest.warns(fg.PairingWarning, match=r"\\x1b"):
        warnings.warn(ACTING, fg.PairingWarning, stacklevel=1)


def test_what_prints_itself_holds_no_control_characters():
    vector = fg.SteeringVector(torch.ones(4), "blocks.1.hook_resid_post", provenance={"method": ACTING * 9})
    sae = replace(make_sae(), source=ACTING)
    for value in (vector, sae, Excerpt((ACTING, "a"), (1.0, 0.5), 0, 0), fg.SeenFeature(1, ACTING, 1.0, ACTING)):
        assert not acts(str(value) + repr(value))
        assert len(repr(value)) < 400


def test_nothing_that_a_file_holds_reaches_the_terminal_raw(tmp_path, monkeypatch):
    hostile = f"{ACTING}\nerror: all is well"
    (tmp_path / "contrast.json").write_text(
        json.dumps({"name": hostile, "positive": ["a"], "negative": [hostile, 3]}), encoding="utf-8"
    )
    write_tensors(tmp_path / "kind", {}, kind=hostile.replace("\udc80", ""), header={"note": ACTING[:30]})
    for arguments in (
        ("info", tmp_path / "kind"),
        ("info", tmp_path / "kind", "--json"),
        ("features", tmp_path / "kind"),
        ("collect", tmp_path / "contrast.json", "-o", tmp_path / "out"),
        ("features", tmp_path / hostile.replace("\x00", "")),
    ):
        status, out, err = run_on_console(monkeypatch, "utf-8", *arguments)
        assert status in (0, 2), (arguments, err)
        assert not acts(out + err), arguments
        assert "\nerror: all is well" not in out + err
        if status == 0 and out.startswith("{"):
            assert json.loads(out)["kind"] == hostile.replace("\udc80", "")
