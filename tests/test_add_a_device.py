"""The page that adds a device does what it says: its commands are run, with few networks."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "add_a_device.md"


def section(title: str) -> str:
    """The text below a heading that begins so."""
    return next(part for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE) if part.startswith(title))


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and contents of all fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str, languages: tuple[str, ...] = ("sh",)) -> list[str]:
    """The lines of all blocks of commands."""
    return [line for language, block in blocks(text) if language in languages for line in block.splitlines() if line]


def run(line: str, folder: Path) -> str:
    """A command of the page, with few networks."""
    words = shlex.split(line)
    assert words[0] == "nasbench"
    words = [("10" if before == "--networks" else word) for before, word in zip(["", *words], words, strict=False)]
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_every_command_of_the_page_is_one() -> None:
    from typer.testing import CliRunner

    from nasbench.cli import app

    for line in commands(PAGE.read_text(), ("sh", "")):
        words = shlex.split(line)
        if words[0] == "ssh":
            continue
        assert words[0] == "nasbench", line
        path = words[1:3] if words[1] == "devices" else words[1:2]
        said = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "300"})
        assert said.exit_code == 0, line
        for option in (w for w in words if w.startswith("--")):
            assert option in said.output, line


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.extra("openvino"))])
def test_from_nothing_to_a_validated_profile_of_this_machine(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parent.parent))
    lines = [ln for ln in commands(section("The machine")) if ("openvino" in ln) == (runtime == "openvino")]
    said = {line: run(line, tmp_path) for line in lines}
    for command in ("check", "calibrate", "validate", "predict"):
        assert any(f" {command} " in line for line in lines), command
    validated = next(text for line, text in said.items() if " validate " in line)
    assert "in the 90 % interval" in validated
    predicted = next(text for line, text in said.items() if " predict " in line)
    assert "of 10 networks measured" in predicted


def test_a_device_of_ones_own_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parent.parent))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{bin_folder}:/usr/bin:/bin")
    text = section("A profile of your own")
    (program,) = [block for language, block in blocks(text) if language == "python"]
    (tmp_path / "my_meter.py").write_text(program)
    said = {line: run(line, tmp_path) for line in commands(text)}
    assert "of 3 networks measured" in next(t for ln, t in said.items() if "--from" in ln)
    assert (tmp_path / "again.csv").read_text().count("\n") == 2
