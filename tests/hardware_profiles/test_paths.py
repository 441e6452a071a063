"""How files are read: tables with the line of every row, whoever wrote them, and directories after a kill."""

import gzip
import re
import resource
import shutil
from pathlib import Path

import pytest

from hardware_profiles import list_profiles
from hardware_profiles.paths import atomic, finished, read_csv
from search_spaces import UserError

TEXT = 'network, note\nresnet18,"two\nlines"\n\nvgg11,x\n'
ROWS = ["network", "note"], [(3, ["resnet18", "two\nlines"]), (5, ["vgg11", "x"])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_come_with_their_lines_from_plain_and_packed_files(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(TEXT.encode(encoding))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TEXT.replace("\n", "\r\n").encode(encoding)))
    assert read_csv(tmp_path / "a.csv") == ROWS
    header, rows = read_csv(tmp_path / "a.csv.gz")
    assert (header, [line for line, _ in rows]) == (ROWS[0], [3, 5])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv: line 3: 1 values for 2 columns"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv: a column occurs twice: a, a"),
        ("a.csv", b"a;b\n1,5;2\n", r"a\.csv: line 1: columns are separated by ';', where commas are expected"),
        ("a.csv", b"a\tb\n1\t2\n", r"a\.csv: line 1: columns are separated by '\\t'"),
        ("a.csv", b"\xff\xfe", r"a\.csv: cannot be read"),
        ("a.csv.gz", b"a,b\n", r"a\.csv\.gz: cannot be read"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-6], r"a\.csv\.gz: cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / name)


def test_a_directory_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"^{re.escape(str(tmp_path))}: is a directory, where a table as CSV is expected$"
    ):
        read_csv(tmp_path)


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    path, missing = tmp_path / "out.csv", tmp_path / "missing.csv"
    expected = f"{path}: cannot write it: {missing}: No such file or directory"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"), atomic(path) as temporary:
        shutil.copyfile(missing, temporary)


def test_an_error_about_the_file_itself_names_it_alone(tmp_path: Path) -> None:
    path, source = tmp_path / "out.csv", tmp_path / "source.csv"
    source.write_bytes(b"x" * 10_000)
    full = f"^{re.escape(str(path))}: cannot write it: File too large$"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))  # stands for a full disk
    try:
        with pytest.raises(UserError, match=full), atomic(path) as temporary:
            temporary.write_bytes(source.read_bytes())
        with pytest.raises(UserError, match=full), atomic(path) as temporary:
            shutil.copyfile(source, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot write it: Is a directory$"), atomic(path):
        pass
    with pytest.raises(UserError, match="it: Permission denied$"), atomic(path) as temporary:
        raise PermissionError(13, "Permission denied", str(temporary.with_suffix(".bin")))
    assert sorted(tmp_path.iterdir()) == [path, source]


def test_what_a_process_wrote_when_it_was_killed_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path))
    before = list_profiles()
    with atomic(tmp_path / "devices" / "mine.toml") as temporary:
        assert temporary.match("*.toml")
        assert list_profiles() == before
        assert finished(tmp_path, "**/*.toml") == []
    assert finished(tmp_path, "**/*.toml") == [tmp_path / "devices" / "mine.toml"]
    assert list_profiles() == sorted([*before, "mine"], key=lambda name: (name != "host", name))
