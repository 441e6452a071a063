"""Predictors: latency, energy, memory and accuracy of networks without running them, and calibration to a device.

Everything that estimates lives here, with its uncertainty; what is known of devices, and measuring on them, lives in
`hardware_profiles`. `predictor_for` gives the right predictor for a metric on a target.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from predictors.accuracy import AccuracyPredictor
    from predictors.base import AdditivePredictor, BoundAdditive, BoundPredictor, Estimate, Predictor
    from predictors.calibration import Calibration, fit_target
    from predictors.choice import choose_predictor, predictor_for
    from predictors.counts import Count
    from predictors.few_shot import FewShot
    from predictors.lookup import LookupTable
    from predictors.measuring import calibrate
    from predictors.operator_model import OperatorModel
    from predictors.roofline import Roofline
    from predictors.roofline_fitting import fit_roofline
    from predictors.suite import CalibrationNetwork, calibration_suite
    from predictors.tables import MeasuredTable, TableLookup
    from predictors.zero_cost import score_architecture, score_network

_LAZY = {
    "AccuracyPredictor": "accuracy",
    "AdditivePredictor": "base",
    "BoundAdditive": "base",
    "BoundPredictor": "base",
    "Calibration": "calibration",
    "CalibrationNetwork": "suite",
    "Count": "counts",
    "Estimate": "base",
    "FewShot": "few_shot",
    "LookupTable": "lookup",
    "MeasuredTable": "tables",
    "OperatorModel": "operator_model",
    "Predictor": "base",
    "Roofline": "roofline",
    "TableLookup": "tables",
    "calibrate": "measuring",
    "calibration_suite": "suite",
    "choose_predictor": "choice",
    "fit_roofline": "roofline_fitting",
    "fit_target": "calibration",
    "predictor_for": "choice",
    "score_architecture": "zero_cost",
    "score_network": "zero_cost",
}

__all__ = [
    "AccuracyPredictor", "AdditivePredictor", "BoundAdditive", "BoundPredictor", "Calibration", "CalibrationNetwork",
    "Count", "Estimate", "FewShot", "LookupTable", "MeasuredTable", "OperatorModel", "Predictor", "Roofline",
    "TableLookup", "calibrate", "calibration_suite", "choose_predictor", "fit_roofline",
    "fit_target", "predictor_for", "score_architecture", "score_network",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"predictors.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
