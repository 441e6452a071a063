import tomllib
from importlib import resources
from pathlib import Path

import pytest
import tomli_w

from hardware_profiles import list_profiles, load_profile, load_target
from hardware_profiles.profile import parse_profile
from search_spaces import UserError

SHIPPED = [
    "edge_tpu", "edge_tpu_dev_board", "ethos_u55", "ethos_u65", "jetson_agx_xavier", "jetson_nano", "jetson_orin_nano",
    "jetson_tx2", "jetson_xavier_nx", "ncs1", "ncs2", "oak_rvc2", "pixel_1", "pixel_3", "pixel_4", "raspberry_pi_3",
    "raspberry_pi_4", "raspberry_pi_5", "snapdragon_855",
]  # fmt: skip


def table(name: str = "jetson_nano") -> dict:
    """A shipped profile as a table that a test may spoil."""
    return tomllib.loads((resources.files("hardware_profiles") / "devices" / f"{name}.toml").read_text())


def test_shipped_profiles_are_listed_and_host_comes_first() -> None:
    assert list_profiles()[0] == "host"
    assert set(SHIPPED) <= set(list_profiles())


@pytest.mark.parametrize("name", ["host", *SHIPPED])
def test_every_profile_says_where_its_figures_come_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.target().operating_point == profile.default
    assert profile.roofline.estimated
    assert profile.local == (name == "host")
    assert all(figure.source for figure in profile.datasheet)
    for point in profile.operating_points:
        target = load_target(f"{name}:{point}")
        assert target.name == f"{name}:{point}"
        assert target.measure


@pytest.mark.parametrize("name", ["host", *SHIPPED])
def test_a_profile_written_as_toml_reads_back_equal(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(tomli_w.dumps(profile.model_dump(exclude_none=True)))
    assert load_profile(path) == profile


def test_a_precision_alone_means_the_first_operating_point_that_has_it() -> None:
    assert load_target("jetson_nano:fp16").name == "jetson_nano:fp16-maxn"
    assert load_target("jetson_nano").name == "jetson_nano:fp16-maxn"
    assert load_target("edge_tpu").itemsize == 1


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown device 'jetson_nan'.*'jetson_nano'"):
        load_target("jetson_nan")
    with pytest.raises(UserError, match=r"no operating point 'fp17'.*fp16-maxn"):
        load_target("jetson_nano:fp17")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("operating_points", "fp16-maxn", "peak_gmac"), 1.0, r"peak_gmac: unknown key. Did you mean 'peak_gmacs'"),
        (("roofline", "launchus"), 1.0, r"roofline.launchus: unknown key. Did you mean 'launch_us'"),
        (("titel",), "x", r"titel: unknown key. Did you mean 'title'"),
        (
            ("operating_points", "fp16-maxn", "peak_gmacs"),
            -3,
            r"peak_gmacs: -3 is outside .*10\^9 multiply-accumulates/s",
        ),
        (("operating_points", "fp16-maxn", "bandwidth_gbs"), "fast", r"bandwidth_gbs: .*number.*got 'fast'"),
        (("operating_points", "fp16-maxn", "batch"), 0, r"batch: 0 is outside 1 to 1e\+06"),
        (("operating_points", "fp16-maxn", "precision"), "fp8", r"precision: unknown value 'fp8'. .*fp16, fp32, int8"),
        (("operating_points", "fp16-maxn", "power_w"), float("inf"), r"power_w: inf is outside"),
        (("operating_points", "fp16-maxn", "source"), None, r"operating_points.fp16-maxn.source: this key is missing"),
        (("roofline", "source"), None, r"roofline.source: this key is missing"),
        (("operating_points", "fp16-maxn", "peak_gmacs"), None, r"peak_gmacs: this key is missing"),
        (("roofline", "efficiency", "conv2d"), 1.5, r"efficiency.conv2d: .*less than or equal to 1, got 1.5"),
        (("roofline", "efficiency", "conv2"), 0.5, r"efficiency.conv2: unknown kind.*Did you mean 'conv2d'"),
        (("roofline", "efficiency", "other"), None, r"roofline: efficiency must name 'other'"),
        (("roofline", "on_chip_bytes"), 8, r"on_chip_bytes needs host_link_gbs"),
        (("default",), "fp61-maxn", r"default 'fp61-maxn' is no operating point. Did you mean 'fp16-maxn'"),
        (("datasheet", 0, "unit"), "GB/m", r"datasheet.0.unit: unknown value 'GB/m'. Did you mean 'GB/s'"),
        (("datasheet", 0, "unit"), "ghz", r"datasheet.0.unit: unknown value 'ghz'. Did you mean 'GHz'"),
        (
            ("operating_points", "fp16-maxn", "peak_gmacs"),
            20e9,
            r"peak_gmacs: 2e\+10 is outside 1e-05 to 1e\+08, in 10",
        ),
        (("operating_points", "fp16-maxn", "bandwidth_gbs"), 25.6e9, r"bandwidth_gbs: 2.56e\+10 is outside .*GB/s"),
        (("operating_points", "fp16-maxn", "power_w"), 10**6, r"power_w: 1e\+06 is outside 0.0001 to 100000, in W"),
        (("operating_points", "fp16-maxn", "threads"), 10**6, r"threads: 1e\+06 is outside 1 to 4096"),
        (("operating_points", "fp16-maxn", "batch"), 10**9, r"batch: 1e\+09 is outside"),
        (("roofline", "launch_us"), 1e10, r"roofline.launch_us: 1e\+10 is outside .*microseconds"),
        (("roofline", "fixed_us"), -1, r"roofline.fixed_us: -1 is outside .*microseconds"),
        (("roofline", "bandwidth_efficiency"), 60, r"bandwidth_efficiency: an estimate is a fraction .*got 60"),
        (("roofline", "host_link_gbs"), 5e9, r"roofline.host_link_gbs: 5e\+09 is outside .*GB/s"),
        (("datasheet", 0, "source"), "", r"datasheet.0.source"),
        (("reference_sets", 0, "operating_point"), "fp99", r"reference_sets: no operating point 'fp99'"),
        (("reference_sets", 0, "latency_ms", "resnet50@224"), 0, r"latency_ms.resnet50@224: .*greater than 0, got 0"),
        (("fits", "fp16-maxn", "log_std"), -0.1, r"fits.fp16-maxn.log_std: .*greater than 0"),
        (("name",), "Jetson Nano", r"name: .*pattern"),
        (("kind",), "TPU", r"kind: unknown value 'TPU'. Did you mean 'NPU'"),
        (("datasheet", 0, "value"), float("nan"), r"datasheet.0.value: .*finite number, got nan"),
        (("datasheet", 0, "value"), 0, r"datasheet.0.value: .*greater than 0, got 0"),
        (("operating_points", "fp16-maxn", "power_w"), float("nan"), r"power_w: nan is outside"),
        (("operating_points", "fp16-maxn", "host_link"), "USB 3.0", r"host_link and host_link_gbs.*go together"),
        (("operating_points", "fp16-maxn", "host_link_gbs"), -1, r"host_link_gbs: -1 is outside .*GB/s"),
        (("operating_points", "fp16-maxn", "options"), {"nvpmodel": None}, r"options.nvpmodel"),
        (("operating_points", "fp16-maxn", "precision"), "int8", r"'fp16-maxn': precision is 'int8'.*fp32, fp16 only"),
        (("constraints", "operator"), ["add"], r"constraints.operator: unknown key. Did you mean 'operators'"),
        (("constraints", "precisions"), ["fp8"], r"constraints.precisions.0: unknown value 'fp8'"),
        (
            ("constraints", "operators"),
            ["relu", "hardswish"],
            r"operators: .*kind 'hardswish'. Did you mean 'hard_swish'",
        ),
        (("constraints", "unsupported_operators"), ["Gelu"], r"unsupported_operators: .*'Gelu'.*read as 'gelu'"),
        (("constraints", "limits"), {"maxpool": {"source": "x"}}, r"limits: .*'maxpool'. Did you mean 'max_pool2d'"),
        (("constraints", "source"), "", r"constraints: constraints need a source"),
        (("constraints", "otherwise"), "cpu", r"otherwise: unknown value 'cpu'. Did you mean 'host_cpu'"),
        (("constraints", "limits"), {"add": {"max_stride": 2}}, r"constraints.limits.add.source: this key is missing"),
        (
            ("constraints", "limits"),
            {"add": {"max_strid": 2, "source": "x"}},
            r"constraints.limits.add.max_strid: unknown key. Did you mean 'max_stride'",
        ),
        (
            ("constraints", "limits"),
            {"add": {"max_stride": 0, "source": "x"}},
            r"constraints.limits.add.max_stride: .*greater than or equal to 1, got 0",
        ),
    ],
)
def test_a_wrong_profile_names_file_key_and_what_was_expected(path: tuple, value: object, message: str) -> None:
    profile = table()
    *parents, last = path
    inner = profile
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(UserError, match=message) as error:
        parse_profile(profile, "mine.toml")
    assert str(error.value).startswith("mine.toml: ")


def test_a_misspelt_key_is_named_although_the_right_one_is_missing() -> None:
    profile = table()
    point = profile["operating_points"]["fp16-maxn"]
    point["peak_gmac"] = point.pop("peak_gmacs")
    with pytest.raises(UserError, match=r"peak_gmac: unknown key. Did you mean 'peak_gmacs'"):
        parse_profile(profile, "mine.toml")


def test_what_is_supported_and_unsupported_at_once_is_refused() -> None:
    profile = table("edge_tpu")
    profile["constraints"]["unsupported_operators"] = ["add"]
    with pytest.raises(UserError, match=r"^mine.toml: constraints: 'add' stands among operators and among unsupported"):
        parse_profile(profile, "mine.toml")


def test_constraints_of_other_runtimes_do_not_hold() -> None:
    board = load_profile("edge_tpu_dev_board")
    assert board.target("int8").constraints.operators
    assert not board.target("int8-cpu").constraints.operators
    assert "num_threads=1" in board.target("int8-cpu").measure
    assert board.target("int8").measure == board.measure


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("name = 1\nkind = ?")
    with pytest.raises(UserError, match=r"bad.toml: not valid TOML.*line 2"):
        load_profile(bad)
    with pytest.raises(UserError, match=r"gone.toml: cannot be read"):
        load_profile(tmp_path / "gone.toml")
    other = tmp_path / "other.toml"
    other.write_text(tomli_w.dumps(table()))
    with pytest.raises(UserError, match=r"other.toml: name: is 'jetson_nano'"):
        load_profile(other)


def test_the_users_own_profiles_are_found_and_cannot_hide_shipped_ones(own_home: Path) -> None:
    devices = own_home / "devices"
    devices.mkdir(parents=True)
    mine = {**table(), "name": "my_board", "title": "My board"}
    (devices / "my_board.toml").write_text(tomli_w.dumps(mine))
    assert "my_board" in list_profiles()
    assert load_target("my_board:fp32").profile.title == "My board"

    (devices / "jetson_nano.toml").write_text(tomli_w.dumps(table()))
    with pytest.raises(UserError, match=r"jetson_nano.toml: .*comes with the package"):
        load_profile("jetson_nano")


def test_the_host_is_the_same_whenever_it_is_detected() -> None:
    from hardware_profiles import host, host_fingerprint

    first, fingerprint = load_profile("host"), host_fingerprint()
    host._cpuinfo.cache_clear()
    assert load_profile("host") == first
    assert host_fingerprint() == fingerprint
