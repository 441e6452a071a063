"""Optional dependencies: imported where used, named where missing, and kept quiet while they work."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from types import ModuleType

from search_spaces.errors import UserError

# Extra of this project -> the modules that it brings and that are used here.
EXTRAS: dict[str, tuple[str, ...]] = {
    "litert": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
    "openvino": ("openvino", "nncf"),
    "executorch": ("executorch", "torchao"),
    "ethos-u": ("ethosu",),
    "tensorboard": ("tensorboard",),
    "ray": ("ray",),
    "dashboard": ("optuna_dashboard",),
    "parquet": ("pyarrow",),
    "prune": ("torch_pruning",),
    "cmaes": ("cmaes",),
}

_STANDARD = (1, 2)  # file descriptors of output and error


def require(extra: str, *modules: str) -> None:
    """See that the modules of an extra are installed (all of them where none is named), without importing them.

    Raises:
        UserError: one is missing; says what to install.
    """
    for module in modules or EXTRAS.get(extra, ()):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed. It comes with: pip install nasbench-hw[{extra}]")


def load(extra: str, module: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        UserError: it is missing, or cannot be imported here.
    """
    if module in sys.modules:
        return sys.modules[module]
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
    """Swallow what converters print: as warnings, as log lines, and on standard output and error, from C++ too.

    What goes wrong comes as an exception. Both are redirected for the whole process meanwhile.
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
        _flush_c()
        saved = [os.dup(stream) for stream in _STANDARD]
        try:
            for stream in _STANDARD:
                os.dup2(sink.fileno(), stream)
            yield
        finally:
            _flush_c()
            for stream, before in zip(_STANDARD, saved, strict=True):
                os.dup2(before, stream)
                os.close(before)
            logging.disable(disabled)
            root.handlers[:] = handlers  # a first log line installs one, which would hold on to the sink


def _flush_c() -> None:
    """Write out what C and C++ hold back of their standard output."""
    ctypes.CDLL(None).fflush(None)


def reason(error: BaseException) -> str:
    """An exception of a runtime as one line: what it says, what caused it, and the operator named further down."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = _first_line(error) if root is error else f"{_first_line(error)} ({_first_line(root)})"
    operator = re.compile(r"\baten(?:::|\.)\w+")
    named = operator.search(f"{error} {root}")
    return text if named is None or operator.search(text) else f"{text} ({named[0]})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
