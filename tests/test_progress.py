"""Progress: a bar where a person watches, nothing in pipes, and one place that decides."""

from __future__ import annotations

import inspect
import io
import sys
import types

import pytest

import fgsteer as fg
from fgsteer.display import progress as progress_module
from fgsteer.display.progress import reporting
from tests.helpers.saes import make_sae
from tests.helpers.tiny import tiny_model, word_tokenizer

TEXTS = ["the man sat", "a cat ran"]
PUBLIC = [
    fg.collect,
    fg.measure_density,
    fg.measure_examples,
    fg.output_scores,
    fg.calibrate,
    fg.calibrate_many,
    fg.calibrate_grid,
    fg.sweep,
    fg.EffectApproximator.measure,
    fg.Bench.run,
]


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self):
        return True


def as_terminal(monkeypatch):
    """Standard error as a terminal from here on; pytest's own stream would take the place of a fixture's."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    return stream


@pytest.fixture(scope="module")
def work():
    """A function that reads a few texts, with options of ``measure_density``."""
    model, tokenizer, sae = tiny_model("llama"), word_tokenizer(), make_sae("relu")
    return lambda **options: fg.measure_density(model, tokenizer, sae, TEXTS, **options)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_progress_is_on_by_default(function):
    assert inspect.signature(function).parameters["progress"].default is None


def test_a_terminal_gets_a_bar(work, monkeypatch):
    terminal = as_terminal(monkeypatch)
    work()
    assert "measuring density" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    terminal.truncate(0)
    work(progress=False)
    assert terminal.getvalue() == ""
    done: list[int] = []
    work(progress=done.append)
    assert done[-1] == 2
    assert terminal.getvalue() == ""


def test_pipes_and_other_processes_get_nothing(work, monkeypatch, capfd):
    terminal = as_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work()
    assert terminal.getvalue() == ""
    monkeypatch.undo()
    monkeypatch.setenv("FORCE_COLOR", "1")  # which says how to print, and not that someone watches
    work()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as of a program without a console
        work()
    assert capfd.readouterr() == ("", "")


def test_work_inside_other_work_has_no_bar(work, monkeypatch):
    terminal = as_terminal(monkeypatch)
    with reporting(None, "outer work", 1) as report:
        work()
        report(1)
    assert "outer work" in terminal.getvalue()
    assert "measuring density" not in terminal.getvalue()
    terminal.truncate(0)
    for silent in (False, lambda done: None):
        with reporting(silent, "outer work"):
            work()
    assert terminal.getvalue() == ""
    work()  # what was silenced is silenced no longer
    assert "measuring density" in terminal.getvalue()


def test_what_the_program_prints_stays_in_its_pipe(monkeypatch):
    terminal = as_terminal(monkeypatch)
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    with reporting(None, "work\x1b[2J [red]", 1):
        print("a result")
    assert piped.getvalue() == "a result\n"
    assert r"work\x1b[2J [red]" in terminal.getvalue()


def test_something_else_is_refused(work):
    for wrong in (0, "no", [print]):
        with pytest.raises(fg.ArgumentError, match="progress=False"):
            work(progress=wrong)


def test_a_notebook_gets_a_bar_of_its_own(monkeypatch):
    """The bar is a display that is updated, and empty in the end; work that is done at once shows none."""
    displayed: list[str] = []
    handle = types.SimpleNamespace(update=displayed.append)

    def display(page, display_id):
        assert display_id is True
        displayed.append(page)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=display))
    monkeypatch.setattr(progress_module, "in_notebook", lambda: True)
    with reporting(None, "quick", 3) as report:
        report(3)
    assert displayed == []
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.0)
    with reporting(None, "<work>", 3) as report:
        report(1)
        report(2)
    with reporting(None, "work") as report:
        report(1000)
        report(3, 4)
    assert displayed == [
        '<progress value="1" max="3"></progress> &lt;work&gt;: 1 of 3',
        '<progress value="2" max="3"></progress> &lt;work&gt;: 2 of 3',
        "",
        "<progress></progress> work: 1,000",
        '<progress value="3" max="4"></progress> work: 3 of 4',
        "",
    ]
