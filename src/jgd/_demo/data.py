"""The real data of the tour: three sets that ship with scikit-learn."""

from typing import NamedTuple

import numpy as np

from jgd._errors import require


class Dataset(NamedTuple):
    """Inputs `(N, D)` and targets `(N,)`, in float64 and in memory."""

    x: np.ndarray
    y: np.ndarray


def diabetes() -> Dataset:
    """442 patients: ten measurements, and how far the disease progressed in a year."""
    return Dataset(*require("sklearn.datasets", "demo").load_diabetes(return_X_y=True))


def breast_cancer() -> Dataset:
    """569 tumours: thirty measurements, standardised; 1 is benign, 0 malignant."""
    x, y = require("sklearn.datasets", "demo").load_breast_cancer(return_X_y=True)
    return Dataset(standardized(x), y)


def digits() -> Dataset:
    """1797 handwritten digits of 8 × 8 pixels, in [0, 1]; the target is the digit."""
    x, y = require("sklearn.datasets", "demo").load_digits(return_X_y=True)
    return Dataset(x / 16, y)


def standardized(x: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and standard deviation 1."""
    return (x - x.mean(axis=0)) / x.std(axis=0)
