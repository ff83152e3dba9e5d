"""The order of the code itself: who may import whom, sizes, documentation, light start-up, and honest lists in dvc.yaml."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import Config, load_config
from pipeline.registry import METHODS

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
    registry
    config
    preflight
    distributed
    reproducibility
    checkpoint
    launch
    tracking_context tracking_journal
    tracking_store
    tracking_courier
    tracking
    data.video data.manifest
    data.store data.labels
    data.contact_sheet
    data.extract
    data.anatomy
    data.synthetic
    data.duplicates data.folds data.given_splits data.grouping
    data.splits
    data.split_report
    data.clips data.transforms
    data.frames
    data.loader
    losses models.heads models.momentum models.backbones
    models.classifier
    evaluation.metrics evaluation.plots evaluation.features
    evaluation.statistics evaluation.predictions
    evaluation.report
    evaluation.summary evaluation.content
    evaluation.pages
    evaluation.evaluate
    evaluation.compare
    methods.base
    methods.*
    training.optim training.inputs
    training.monitor training.finetune
    training.pretrain
    training.pretrain_stage training.finetune_stage
    machine presets
    doctor
    cli
"""
LEVEL = {f"pipeline.{name}": level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}

# Who reads or sets environment variables, and why.
READS_ENVIRONMENT = {
    "pipeline.files": "DVC_ROOT: the project folder behind a queued experiment's copy",
    "pipeline.config": "MLFLOW_TRACKING_URI",
    "pipeline.distributed": "what torchrun sets",
    "pipeline.launch": "what torchrun sets, and what its workers inherit",
    "pipeline.tracking": "RANK: only the first process logs",
    "pipeline.tracking_context": "DVC's name of the experiment",
    "pipeline.tracking_store": "time limits of MLflow's client",
    "pipeline.data.video": "OpenCV takes the allow-list of containers from there only",
}

# Modules no stage lists in dvc.yaml, although it imports them: their change cannot change a result, only whether there is one.
UNTRACKED = {
    "errors": "words",
    "files": "writes what it is given",
    "registry": "finds by name",
    "config": "checks; every value stands in params.yaml, whose keys are tracked (test_params__*)",
    "cli": "prints errors",
    "doctor": "reached through cli only",
    "machine": "reached through cli only",
    "presets": "reached through cli only",
    "launch": "starts processes; their number changes no sample",
    "reproducibility": "seeds from parameters",
    "checkpoint": "reads and writes weights unchanged, or refuses",
    "tracking": "a stage's result does not depend on who watches",
    "tracking_context": "tracking",
    "tracking_courier": "tracking",
    "tracking_journal": "tracking",
    "tracking_store": "tracking",
}
# Read by many stages only to hand on what another stage has written, which is a dependency itself. Stages that do more with
# them list them.
READERS = {"data.manifest": ("extract", "extract_extra", "split")} | dict.fromkeys(
    ("data.folds", "data.given_splits", "data.grouping"), ("split",)
)
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


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for name, path in SOURCES.items():
        yield name, ast.parse(path.read_text(encoding="utf-8"))


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


# --- (a) import direction --------------------------------------------------------------------------------------------


def _level(name: str) -> int | None:
    return LEVEL.get(name, LEVEL.get(f"{name.rsplit('.', 1)[0]}.*"))


def test_imports__every_module_has_its_place() -> None:
    assert not [name for name in PIPELINE if _level(name) is None], "not in ORDER: give it a line in tests/test_layout.py"
    gone = [name for name in LEVEL if not name.endswith("*") and name not in SOURCES]
    assert not gone, f"in ORDER, but there is no such module: {gone}"


@pytest.mark.parametrize("name", PIPELINE)
def test_imports__go_upwards_in_the_list_only(name: str) -> None:
    wrong = [other for other in imports(name) if not other.startswith("pipeline.") or _level(other) >= _level(name)]
    assert not wrong, f"{name} imports {wrong}, which stand beside or below it in ORDER"


def test_imports__methods_do_not_know_one_another() -> None:
    methods = {name for name in PIPELINE if name.startswith("pipeline.methods.") and name != "pipeline.methods.base"}
    assert len(methods) >= 4
    for name in methods:
        assert not imports(name) & methods, f"{name}: dvc.yaml tracks one method's file, so it must not use another's"


def test_imports__stages_use_the_pipeline_only() -> None:
    for stage in STAGES:
        assert all(name.startswith("pipeline.") for name in imports(f"stages.{stage}"))


# --- (b) sizes, documentation, annotations ---------------------------------------------------------------------------


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_sizes__files_and_functions_stay_readable() -> None:
    templates = {path.name: path for path in ROOT.glob("pipeline/**/*.j2")}
    for name, path in {**SOURCES, **templates}.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500, f"{name}: {len(lines)} lines"
        if path.suffix == ".py":
            assert max(map(len, lines), default=0) <= 160, f"{name}: a line of {max(map(len, lines))} characters"
    for name, tree in _trees():
        for function in _functions(tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            assert length <= 100, f"{name}.{function.name}: {length} lines"


def test_docstrings__every_module() -> None:
    assert not [name for name, tree in _trees() if not ast.get_docstring(tree)]


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions, classes and methods, without those that implement what a base class documents."""
    documented = ast.ClassDef | ast.FunctionDef
    for node in tree.body:
        if isinstance(node, documented) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from (sub for sub in node.body if isinstance(sub, ast.FunctionDef) and not sub.name.startswith("_"))


def test_docstrings__public_names_of_the_pipeline() -> None:
    places = [(name, node) for name, tree in _trees() if name.startswith("pipeline.") for node in _public(tree)]
    bare = [f"{name}.{node.name}" for name, node in places if not ast.get_docstring(node)]
    assert len(bare) <= 0.05 * len(places), f"{len(bare)} of {len(places)} without docstring: {bare}"


def test_annotations__nearly_everywhere() -> None:
    total, bare = 0, []
    for name, tree in _trees():
        if name.startswith("tests."):
            continue
        for function in _functions(tree):
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
            wanted = [argument.annotation for argument in arguments if argument.arg not in ("self", "cls")] + [function.returns]
            total += len(wanted)
            bare += [f"{name}.{function.name}"] * sum(annotation is None for annotation in wanted)
    assert len(bare) <= 0.05 * total, f"{len(bare)} of {total}: {sorted(set(bare))}"


# --- (c) environment variables, (d) light start ----------------------------------------------------------------------


def test_environment__only_the_named_modules_read_it() -> None:
    found = {
        name
        for name, tree in _trees()
        if name.startswith(("pipeline.", "stages."))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb")
    }
    assert found == set(READS_ENVIRONMENT)


def test_start__light_stages_load_no_heavy_package() -> None:
    """Reading params.yaml, and all imports of the stages before training, in one fresh process."""
    script = """
import json, runpy, sys
for stage in sys.argv[1:]:
    runpy.run_path(f"stages/{stage}.py", run_name="imported")
from pipeline.config import load_config
load_config("params.yaml")
import pipeline.training.inputs, pipeline.training.pretrain_stage, pipeline.training.finetune_stage, pipeline.doctor
print(json.dumps([name for name in ("torch", "torchvision", "mlflow", "lightly") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script, *STAGES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# --- (e) README ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["pipeline", "stages", "benchmarks", "tests"])
def test_readme__names_every_source_file(folder: str) -> None:
    """By its path, or by its name where that is the only one of this name below `folder`."""
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    words = set(re.findall(r"[\w./-]+\.py\b", path.read_text(encoding="utf-8")))
    files = [source.relative_to(ROOT) for name, source in SOURCES.items() if name.startswith(f"{folder}.")]
    missing = [str(file) for file in files if not words & {file.as_posix(), file.relative_to(folder).as_posix(), file.name}]
    assert not missing, f"README.md does not name {missing}"


# --- (f) what dvc.yaml tracks ----------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def _stages_of_dvc() -> dict[str, dict[str, Any]]:
    """Stage name to its block; of `foreach` stages the block under `do`."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: block.get("do", block) for name, block in stages.items()}


def _registered(stage: str) -> set[str]:
    """Modules that are reached by name through the registry, which no import shows."""
    if stage not in ("pretrain", "finetune"):
        return set()
    found = {"pipeline.models.backbones", "pipeline.models.heads"}
    if stage == "pretrain":
        found |= {name for name in PIPELINE if name.startswith("pipeline.methods.")}
    return found


def _determining(stage: str) -> set[str]:
    """Modules the result of a stage depends on, by their name within pipeline."""
    read_only = {name for name, stages in READERS.items() if stage not in stages}
    untracked = frozenset(f"pipeline.{name}" for name in {*UNTRACKED, *read_only})
    found = closure(f"stages.{'extract' if stage == 'extract_extra' else stage}", untracked)
    for name in _registered(stage):
        found |= {name} | closure(name, untracked)
    return found


def _listed(stage: str) -> tuple[set[str], set[str]]:
    """Source modules and other paths among the deps of a stage; a folder stands for its modules."""
    modules, others = set(), set()
    for dep in _stages_of_dvc()[stage]["deps"]:
        dep = dep.replace("${pretrain.method}", "*")
        if not dep.startswith(("pipeline", "stages")):
            others.add(dep)
            continue
        paths = [ROOT / dep] if "*" not in dep else list(ROOT.glob(dep))
        assert paths and all(path.exists() for path in paths), f"dvc.yaml, {stage}: {dep} does not exist"
        files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
        modules |= {name for name, source in SOURCES.items() if source in files}
    return modules, others


@pytest.mark.parametrize("stage", ["check", "phantom", "extract", "extract_extra", "split", "pretrain", "finetune", "evaluate"])
def test_dvc__a_stage_depends_on_exactly_the_code_of_its_result(stage: str) -> None:
    listed, _ = _listed(stage)
    script = f"stages.{'extract' if stage == 'extract_extra' else stage}"
    wanted = _determining(stage) | {script}
    folders = [dep for dep in _stages_of_dvc()[stage]["deps"] if dep.startswith("pipeline") and (ROOT / dep).is_dir()]
    assert not wanted - listed, f"dvc.yaml, {stage}: add to deps (or to UNTRACKED with a reason): {sorted(wanted - listed)}"
    # A folder may hold more than the stage uses; a single file that it does not use would re-run it for nothing.
    held = {name for name in listed if any((ROOT / folder) in SOURCES[name].parents for folder in folders)}
    assert not listed - wanted - held, f"dvc.yaml, {stage}: not used: {sorted(listed - wanted - held)}"


@pytest.mark.parametrize(
    ("stage", "file"), [("pretrain", "training/inputs.py"), ("finetune", "training/finetune_stage.py")]
)
def test_fingerprint__holds_the_code_of_the_result(stage: str, file: str) -> None:
    """Else a changed source file would re-run the stage, and the stage would find the result of the old code finished."""
    calls = [
        node for node in ast.walk(ast.parse((ROOT / "pipeline" / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "code_digest"
    ]
    assert len(calls) == 1
    digested = {argument.value for argument in calls[0].args if isinstance(argument, ast.Constant)}
    left_out = {f"pipeline.{name}" for name in NOT_IN_FINGERPRINT}
    if stage == "finetune":
        # Reached through the loader, of which fine-tuning uses the random numbers only, and through pick_device.
        left_out = left_out - {"pipeline.evaluation.features"} | {"pipeline.data.clips", "pipeline.distributed"}
    chosen = {name for name in PIPELINE if name.startswith("pipeline.methods.") and name != "pipeline.methods.base"}
    wanted = {SOURCES[name].relative_to(ROOT / "pipeline").as_posix() for name in _determining(stage) - left_out - chosen}
    assert wanted - digested == set(), "add to code_digest (or to NOT_IN_FINGERPRINT with a reason)"
    assert all((ROOT / "pipeline" / name).is_file() for name in digested)
    if stage == "pretrain":
        assert any(isinstance(argument, ast.JoinedStr) for argument in calls[0].args), "the chosen method's file"


def test_dvc__the_report_template_is_tracked() -> None:
    assert "pipeline/evaluation" in _stages_of_dvc()["evaluate"]["deps"]
    assert list((ROOT / "pipeline/evaluation").glob("*.j2"))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name


def _within(key: str, sections: set[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def test_params__every_key_is_tracked_or_deliberately_not() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tracked: set[str] = {"data.source", "data.extra_sources"}  # as deps: the folders themselves
    for block in _stages_of_dvc().values():
        tracked |= {key.replace("${pretrain.method}", method) for key in block.get("params", []) for method in raw["methods"]}
    leaves = list(_leaves(raw))
    loose = [key for key in leaves if not _within(key, tracked) and not _within(key, set(UNTRACKED_KEYS))]
    assert not loose, f"no stage in dvc.yaml tracks {loose}"
    gone = [key for key in tracked if not any(_within(leaf, {key}) for leaf in leaves) and "${" not in key]
    assert not gone, f"dvc.yaml tracks {gone}, which params.yaml does not have"


def _chain(node: ast.AST) -> list[str]:
    """`config.pretrain.seed` and `self.config.pretrain.seed` as ["pretrain", "seed"]; [] for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    names += [node.id] if isinstance(node, ast.Name) else []
    names = [name for name in reversed(names) if name != "self"]
    return names[1:3] if names[:1] == ["config"] and names[1:2] and names[1] in Config.model_fields else []


@pytest.mark.parametrize("stage", STAGES)
def test_params__a_stage_tracks_what_its_code_reads(stage: str) -> None:
    """Or a stage before it does: it imports modules of theirs, and their new result runs it again."""
    read: set[str] = set()
    for name in _determining(stage) | {f"stages.{stage}"}:
        tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
        # The longest chains only: config.pretrain.seed holds config.pretrain.
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _chain(node)}
        read |= {".".join(_chain(node)) for node in ast.walk(tree) if _chain(node) and id(node) not in inner}
    tracked = {"data.extra_sources"}
    for earlier in STAGES[: STAGES.index(stage) + 1]:
        block = _stages_of_dvc()[earlier]
        tracked |= {key.replace(".${pretrain.method}", "") for key in block.get("params", [])}
        tracked |= {dep[2:-1] for dep in block["deps"] if dep.startswith("${")}
    fields = Config.model_fields.keys() - {"tracking", "launch", "methods"}
    read = {key for key in read if key.split(".")[0] in fields and key.split(".")[-1] not in ("model_dump", "method_params")}
    loose = {key for key in read if not _within(key, tracked) and not any(_within(one, {key}) for one in tracked)}
    loose = {key for key in loose if not _within(key, set(UNTRACKED_KEYS))}
    assert not loose, f"dvc.yaml, {stage}: add to params: {sorted(loose)}"


# --- (g) params.yaml and the models ----------------------------------------------------------------------------------


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((model for part in typing.get_args(annotation) if (model := _inner_model(part))), None)
    return None


def _compare(model: type[BaseModel], values: dict[str, Any], place: str) -> Iterator[str]:
    fields = model.model_fields
    yield from (f"{place}{key}: in the model, not in params.yaml" for key in fields if key not in values)
    yield from (f"{place}{key}: in params.yaml, not in the model" for key in values if key not in fields)
    for key, field in fields.items():
        inner = _inner_model(field.annotation)
        if inner and isinstance(values.get(key), dict):
            yield from _compare(inner, values[key], f"{place}{key}.")


def test_params__names_exactly_the_fields_of_the_models() -> None:
    """So that no default hides in code, and DVC sees every value a result depends on."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    blocks = raw["methods"]
    wrong = list(_compare(Config, raw, ""))
    assert sorted(blocks) == METHODS.names()
    for name in blocks:
        wrong += _compare(METHODS.get(name).Params, blocks[name] or {}, f"methods.{name}.")
    # No pretraining: it makes no views, so there is nothing to set.
    wrong = [line for line in wrong if not line.startswith("methods.random.augmentation")]
    assert not wrong
    assert load_config(ROOT / "params.yaml").pretrain.method in blocks


# --- (h) nothing of one machine --------------------------------------------------------------------------------------


def test_files__name_no_machine_and_no_loose_end() -> None:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    # Written in pieces, so that this file does not find itself.
    home = r"(?<![\w.~-])/" + r"(work|home|root|Users|mnt|private)/\w"
    index = r"(py" + r"pi\.org|files\.python" + r"hosted|--(extra-)?index-url[ =]+\S*//|arti" + r"factory)"
    loose = r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b"
    # Examples of what must not leak, not places.
    fictitious = "/home/" + "clinic"
    found = []
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if name == "dvc.lock" or not path.is_file() or b"\0" in (raw := path.read_bytes()):
            continue
        for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
            if re.search(f"{home}|{index}|{loose}", line.replace(fictitious, "")):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
