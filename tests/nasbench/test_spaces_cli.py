"""A space of one's own from a command: written, shown, loaded, searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nasbench.cli import app
from nasbench.spaces_cli import new_space
from nasbench.strategies.nsga2 import NSGA2
from predictors.counts import Count
from search_spaces import UserError, calibrate, load_space, presets
from search_spaces.chain_blocks import BLOCK_TYPES


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_new_space_loads_at_once_and_can_be_searched(tmp_path: Path) -> None:
    assert str(tmp_path / "mine.toml") in call("spaces", "new", "mine", "--in", str(tmp_path))
    space = load_space(tmp_path / "mine.toml", 1, 10)
    macs = Count("macs").bind(space)
    strategy = NSGA2(space, 0, population_size=20)
    for _ in range(5):
        proposals = strategy.ask(20)
        values = macs.predict(proposals.archs).mean[:, None]
        strategy.tell(proposals, values, np.zeros((20, 0)), np.zeros(20, dtype=np.uint8))
    arch = proposals.archs[0]
    supernet, x = space.supernet(), torch.randn(4, *space.input_shape)
    with torch.no_grad():
        stats = calibrate(supernet, arch, x)
        assert supernet.extract(arch, stats)(x[..., :24, :24]).shape == (4, 10)
    shown = call("spaces", "show", str(tmp_path / "mine.toml"))
    assert "48,384 architectures" in shown
    assert "stage1.width" in shown


def test_the_template_names_every_type_of_block_and_key(tmp_path: Path) -> None:
    text = new_space("mine", directory=tmp_path).read_text()
    for kind in BLOCK_TYPES:
        for key, field in kind.model_fields.items():
            words = [field.annotation.__args__[0]] if key == "type" else [key]  # type: ignore[union-attr]
            assert all(word in text for word in words), (kind.__name__, key)


def test_a_new_space_begins_as_a_copy_of_another(tmp_path: Path) -> None:
    path = new_space("other", "fbnet_32", tmp_path)
    assert load_space(path).knobs == load_space("fbnet_32").knobs
    assert (
        path.read_text() == call("spaces", "show", "fbnet_32", "--toml") == call("spaces", "show", str(path), "--toml")
    )


def test_every_space_is_listed() -> None:
    for listed in (call("spaces"), call("spaces", "list")):
        assert all(name in listed for name in presets())


def test_what_cannot_be_written_is_said_and_nothing_is(tmp_path: Path) -> None:
    path = new_space("mine", directory=tmp_path)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"mine\.toml is there already"):
        new_space("mine.toml", directory=tmp_path)
    assert path.read_text() == "mine"
    for wrong in ("../x", "a b", "", "1x"):
        with pytest.raises(UserError, match="space name"):
            new_space(wrong, directory=tmp_path)
    with pytest.raises(UserError, match="Did you mean 'fbnet'"):
        new_space("x", "fbnett", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        new_space("x", directory=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kernel = [3, 5]", "kernel = [3, 4]", ["blocks.mb_kernel4_expansion3", "kernel", "must be odd, got 4"]),
        ("width = 24", 'width = "wide"', ["stages.0.width", "'wide'"]),
        ("layers = [1, 2]", "layers = [2, 1]", ["stages.0.layers", "rise"]),
        ("final_width = 128", "final_widht = 128", ["unknown key 'final_widht'", "final_width"]),
        ('"separable"]', '"seperable"]', ["stages.0.choices", "'separable'"]),
        ('type = "shuffle"', 'type = "shufle"', ["blocks.shuffle", "shufle", "separable"]),
        ('family = "chain"', 'family = "chian"', ["family", "'chain'"]),
        ("resolution = [24, 28]", "resolution = []", ["resolution", "rise"]),
    ],
)
def test_mistakes_name_file_key_and_value(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = new_space("mine", directory=tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_space(path)
    for word in ("mine.toml", *words):
        assert word in str(error.value)
