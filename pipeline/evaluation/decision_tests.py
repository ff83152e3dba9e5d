"""McNemar's test of two models' decisions on the same units, exact for one unit a patient and clustered for several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.weighted import TOO_FEW_PATIENTS, same_patients

__all__ = ["Discordance", "mcnemar"]


@dataclass(frozen=True)
class Discordance:
    """Units on which two models disagree about being right, and whether that leans to one side."""

    first_only: int
    """Units that only the first gets right."""
    second_only: int
    difference: float
    """Accuracy of the first minus accuracy of the second."""
    p_value: float | None
    """Two-sided."""
    units: int
    patients: int
    kind: Literal["mid-p", "clustered"]
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def mcnemar(first: Scores, second: Scores) -> Discordance:
    """Two-sided test of "both models are right equally often" from the units where only one of them is right.

    One unit a patient: exact binomial test with the mid-p value, which counts the observed table half. The plain exact
    test is far more cautious than its level says with few discordant units, mid-p keeps the level nearly always
    (Fagerland, Lydersen & Laake 2013). Several units a patient: Obuchowski (1998), from d = (only first right) - (only
    second right) of each of G patients: z^2 = (G - 1)/G (sum d)^2 / sum d^2, with Student's quantiles for G - 1 degrees.
    Durkalski et al. (2003) weigh patients equally whatever their number of units, which compares another quantity than
    the accuracies beside it.

    Args:
        first, second: the same units in the same order.

    Returns:
        `p_value` 1 without any discordant unit; None with a reason for one patient with several units.

    Raises:
        DataError: no rows, or patients, labels or classes of the rows differ.
    """
    order = same_patients(first, second)
    if not (np.array_equal(first.patients, second.patients) and np.array_equal(first.labels, second.labels)):
        raise DataError("McNemar: the two sets of predictions must hold the same units in the same order; sort both tables by video first")
    right = [scores.probabilities.argmax(1) == scores.labels for scores in (first, second)]
    lean = right[0].astype(np.int64) - right[1]
    wins, losses = int((lean > 0).sum()), int((lean < 0).sum())
    single = len(order) == len(lean)
    p_value, reason = 1.0, ""
    if single:
        fewer = min(wins, losses)
        p_value = min(1.0, float(2 * stats.binom.cdf(fewer, wins + losses, 0.5) - stats.binom.pmf(fewer, wins + losses, 0.5)))
    else:
        p_value, reason = _clustered(np.bincount(np.searchsorted(order, first.patients.astype(str)), lean, len(order)))
    kind: Literal["mid-p", "clustered"] = "mid-p" if single else "clustered"
    return Discordance(wins, losses, (wins - losses) / len(lean), p_value, len(lean), len(order), kind, reason)


def _clustered(lean: np.ndarray) -> tuple[float | None, str]:
    """p value from the patients' sums float64 [G]."""
    count = len(lean)
    if count < TOO_FEW_PATIENTS:
        return None, f"{count} patient: how patients differ cannot be seen"
    if not lean.sum():
        return 1.0, ""
    z = np.sqrt((count - 1) / count) * abs(lean.sum()) / np.sqrt(lean @ lean)
    return float(2 * stats.t.sf(z, count - 1)), ""
