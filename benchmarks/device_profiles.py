"""Published latencies of networks that a profile's roofline was not fitted to.

    python -m benchmarks.device_profiles [--table TABLE.csv] [--rows] [--stored]

For every shipped profile with references of enough networks, at its default operating point (or the one with most
networks, if the default has too few), batch 1, each network once: the roofline is fitted anew to all other
networks, and to all other families (all widths, depths and resolutions of a design left out together). Other
operating points are in the table, not in the JSON. Priors come from other devices only; their figures of the same
networks do take part in those. With a table (by default `published_latencies.csv` in $NASBENCH_DATA) the rows that
are not used are counted by reason; `--rows` lists them. `--stored` prints the errors that the profiles state,
without fitting.

The last line is JSON, one object per profile:

operating_point               where
n, families                   networks and families of them
median_ape                    median absolute error relative to the measurement, network left out
family_median_ape             the same, family left out
within_10_percent, within_20_percent, family_within_20_percent   share of networks predicted that closely
spearman                      rank correlation, network left out
coverage_90, family_coverage_90   share of measurements inside 90 % intervals, which other networks' errors calibrate
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from hardware_profiles.profile import Profile, load_profile, shipped_files
from hardware_profiles.profile_sections import RooflineFit
from predictors.roofline_fitting import fit_roofline, fitted_alone
from tools.published_rows import read, report


def reported(profile: Profile) -> str:
    """The operating point that stands for a profile."""
    if profile.default in profile.fits:
        return profile.default
    return max(profile.fits, key=lambda point: profile.fits[point].networks)


def figures(point: str, fit: RooflineFit) -> dict[str, Any]:
    """The JSON object of a fit."""
    return {"operating_point": point, "n": fit.networks, "families": fit.families} | fit.errors.model_dump()


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of rooflines on published latencies that were left out.")
    parser.add_argument(
        "--table", type=Path, help="published latencies; default: $NASBENCH_DATA/published_latencies.csv"
    )
    parser.add_argument("--rows", action="store_true", help="list every row of the table that is left out")
    parser.add_argument("--stored", action="store_true", help="print what the profiles state instead of fitting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shipped = {name: load_profile(name) for name in shipped_files()}
    profiles = {name: profile for name, profile in shipped.items() if profile.fits}
    if not args.stored:
        # The stored fits are forgotten: nothing but peaks and references enters.
        bare = {name: profile.model_copy(update={"fits": {}}) for name, profile in profiles.items()}
        others = {name: fitted_alone(profile) for name, profile in bare.items()}
        profiles = {name: fit_roofline(profile, others) for name, profile in bare.items()}

    print(f"{'':35}{'':5}{'':5}{'network left out':^42}{'family left out':^26}")
    columns = ("n", "fam.", "median", "+-10 %", "+-20 %", "rank", "90 %", "median", "+-20 %", "90 %")
    print(f"{'target (* in the JSON)':35}" + "".join(f"{c:>5}" if i < 2 else f"{c:>8}" for i, c in enumerate(columns)))
    for name, profile in profiles.items():
        for point, fit in profile.fits.items():
            e = fit.errors
            star = "*" if point == reported(profile) else ""
            print(
                f"{name + ':' + point + star:35}{fit.networks:5d}{fit.families:5d}{e.median_ape:8.1%}"
                f"{e.within_10_percent:8.0%}{e.within_20_percent:8.0%}"
                + (f"{e.spearman:8.3f}" if e.spearman is not None else " " * 8)
                + f"{e.coverage_90:8.0%}{e.family_median_ape:8.1%}{e.family_within_20_percent:8.0%}"
                f"{e.family_coverage_90:8.0%}"
            )
    few = [
        f"{name}:{point} ({len({(r.network, r.size) for r in profile.references if r.operating_point == point})})"
        for name, profile in shipped.items()
        for point in dict.fromkeys(r.operating_point for r in profile.references)
        if point not in profile.fits
    ]
    print(f"Too few networks to fit and judge: {', '.join(few)}; the other profiles have no references")
    table = args.table
    if table is None and os.environ.get("NASBENCH_DATA"):
        table = Path(os.environ["NASBENCH_DATA"]) / "published_latencies.csv"
    if table is not None:
        print()
        print(report(read(table), args.rows))
    points = {name: reported(profile) for name, profile in profiles.items()}
    print(json.dumps({name: figures(point, profiles[name].fits[point]) for name, point in points.items()}))


if __name__ == "__main__":
    main()
