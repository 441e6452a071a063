"""Predicted against measured latency on this machine, for networks that the calibration never saw.

    python -m benchmarks.host_latency [--runtime onnxruntime] [--precision fp32] [--parts quickstart mobile96 ...]
    python -m benchmarks.host_latency ... --files DIRECTORY --convert-only      then the same without --convert-only

`quickstart` and `mobile96`: a fresh calibration of 32 networks of the space, tested on random architectures of it.
`other_families`: one calibration on made-up networks, tested on published ones of all families and on seeded random
architectures of three spaces, none of which it has seen. The model's features were designed in view of one half of the
families, chosen by a hash of their names; `within_10_relative_report` is the figure of the other half, though some of
what was chosen later (groups, scales, the made-up networks, the order of shuffled maps) had both in sight.
The tests are measured twice, by independent runs of the meter; one thread, batch 1. A network that the runtime cannot
convert or run is named and left out. Converting takes many times longer than measuring, which wants a machine that does
nothing else: `--files` keeps converted networks for later runs, `--convert-only` stops there, and `--measure-only`
leaves out what is not converted yet. `--suite 150 --per-family 1` measures for a few minutes; a larger suite begins
with the smaller one.
The last line is JSON, one object per part:

within_10_percent         share of networks predicted within 10 % of the first measurement
repeat_within_10_percent  share of networks whose second measurement is within 10 % of the first: what noise allows
within_10_relative        ratio of the two
within_10_relative_report the same of the families that the model was not designed on (of the whole for a space)
spearman                  rank correlation of prediction and first measurement
coverage_90               share of first measurements inside the 90 % interval
median_ape                median of |predicted / measured - 1|
measuring_s               seconds that measuring for the calibration took
converting_s              seconds that converting for it took
n                         networks compared
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hardware_profiles import Artifact, Target, load_target, meter_for
from hardware_profiles.converted import ConvertedFiles
from hardware_profiles.measuring import measure_alone
from predictors import CalibrationNetwork, calibrate, calibration_suite
from predictors.calibration import Calibration
from predictors.measuring import SpaceNetwork, choose, converted, is_converted
from predictors.quality import estimate_figures
from search_spaces import SearchSpace, UserError, load_space, reference_network, reference_networks

# The spaces with the task that each is meant for: input channels and classes.
SPACES = {"quickstart": (1, 10), "mobile96": (3, 100)}
OTHERS = "other_families"
# Published networks are tested at their resolution, or at a smaller one that brings them below so many
# multiply-accumulates: so that all take 0.1 to 100 ms.
MOST_MACS = 1.2e9


def published(per_family: int) -> list[CalibrationNetwork]:
    """Up to so many reference networks of each family, from the first to the last in its list."""
    families: dict[str, list[str]] = {}
    for name in reference_networks():
        families.setdefault(reference_network(name).family, []).append(name)
    chosen: list[CalibrationNetwork] = []
    for names in families.values():
        places = np.linspace(0, len(names) - 1, min(per_family, len(names))).round().astype(int)
        for name in (names[i] for i in np.unique(places)):
            network = reference_network(name)
            try:
                macs = network.workload().macs
                if macs > MOST_MACS:
                    size = int(network.input_shape[1] * np.sqrt(MOST_MACS / macs) // 32 * 32)
                    network = reference_network(name, resolution=max(size, 96))
                    network.workload()
            except UserError as error:
                print(f"left out: {error}")
                continue
            chosen.append(network)
    return chosen


def drawn(space: SearchSpace, n: int, seed: int, known: Set[str] = frozenset()) -> list[CalibrationNetwork]:
    """Random architectures of a space, without those named in `known`."""
    archs = np.unique(space.sample(n + 2 * len(known), np.random.default_rng([seed, 1])), axis=0)
    networks = [SpaceNetwork(space, tuple(arch.tolist())) for arch in archs]
    unseen = [network for network in networks if network.name not in known]
    order = np.random.default_rng([seed, 2]).permutation(len(unseen))[:n]
    return [unseen[i] for i in order]


def convert(networks: Sequence[CalibrationNetwork], files: ConvertedFiles) -> dict[CalibrationNetwork, Artifact]:
    """The networks that the runtime takes, converted now or in an earlier run."""
    artifacts: dict[CalibrationNetwork, Artifact] = {}
    for network in networks:
        try:
            artifacts[network] = converted(network, files)
        except UserError as error:
            print(f"left out: {network.name}: {error}", flush=True)
    return artifacts


def measured(
    target: Target, networks: Sequence[CalibrationNetwork], files: ConvertedFiles, seed: int
) -> dict[CalibrationNetwork, tuple[float, float]]:
    """Two latencies of each network that runs, ms."""
    artifacts = convert(networks, files)
    runs = []
    for run in range(2):
        meter = meter_for(target)
        meter.seed = seed + run  # type: ignore[attr-defined]
        runs.append(measure_alone(meter, list(artifacts.values()), target))
    found: dict[CalibrationNetwork, tuple[float, float]] = {}
    for network, first, second in zip(artifacts, *runs, strict=True):
        if error := first.error or second.error:
            print(f"left out: {network.name}: {error}")
        else:
            found[network] = first.latency_ms, second.latency_ms
    return found


def compare(
    target: Target, calibration: Calibration, latencies: dict[CalibrationNetwork, tuple[float, float]], title: str
) -> dict[str, float]:
    """The figures of one part."""
    tested = list(latencies)
    first, second = np.array(list(latencies.values())).T
    estimate = calibration.predictor(target).predict([network.workload() for network in tested])
    found = estimate_figures(estimate, first)
    off, repeated = np.abs(estimate.mean / first - 1), np.abs(second / first - 1)
    report = np.array([title != OTHERS or not designed_on(network.family) for network in tested])
    print(
        f"{title}: {len(tested)} networks of {first.min():.3f}-{first.max():.3f} ms (median {np.median(first):.3f}), "
        f"median error {found['median_error']:.1%}, median difference of the two measurements "
        f"{np.median(repeated):.1%}, 90 % interval holds {found['interval_90_coverage']:.0%}"
    )
    for place in np.argsort(-off)[:10]:
        name = tested[place].name
        print(f"  {name}: predicted {estimate.mean[place]:.3f}, measured {first[place]:.3f} ms")
    return {
        "within_10_percent": found["within_10_percent"],
        "repeat_within_10_percent": float(np.mean(repeated <= 0.1)),
        "within_10_relative": _relative(off, repeated),
        "within_10_relative_report": _relative(off[report], repeated[report]),
        "spearman": found.get("spearman", float("nan")),
        "coverage_90": found["interval_90_coverage"],
        "median_ape": found["median_error"],
        "measuring_s": round(calibration.seconds["measure"], 1),
        "converting_s": round(calibration.seconds["convert"], 1),
        "n": len(tested),
    }


def networks_of(
    part: str, target: Target, args: argparse.Namespace
) -> tuple[list[CalibrationNetwork], list[CalibrationNetwork]]:
    """The networks that a part calibrates with, and those that it is tested on."""
    if part == OTHERS:
        tests = published(args.per_family)
        for name in ("quickstart", "mobile96", "ofa_mobilenet_v3"):
            tests += drawn(load_space(name, *SPACES.get(name, ())), min(10, args.networks), args.seed)
        return list(calibration_suite(args.suite, args.seed)), tests
    space = load_space(part, *SPACES[part])
    rows = choose(space, args.calibration, target, np.random.default_rng(args.seed))
    chosen: list[CalibrationNetwork] = [SpaceNetwork(space, tuple(row.tolist())) for row in rows]
    return chosen, drawn(space, args.networks, args.seed, {network.name for network in chosen})


def designed_on(family: str) -> bool:
    """Whether the operator model's features and scales were chosen with networks of this family in view."""
    return bool(int(hashlib.sha256(f"hl-2:{family}".encode()).hexdigest(), 16) % 2)


def _relative(off: NDArray[np.float64], repeated: NDArray[np.float64]) -> float:
    """Share of predictions within 10 %, over that of second measurements; NaN where no second one is."""
    again = np.mean(repeated <= 0.1)
    return float(np.mean(off <= 0.1) / again) if again else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Predicted against measured latency of unseen networks on this machine."
    )
    parser.add_argument("--runtime", default="onnxruntime", help="onnxruntime, litert, openvino, executorch")
    parser.add_argument("--precision", default="fp32", help="fp32 or int8")
    parser.add_argument("--parts", nargs="+", default=[*SPACES, OTHERS], choices=[*SPACES, OTHERS])
    parser.add_argument(
        "--networks", type=int, default=100, help="random architectures per space (of the other families: 10 at most)"
    )
    parser.add_argument("--calibration", type=int, default=32, help="networks measured for the calibration of a space")
    parser.add_argument("--suite", type=int, default=540, help="made-up networks measured for the other families")
    parser.add_argument("--per-family", type=int, default=3, help="published networks per family")
    parser.add_argument("--files", type=Path, help="directory to keep converted networks in; else they are not kept")
    parser.add_argument("--convert-only", action="store_true", help="fill --files, and measure nothing yet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-only", action="store_true", help="leave out networks that are not in --files yet")
    args = parser.parse_args()
    if (args.convert_only or args.measure_only) and not args.files:
        parser.error("--convert-only, --measure-only: name the directory of what is converted, --files DIRECTORY")
    torch.set_num_threads(1)
    prefix = "" if args.runtime == "onnxruntime" else f"{args.runtime}-"
    target = load_target(f"host:{prefix}{args.precision}")
    results = {}
    with tempfile.TemporaryDirectory(prefix="nasbench-host-latency-") as temporary:
        files = ConvertedFiles(args.files or Path(temporary) / "files", target)
        for part in args.parts:
            chosen, networks = networks_of(part, target, args)
            if args.measure_only:
                chosen, networks = ([n for n in some if is_converted(n, files)] for some in (chosen, networks))
                print(f"{part}: {len(chosen)} networks to calibrate with and {len(networks)} to test are converted")
            if args.convert_only:
                print(f"{part}: {len(convert([*chosen, *networks], files))} networks converted", flush=True)
                continue
            latencies = measured(target, networks, files, args.seed)
            calibration = calibrate(target, chosen, seed=args.seed, cache=Path(temporary), files=files.folder)
            results[part] = compare(target, calibration, latencies, part)
    if args.convert_only:
        return
    keys = list(next(iter(results.values())))
    print("part".ljust(16) + "".join(k.rjust(26) for k in keys))
    for name, row in results.items():
        print(name.ljust(16) + "".join(f"{row[k]:.3f}".rjust(26) for k in keys))
    print(json.dumps({name: {k: round(v, 4) for k, v in row.items()} for name, row in results.items()}))


if __name__ == "__main__":
    main()
