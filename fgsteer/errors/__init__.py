"""Every error and warning that fgsteer raises on purpose.

    FgsteerError
    ├── ArgumentError      an argument of another type, or in another's place
    ├── DataError          an argument or data that cannot be used
    ├── HookpointError     a layer, site or architecture that does not exist
    ├── PairingError       two things that do not belong together (shapes, hashes)
    ├── SelectionError     nothing left to steer with
    ├── FormatError        a file that is not what it should be
    │   └── MissingError   a model that is not there, or whose hub cannot be reached
    ├── BusyError          a file or run that another process is writing
    ├── SteeringError      an intervention that cannot be applied as asked
    ├── PluginError        another package's addition to fgsteer that cannot be loaded
    └── JudgeError         a judge that cannot be asked, or gave no score
    FgsteerWarning
    ├── PairingWarning     things that may not belong together (names)
    ├── SelectionWarning   a selection that is weaker than it looks
    └── UntouchedWarning   a steered run in which no token was steered, or a module that was is replaced

An error says what was expected, what came, the likely cause, and what to change. The files beside this one:

    checks.py    checks the types and ranges of arguments before any work
    defaults.py  torch's default dtype and device, as they are at first while a public function runs
    changes.py   changes of what outlives a call, undone whatever ends the block that they are for
    wording.py   articles and plurals for messages
    reprs.py     one-line reprs
    escaping.py  texts that are not trusted, made safe for a terminal, JSON and Markdown
    limits.py    limits of numbers
"""

from __future__ import annotations

from fgsteer.errors.escaping import escape_text


class FgsteerError(Exception):
    """Base of every fgsteer error: what came, what was expected, what to change.

    Args:
        got: What came: a phrase that completes "Expected …, got …", or a sentence of its own, with its full stop.
        expected: A phrase that completes "Expected …"; may be empty where ``got`` is a sentence.
        change: What to change, and the likely cause: an imperative or a sentence, without its full stop.
    """

    def __init__(self, got: str, expected: str = "", change: str = "") -> None:
        self.got, self.expected, self.change = got, expected, change
        if expected and not got.endswith("."):
            message = f"Expected {expected}, got {got}."
        else:
            message = f"{got.removesuffix('.')}." + (f" Expected {expected}." if expected else "")
        if change:
            message += f" {change[0].upper()}{change[1:]}" + ("" if change.endswith((".", "?", ")")) else ".")
        super().__init__(message)

    def __str__(self) -> str:
        return escape_text(super().__str__())  # names and texts in it may come from anywhere


class ArgumentError(FgsteerError, TypeError):
    """A function was given something of another type than it takes, or in another argument's place."""


class DataError(FgsteerError, ValueError):
    """An argument or data cannot be used."""


class HookpointError(FgsteerError, ValueError):
    """The model has no such layer, site or known block structure."""


class PairingError(FgsteerError, ValueError):
    """Two objects do not belong together: other shapes, another hookpoint, another hash."""


class SelectionError(FgsteerError, ValueError):
    """A selection of features is empty or impossible."""


class FormatError(FgsteerError, ValueError):
    """A file is missing, truncated, of another format, or cannot be written."""


class MissingError(FormatError, OSError):
    """What was named is neither on this machine nor at an address that can be reached."""


class BusyError(FgsteerError, RuntimeError):
    """Another process, or another thread, is writing the file or going on with the run."""


class SteeringError(FgsteerError, RuntimeError):
    """An intervention cannot be applied as asked."""


class PluginError(FgsteerError, ImportError):
    """A plugin cannot be imported, or adds a name that is taken."""


class JudgeError(FgsteerError, RuntimeError):
    """A judge is not installed, cannot be reached, or gave no readable score."""


class FgsteerWarning(UserWarning):
    """Base of every fgsteer warning."""

    def __str__(self) -> str:
        return escape_text(super().__str__())


class PairingWarning(FgsteerWarning):
    """Names of a model, SAE or vector differ, though their shapes agree."""


class SelectionWarning(FgsteerWarning):
    """A selection ran with less evidence or fewer filters than its method asks for."""


class UntouchedWarning(FgsteerWarning):
    """A steered run in which an intervention missed a token of its scope, or in which what it acts on was replaced."""
