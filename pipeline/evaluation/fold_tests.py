"""Comparing two methods by the folds of one cross-validation, whose training sets overlap: a test and a Bayesian answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipeline.errors import DataError

__all__ = ["FoldTest", "RopeAnswer", "bayesian_correlated_t", "corrected_resampled_t"]


@dataclass(frozen=True)
class FoldTest:
    """Result of `corrected_resampled_t`."""

    mean: float
    standard_error: float
    t: float | None
    degrees: int
    p_value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RopeAnswer:
    """Probabilities that the first method is worse, practically equivalent, or better; they add up to 1."""

    worse: float | None
    equivalent: float | None
    better: float | None
    rope: float
    """Half width of what counts as equivalent."""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def corrected_resampled_t(
    differences: Sequence[float], test_over_train: float, *, confidence: float = 0.95
) -> FoldTest:
    """Corrected resampled t-test over folds and repeats (Nadeau & Bengio 2003).

    Training sets of folds overlap, so the plain variance of the mean is too small; it is multiplied by
    1/J + n_test/n_train instead of 1/J. For k folds repeated r times J = k r, and the ratio stays 1 / (k - 1): more
    repeats steady the estimate but bring no new patients (Bouckaert & Frank 2004).

    Args:
        differences: J values, one a fold and repeat, J >= 2.
        test_over_train: n_test / n_train; for k-fold cross-validation 1 / (k - 1), repeated or not.

    Returns:
        `t`, `p_value`, `low` and `high` are None, with a reason, when all differences are equal (no variance to compare with).

    Raises:
        DataError: fewer than 2 values, a value that is not finite, or a ratio that is not positive.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or not test_over_train > 0:
        raise DataError(
            f"corrected t-test: needs at least 2 finite differences and n_test/n_train > 0; got {values.tolist()} and "
            f"{test_over_train}"
        )
    degrees = len(values) - 1
    mean = float(values.mean())
    # Equal values may differ in the last bit; their spread is rounding, not variance.
    spread = float(values.std(ddof=1))
    spread = 0.0 if spread <= 1e-12 * max(1.0, abs(mean)) else spread
    error = spread * float(np.sqrt(1 / len(values) + test_over_train))
    if not error:
        # Folds that agree are no proof that others would.
        reason = "all folds differ by the same amount: no variance to compare with"
        return FoldTest(mean, 0.0, None, degrees, None, None, None, reason)
    half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
    t = mean / error
    return FoldTest(mean, error, t, degrees, float(2 * stats.t.sf(abs(t), degrees)), mean - half, mean + half)


def bayesian_correlated_t(differences: Sequence[float], test_over_train: float, *, rope: float = 0.01) -> RopeAnswer:
    """How probable it is that the first method is better by more than `rope`, worse by more, or neither.

    The posterior of the mean difference under the flat prior of Corani & Benavoli (2015; Benavoli et al. 2017) is
    Student's t around the mean with the corrected standard error, since their correlation n_test / (n_test + n_train)
    gives the factor 1/J + n_test/n_train of Nadeau & Bengio.

    Args:
        differences, test_over_train: as for `corrected_resampled_t`.
        rope: differences up to this size, in units of the metric, count as equivalent; say why you chose it.

    Raises:
        DataError: as for `corrected_resampled_t`, or a negative rope.
    """
    if not rope >= 0:
        raise DataError(f"equivalence: the half width of what counts as equal must be >= 0; got {rope}")
    test = corrected_resampled_t(differences, test_over_train)
    if not test.standard_error:
        return RopeAnswer(None, None, None, rope, test.reason)
    below, above = stats.t.cdf((np.array([-rope, rope]) - test.mean) / test.standard_error, test.degrees)
    return RopeAnswer(float(below), float(above - below), float(1 - above), rope)
