"""Static int8 quantisation of ONNX files, in the form with quantise and dequantise nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hardware_profiles.extras import quiet, reason
from search_spaces.errors import UserError

CalibrationMethod = Literal["minmax", "entropy", "percentile"]


def quantize_onnx(
    source: Path,
    path: Path,
    batches: Iterable[np.ndarray[Any, Any]],
    *,
    calibration: CalibrationMethod = "minmax",
    per_channel: bool = True,
    reduce_range: bool = False,
) -> None:
    """Quantise an fp32 ONNX file: unsigned activations, signed weights, ranges calibrated on `batches`.

    Args:
        source: the file; one input.
        path: written in place, so the caller makes it atomic.
        batches: arrays `(batch, channels, height, width)` float32 in the file's batch size.
        calibration: how the range of an activation follows from its values; `entropy` and `percentile` keep all
            activations of all batches in memory.
        per_channel: one scale per output channel of a weight, instead of one per weight.
        reduce_range: 7 bits for weights. x86 processors without VNNI add pairs of 8-bit products in 16 bits, which
            overflow: there, 8 bits cost the logits of MobileNetV3-like networks 5 dB of signal-to-noise ratio (28 to
            22 dB) and gained no speed.

    Raises:
        UserError: a file that cannot be quantised.
    """
    import onnx
    from onnxruntime import quantization as ortq
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if calibration not in get_args(CalibrationMethod):
        raise UserError(f"calibration = {calibration!r}: expected {', '.join(get_args(CalibrationMethod))}")
    methods = ortq.CalibrationMethod
    prepared = path.with_name(f"{path.name}.prepared")
    try:
        name = onnx.load(str(source), load_external_data=False).graph.input[0].name

        class Reader(ortq.CalibrationDataReader):
            def __init__(self) -> None:
                self.feeds: Iterator[np.ndarray[Any, Any]] = iter(batches)

            def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
                x = next(self.feeds, None)
                return None if x is None else {name: x}

        with quiet():
            # Shapes only: the converter has folded normalisation, and the runtime's own optimisation would split
            # hard-swish in two, each half then quantised (5 % slower). Shapes are static: no symbolic pass.
            quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
            ortq.quantize_static(
                str(prepared),
                str(path),
                Reader(),
                quant_format=ortq.QuantFormat.QDQ,
                activation_type=ortq.QuantType.QUInt8,
                weight_type=ortq.QuantType.QInt8,
                per_channel=per_channel,
                reduce_range=reduce_range,
                calibrate_method={
                    "minmax": methods.MinMax,
                    "entropy": methods.Entropy,
                    "percentile": methods.Percentile,
                }[calibration],
            )
    except Exception as error:  # the tools raise whatever onnx, numpy and the runtime raise
        raise UserError(f"{source}: cannot be quantised: {reason(error)}") from error
    finally:
        prepared.unlink(missing_ok=True)
