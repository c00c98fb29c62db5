"""The command line, run inside the test's process."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any

import typer
from typer.testing import CliRunner

from fgsteer import cli
from fgsteer.cli.app import app


def invoke(*arguments):
    """The result of a command; what it raised, other than its exit, is raised here."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def invoke_on_cpu(*arguments):
    """``invoke`` of a command that loads a model, on the CPU."""
    return invoke(*arguments, "--device", "cpu")


def run_on_console(monkeypatch, encoding, *arguments):
    """(status, standard output, standard error) of the command line on a console of an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    status: Any = 0
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["fgsteer", *map(str, arguments)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    for stream in streams:
        stream.flush()
    return (status, *(stream.buffer.getvalue().decode(encoding) for stream in streams))


def click_group() -> Any:
    """The command line as click knows it: ``click_group().commands`` has every command by name."""
    return typer.main.get_command(app)
