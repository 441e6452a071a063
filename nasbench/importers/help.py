"""Tables in the layout of HELP (Lee et al., NeurIPS 2021): NAS-Bench-201 or FBNet, a column of latencies per device."""

from __future__ import annotations

from pathlib import Path

from hardware_profiles.paths import sha256_of
from nasbench.importers.manifest import Imported
from predictors.tables import MeasuredTable


def read_help(path: Path) -> Imported:
    """All devices of a file, as `arch` (choice indices) and `DEVICE_ms`.

    Raises:
        UserError: file, row and column of what is not as it should be.
    """
    table = MeasuredTable.from_help(path)
    rows = [
        ["_".join(map(str, arch)), *(f"{v:.10g}" for v in values)]
        for arch, values in zip(table.archs.tolist(), table.latency_ms.tolist(), strict=True)
    ]
    header = ["arch", *(f"{device}_ms" for device in table.devices)]
    source = f"{table.space} in the layout of HELP (Lee et al., NeurIPS 2021, arXiv:2106.08630)"
    digest = sha256_of(path)
    return Imported(header, rows, source, digest, units=dict.fromkeys(header[1:], "ms"))
