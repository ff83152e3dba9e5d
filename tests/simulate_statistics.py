"""How often intervals hold the truth and tests raise false alarms, on made-up patients who give several alike clips.

    python tests/simulate_statistics.py [--quick]

Prints the Markdown tables of docs/statistics.md (3 minutes of one core; `--quick`: half a minute, coarser). Every
number is a share of simulated studies; `±` is its Monte Carlo standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.evaluation.decision_tests import mcnemar
from pipeline.evaluation.fold_tests import corrected_resampled_t
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.roc_tests import delong, delong_test
from pipeline.evaluation.statistics import bootstrap_intervals, paired_bootstrap, patient_intervals, permutation_test
from pipeline.evaluation.subgroups import compare_with_rest
from pipeline.evaluation.weighted import WeightedMetrics, draw_patients

CLASSES = ("a", "b", "c")
MIX = (0.4, 0.35, 0.25)
SIZES = (15, 30, 60, 120)
METRICS = ("balanced_accuracy", "macro_f1", "auroc.c")
"""For the last, `patient_intervals` gives DeLong's interval."""
WORDS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc.c": "AUROC of class c"}
POSITION = 2
SKILLS = {"middling": 1.5, "good": 3.0}
Hits = dict[str, list[float]]


def models(rng: np.random.Generator, patients: int, skills: Sequence[float], alike: float = 0.7) -> list[Scores]:
    """Predictions of one model a skill for the same clips: 1 + Poisson(2) a patient, three classes.

    A class's score is skill (if true) + what the patient adds + noise, both with standard deviation 1, so that clips of
    one patient correlate by 1/2. `alike` is the correlation of two models in both.
    """
    sizes = np.floor(np.array(MIX) * patients).astype(int)
    sizes[0] += patients - sizes.sum()
    group = np.repeat(np.arange(patients), 1 + rng.poisson(2, patients))
    labels = np.repeat(np.arange(3), sizes)[group]
    names = np.array([f"P{index:06d}" for index in range(patients)])[group]
    shared = rng.normal(size=(patients, 3)), rng.normal(size=(len(group), 3))
    result = []
    for skill in skills:
        own = rng.normal(size=(patients, 3)), rng.normal(size=(len(group), 3))
        patient, noise = (np.sqrt(alike) * a + np.sqrt(1 - alike) * b for a, b in zip(shared, own, strict=True))
        result.append(Scores(labels, softmax(skill * np.eye(3)[labels] + patient[group] + noise, axis=1), names, CLASSES))
    return result


def units_apart(scores: Scores) -> Scores:
    """The same clips, each as if it were a patient of its own: the usual mistake."""
    names = np.array([f"U{index:06d}" for index in range(len(scores.labels))])
    return Scores(scores.labels, scores.probabilities, names, scores.classes)


def truth(skill: float) -> dict[str, float]:
    """The metrics for 40 000 patients."""
    (scores,) = models(np.random.default_rng(1), 40_000, [skill])
    values = WeightedMetrics(scores).values(np.ones((1, 40_000)), METRICS)
    return {name: float(value[0]) for name, value in values.items()}


def plain_percentiles(scores: Scores, replicates: int, seed: int) -> dict[str, tuple[float, float]]:
    """The textbook interval: 2.5 and 97.5 percent of the draws."""
    engine = WeightedMetrics(scores)
    drawn = engine.values(draw_patients(len(engine.patients), replicates, seed), METRICS)
    return {name: tuple(np.nanquantile(values, [0.025, 0.975])) for name, values in drawn.items()}


def coverage(patients: int, skill: float, trials: int, *, replicates: int = 400, seed: int = 0) -> tuple[Hits, Hits]:
    """Whether each kind of interval held the truth, and its length, study by study; NaN where there was no interval."""
    rng, wanted = np.random.default_rng([seed, patients]), truth(skill)
    held, length = defaultdict(list), defaultdict(list)
    for trial in range(trials):
        (scores,) = models(rng, patients, [skill])
        apart = units_apart(scores)
        found: dict[str, Mapping[str, tuple[float, float]]] = {
            "clips, plain percentiles": plain_percentiles(apart, replicates, trial),
            "patients, plain percentiles": plain_percentiles(scores, replicates, trial),
            "patients, expanded percentiles": _ends(bootstrap_intervals(scores, METRICS, replicates=replicates, seed=trial)),
            "patients, linearised": _ends(patient_intervals(scores, METRICS[:2])),
            "clips, DeLong": _ends({"auroc.c": delong(apart, POSITION)}),
            "patients, DeLong": _ends({"auroc.c": delong(scores, POSITION)}),
        }
        for kind, intervals in found.items():
            for name, (low, high) in intervals.items():
                none = not high - low > 1e-9
                held[f"{WORDS[name]}: {kind}"].append(np.nan if none else low <= wanted[name] <= high)
                length[f"{WORDS[name]}: {kind}"].append(np.nan if none else high - low)
    return dict(held), dict(length)


def _ends(intervals: Mapping) -> dict[str, tuple[float, float]]:
    return {name: (np.nan, np.nan) if one.low is None else (one.low, one.high) for name, one in intervals.items()}


def false_alarms(patients: int, skill: float, trials: int, *, replicates: int = 400, seed: int = 0) -> Hits:
    """Whether each test called two equally good models different at 5 %; NaN where it gave no answer."""
    rng, result = np.random.default_rng([seed, patients]), defaultdict(list)
    for trial in range(trials):
        first, second = models(rng, patients, [skill, skill])
        apart = [units_apart(first), units_apart(second)]
        p_values = {
            "accuracy: McNemar, clips": mcnemar(*apart).p_value,
            "accuracy: McNemar, patients (Obuchowski)": mcnemar(first, second).p_value,
            "AUROC: DeLong, clips": delong_test(*apart, POSITION).p_value,
            "AUROC: DeLong, patients": delong_test(first, second, POSITION).p_value,
        }
        for name in ("accuracy", "balanced_accuracy", "macro_auroc"):
            p_values[f"{name.replace('_', ' ')}: permutation, patients"] = permutation_test(
                first, second, name, permutations=replicates - 1, seed=trial
            ).p_value
        p_values["balanced accuracy: permutation, clips"] = permutation_test(
            *apart, "balanced_accuracy", permutations=replicates - 1, seed=trial
        ).p_value
        interval = paired_bootstrap(first, second, "balanced_accuracy", replicates=replicates, seed=trial)
        p_values["balanced accuracy: 0 outside the interval"] = None if interval.low is None else float(interval.low <= 0 <= interval.high)
        for name, value in p_values.items():
            result[name].append(np.nan if value is None else value <= 0.05)
    return dict(result)


def subgroup_false_alarms(patients: int, skill: float, trials: int, *, replicates: int = 400, seed: int = 0) -> Hits:
    """The same for a sub-group, 40 % of the patients drawn by lot, against the rest; NaN where there was no answer."""
    rng, result = np.random.default_rng([seed, patients]), defaultdict(list)
    for trial in range(trials):
        (scores,) = models(rng, patients, [skill])
        chosen = np.isin(scores.patients, rng.choice(np.unique(scores.patients), round(0.4 * patients), replace=False))
        inside, rest = (Scores(scores.labels[part], scores.probabilities[part], scores.patients[part], CLASSES) for part in (chosen, ~chosen))
        found = compare_with_rest(inside, rest, replicates=replicates, seed=trial)
        low, high = (np.nan if found[end] is None else found[end] for end in ("difference_low", "difference_high"))
        result["permutation, patients"].append(np.nan if found["p"] is None else found["p"] <= 0.05)
        result["0 outside the interval"].append(np.nan if np.isnan(low) else not low <= 0 <= high)
        # Like is compared with like only where both sides have the same classes.
        low, high = _plain_gap(inside, rest, replicates, trial) if set(inside.labels) == set(rest.labels) else (np.nan, np.nan)
        result["0 outside plain percentiles"].append(np.nan if np.isnan(low) else not low <= 0 <= high)
    return dict(result)


def _plain_gap(inside: Scores, rest: Scores, replicates: int, seed: int) -> tuple[float, float]:
    """Textbook interval of the difference in balanced accuracy between two sets of patients."""
    people = sorted({*inside.patients.tolist(), *rest.patients.tolist()})
    weights = draw_patients(len(people), replicates, seed)
    left, right = (WeightedMetrics(scores, people).values(weights, METRICS[:1])[METRICS[0]] for scores in (inside, rest))
    return tuple(np.nanquantile(left - right, [0.025, 0.975]))


def fold_false_alarms(patients: int, trials: int, *, folds: int = 5, repeats: int = 5, seed: int = 0) -> Hits:
    """The same for tests over the folds of a cross-validation in which two equally good methods are really trained.

    A method is a nearest-mean classifier on its own 5 of 10 equally informative numbers of a patient.
    """
    rng, result = np.random.default_rng([seed, patients]), defaultdict(list)
    for _ in range(trials):
        labels = np.arange(patients) % 2
        data = rng.normal(size=(patients, 10)) + 0.5 * labels[:, None]
        gaps = np.array([_fold_gaps(rng, data, labels, folds) for _ in range(repeats)])
        for count in (1, repeats):
            values = gaps[:count].ravel()
            times = f"{folds} folds" if count == 1 else f"{folds} folds x {count}"
            p_values = {
                f"{times}: plain t": corrected_resampled_t(values, 1e-15).p_value,
                f"{times}: corrected t": corrected_resampled_t(values, 1 / (folds - 1)).p_value,
            }
            for name, value in p_values.items():
                result[name].append(np.nan if value is None else value <= 0.05)
    return dict(result)


def _fold_gaps(rng: np.random.Generator, data: np.ndarray, labels: np.ndarray, folds: int) -> list[float]:
    """Difference in accuracy of the two methods in each stratified fold."""
    place = np.empty(len(labels), int)
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = np.arange(len(rows)) % folds
    gaps = []
    for fold in range(folds):
        test, right = place == fold, []
        for part in (data[:, :5], data[:, 5:]):
            means = [part[~test & (labels == label)].mean(0) for label in (0, 1)]
            distance = [((part[test] - mean) ** 2).sum(1) for mean in means]
            right.append(((distance[1] < distance[0]) == labels[test]).mean())
        gaps.append(float(right[0] - right[1]))
    return gaps


def share(hits: Sequence[float]) -> tuple[float, float, int]:
    """Share of the studies with an answer, its Monte Carlo standard error, and the number of studies without one."""
    values = np.array(hits, float)
    known = values[np.isfinite(values)]
    mean = float(known.mean())
    return mean, float(np.sqrt(max(mean * (1 - mean), 1 / len(known)) / len(known))), len(values) - len(known)


def table(title: str, columns: Mapping[int, Hits], lengths: Mapping[int, Hits] | None = None) -> str:
    """A Markdown table: one row a method, one column a number of patients."""
    lines = [f"| {title} | " + " | ".join(f"{count} patients" for count in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in sorted(next(iter(columns.values()))):
        cells = []
        for count, hits in columns.items():
            mean, error, without = share(hits[name])
            extra = f", {float(np.nanmean(lengths[count][name])):.2f} long" if lengths else ""
            lacking = f", none in {100 * without / len(hits[name]):.0f} %" if without >= 0.005 * len(hits[name]) else ""
            cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}{extra}{lacking}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 studies instead of 1000")
    trials = 100 if parser.parse_args(arguments).quick else 1000
    for word, skill in SKILLS.items():
        known = truth(skill)
        found = {count: coverage(count, skill, trials) for count in SIZES}
        values = ", ".join(f"{WORDS[name]} {value:.3f}" for name, value in known.items())
        print(f"\nIntervals, {word} model ({values}): % of {trials} studies whose 95 % interval holds the truth\n")
        print(table("interval", {count: part[0] for count, part in found.items()}, {count: part[1] for count, part in found.items()}), flush=True)
    print(f"\nTests of two equally good models: % of {trials} studies with p <= 0.05 (5 is right)\n")
    print(table("test", {count: false_alarms(count, SKILLS["middling"], trials) for count in SIZES}), flush=True)
    print(f"\nA sub-group no better or worse than the rest: % of {trials} studies that say otherwise at 5 % (5 is right)\n")
    print(table("balanced accuracy", {count: subgroup_false_alarms(count, SKILLS["middling"], trials) for count in SIZES}), flush=True)
    print(f"\nTests over folds of two equally good, really trained methods: % of {2 * trials} studies with p <= 0.05 (5 is right)\n")
    print(table("test", {count: fold_false_alarms(count, 2 * trials) for count in SIZES}))


if __name__ == "__main__":
    main()
