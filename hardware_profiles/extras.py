"""Optional runtimes: imported where used, named where missing, and kept quiet while they work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType

from search_spaces.errors import UserError


def require(extra: str, *modules: str) -> None:
    """See that the modules of an optional dependency are installed, without importing them.

    Raises:
        UserError: one is missing; says what to install.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed. It comes with: pip install nasbench-hw[{extra}]")


def load(extra: str, module: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        UserError: it is missing, or cannot be imported here.
    """
    require(extra, module.partition(".")[0])
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is installed but cannot be imported ({error}). "
            f"pip install nasbench-hw[{extra}] brings what it needs"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what converters print: on standard output, as warnings, as log lines, and from C++ on standard error.

    What goes wrong comes as an exception. Standard error is redirected for the whole process meanwhile.
    """
    root = logging.getLogger()
    disabled, handlers = root.manager.disable, root.handlers[:]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryFile() as sink,
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        saved = os.dup(2)
        try:
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            logging.disable(disabled)
            root.handlers[:] = handlers  # a first log line installs one, which would hold on to the sink


def reason(error: BaseException) -> str:
    """An exception of a runtime as one line, with the operator that it names further down, if any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines[0] if lines else type(error).__name__)[:300]
    operator = re.compile(r"\baten(?:::|\.)\w+")
    named = operator.search(str(error))
    return first if named is None or operator.search(first) else f"{first} ({named[0]})"
