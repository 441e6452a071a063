"""Converted networks that are kept."""

import resource
from pathlib import Path

import pytest
from torch import nn

from hardware_profiles import Artifact, load_target
from hardware_profiles.converted import ConvertedFiles
from search_spaces import UserError


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())


class Counted:
    """Builds a network, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> nn.Module:
        self.count += 1
        return network()


def artifact(folder: Path, build: Counted, identity: str = "a", side: int = 6, target: str = "host:fp32") -> Artifact:
    return ConvertedFiles(folder, load_target(target)).convert(identity, build, (1, side, side))


def test_a_network_is_converted_once(tmp_path: Path) -> None:
    build = Counted()
    first = artifact(tmp_path / "new", build)
    assert artifact(tmp_path / "new", build) == first
    assert build.count == 1
    assert first.path.is_file()
    assert first.precision == "fp32"


def test_whatever_changes_the_file_makes_another(tmp_path: Path) -> None:
    build = Counted()
    found = [
        artifact(tmp_path, build),
        artifact(tmp_path, build, identity="b"),
        artifact(tmp_path, build, side=7),
        artifact(tmp_path, build, target="host:int8"),
    ]
    assert len({a.path for a in found}) == 4
    assert build.count == 3  # int8 is made from the file in fp32
    assert "noise" in artifact(tmp_path, build, target="host:int8").note


@pytest.mark.parametrize("prefix", ["", "litert-"])
def test_an_int8_file_comes_from_the_kept_fp32_file_or_makes_it(tmp_path: Path, prefix: str) -> None:
    if prefix:
        pytest.importorskip("litert_torch")
    build = Counted()
    assert artifact(tmp_path, build, target=f"host:{prefix}int8").precision == "int8"
    assert artifact(tmp_path, build, target=f"host:{prefix}fp32").precision == "fp32"
    assert build.count == 1


def test_a_refusal_in_fp32_is_one_in_int8(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="channels"):
            ConvertedFiles(tmp_path, load_target("host:int8")).convert("a", lambda: nn.Conv2d(3, 4, 3), (1, 6, 6))


def test_a_file_or_note_that_is_gone_or_damaged_is_made_again(tmp_path: Path) -> None:
    build = Counted()
    path = artifact(tmp_path, build).path
    path.unlink()
    artifact(tmp_path, build)
    path.with_suffix(".json").write_text("{", encoding="utf-8")
    artifact(tmp_path, build)
    assert build.count == 3


def test_a_refusal_is_kept_with_its_reason(tmp_path: Path) -> None:
    tries = []

    def build() -> nn.Module:
        tries.append(1)
        return nn.Conv2d(3, 4, 3)  # the input has one channel

    for _ in range(2):
        with pytest.raises(UserError, match="channels"):
            ConvertedFiles(tmp_path, load_target("host:fp32")).convert("a", build, (1, 6, 6))
    assert len(tries) == 1
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("target", ["host:fp32", "host:openvino-int8"])
def test_a_full_disk_is_not_kept_as_a_refusal(tmp_path: Path, target: str) -> None:
    build = Counted()
    if "openvino" in target:
        pytest.importorskip("openvino")
        artifact(tmp_path, build, target="host:fp32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))  # more than a note has, less than a network
    try:
        with pytest.raises(UserError, match=r"(onnx|xml): cannot write it"):
            artifact(tmp_path, build, target=target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert artifact(tmp_path, build, target=target).path.stat().st_size > 400


def test_a_runtime_that_reads_onnx_shares_its_files(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    build = Counted()
    assert artifact(tmp_path, build) == artifact(tmp_path, build, target="host:openvino-fp32")
    assert artifact(tmp_path, build, target="host:openvino-int8").path.suffix == ".xml"
    assert build.count == 1
