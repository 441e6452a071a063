"""Latency of networks as the sum of measured blocks: the look-up tables that come with many search papers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.paths import read_csv, write_text
from predictors.base import AdditivePredictor, Array, Estimate
from predictors.tables import MS_PER_UNIT
from search_spaces import Operator, SearchSpace, Tensor, UserError, Workload, WorkloadBuilder
from search_spaces.operators import FOLDED

# Standard deviation of measured / predicted - 1 that is assumed for sums of blocks: a runtime works across them, and
# whole networks were not part of the table. ProxylessNAS-Mobile, by its authors' own table: 86 ms; measured: 78 ms.
RELATIVE_STD = 0.1

_FORMAT = "nasbench block table 1"
_PROXYLESS_BLOCK = re.compile(
    r"expanded_conv-input:(\d+)x(\d+)x(\d+)-output:(\d+)x(\d+)x(\d+)-expand:(\d+)-kernel:(\d+)-stride:(\d+)-idskip:([01])"
)
_PROXYLESS_STEM = re.compile(r"Conv-input:(\d+)x(\d+)x(\d+)-output:(\d+)x(\d+)x(\d+)")
_PROXYLESS_LAST = re.compile(r"Conv_1-input:(\d+)x(\d+)x(\d+)-output:(\d+)x(\d+)x(\d+)")
_PROXYLESS_LOGITS = re.compile(r"Logits-input:(\d+)x(\d+)x(\d+)-output:(\d+)")


class LookupTable(AdditivePredictor):
    """A sum of measured block latencies. A network with any other block is an error that names it: nothing is made up.

    A block is known by what it is, the sequence of its operators with their shapes (`signature`), not by its name; so
    one table serves every space with these blocks. A whole network is cut into known blocks, the longest first.

    Needs latencies of blocks: `from_proxylessnas`, `from_fbnet` or `from_csv`, or a file that `save` wrote.

    Args:
        blocks: signature -> milliseconds.
        source: where the figures come from.
        relative_std: standard deviation of measured / predicted - 1 of whole networks; assumed unless the user knows.

    Raises:
        UserError: no blocks, or a latency that is negative or not finite.
    """

    metric = "latency_ms"

    def __init__(self, blocks: Mapping[str, float], source: str = "", relative_std: float = RELATIVE_STD) -> None:
        for block, ms in blocks.items():
            if not (math.isfinite(ms) and ms >= 0):
                raise UserError(f"{source}: block {block!r}: a latency is a number of ms, not negative, got {ms}")
        if not blocks:
            raise UserError(f"{source or 'block table'}: no blocks")
        if not (math.isfinite(relative_std) and relative_std > 0):
            raise UserError(f"block table: relative_std must be positive, got {relative_std}")
        self.blocks = dict(blocks)
        self.source = source
        self.relative_std = relative_std
        self._sequences = {tuple(block.split("; ")): ms for block, ms in blocks.items()}
        self._longest = max(map(len, self._sequences))

    def block_features(self, workload: Workload) -> Array:
        """`(1,)` milliseconds.

        Raises:
            UserError: an operator at which no block of the table begins, with the operators that follow.
        """
        text = signature(workload)
        if text not in self.blocks and all(op.kind in FOLDED for op in workload.operators):
            return np.zeros(1)  # an identity runs nothing
        words = text.split("; ")
        total, at = 0.0, 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                ms = self._sequences.get(tuple(words[at : at + length]))
                if ms is not None:
                    total, at = total + ms, at + length
                    break
            else:
                following = "; ".join(words[at : at + 4])
                raise UserError(
                    f"the block table of {self.source or 'the user'} has no block for {following!r} (operator {at} of "
                    f"{len(words)}); measure such a block and add it, or choose another predictor"
                )
        return np.array([total])

    def head(self, totals: Any) -> Any:
        return totals[:, 0]

    @property
    def coefficients(self) -> tuple[Array, float]:
        return np.ones(1), 0.0

    def around(self, mean: Array) -> Estimate:
        warning = f"a sum of blocks measured apart ({self.source}), with an assumed spread of {self.relative_std:.0%}"
        return Estimate(mean, self.relative_std * mean, lognormal=True, warning=warning)

    @classmethod
    def from_proxylessnas(cls, path: Path) -> LookupTable:
        """Import ProxylessNAS's table of a Pixel 1 (Cai et al., ICLR 2019), or one in its layout.

        CSV with columns `block` (such as `expanded_conv-
        input:56x56x24-output:28x28x40-expand:3-kernel:5-stride:2-idskip:0`) and `latency_ms_mean`.

        Raises:
            UserError: file and line of what is not as it should be.
        """
        path = Path(path)
        return cls(
            _distinct(
                path,
                ((line, _proxyless(row["block"], f"{path}: line {line}"), _ms(path, line, row, "latency_ms_mean"))
                 for line, row in _lines(path, ("block", "latency_ms_mean"))),
            ),
            str(path),
        )  # fmt: skip

    @classmethod
    def from_fbnet(cls, path: Path) -> LookupTable:
        """Import a table of FBNet blocks (Wu et al., CVPR 2019) with columns layer, c_in, c_out, stride, hw_in, op and
        latency_ms.

        The same block at several layers counts once, with its mean. Blocks with grouped convolutions are known without
        the shuffling of channels between them.

        Raises:
            UserError: file and line of what is not as it should be.
        """
        path = Path(path)
        found: dict[str, list[float]] = {}
        columns = ("c_in", "c_out", "stride", "hw_in", "op")
        for line, row in _lines(path, (*columns, "latency_ms")):
            try:
                c_in, c_out, stride, size = (int(row[c]) for c in columns[:4])
            except ValueError:
                raise UserError(f"{path}: line {line}: c_in, c_out, stride and hw_in are whole numbers") from None
            block = _fbnet(c_in, c_out, stride, size, row["op"], f"{path}: line {line}, column 'op'")
            found.setdefault(block, []).append(_ms(path, line, row, "latency_ms"))
        return cls({block: float(np.mean(values)) for block, values in found.items()}, str(path))

    @classmethod
    def from_csv(cls, path: Path) -> LookupTable:
        """Import a CSV with a column `block` of signatures and one of `latency_ms`, `_us` or `_s`.

        `block_signatures(space)` lists what a space needs.

        Raises:
            UserError: file and line of what is not as it should be; a block twice with different latencies.
        """
        path = Path(path)
        lines = _lines(path, ("block",))
        header = list(lines[0][1]) if lines else []
        columns = [c for c in header if re.fullmatch(r"latency_(s|ms|us|ns)", c)]
        if len(columns) != 1:
            raise UserError(f"{path}: needs one column of latencies with its unit, such as latency_ms; got {header}")
        scale = MS_PER_UNIT[columns[0].removeprefix("latency_")]
        rows = ((line, row["block"], scale * _ms(path, line, row, columns[0])) for line, row in lines)
        return cls(_distinct(path, rows), str(path))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        about = {"format": _FORMAT, "source": self.source, "relative_std": self.relative_std, "blocks": self.blocks}
        write_text(Path(path), json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> LookupTable:
        """Read what `save` wrote: JSON with `format`, `source`, `relative_std` and `blocks` (signature -> ms).

        Raises:
            UserError: no such file, or another kind of file.
        """
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']!r}")
            blocks = {str(block): float(ms) for block, ms in about["blocks"].items()}
            return cls(blocks, str(about["source"]), float(about["relative_std"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a block table: {error}") from error


def signature(workload: Workload) -> str:
    """What a block is: its operators in execution order with shapes; normalisation disappears, as it is folded."""
    words = [_word(op) for op in workload.operators if op.kind not in FOLDED]
    return "; ".join(words) or f"identity {'x'.join(map(str, workload.tensors[workload.inputs[0]].shape))}"


def block_signatures(space: SearchSpace) -> dict[str, str]:
    """Signature -> name of a block that has it: what a table for `space` must hold."""
    found: dict[str, str] = {}
    for block in space.catalog:
        found.setdefault(signature(block.workload), block.name)
    return found


def _word(op: Operator) -> str:
    shapes = "+".join("x".join(map(str, t.shape)) for t in op.inputs)
    # A map of one pixel is a vector: some networks, and tables, say so right after pooling.
    output = op.output.shape[:1] if op.kind == "global_avg_pool" else op.output.shape
    text = f"{op.kind} {shapes}->{'x'.join(map(str, output))}"
    if op.kernel:
        text += f" k{'x'.join(map(str, op.kernel))}"
    if op.stride:
        text += f" s{'x'.join(map(str, op.stride))}"
    return text + (f" g{op.groups}" if op.groups > 1 else "")


def _mbconv(
    size: int, c_in: int, c_out: int, expansion: int, kernel: int, stride: int, *, add: bool, activation: str,
    groups: int = 1, expand_always: bool = False,
) -> str:  # fmt: skip
    """Signature of an inverted residual (Sandler et al., 2018)."""
    builder = WorkloadBuilder()
    start = here = builder.input(Tensor((c_in, size, size)))
    mid, out = c_in * expansion, math.ceil(size / stride)
    if expansion > 1 or expand_always:
        here = builder.add("conv2d", [here], (mid, size, size), kernel=(1, 1), stride=(1, 1), groups=groups)
        here = builder.add(activation, [here], (mid, size, size))
    here = builder.add("depthwise_conv2d", [here], (mid, out, out), kernel=(kernel,) * 2, stride=(stride,) * 2,
                       groups=mid)  # fmt: skip
    here = builder.add(activation, [here], (mid, out, out))
    here = builder.add("conv2d", [here], (c_out, out, out), kernel=(1, 1), stride=(1, 1), groups=groups)
    if add:
        here = builder.add("add", [here, start], (c_out, out, out))
    return signature(builder.build([here]))


def _proxyless(key: str, where: str) -> str:
    """Signature of a block of ProxylessNAS by its key."""
    if match := _PROXYLESS_BLOCK.fullmatch(key):
        size, _, c_in, _, _, c_out, expansion, kernel, stride, skip = map(int, match.groups())
        return _mbconv(size, c_in, c_out, expansion, kernel, stride, add=bool(skip), activation="relu6")
    builder = WorkloadBuilder()
    if match := _PROXYLESS_STEM.fullmatch(key) or _PROXYLESS_LAST.fullmatch(key):
        size, _, c_in, out, _, c_out = map(int, match.groups())
        sides = (1, 1) if key.startswith("Conv_1") else (3, 3)
        here = builder.input(Tensor((c_in, size, size)))
        here = builder.add("conv2d", [here], (c_out, out, out), kernel=sides, stride=(size // out,) * 2)
        return signature(builder.build([builder.add("relu6", [here], (c_out, out, out))]))
    if match := _PROXYLESS_LOGITS.fullmatch(key):
        size, _, c_in, classes = map(int, match.groups())
        here = builder.add("global_avg_pool", [builder.input(Tensor((c_in, size, size)))], (c_in,))
        return signature(builder.build([builder.add("linear", [here], (classes,))]))
    raise UserError(f"{where}, column 'block': not a block of ProxylessNAS: {key!r}")


def _fbnet(c_in: int, c_out: int, stride: int, size: int, op: str, where: str) -> str:
    """Signature of an FBNet block by its shape and its choice, such as `k3_e6` or `k5_e1_g2`."""
    if op == "skip":
        return f"identity {c_in}x{size}x{size}"
    match = re.fullmatch(r"k(\d)_e(\d)(?:_g(\d))?", op)
    if not match:
        raise UserError(f"{where}: not a block of FBNet: {op!r}; such as k3_e6, k5_e1_g2 or skip")
    kernel, expansion, groups = int(match[1]), int(match[2]), int(match[3] or 1)
    residual = stride == 1 and c_in == c_out
    return _mbconv(size, c_in, c_out, expansion, kernel, stride, add=residual, activation="relu", groups=groups,
                   expand_always=True)  # fmt: skip


def _lines(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV that has these columns."""
    header, rows = read_csv(path)
    for column in columns:
        if column not in header:
            raise UserError(f"{path}: column {column!r} is missing; it has {', '.join(header)}")
    return [(line, dict(zip(header, row, strict=True))) for line, row in rows]


def _ms(path: Path, line: int, row: Mapping[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: line {line}, column {column!r}: a latency is a positive number, got {row[column]!r}")
    return value


def _distinct(path: Path, rows: Iterable[tuple[int, str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for line, block, ms in rows:
        if found.setdefault(block, ms) != ms:
            raise UserError(f"{path}: line {line}: block {block!r} again, with {ms:g} instead of {found[block]:g} ms")
    return found
