"""Shoulder exercises from a smartwatch (Burns et al. 2018, arXiv:1802.01489; BSD-3 licence, through `seglearn`)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.tasks.array_task import content_sha256
from nasbench.tasks.recordings import Recordings, RecordingsTask
from search_spaces.errors import UserError

# As the original names them: pendulum, abduction, forward elevation, internal and external rotation with a band,
# trapezius extension, upright row.
CLASS_NAMES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
EMBEDDED = Path(__file__).parent / "data" / "smartwatch_exercises.npz"
EMBEDDED_SHA256 = "691153aa69b32656687db1aa192736d2db087e945594a04e247b84dddf1bf3b9"


class SmartwatchExercises(RecordingsTask):
    """Which of seven exercises a person does, from a smartwatch's accelerometer and gyroscope at 50 Hz.

    140 recordings of ten people, one of each exercise with either arm, 19 to 52 seconds long; six channels (three of
    acceleration, three of rotation). The recordings come with the package, in half precision
    (`tools/make_smartwatch_recordings.py` made the file). Keys as in `RecordingsTask`; the default window is 2.56 s.
    """

    name = "smartwatch"

    def load(self) -> Recordings:
        arrays = embedded()
        signals = np.split(arrays["samples"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])
        return Recordings(signals, arrays["labels"], arrays["persons"], CLASS_NAMES)


def embedded(path: Path = EMBEDDED) -> dict[str, NDArray[Any]]:
    """The arrays of the embedded recordings.

    `samples` `(244102, 6)` float16 of all recordings one after the other, and for each of the 140: `lengths`, `labels`,
    `persons` and `sides` (1 for the right arm).

    Raises:
        UserError: the file is missing or differs from the one that was released.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the embedded recordings cannot be read ({error}); reinstall") from error
    if content_sha256(arrays) != EMBEDDED_SHA256:
        raise UserError(f"{path}: the embedded recordings differ from the released ones; reinstall")
    return arrays
