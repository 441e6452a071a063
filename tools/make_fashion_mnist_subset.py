"""Make the embedded subset of Fashion-MNIST from the four original files.

    python tools/make_fashion_mnist_subset.py DIRECTORY

Of the original training set, the first 1,200 images of every class become the training split and the next 200 the
validation split; of the original test set, the first 200 of every class become the test split. The originals are in
random order, so this is a fair sample, and it depends on no random generator.
"""

import os
import sys
from pathlib import Path

import numpy as np

from nasbench.tasks.fashion_mnist import EMBEDDED, FILES, content_sha256, read_idx

TRAIN, VALIDATION, TEST = 1200, 200, 200


def main(directory: Path) -> None:
    x, y, x_test, y_test = (read_idx(directory / name) for name in FILES)

    def rows(labels: np.ndarray, start: int, stop: int) -> np.ndarray:
        return np.sort(np.concatenate([np.flatnonzero(labels == c)[start:stop] for c in range(10)]))

    train, val, test = rows(y, 0, TRAIN), rows(y, TRAIN, TRAIN + VALIDATION), rows(y_test, 0, TEST)
    arrays = {
        "x_train": x[train], "y_train": y[train],
        "x_val": x[val], "y_val": y[val],
        "x_test": x_test[test], "y_test": y_test[test],
    }  # fmt: skip
    temporary = EMBEDDED.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, EMBEDDED)
    print(f"{EMBEDDED}: {EMBEDDED.stat().st_size / 1e6:.2f} MB, content SHA-256 {content_sha256(arrays)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
