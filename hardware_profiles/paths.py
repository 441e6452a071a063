"""Where the user's own files live, and how files are read and written: whole or not at all."""

import csv
import gzip
import hashlib
import io
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from search_spaces.errors import UserError, in_words

# Nothing that is written under a lock takes longer.
LOCK_TIMEOUT_S = 60


def user_data_dir() -> Path:
    """Directory of the user's own profiles, calibrations and caches: `$NASBENCH_HOME`, else the platform's place.

    It need not exist yet; whoever writes into it makes it.
    """
    home = os.environ.get("NASBENCH_HOME")
    return Path(home).expanduser() if home else Path(platformdirs.user_data_dir("nasbench-hw"))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UserError: the directory cannot be made or written, or the block met an error of the system; where that is about
            another file, it is named too.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; what is written here is meant to be read like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        # A copy to a full disk names its source first; converters write files beside, whose names begin alike.
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        other = bool(names) and not any(name == str(path) or temporary.stem in name for name in names)
        about = f"{names[0]}: " if other else ""
        raise UserError(f"{path}: cannot write it: {about}{error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def finished(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory whose names match, sorted, without what a process killed in `atomic` left behind."""
    return sorted(p for p in directory.glob(pattern) if not p.name.startswith("."))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold back other processes that add to the file `path` while it is read, changed and written; by a lock beside it.

    Raises:
        UserError: the lock cannot be written, or another process holds it for a minute.
    """
    from filelock import FileLock, Timeout

    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise UserError(
            f"{path}: another process has been writing it for {LOCK_TIMEOUT_S} s ({lock} is held)"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Raises UserError where that fails."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises UserError where it cannot be read, or is none (with the line)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {in_words(error)}") from error


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and (line number, values) of each row, of a table as CSV or `.csv.gz`. Blank lines are passed over.

    Raises:
        UserError: it cannot be read, its columns are not separated by commas, one stands twice, or a row has not as
            many values as there are columns.
    """
    try:
        raw = path.read_bytes()
        # Spreadsheets write a mark in front.
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [column.strip() for column in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory, where a table as CSV is expected") from error
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {in_words(error)}") from error
    if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), "")):
        raise UserError(
            f"{path}: line 1: columns are separated by {other!r}, where commas are expected; save it with commas, and "
            "with points in decimals"
        )
    if len(set(header)) != len(header):
        raise UserError(f"{path}: a column occurs twice: {', '.join(header)}")
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}: line {line}: {len(row)} values for {len(header)} columns")
    return header, rows
