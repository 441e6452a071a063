"""What a person sees of a profile holds everything that is in it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from hardware_profiles import list_profiles, load_profile
from nasbench.devices_view import list_devices, show_device
from nasbench.tables import table


def shown(name: str) -> str:
    out = io.StringIO()
    show_device(load_profile(name), Console(file=out, width=1000, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize("name", list_profiles())
def test_a_shown_profile_names_every_figure_and_every_source(name: str) -> None:
    text, profile = shown(name), load_profile(name)
    body, _, sources = text.partition("\nSources\n")
    assert profile.title in body
    for figure in profile.datasheet:
        assert f"{figure.value:g} {figure.unit}" in body
        assert figure.source in sources
    for point in profile.operating_points:
        assert re.search(rf"^{re.escape(point)}[* ]", body, re.MULTILINE)
        assert profile.target(point).measure in body
    for kind in profile.constraints.operators + profile.constraints.unsupported_operators:
        assert kind in body
    assert profile.constraints.note in body
    # Every number leads to a source, and every source is referred to.
    numbers = set(re.findall(r"\[(\d+)\]", sources))
    assert set(re.findall(r"\[(\d+)\]", body)) == numbers
    assert len(numbers) == len(sources.strip().splitlines())


def test_the_list_has_a_line_per_device(capsys: pytest.CaptureFixture[str]) -> None:
    list_devices()
    lines = capsys.readouterr().out.splitlines()
    for name in list_profiles():
        assert any(line.startswith(f"{name} ") for line in lines)


def test_no_bracket_in_a_cell_is_taken_for_a_style(capsys: pytest.CaptureFixture[str]) -> None:
    table(("network", "note"), [("alexnet", "pip install nasbench-hw[litert]"), ("vgg11", 0.123456)])
    out = capsys.readouterr().out
    assert "pip install nasbench-hw[litert]" in out
    assert "0.1235" in out
