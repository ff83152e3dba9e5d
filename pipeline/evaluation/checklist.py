"""Two reporting checklists, filled as far as a run knows: TRIPOD+AI (Collins et al., BMJ 2024) and CLAIM (2024 update).

Topics are named in our own words; the wording of an item is that of its publication. An item that no program can know is
left to the authors, and says so. What is filled here is a start, not a claim that an item is met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.model_card import markdown_table, model_card, run_facts
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.report import Section, Table
from pipeline.files import atomic_write

__all__ = ["CLAIM", "TO_FILL", "TRIPOD_AI", "checklist_part", "filled"]

TO_FILL = "to be filled by you"
INTRO = (
    "Journals ask for these lists. The run has filled in what it knows; everything else says “to be filled by you”. Numbers and topics follow "
    "TRIPOD+AI (BMJ 2024) and CLAIM (2024 update), in words of our own: keep the published forms beside this table."
)

# (number, topic, what this run knows, where the report shows it). "" where only the authors can know; names in braces come from `run_facts`.
Row = tuple[str, str, str, str]
TRIPOD_AI: Sequence[Row] = (
    ("1", "Title: what kind of study, for whom, which outcome", "Working title: {title}; {classes}", "top of the page"),
    ("2", "Abstract in the form for such studies", "{headline}", "Summary"),
    ("3a", "Medical background, existing models", "", ""),
    ("3b", "For whom, where in care, used by whom", "", ""),
    ("3c", "Known inequalities between groups of people", "", ""),
    ("4", "Aim: development, evaluation, or both", "Development with internal validation; no external validation", "Limits of use"),
    ("5a", "Where the data come from, why these", "{patients} {unit}s, {videos} labelled videos, manifest {manifest}; origin: to be filled by you",
     "Data and split"),
    ("5b", "When the data were collected", "", ""),
    ("6a", "Setting, centres", "", ""),
    ("6b", "Who could take part", "Of the given files: {included}; clinical criteria: to be filled by you", "Data and split"),
    ("6c", "Treatments", "", ""),
    ("7", "Preparation and quality control of data", "{preparation}", "Data and split, Parameters"),
    ("8a", "Outcome, and how it was determined", "One label a {labelled}: {classes}; how it was determined: to be filled by you", "Data and split"),
    ("8b", "Who judged subjective outcomes", "", ""),
    ("8c", "Blinding of those who judged", "", ""),
    ("9a", "Choice of predictors", "Pixels of the frames only; no clinical variable", "Parameters"),
    ("9b", "Definition and measurement of predictors", "{input}; probes and settings of the machines: to be filled by you", "Parameters"),
    ("9c", "Who judged subjective predictors", "None: no person reads a predictor", ""),
    ("10", "Sample size", "{size}; whether and how the size was calculated beforehand: to be filled by you", "Data and split"),
    ("11", "Missing data", "{missing}", "Data and split, Warnings"),
    ("12a", "Use of the data: development and evaluation", "{protocol}", "Data and split"),
    ("12b", "Form and scaling of predictors", "{input}", "Parameters"),
    ("12c", "Kind of model, tuning, internal validation", "{model}; {selection}", "Parameters, Fine-tuned models"),
    ("12d", "Differences between clusters (centres)", "{subgroups}", "Sub-groups"),
    ("12e", "Measures of performance", "{measures}", "Statistics"),
    ("12f", "Updating of the model", "{calibration}", "Calibration"),
    ("12g", "How predictions were computed", "{prediction}", "Statistics"),
    ("13", "Class imbalance", "{imbalance}", "Parameters"),
    ("14", "Fairness", "Sub-groups as far as columns name them ({subgroups}); aims and choices: to be filled by you", "Sub-groups"),
    ("15", "What the model gives, thresholds", "A probability for each class, the most probable is the answer; {thresholds}",
     "Calibration"),
    ("16", "Differences between development and evaluation data", "{other}", "Data and split"),
    ("17", "Ethical approval, consent", "", ""),
    ("18a", "Funding", "", ""),
    ("18b", "Conflicts of interest", "", ""),
    ("18c", "Protocol", "Parameters are fixed in params.yaml and its commit; a protocol written before: to be filled by you",
     "How it was made"),
    ("18d", "Registration", "", ""),
    ("18e", "Sharing of data", "", ""),
    ("18f", "Sharing of code", "Commit {revision}; where it can be had: to be filled by you", "How it was made"),
    ("19", "Patients and public in the study", "", ""),
    ("20a", "Flow of participants", "{flow}", "Data and split"),
    ("20b", "Characteristics of participants", "Counts by class; age, sex and illness: to be filled by you", "Data and split"),
    ("20c", "Development against evaluation data", "Counts of each fold's training and test {unit}s", "Data and split"),
    ("21", "Participants and outcome events in each analysis", "Counts by class and fold", "Data and split"),
    ("22", "Full model", "Weights of every fold in models/finetuned; `sonoscope export` writes them with a card", "How it was made"),
    ("23a", "Performance with intervals", "{headline}", "Summary and all tables"),
    ("23b", "Differences between clusters", "{subgroups}; each fold by itself", "Sub-groups, Fold by fold"),
    ("24", "Results of updating", "{calibration}", "Calibration"),
    ("25", "Interpretation, fairness", "", ""),
    ("26", "Limitations", "{limits}; what the data do not show: to be filled by you", "Limits of use"),
    ("27a", "Poor or absent input", "Unreadable files are set aside and listed; a picture of anything gets an answer", "Data and split"),
    ("27b", "What users must do and know", "", ""),
    ("27c", "Next steps", "", ""),
)
CLAIM: Sequence[Row] = (
    ("1", "Title names the kind of AI", "Working title: {title}; {model}", "top of the page"),
    ("2", "Abstract", "{headline}", "Summary"),
    ("3", "Background, intended use", "", ""),
    ("4", "Aims and hypotheses", "Does pretraining on unlabelled video help? {question}", "Does pretraining help?"),
    ("5", "Prospective or retrospective", "", ""),
    ("6", "Goal of the study", "Development and internal validation", "Limits of use"),
    ("7", "Data sources", "Manifest {manifest}; origin: to be filled by you", "Data and split"),
    ("8", "Inclusion and exclusion", "Of the given files: {included}; clinical criteria: to be filled by you", "Data and split"),
    ("9", "Preprocessing", "{preparation}", "Parameters"),
    ("10", "Selection of subsets", "{frames}", "Parameters"),
    ("11", "De-identification", "{privacy}", "Parameters"),
    ("12", "Missing data", "{missing}", "Warnings"),
    ("13", "How images were acquired", "", ""),
    ("14", "Reference standard", "One label a {labelled}: {classes}; its definition: to be filled by you", "Data and split"),
    ("15", "Why this reference standard", "", ""),
    ("16", "Who gave the labels", "", ""),
    ("17", "How test data were labelled", "", ""),
    ("18", "Agreement of those who labelled", "", ""),
    ("19", "How data were divided", "{protocol}", "Data and split"),
    ("20", "Level at which the parts are disjoint", "{disjoint}", "Data and split"),
    ("21", "Intended sample size", "{size}; whether and how the size was calculated beforehand: to be filled by you", "Data and split"),
    ("22", "The model", "{model}", "Parameters"),
    ("23", "Software", "{software}", "Environment"),
    ("24", "Initial weights", "{initial}", "Fine-tuned models"),
    ("25", "Training", "{training}", "Parameters, Learning curves"),
    ("26", "Choice of the final model", "{selection}", "Fine-tuned models"),
    ("27", "Ensembles", "None; seeds are averaged as numbers, not as a network", "Statistics"),
    ("28", "Measures of performance", "{measures}", "Statistics"),
    ("29", "Uncertainty", "{uncertainty}", "Statistics"),
    ("30", "Robustness", "Seeds, folds and sub-groups: {robustness}", "Fold by fold, Sub-groups"),
    ("31", "Explainability", "{explained}", "Where did the network look?"),
    ("32", "Evaluation on internal data", "{protocol}", "Data and split"),
    ("33", "Evaluation on external data", "None was made", "Limits of use"),
    ("34", "Registration of a trial", "", ""),
    ("35", "Flow of cases", "{flow}", "Data and split"),
    ("36", "Characteristics of cases in each part", "Counts by class and fold; age, sex and illness: to be filled by you", "Data and split"),
    ("37", "Performance in every part", "Training: loss in the learning curves; {parts}", "Learning curves, all tables"),
    ("38", "Diagnostic performance with its precision", "{headline}", "Summary and all tables"),
    ("39", "Analysis of failures", "{failures}", "Errors"),
    ("40", "Limitations", "{limits}; what the data do not show: to be filled by you", "Limits of use"),
    ("41", "Meaning for practice", "", ""),
    ("42", "Full protocol", "Parameters and commands; a protocol written before: to be filled by you", "How it was made"),
    ("43", "Software, model and data available", "Commit {revision}; data and place: to be filled by you", "How it was made"),
    ("44", "Funding", "", ""),
)


def filled(rows: Sequence[Row], facts: Mapping[str, str]) -> list[list[str]]:
    """[number, topic, answer, where] of every item; answers without a known fact are `TO_FILL`."""
    return [[number, topic, answer.format_map(facts) if answer else TO_FILL, where] for number, topic, answer, where in rows]


def checklist_part(context: Context) -> Part:
    """Writes checklist.md and model_card.md and shows the lists, folded, as the last section of the report."""
    facts = run_facts(context)
    lists = {"TRIPOD+AI 2024": filled(TRIPOD_AI, facts), "CLAIM 2024": filled(CLAIM, facts)}
    columns = ["Item", "Topic", "What this run knows", "Where"]
    lines = [f"# Reporting checklists: {facts['title']}", "", INTRO, "", f"{facts['stamp_line']}"]
    for name, rows in lists.items():
        lines += ["", f"## {name}", "", *markdown_table(columns, rows)]
    atomic_write(context.output / "checklist.md", "\n".join(lines) + "\n")
    atomic_write(context.output / "model_card.md", model_card(context, facts))
    counts = {name: _counts(rows) for name, rows in lists.items()}
    told = "; ".join(f"{name}: {known} of {total} items touched by this run, {left} wholly yours" for name, (known, left, total) in counts.items())
    words = [
        f"{INTRO} {told}.",
        "Both lists are saved beside this page as checklist.md, with a model card (Mitchell et al., 2019) as model_card.md, ready to edit.",
    ]
    tables = [Table(name, columns, rows) for name, rows in lists.items()]
    numbers = {name: {"filled": known, "to_fill": left, "items": total} for name, (known, left, total) in counts.items()}
    return Part("checklist", numbers, Section("checklist", "Reporting checklist", words, tables=tables, after="made", folded=True))


def _counts(rows: Sequence[Sequence[Any]]) -> tuple[int, int, int]:
    left = sum(row[2] == TO_FILL for row in rows)
    return len(rows) - left, left, len(rows)
