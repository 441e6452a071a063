"""Fits rooflines to published latencies, and says how well they predict networks that were left out.

The logarithms of the costs (`predictors.roofline.COSTS`) get the most probable values under a normal prior and
Student-t errors of the logarithm of latency: few references suffice, and one odd figure does not bend the rest. The
prior's mean and spread are those of other devices of the same class, as far as there are any (empirical Bayes); figures
of the device itself never enter it, so that an error of cross-validation is one of networks, or families, that the fit
has not seen on this device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from hardware_profiles.profile import Profile, Target, load_profile, shipped_files
from hardware_profiles.profile_sections import FitErrors, Reference, RooflineFit, RooflineParameters
from predictors.base import Array
from predictors.quality import covered, figures, share_within
from predictors.roofline import ARITHMETIC, COSTS, FIXED, LINK, crossing_bytes, over_link, working_power, workload_work
from predictors.units import OTHER_UNIT
from search_spaces import UserError, Workload
from search_spaces.reference import reference_network

# With fewer networks at an operating point nothing is fitted.
LEAST_NETWORKS = 3
# Assumed errors of ln(latency): a Student-t distribution with so many degrees of freedom, whose scale is fitted within
# bounds, beginning with the first.
FREEDOM = 4.0
SCALE, SCALES = 0.08, (0.06, 0.3)
# Figures of a profile that measurements are this many times off tell nothing of them.
NO_USE = 10.0

# Priors of devices of which nothing else is known: what they attain of their peaks, microseconds, and what they get
# of a link's nominal speed; and standard deviations of the logarithms. Rough, and meant to be.
_BROAD = {
    #      conv pointw linear  dw   group weights activ launch fixed link
    "CPU": (0.5, 0.4, 0.4, 0.2, 0.3, 0.6, 0.5, 10, 100, 0.7),
    "GPU": (0.6, 0.5, 0.5, 0.15, 0.3, 0.6, 0.6, 12, 100, 0.7),
    "NPU": (0.4, 0.25, 0.25, 0.04, 0.1, 0.5, 0.5, 20, 500, 0.7),
}
_BROAD_STD = (0.7, 0.7, 0.7, 0.8, 0.8, 0.7, 0.8, 1.0, 1.0, 0.3)
# Other devices count against the broad prior as that many devices; their spread is at least the second figure.
_BROAD_DEVICES, _LEAST_STD = 1.0, 0.7
# Channels, and pixels of a row, that arithmetic is rounded up to.
_LANES = {"CPU": (1, 1), "GPU": (32, 32), "NPU": (16, 8)}
# Runtimes that compute on the CPU, whatever the device is known for.
_CPU_RUNTIMES = frozenset({"tflite", "litert", "ncnn", "onnxruntime", "openvino-cpu", "executorch"})

# Directions of uncertainty that a fit keeps.
_DIRECTIONS = 4
# Intervals are scaled so that they hold 90 % of the errors on networks and families left out, together with this many
# errors of a normal distribution with that standard deviation, relative to what the fit expects: ten networks alone do
# not determine a 90 % quantile.
_PSEUDO_ERRORS, _PSEUDO_STD = 5, 1.0


@dataclass(frozen=True)
class Sample:
    """The references of one operating point, one row per network.

    Attributes:
        names: `network@resolution`.
        families: of the networks.
        work: `(n, C)` multiples of `COSTS`.
        latency_ms: `(n,)` medians over the figures of one network.
    """

    target: Target
    names: tuple[str, ...]
    families: tuple[str, ...]
    work: Array
    latency_ms: Array

    @property
    def logs(self) -> Array:
        return np.log(self.latency_ms)

    @property
    def groups(self) -> NDArray[np.intp]:
        """`(n,)` number of each network's family."""
        return np.unique(self.families, return_inverse=True)[1]


def device_class(target: Target) -> str:
    """`CPU`, `GPU` or `NPU`: which devices a target is like."""
    kind = target.profile.kind
    if target.runtime in _CPU_RUNTIMES and kind != "GPU":
        return "CPU"
    return kind if kind in _BROAD else "NPU"


def sample(target: Target) -> Sample:
    """The target's references, with several figures of one network reduced to their median.

    Raises:
        UserError: a reference of an unknown network.
    """
    figures: dict[tuple[str, int | tuple[int, int]], list[float]] = {}
    names = []
    for reference in _references(target):
        key = reference.network, reference.resolution
        if key not in figures:
            names.append(f"{reference.network}@{reference.size}")
        figures.setdefault(key, []).append(reference.latency_ms)
    rows = []
    families = []
    for name, resolution in figures:
        try:
            network = reference_network(name, resolution=resolution)
        except UserError as error:
            raise UserError(f"profile {target.profile.name!r}: references: {error}") from error
        families.append(network.family)
        rows.append(_work(network.workload(), target))
    return Sample(
        target,
        tuple(names),
        tuple(families),
        np.array(rows).reshape(-1, len(COSTS)),
        np.array([median(values) for values in figures.values()]),
    )


def _work(workload: Workload, target: Target) -> Array:
    """`(C,)` multiples of `COSTS` of one network."""
    work = workload_work(workload, target, _LANES[device_class(target)])
    work[FIXED] = 1e-3
    if target.point.host_link_gbs:
        roof = target.profile.roofline
        params, working = target.itemsize * workload.params, working_power(workload, target)
        moved = over_link(crossing_bytes(workload, target), params, working, roof.on_chip_bytes)
        work[LINK] = moved / target.point.host_link_gbs
    return work


def measured_sample(
    target: Target, names: Sequence[str], families: Sequence[str], workloads: Sequence[Workload], latency_ms: Array
) -> Sample:
    """A sample of any measured networks, one workload and latency `(n,)` per name."""
    work = [_work(workload, target) for workload in workloads]
    return Sample(target, tuple(names), tuple(families), np.array(work).reshape(-1, len(COSTS)), np.asarray(latency_ms))


def _references(target: Target) -> list[Reference]:
    return [r for r in target.profile.references if r.operating_point == target.operating_point]


@dataclass(frozen=True)
class Prior:
    """Normal prior of the logarithms of the costs: mean and standard deviation `(C,)` each."""

    mean: Array
    std: Array


def broad_prior(target: Target) -> Prior:
    """What is assumed of a device of this class when no other is known."""
    values = np.array(_BROAD[device_class(target)], dtype=float)
    signs = np.array([1 if name in ("launch", "fixed") else -1 for name in COSTS])
    return Prior(signs * np.log(values), np.array(_BROAD_STD))


def prior(target: Target, others: Mapping[str, Sequence[tuple[Target, Array]]]) -> Prior:
    """The prior of a target, from what was fitted to other devices of its class.

    Args:
        others: per device, its targets and their logarithms of costs fitted alone; the target's own device is left out.
    """
    broad = broad_prior(target)
    like = []
    for device, fits in others.items():
        rows = [logs for other, logs in fits if device_class(other) == device_class(target)]
        if rows and device != target.profile.name:
            like.append(np.mean(rows, axis=0))
    if not like:
        return broad
    known = np.array(like)
    weight = len(known) + _BROAD_DEVICES
    mean = (known.sum(0) + _BROAD_DEVICES * broad.mean) / weight
    variance = (((known - mean) ** 2).sum(0) + _BROAD_DEVICES * broad.std**2) / weight
    std = np.maximum(np.sqrt(variance), _LEAST_STD)
    std[LINK] = broad.std[LINK]
    return Prior(mean, std)


def near(assumed: Prior, data: Sample) -> Prior:
    """The prior, moved to the level of the measurements where that is an order of magnitude off.

    Peaks that were guessed may be, and errors with long tails would take all measurements for odd ones.
    """
    off = float(np.median(data.logs - np.log(data.work @ np.exp(assumed.mean))))
    return Prior(assumed.mean + off, assumed.std) if abs(off) > np.log(NO_USE) else assumed


@dataclass(frozen=True)
class Costs:
    """Fitted costs.

    Attributes:
        logs: `(C,)` their most probable logarithms.
        scale: of the errors of ln(latency).
        covariance: `(C, C)` of the logarithms, to first order.
    """

    logs: Array
    scale: float
    covariance: Array

    def predict(self, work: Array) -> tuple[Array, Array]:
        """Logarithms of latency `(n,)`, and the variances `(n,)` that they are expected to err by."""
        shares = work * np.exp(self.logs)
        times = shares.sum(1)
        gradient = shares / times[:, None]
        return np.log(times), self.scale**2 + np.einsum("ij,jk,ik->i", gradient, self.covariance, gradient)


def fit_costs(work: Array, logs: Array, prior: Prior) -> Costs:
    """The most probable costs, with the scale of errors taken from a first fit. Without networks, the prior's.

    Args:
        work: `(n, C)`, not negative.
        logs: `(n,)` logarithms of the latencies in ms.
    """
    x = _most_probable(work, logs, prior, SCALE, prior.mean)
    errors = np.log(work @ np.exp(x)) - logs
    # The median absolute deviation of a normal distribution is 0.67 standard deviations.
    scale = float(np.clip(1.4826 * np.median(np.abs(errors)), *SCALES)) if len(errors) else SCALE
    x = _most_probable(work, logs, prior, scale, x)
    hessian, _ = _normal_equations(work, logs, prior, scale, x)
    return Costs(x, scale, np.asarray(np.linalg.inv(hessian), dtype=np.float64))


def _most_probable(work: Array, logs: Array, prior: Prior, scale: float, x: Array) -> Array:
    """Levenberg-Marquardt steps from `x`."""

    def badness(x: Array) -> float:
        error = (np.log(work @ np.exp(x)) - logs) / scale
        return float(((FREEDOM + 1) * np.log1p(error**2 / FREEDOM)).sum() + (((x - prior.mean) / prior.std) ** 2).sum())

    value = badness(x)
    damping = 1e-3
    for _ in range(100):
        hessian, gradient = _normal_equations(work, logs, prior, scale, x)
        for _ in range(12):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient).clip(-1.5, 1.5)
            new = badness(x + step)
            if new <= value:
                break
            damping *= 10
        else:
            return x
        x = x + step
        damping = max(damping / 5, 1e-9)
        if value - new < 1e-8 * (1 + abs(value)):
            return x
        value = new
    return x


def _normal_equations(work: Array, logs: Array, prior: Prior, scale: float, x: Array) -> tuple[Array, Array]:
    """Gauss-Newton's matrix and half the gradient of the reweighted squares."""
    shares = work * np.exp(x)
    times = shares.sum(1)
    error = (np.log(times) - logs) / scale
    jacobian = shares / times[:, None] / scale
    weighted = jacobian * ((FREEDOM + 1) / (FREEDOM + error**2))[:, None]
    precision = 1 / prior.std**2
    return weighted.T @ jacobian + np.diag(precision), weighted.T @ error + precision * (x - prior.mean)


@dataclass(frozen=True)
class LeftOut:
    """Predictions of networks that were left out: `(n,)` errors ln(predicted / measured), and the standard deviations
    that their fits expected."""

    errors: Array
    expected: Array

    @property
    def relative(self) -> Array:
        return np.abs(self.errors) / self.expected


def leave_out(data: Sample, prior: Prior, groups: NDArray[np.intp]) -> LeftOut:
    """Predict each group of networks from a fit to all others."""
    errors, variances = np.zeros(len(data.names)), np.zeros(len(data.names))
    for group in np.unique(groups):
        out = groups == group
        predicted, variances[out] = fit_costs(data.work[~out], data.logs[~out], prior).predict(data.work[out])
        errors[out] = predicted - data.logs[out]
    return LeftOut(errors, np.sqrt(variances))


def _interval_scale(relative: Array) -> float:
    """What expected spreads are multiplied by, so that 90 % intervals hold 90 % of errors `|error| / expected`."""
    levels = (np.arange(_PSEUDO_ERRORS) + 0.5) / _PSEUDO_ERRORS
    pooled = np.sort(np.concatenate([relative, _PSEUDO_STD * ndtri(0.5 + levels / 2)]))
    # The conformal quantile (Vovk et al., 2005): of n errors the ceil(0.9 (n + 1))-th.
    rank = min(int(np.ceil(0.9 * (len(pooled) + 1))), len(pooled))
    return float(pooled[rank - 1] / ndtri(0.95))


def _covered(left: LeftOut, both: Sequence[LeftOut], groups: NDArray[np.intp]) -> float:
    """Share of errors inside their 90 % intervals, each scaled by the errors of other groups."""
    pool = np.stack([part.relative for part in both])
    return covered(left.relative, groups, lambda others: ndtri(0.95) * _interval_scale(pool[:, others].ravel()))


def evaluate(data: Sample, prior: Prior) -> tuple[FitErrors, float]:
    """Errors on left-out networks and families, and the scale of the intervals."""
    n = len(data.names)
    networks = leave_out(data, prior, np.arange(n))
    families = leave_out(data, prior, data.groups)
    both = (networks, families)
    alone, together = (figures(-left.errors, data.latency_ms) for left in both)
    rank = alone.get("spearman")
    errors = FitErrors(
        median_ape=round(alone["median_error"], 4),
        within_10_percent=round(alone["within_10_percent"], 4),
        within_20_percent=round(share_within(-networks.errors, 0.2), 4),
        spearman=None if rank is None else round(rank, 4),
        coverage_90=round(_covered(networks, both, np.arange(n)), 4),
        family_median_ape=round(together["median_error"], 4),
        family_within_20_percent=round(share_within(-families.errors, 0.2), 4),
        family_coverage_90=round(_covered(families, both, data.groups), 4),
    )
    return errors, _interval_scale(np.concatenate([left.relative for left in both]))


def fit_target(target: Target, others: Mapping[str, Sequence[tuple[Target, Array]]]) -> RooflineFit:
    """Fit one operating point; `others` as `prior` takes them.

    Raises:
        UserError: too few networks, an unknown network, or figures in different units.
    """
    powers = [r.energy_mj / r.latency_ms for r in _references(target) if r.energy_mj]
    data, assumed = sample(target), prior(target, others)
    fit = fit_sample(data, assumed, powers)
    _check_units(data, fit_costs(data.work, data.logs, assumed).logs)
    return fit


def fit_sample(data: Sample, assumed: Prior, powers: Sequence[float] = ()) -> RooflineFit:
    """Fit measured networks of one operating point.

    Args:
        data: references, or networks that somebody measured (`measured_sample`).
        assumed: of the costs, before anything was measured.
        powers: W, of networks whose energy was measured too.

    Raises:
        UserError: too few networks.
    """
    target, n = data.target, len(data.names)
    if n < LEAST_NETWORKS:
        raise UserError(
            f"{target.name}: {n} networks with references are too few to fit a roofline; at least {LEAST_NETWORKS} "
            "are needed"
        )
    alone = fit_costs(data.work, data.logs, broad_prior(target)).logs
    costs = fit_costs(data.work, data.logs, assumed)
    errors, scale = evaluate(data, assumed)
    values, vectors = np.linalg.eigh(costs.covariance)
    order = np.argsort(-values)[:_DIRECTIONS]
    # An eigenvector's sign is arbitrary: the largest component is made positive, so that files stay the same.
    signs = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), np.arange(len(values))])
    directions = [scale * np.sqrt(values[i]) * signs[i] * vectors[:, i] for i in order]
    return RooflineFit(
        networks=n,
        families=len(set(data.families)),
        range_ms=(float(data.latency_ms.min()), float(data.latency_ms.max())),
        parameters=_parameters(target, costs.logs, n),
        log_std=_round(scale * costs.scale),
        deviations=tuple(tuple(round(float(v), 4) + 0.0 for v in row) for row in directions),
        alone=tuple(round(float(v), 4) for v in alone),
        power_w=_round(median(powers)) if powers else None,
        errors=errors,
    )


def _check_units(data: Sample, x: Array) -> None:
    off = np.log(data.work @ np.exp(x)) - data.logs
    worst = int(np.argmax(np.abs(off)))
    if abs(off[worst]) > np.log(OTHER_UNIT):
        raise UserError(
            f"{data.target.name}: reference {data.names[worst]}: {data.latency_ms[worst]:g} ms is "
            f"{np.exp(abs(off[worst])):.0f} times {'less' if off[worst] > 0 else 'more'} than the other references "
            "lead to expect; latencies are in milliseconds"
        )


def _parameters(target: Target, x: Array, n: int) -> RooflineParameters:
    cost = np.exp(x)
    names = dict(zip(COSTS, cost, strict=True))
    efficiency = {kind: _round(1 / names[kind]) for kind in ARITHMETIC}
    point = target.point
    return RooflineParameters(
        efficiency=efficiency | {"other": min(efficiency.values())},
        bandwidth_efficiency=_round(1 / names["activations"]),
        weight_bandwidth_efficiency=_round(1 / names["weights"]),
        lanes=_LANES[device_class(target)],
        launch_us=_round(names["launch"]),
        fixed_us=_round(names["fixed"]),
        host_link_gbs=_round(point.host_link_gbs / names["link"]) if point.host_link_gbs else None,
        estimated=False,
        source=f"fitted to the references of {n} networks",
    )


def _round(value: float) -> float:
    """Four significant digits: more would be noise, in files and in comparisons."""
    return float(f"{value:.4g}")


def fitted_points(profile: Profile) -> list[Target]:
    """The operating points with references of enough networks, in the profile's order."""
    networks: dict[str, set[tuple[str, str]]] = {}
    for r in profile.references:
        networks.setdefault(r.operating_point, set()).add((r.network, r.size))
    return [profile.target(p) for p in profile.operating_points if len(networks.get(p, ())) >= LEAST_NETWORKS]


def fitted_alone(profile: Profile) -> list[tuple[Target, Array]]:
    """Per operating point with enough references, the logarithms of its costs without knowledge of other devices."""
    fits = []
    for target in fitted_points(profile):
        data = sample(target)
        fits.append((target, np.round(fit_costs(data.work, data.logs, broad_prior(target)).logs, 4)))
    return fits


@lru_cache(maxsize=1)
def shipped_costs() -> dict[str, list[tuple[Target, Array]]]:
    """What was fitted alone to each device that comes with the package."""
    profiles = {name: load_profile(name) for name in shipped_files()}
    return {
        name: [(profile.target(point), np.array(fit.alone)) for point, fit in profile.fits.items()]
        for name, profile in profiles.items()
    }


def fit_roofline(profile: Profile, others: Mapping[str, Sequence[tuple[Target, Array]]] | None = None) -> Profile:
    """The profile with a fit for each operating point that has references of enough networks.

    `Roofline(profile.target())` then uses them. Operating points with too few keep what they had, and a roofline says
    that it is not calibrated there.

    Args:
        profile: with references.
        others: what is known of other devices, as `fitted_alone` gives it; by default of the shipped ones.

    Raises:
        UserError: a reference of an unknown network, in another unit, or too few anywhere.
    """
    others = shipped_costs() if others is None else others
    targets = fitted_points(profile)
    if not targets:
        raise UserError(
            f"profile {profile.name!r}: {len(profile.references)} references, but no operating point with "
            f"{LEAST_NETWORKS} networks, which a roofline needs; until then it rests on the datasheet"
        )
    return profile.model_copy(
        update={"fits": profile.fits | {t.operating_point: fit_target(t, others) for t in targets}}
    )
