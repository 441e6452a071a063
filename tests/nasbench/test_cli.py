"""What the command `nasbench` says of itself, and of what goes wrong."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.markup import render
from typer.main import get_command
from typer.testing import CliRunner

from nasbench.cli import app, main
from predictors.choice import METRICS


def helps(command: Any, path: str = "nasbench") -> Iterator[tuple[str, str]]:
    """Every help text of a command and those below it, with whose it is."""
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", "") or ""
    for name, below in getattr(command, "commands", {}).items():
        yield from helps(below, f"{path} {name}")


def test_no_help_text_loses_words_in_brackets_as_markup() -> None:
    texts = dict(helps(get_command(app)))
    assert "[[stages]]" in render(texts["nasbench compress stages"]).plain
    for where, text in texts.items():
        assert render(text).plain == text.replace("\\[", "["), where


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["run", "x" * 300], "; what was finished is kept, see nasbench run --resume"),
        (["predict", "x" * 300 + ".onnx", "--target", "ncs2"], ""),
    ],
)
def test_only_what_can_be_continued_is_said_to_be_kept(
    arguments: list[str], kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["nasbench", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith(f"File name too long{kept}\n")


@pytest.mark.parametrize("text", ["naem = 3", '[strategy]\nname = "ngsa2"', '[targets]\ndevices = ["hots"]'])
def test_what_is_wrong_with_an_experiment_is_told_with_its_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'{text}\n[[stages]]\nname = "finetune"\nepochs = 1\n')
    for arguments in (["run", str(file)], ["compress", "resnet18@28", "--stages", str(file)]):
        said = str(CliRunner().invoke(app, arguments).exception)
        assert said.startswith(f"{file}: ")
        assert said.count(str(file)) == 1


def test_predict_lists_every_metric_that_it_takes() -> None:
    listed = dict(helps(get_command(app)))["nasbench predict metric"]
    assert all(metric in listed for metric in METRICS)


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"nasbench-hw {version('nasbench-hw')}\n"
