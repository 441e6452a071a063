"""How files are read: tables with the line of every row, whoever wrote them, and directories after a kill."""

import gzip
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
        ("a.csv", b"\xff\xfe", r"a\.csv: cannot be read"),
        ("a.csv.gz", b"a,b\n", r"a\.csv\.gz: cannot be read"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-6], r"a\.csv\.gz: cannot be read"),
    ],
)
def test_what_is_no_table_is_refused(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / name)


def test_what_a_process_wrote_when_it_was_killed_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path))
    before = list_profiles()
    with atomic(tmp_path / "devices" / "mine.toml") as temporary:
        assert temporary.match("*.toml")
        assert list_profiles() == before
        assert finished(tmp_path, "**/*.toml") == []
    assert finished(tmp_path, "**/*.toml") == [tmp_path / "devices" / "mine.toml"]
    assert list_profiles() == sorted([*before, "mine"], key=lambda name: (name != "host", name))
