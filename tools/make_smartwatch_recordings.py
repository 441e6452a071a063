"""Make the embedded smartwatch recordings from the file in a wheel of `seglearn`.

    pip download --no-deps seglearn==1.2.5
    python tools/make_smartwatch_recordings.py seglearn-1.2.5-py3-none-any.whl

The wheel holds a pickled dictionary, which can do anything when it is read: it is read only if its SHA-256 is the known
one. What is written are plain arrays, samples in float16, rounded by up to 1/2048 of their value.
"""

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from nasbench.tasks.array_task import content_sha256
from nasbench.tasks.smartwatch import CLASS_NAMES, EMBEDDED

MEMBER = "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


def main(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        sys.exit(f"{wheel}: SHA-256 of {MEMBER} is {found}, expected {SHA256}; not opened")
    original = np.load(io.BytesIO(data), allow_pickle=True).item()
    assert tuple(original["y_labels"]) == CLASS_NAMES
    arrays = {
        "samples": np.concatenate(original["X"]).astype(np.float16),
        "lengths": np.array([len(x) for x in original["X"]], np.int32),
        "labels": original["y"].astype(np.uint8),
        "persons": original["subject"].astype(np.uint8),
        "sides": original["side"].astype(np.uint8),
    }
    temporary = EMBEDDED.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, EMBEDDED)
    print(f"{EMBEDDED}: {EMBEDDED.stat().st_size / 1e6:.2f} MB, content SHA-256 {content_sha256(arrays)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
