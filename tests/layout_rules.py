"""The tables behind the tests of the code's own order: who may import whom, what dvc.yaml need not list, and why."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("pipeline", "stages", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
}
PIPELINE = [name for name in SOURCES if name.startswith("pipeline.")]
STAGES = ("phantom", "extract", "split", "pretrain", "finetune", "evaluate")

# A module imports only from modules further up. Modules of one line do not know one another.
ORDER = """
    errors
    files
    parameters
    registry
    grid
    config
    distributed
    reproducibility
    checkpoint
    launch
    models.catalog
    scorer
    tracking_context tracking_journal tracking_model
    tracking_store
    tracking_courier tracking_view
    tracking
    data.limits data.integrity data.sniffing data.dicom_pixels
    data.dicom data.pool data.trouble data.outline data.thinning
    data.sector
    data.masking
    data.video data.manifest data.mask_report
    data.numbered
    data.store data.labels data.probe data.attributes
    data.contact_sheet data.frame_labels
    data.extract
    data.recipes.base
    data.recipes.lung data.recipes.sonography data.recipes.endoscopy
    data.recipes.catalog data.recipes.fetch data.recipes.prepare
    data.anatomy
    data.synthetic
    data.duplicates data.folds data.given_splits data.grouping
    data.inspect
    data.inspect_report
    data.splits
    data.splitting
    data.split_report
    data.photometry
    data.randaugment
    data.clips data.transforms
    export.facts
    data.frames
    data.loader
    models.levels
    losses models.heads models.momentum
    losses_baselines losses_msn
    models.vit models.lora models.patches
    models.backbones
    models.published
    models.classifier
    evaluation.metrics evaluation.plots evaluation.features evaluation.neighbors
    evaluation.weighted
    evaluation.calibration evaluation.curves
    evaluation.statistics evaluation.fold_tests evaluation.phases evaluation.predictions evaluation.feature_plots evaluation.forest
    evaluation.calibration_plots
    evaluation.roc_tests evaluation.decision_tests
    evaluation.report
    evaluation.summary evaluation.content evaluation.parts
    evaluation.choices
    evaluation.calibration_results
    evaluation.calibration_pages
    evaluation.saliency
    evaluation.model_card evaluation.reproduction
    evaluation.checklist
    evaluation.feature_pages evaluation.curve_pages evaluation.explanations
    evaluation.shortcuts evaluation.subgroups evaluation.records
    evaluation.pages
    evaluation.evaluate
    evaluation.compare_lock
    evaluation.compare_sources evaluation.compare_numbers
    evaluation.compare_rules
    evaluation.compare
    evaluation.compare_tables
    evaluation.compare_pages
    methods.base
    methods.*
    preflight
    training.optim training.inputs
    training.monitor training.finetune
    training.pretrain training.selection
    training.pretrain_stage training.finetune_stage
    export.card
    export.formats
    embed
    retrieval
    machine presets
    doctor datasets protocols
    cli
"""
LEVEL = {f"pipeline.{name}": level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}

# Who reads or sets environment variables, and why.
READS_ENVIRONMENT = {
    "pipeline.files": "DVC_ROOT: the project folder behind a queued experiment's copy",
    "pipeline.config": "MLFLOW_TRACKING_URI",
    "pipeline.distributed": "what torchrun sets",
    "pipeline.launch": "what torchrun sets, and what its workers inherit",
    "pipeline.scorer": "SONOSCOPE_SCORE_PATHS: text may name files",
    "pipeline.tracking": "RANK: only the first process logs",
    "pipeline.tracking_context": "DVC's name of the experiment",
    "pipeline.evaluation.reproduction": "DVC's name of the experiment, and the commit it started from",
    "pipeline.tracking_store": "time limits of MLflow's client",
    "pipeline.data.recipes.fetch": "git's own settings are kept away from the clone",
    "pipeline.data.video": "OpenCV takes the allow-list of containers from there only",
}

# Modules no stage lists in dvc.yaml, although it imports them: their change cannot change a result, only whether there is one.
UNTRACKED = {
    "errors": "words",
    "files": "writes what it is given",
    "registry": "finds by name",
    "parameters": "checks; every value stands in params.yaml, whose keys are tracked (test_params__*)",
    "config": "checks; every value stands in params.yaml, whose keys are tracked (test_params__*)",
    "cli": "prints errors",
    "datasets": "reached through cli only",
    "data.inspect": "reached through cli only",
    "data.inspect_report": "reached through cli only",
    "data.probe": "reached through cli only",
    "doctor": "reached through cli only",
    "embed": "reached through cli only",
    "machine": "reached through cli only",
    "presets": "reached through cli only",
    "protocols": "reached through cli only",
    "retrieval": "reached through cli only",
    "data.limits": "ends processes that hang or want too much; a file is read the same or not at all",
    "data.pool": "starts processes; the store has the same bytes with any number",
    "launch": "starts processes; their number changes no sample",
    "reproducibility": "seeds from parameters",
    "checkpoint": "reads and writes weights unchanged, or refuses",
    "tracking": "a stage's result does not depend on who watches",
    "tracking_context": "tracking",
    "tracking_courier": "tracking",
    "tracking_journal": "tracking",
    "tracking_model": "tracking",
    "scorer": "the code of logged models; no stage runs it",
    "export.facts": "says what finished weights are, in a card's words; the weights are written before",
    "tracking_store": "tracking",
    "tracking_view": "reached through cli only",
}
# Read by many stages only to hand on what another stage has written, which is a dependency itself. Stages that do more with
# them list them.
READERS = {"data.manifest": ("extract", "extract_extra", "split")}
# Modules that are no part of the fingerprint by which a finished training result is found again, although the stage lists them.
NOT_IN_FINGERPRINT = {
    "training.inputs": "collects what is in the fingerprint",
    "data.splits": "the videos, patients and labels it chose are in the fingerprint",
    "training.pretrain_stage": "hands over the result",
    "training.monitor": "watches; it draws no random number of the training's",
    "evaluation.features": "pretraining: used by the monitor",
}
# Keys of params.yaml no stage tracks: they say how and where, not what is computed.
UNTRACKED_KEYS = {
    "extract.workers": "processes; the store has the same bytes with any number",
    "tracking": "who watches",
    "launch": "which machine",
}


@lru_cache(maxsize=None)
def imports(name: str) -> frozenset[str]:
    """Modules of the project that a module names: imports at the top, inside functions, for type checkers, and LazyModule."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("LazyModule", "import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return frozenset(other for other in found if other in SOURCES)


def closure(start: str, without: frozenset[str] = frozenset()) -> set[str]:
    """Everything in pipeline that `start` imports, at any distance; `without` is neither listed nor followed."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        for name in imports(queue.pop()) - seen - without:
            seen.add(name)
            queue.append(name)
    return seen
