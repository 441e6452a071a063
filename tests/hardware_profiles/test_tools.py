"""What benchmark programs print is read as they print it; the transcripts' README says where they come from."""

from pathlib import Path

import pytest

from hardware_profiles.subprocesses import ToolError
from hardware_profiles.tools import BenchmarkApp, BenchmarkModel, JsonTool, Reading, Trtexec, tegrastats_power

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def text(name: str) -> str:
    return (TRANSCRIPTS / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "ms", "count", "statistic", "operators"),
    [
        ("benchmark_model_2018", 79.7609, 0, "mean of all runs", 5),
        ("benchmark_model_am62", 602.943, 50, "mean of 50 runs", 0),
        ("benchmark_model_rpi", 2.781, 337, "median of 337 runs", 0),
        ("benchmark_model_litert", 0.462, 2112, "median of 2112 runs", 5),
    ],
)
def test_benchmark_model_of_all_ages(name: str, ms: float, count: int, statistic: str, operators: int) -> None:
    reading = BenchmarkModel().parse(text(name))
    assert reading.samples_ms == (pytest.approx(ms),)
    assert (reading.count, reading.statistic) == (count, statistic)
    assert len(reading.operators) == operators


def test_benchmark_models_operators_and_memory() -> None:
    first = BenchmarkModel().parse(text("benchmark_model_2018")).operators[1]
    assert (first.kind, first.latency_ms) == ("DEPTHWISE_CONV_2D", 2.15)
    assert first.name.endswith("Conv2d_1_depthwise/Relu6")
    linear = BenchmarkModel().parse(text("benchmark_model_litert")).operators[3]
    assert (linear.kind, linear.latency_ms) == ("Fully Connected (NC, PF32) GEMM", 0.382)
    am62 = BenchmarkModel().parse(text("benchmark_model_am62"))
    assert am62.peak_memory_bytes == int(149.531 * 2**20)
    assert "did not run on the delegate" in am62.notes


@pytest.mark.parametrize("cut", ["INFO: count=50 first", "INFO: Running benchmark for at least 50"])
def test_a_benchmark_model_that_breaks_off_gives_no_number(cut: str) -> None:
    whole = text("benchmark_model_am62")
    with pytest.raises(ToolError, match="did not get to its end"):
        BenchmarkModel().parse(whole[: whole.index(cut)])


@pytest.mark.parametrize(
    ("name", "latency", "compute", "version"),
    [("trtexec_8_4", 42.1411, 41.9604, "8.4.1"), ("trtexec_10_3", 3.14062, 3.14062, "10.3.0")],
)
def test_trtexec_of_tensorrt_8_and_10(name: str, latency: float, compute: float, version: str) -> None:
    reading = Trtexec().parse(text(name))
    assert reading.samples_ms == (latency,)
    assert reading.version == version
    assert "percentile(99%)" in reading.notes
    assert Trtexec("gpu_compute").parse(text(name)).samples_ms == (compute,)


def test_trtexec_says_why_there_is_no_number() -> None:
    failed = (
        "[01/01/2024-10:00:00] [E] Error[4]: unsupported operator Foo\n&&&& FAILED TensorRT.trtexec [TensorRT v8602]"
    )
    with pytest.raises(ToolError, match="unsupported operator Foo"):
        Trtexec().parse(failed)
    with pytest.raises(ToolError, match="did not get to its summary"):
        Trtexec().parse(text("trtexec_8_4").split("Latency: min")[0])
    unsteady = text("trtexec_8_4").replace("= 1.04731%", "= 20.4616%")
    assert Trtexec().parse(unsteady).throttled
    assert not Trtexec().parse(text("trtexec_8_4")).throttled


def test_trtexecs_layers_and_times() -> None:
    layers = Trtexec().parse(text("trtexec_10_3") + text("trtexec_profile")).operators
    assert [o.latency_ms for o in layers] == [0.0077, 0.0228, 0.0067, 0.0189, 0.0194]
    assert layers[2].name == "node_of_gpu_0/pool1_1"
    # The form of exportJSONTrace and of the earlier Profiler::print (samples/common/sampleReporting.cpp).
    exported = '[\n  { "startEnqMs" : 0.1, "computeMs" : 2.5, "latencyMs" : 3.5 }\n'
    exported += ', { "computeMs" : 2.25, "latencyMs" : 3 }\n]'
    assert Trtexec().times(exported) == (3.5, 3.0)
    assert Trtexec("gpu_compute").times(exported) == (2.5, 2.25)
    with pytest.raises(ToolError, match="damaged"):
        Trtexec().times(exported[:-5])
    early = (
        "=== Profile (2 iterations ) ===\n          Layer   Time (ms)   Avg. Time (ms)   Time %\n"
        " conv1 + relu1        4.00           2.0000     80.0\n         Total        5.00           2.5000    100.0\n"
    )
    (layer,) = Trtexec().parse(text("trtexec_8_4") + early).operators
    assert (layer.name, layer.latency_ms) == ("conv1 + relu1", 2.0)


def test_benchmark_app_before_and_after_2022() -> None:
    assert BenchmarkApp("CPU").parse(text("benchmark_app_2021")).samples_ms == (1.25,)
    reading = BenchmarkApp("MYRIAD").parse(text("benchmark_app_2022"))
    assert reading.samples_ms == (10.45,)
    assert reading.count == 1413
    assert reading.version.startswith("2022.3.0")
    with pytest.raises(ToolError, match="Can not init Myriad device: NC_ERROR"):
        BenchmarkApp("MYRIAD").parse("[ ERROR ] Can not init Myriad device: NC_ERROR")


def test_tegrastats_of_five_boards() -> None:
    # TX2, Nano, Xavier NX, Orin Nano, AGX Orin: there, three rails add up to the module.
    assert tegrastats_power(text("tegrastats").splitlines()) == (3140, 1750, 3902, 6626, 4788 + 798 + 3842)
    assert tegrastats_power(["RAM 775/7620MB SWAP 0/3810MB (cached 0MB) GR3D_FREQ 0%", ""]) == ()


def test_json_between_other_lines() -> None:
    reading = JsonTool().parse('loading\n{"latency_ms": [1.5, 2], "energy_mj": 4, "runtime_version": "3.1"}\n')
    assert (reading.samples_ms, reading.energy_mj, reading.version) == ((1.5, 2.0), 4.0, "3.1")
    noisy = '{"level": "info"}\n{"latency_ms": [1.5, 2]}  \nclosing {device}\n{ready}\n[I] done\n{"level": "info"} ok\n'
    assert JsonTool().parse(noisy).samples_ms == (1.5, 2.0)
    spread = JsonTool().parse('{\n "latency_ms": 1.5,\n "operators": [{"name": "conv", "latency_ms": 1}]\n}')
    assert spread.samples_ms == (1.5,)
    assert spread.operators[0].name == "conv"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "printed nothing"),
        ("Segmentation fault", "no JSON object, but 'Segmentation fault'"),
        ('{"latency_ms": [1.2, ', "breaks off"),
        ("[1.2]", r"no JSON object, but '\[1.2\]'"),
        (
            '{"latency_ms": 1.2}\n{"latency_ms": 1.3}',
            "2 JSON objects with 'latency_ms'.* go into one list",
        ),
        ('{"level": "info"}\n{"latency_ms": [1.2, ', "breaks off"),
        ('{"config": {"a":\n{"latency_ms": 4},\n "b": 1}', "breaks off"),
        ('{"a": nope,\n{"latency_ms": 4}\n}', "damaged"),
        ('{"latency_ms": 3} trailing', "damaged: Extra data"),
        ('{"latency_ms": 3} {"latency_ms": 4}\n{"latency_ms": 5}', "damaged: Extra data"),
        ('{\n"latency_ms": 3\n} trailing', "damaged: Extra data"),
        (
            '{"latency_ms": 3, "operators": [\n{"name": "a", "latency_ms": 1},\n{"name": "b", "latency_ms": 2}',
            "breaks off",
        ),
        ('{"latency": 1.2}', "unknown key 'latency'. Did you mean 'latency_ms'"),
        ('{"energy_mj": 1.2}', "no key 'latency_ms'"),
        ('{"latency_ms": "1.2 ms"}', "'1.2 ms', where a number"),
        ('{"latency_ms": [true]}', "True, where a number"),
        ('{"latency_ms": 1, "energy_mj": NaN}', "not finite"),
    ],
)
def test_json_that_is_none_says_what_it_is(output: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        JsonTool().parse(output)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(()), "no latency"),
        (Reading((1.0, float("nan"))), "nan ms"),
        (Reading((float("inf"),)), "inf ms"),
        (Reading((-1.0,)), "-1 ms"),
        (Reading((0.0,)), "0 ms"),
        (Reading((1e-6,)), "1e-06 ms, which no inference takes; milliseconds per inference are expected"),
        (Reading((2500.0,) * 100), "ran for 2000 ms only"),  # microseconds
        (Reading((2500.0,), count=100), "100 latencies of 2500 ms"),
        (Reading((1.0,), energy_mj=1e9), "mJ per inference"),
        (Reading((1.0,), energy_mj=-1.0), "-1 W"),
        (Reading((1.0,), energy_mj=float("nan")), "nan W"),
        (Reading((1.0,), peak_memory_bytes=-5), "-5 bytes"),
    ],
)
def test_figures_that_cannot_be_true_are_refused(reading: Reading, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        reading.check(seconds=2.0)
    good = Reading((2.5,) * 100, energy_mj=10.0, peak_memory_bytes=1)
    assert good.check(seconds=2.0) is good


@pytest.mark.parametrize("latency", ["1" + 400 * "0", "1" + 5000 * "0", 100_000 * "["])
def test_numbers_and_nesting_that_python_cannot_hold_are_told(latency: str) -> None:
    with pytest.raises(ToolError, match="digits|cannot be read"):
        JsonTool().parse(f'{{"latency_ms": {latency}}}')
