"""MobileNetV3 spaces against the papers and the reference implementations, and their configuration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_spaces import MobileNetV3Space, UserError, load_space, presets
from search_spaces.mobilenet_v3_spec import make_divisible

STAGE: dict[str, Any] = {"width": 16, "expansions": [2, 4], "kernels": [3, 5], "depths": [1, 2]}


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    # Parameters as torchvision counts them; multiply-accumulates of its published 0.22 and 0.06 GFLOPS at 224 pixels:
    # convolutions and linear layers, squeeze-and-excitation included, without normalisation, pooling and biases.
    [("mobilenet_v3_large", 5_483_032, 216_589_760), ("mobilenet_v3_small", 2_542_856, 56_510_400)],
)
def test_published_networks(name: str, params: int, macs: int) -> None:
    space = load_space(name)
    assert space.size == 1
    arch = np.zeros(len(space.knobs), dtype=space.dtype)
    workload = space.workload(arch)
    assert (workload.params, workload.macs) == (params, macs)
    assert sum(p.numel() for p in space.build(arch).parameters()) == params
    published = space.published[name]
    assert (published.params, published.macs) == (params, f"{macs / 1e9:.2f}B")
    assert (space.references[name] == arch).all()


def test_large_follows_the_table_of_the_paper() -> None:
    space = load_space("mobilenet_v3_large")
    assert isinstance(space, MobileNetV3Space)
    blocks = [b for stage in space.spec(np.zeros(1, np.uint8)).stages for b in stage]
    # Howard et al. (2019), table 1: kernel, expansion size, output, SE, nonlinearity, stride.
    rows = [(b.kernel, b.hidden, b.cout, b.squeeze > 0, b.activation, b.stride) for b in blocks]
    assert rows == [
        (3, 16, 16, False, "relu", 1), (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1),
        (5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1),
        (3, 240, 80, False, "hard_swish", 2), (3, 200, 80, False, "hard_swish", 1),
        (3, 184, 80, False, "hard_swish", 1), (3, 184, 80, False, "hard_swish", 1),
        (3, 480, 112, True, "hard_swish", 1), (3, 672, 112, True, "hard_swish", 1),
        (5, 672, 160, True, "hard_swish", 2), (5, 960, 160, True, "hard_swish", 1),
        (5, 960, 160, True, "hard_swish", 1),
    ]  # fmt: skip
    assert [b.expand for b in blocks] == [False] + [True] * 14


def test_published_once_for_all_space() -> None:
    space = load_space("ofa_mobilenet_v3")
    assert space.size == 7371**5 == 21_758_655_492_572_485_851
    assert len(space.knobs) == 45
    assert space.features(space.sample(1, np.random.default_rng(0))).shape == (1, 120)


def test_resolution_and_width_multiply_the_size() -> None:
    space = load_space("ofa_mobilenet_v3", resolutions=[160, 176, 192], widths=[1.0, 1.2])
    assert space.size == 6 * 7371**5
    assert space.input_shape == (3, 192, 192)


def test_presets_describe_themselves() -> None:
    names = presets()
    assert {"quickstart", "mobile96", "ofa_mobilenet_v3", "mobilenet_v3_large"} <= set(names)
    assert all(text and "\n" not in text for text in names.values())


def test_quickstart_stays_cheap_enough_to_train() -> None:
    """The bounds that its description states."""
    space = load_space("quickstart", 1, 10)
    assert space.workload(space.references["largest"]).macs < 18.5e6
    assert space.workload(space.references["smallest"]).macs > 0.45e6


def test_make_divisible_rounds_to_eight_and_never_far_down() -> None:
    values = np.linspace(1, 2000, 5000)
    rounded = np.array([make_divisible(v) for v in values])
    assert (rounded % 8 == 0).all()
    assert (rounded >= 0.9 * values).all()
    assert (np.diff(rounded) >= 0).all()


def test_width_multiplier_scales_all_but_the_classifier() -> None:
    space = MobileNetV3Space(3, 7, stages=[STAGE], widths=[0.5, 1.0], resolutions=[16])
    half, full = (space.spec(space.references[name]) for name in ("smallest", "largest"))
    assert (half.stem, half.stages[0][0].cout, half.head.final, half.head.features) == (8, 8, 480, 640)
    assert (full.stem, full.stages[0][0].cout, full.head.final, full.head.features) == (16, 16, 960, 1280)
    assert half.head.classes == full.head.classes == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": [3, 4]}, r"stages\.0: kernels must be odd"),
        ({"kernels": [5, 3]}, r"stages\.0\.kernels: choices must be .* ascending order, got \[5, 3\]"),
        ({"depths": []}, r"stages\.0\.depths"),
        ({"stride": 3}, r"stages\.0\.stride: .*1 or 2, got 3"),
        ({"expansions": [1, 2]}, r"stages\.0: expansions must be \[1\] alone or all above 1"),
        ({"hidden": [16, 16]}, r"stages\.0: give either expansions .* or hidden"),
        ({"expansions": [], "hidden": [16]}, r"stages\.0: hidden needs one width per block: 2, got 1"),
        ({"kernel": [3]}, r"unknown key 'stages\.0\.kernel'\. Did you mean 'kernels'"),
        ({"activation": "swish"}, r"stages\.0\.activation: .*'relu' or 'hard_swish', got 'swish'"),
        ({"width": "wide"}, r"stages\.0\.width: .*integer.*, got 'wide'"),
    ],
)
def test_bad_stages_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MobileNetV3Space(stages=[{**STAGE, **change}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": []}, "resolutions: choices must be at least one"),
        ({"resolutions": [32, 0]}, r"resolutions\.1: .*greater than or equal to 1, got 0"),
        ({"widths": [1.0, 1.0]}, "widths: choices must be at least one, distinct"),
        ({"dropout": 1.5}, "dropout: .*less than 1, got 1.5"),
        ({"stages": []}, "stages"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MobileNetV3Space(**{"stages": [STAGE], **options})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_of_the_users_own(tmp_path: Path) -> None:
    text = 'family = "mobilenet_v3"\nresolutions = [32]\n[[stages]]\nwidth = 16\nexpansions = [2, 3]\n'
    space = load_space(write(tmp_path / "mine.toml", text), 1, 5, widths=[0.5, 1.0])
    assert space.size == 4
    assert space.input_shape == (1, 32, 32)
    assert space.num_classes == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family = [", "mine.toml: not valid TOML"),
        ('family = "mobilnet_v3"', "mine.toml: family: .*'mobilnet_v3'. Did you mean 'mobilenet_v3'"),
        ("resolutions = [32]", "mine.toml: family: .*got None"),
        (
            'family = "mobilenet_v3"\nresolution = [32]',
            "mine.toml: unknown key 'resolution'. Did you mean 'resolutions'",
        ),
        ('family = "mobilenet_v3"', "mine.toml: key 'stages' is missing"),
        ('family = "mobilenet_v3"\n[[stages]]\nwidth = -1\nexpansions = [2]', r"mine.toml: stages.0.width: .*got -1"),
    ],
)
def test_errors_of_a_table_name_file_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_space(write(tmp_path / "mine.toml", text))


def test_unknown_spaces_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown space 'quickstrat'. Did you mean 'quickstart'"):
        load_space("quickstrat")
    with pytest.raises(UserError, match="missing.toml: cannot read it"):
        load_space(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="quickstart: unknown key 'width'. Did you mean 'widths'"):
        load_space("quickstart", width=[1.0])
