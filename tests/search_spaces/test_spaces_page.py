"""docs/spaces.md says what is: its table is generated, its examples run."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_spaces import calibrate, load_space, trace

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "spaces.md").read_text(encoding="utf-8")


def blocks(language: str, *sections: str) -> list[str]:
    """The code of the sections whose headings begin so."""
    parts = [part for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE) if part.startswith(sections)]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(parts), re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's Python code leaves behind."""
    found: dict[str, Any] = {"__name__": "page"}
    for block in blocks("python", "Search spaces", "A space in Python"):
        exec(block, found)
    return found


def test_the_table_is_what_the_tool_writes() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "spaces_page.py"))
    assert tool["page"](TEXT) == TEXT, "run: python tools/spaces_page.py"


def test_the_class_on_the_page_is_a_whole_space(names: dict[str, Any]) -> None:
    space = names["Digits"](3, 5)
    supernet, x = space.supernet(), torch.randn(4, 3, 28, 28)
    mixture = space.mixture_supernet()
    mixture.load_state_dict(supernet.state_dict())
    for arch in space.sample(4, np.random.default_rng(0)):
        network = space.build(arch)
        assert space.workload(arch) == trace(network, network.input_shape)
        with torch.no_grad():
            stats = calibrate(supernet, arch, x)
            torch.testing.assert_close(supernet.extract(arch, stats)(x), supernet(x, arch, stats))
            one_hot = [torch.eye(len(k.choices))[int(c)] for k, c in zip(space.knobs, arch, strict=True)]
            torch.testing.assert_close(mixture(x, one_hot), supernet(x, arch))
    assert set(space.decode(space.encode({"width": 8, "kernel": 3, "activation": "silu", "depth": 2}))) == {
        "width", "kernel", "activation", "depth"
    }  # fmt: skip


def test_the_file_on_the_page_is_a_space(tmp_path: Path) -> None:
    (example,) = blocks("toml", "A space from a file")
    (tmp_path / "mine.toml").write_text(example)
    space = load_space(tmp_path / "mine.toml", 1, 10)
    assert [k.name for k in space.knobs][:3] == ["resolution", "stage0.width", "stage0.depth"]
    arch = space.sample(1, np.random.default_rng(1))[0]
    assert space.build(arch)(torch.randn(2, *space.input_shape)).shape == (2, 10)
