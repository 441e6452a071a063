"""Device profiles for people: the list, and one profile as tables with numbered sources."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nasbench import tables
from nasbench.tables import grid, plain
from search_spaces import UserError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from hardware_profiles import OperatingPoint, Profile
    from hardware_profiles.profile_sections import Constraints

_WIDTH = 160  # of lines where there is no terminal: a table's rows stay whole
_LINES = 20  # references shown of one operating point before the view says how many more there are


class _Sources:
    """Numbers sources in the order in which they are first named."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def number(self, source: str) -> str:
        return f"[{self.known.setdefault(source, len(self.known) + 1)}]" if source else ""


def list_devices() -> None:
    """Print every device: what it is, how many published latencies there are, and its operating points.

    A profile of the user's that is wrong is told, and hides no other.
    """
    from hardware_profiles import list_profiles, load_profile

    rows, wrong = [], []
    for name in list_profiles():
        try:
            profile = load_profile(name)
        except UserError as error:
            wrong.append(str(error))
            continue
        points = [f"{p}*" if p == profile.default else p for p in profile.operating_points]
        rows.append((name, profile.kind, profile.title, len(profile.references) or "", ", ".join(points)))
    console = tables.console(_WIDTH)
    console.print(grid(("device", "kind", "what it is", "published", "operating points (* default)"), rows))
    for message in wrong:
        print(f"warning: not listed: {message}", file=sys.stderr)


def show_device(profile: Profile, console: Console | None = None) -> None:
    """Print a profile: datasheet, operating points, how to measure, constraints, published latencies, fits, sources."""
    console = console or tables.console(_WIDTH)
    sources = _Sources()
    console.print(f"[bold]{profile.name}[/bold]  {plain(profile.title)} ({profile.kind})", highlight=False)
    sections: list[tuple[str, RenderableType | None]] = [
        ("Datasheet", _datasheet(profile, sources)),
        ("Operating points", _points(profile, sources)),
        ("What runs there", _constraints(profile, sources)),
        ("Published latencies", _references(profile, sources)),
        ("Roofline", _roofline(profile, sources)),
        ("To measure there", _commands(profile)),
        ("Sources", grid(("", ""), [(f"[{n}]", source) for source, n in sources.known.items()], header=False)),
    ]
    for title, body in sections:
        if body is not None:
            console.print(f"\n[bold]{title}[/bold]")
            console.print(body)


def _datasheet(profile: Profile, sources: _Sources) -> RenderableType | None:
    rows = [
        (figure.name, f"{figure.value:g} {figure.unit}", sources.number(figure.source), figure.note)
        for figure in profile.datasheet
    ]
    return grid(("figure", "value", "source", "note"), rows) if rows else None


def _points(profile: Profile, sources: _Sources) -> RenderableType:
    def row(name: str, point: OperatingPoint) -> tuple[Any, ...]:
        return (
            f"{name}*" if name == profile.default else name,
            point.precision,
            point.runtime,
            point.threads,
            point.power_mode,
            f"{point.peak_gmacs:g}",
            f"{point.bandwidth_gbs:g}",
            "" if point.power_w is None else f"{point.power_w:g}",
            point.host_link,
            "estimated" if point.estimated else "",
            sources.number(point.source),
        )

    columns = (
        "name (* default)",
        "precision",
        "runtime",
        "threads",
        "mode",
        "GMAC/s",
        "GB/s",
        "W",
        "link",
        "",
        "source",
    )
    return grid(columns, [row(name, point) for name, point in profile.operating_points.items()])


def _constraints(profile: Profile, sources: _Sources) -> RenderableType | None:
    rules: Constraints = profile.constraints
    rows: list[tuple[str, Any, str]] = []
    number = sources.number(rules.source) if rules.source else ""
    if rules.runtimes:
        rows.append(("holds for runtimes", ", ".join(rules.runtimes), ""))
    if rules.precisions:
        rows.append(("precisions", ", ".join(rules.precisions), number))
    if rules.static_shapes:
        rows.append(("shapes", "all known when compiled", number))
    if rules.max_rank is not None:
        rows.append(("dimensions per sample", f"at most {rules.max_rank}", number))
    if rules.operators:
        rows.append(("only these operators", ", ".join(rules.operators), number))
    if rules.unsupported_operators:
        rows.append(("not these operators", ", ".join(rules.unsupported_operators), number))
    for kind, limit in rules.limits.items():
        asked = limit.model_dump(exclude_none=True, exclude={"source"})
        words = ", ".join(f"{key.removeprefix('max_').replace('_', ' ')} <= {most:,}" for key, most in asked.items())
        rows.append((kind, words, sources.number(limit.source)))
    if rules.operators or rules.unsupported_operators or rules.limits:
        then = "the network is refused" if rules.otherwise == "refused" else "the operator is left to the host's CPU"
        rows.append(("otherwise", then, number))
    if rules.note:
        rows.append(("note", rules.note, number))
    return grid(("", "", "source"), rows, header=False) if rows else None


def _references(profile: Profile, sources: _Sources) -> RenderableType | None:
    rows: list[tuple[Any, ...]] = []
    by_point: dict[str, int] = {}
    for reference in profile.references:
        by_point[reference.operating_point] = by_point.get(reference.operating_point, 0) + 1
        if by_point[reference.operating_point] <= _LINES:
            energy = "" if reference.energy_mj is None else f"{reference.energy_mj:.4g}"
            rows.append(
                (
                    reference.network,
                    _pixels(reference.resolution),
                    f"{reference.latency_ms:.4g}",
                    energy,
                    reference.operating_point,
                    sources.number(reference.source),
                )
            )
    for point, count in by_point.items():
        if count > _LINES:
            rows.append((f"and {count - _LINES} more", "", "", "", point, ""))
    return grid(("network", "pixels", "ms", "mJ", "operating point", "source"), rows) if rows else None


def _pixels(resolution: int | Sequence[int]) -> str:
    return str(resolution) if isinstance(resolution, int) else "x".join(map(str, resolution))


def _roofline(profile: Profile, sources: _Sources) -> RenderableType:
    """The fitted operating points with their errors on networks left out; else the guesses, named as such."""
    rows = []
    for point, fit in profile.fits.items():
        errors = fit.errors
        rows.append(
            (
                point,
                fit.networks,
                fit.families,
                f"{errors.median_ape:.1%}",
                f"{errors.family_median_ape:.1%}",
                f"{errors.within_20_percent:.0%}",
                "" if errors.spearman is None else f"{errors.spearman:.3f}",
                f"{errors.coverage_90:.0%}",
            )
        )
    if not rows:
        return plain(f"rough figures, fitted to nothing {sources.number(profile.roofline.source)}")
    columns = (
        "fitted to published latencies", "networks", "families", "median error, network left out",
        "family left out", "within 20 %", "Spearman", "in 90 % interval",
    )  # fmt: skip
    return grid(columns, rows)


def _commands(profile: Profile) -> RenderableType | None:
    commands: dict[str, list[str]] = {}
    for name in profile.operating_points:
        commands.setdefault(profile.target(name).measure, []).append(name)
    rows = [(", ".join(names), command) for command, names in commands.items() if command]
    return grid(("operating points", "command"), rows, header=False) if rows else None
