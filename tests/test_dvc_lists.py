"""dvc.yaml and params.yaml are honest: a stage lists exactly the code and the keys its result depends on."""

from __future__ import annotations

import ast
import re
import types
import typing
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import yaml
from layout_rules import (
    NOT_IN_FINGERPRINT, PIPELINE, READERS, ROOT, SOURCES, STAGES, UNTRACKED, UNTRACKED_KEYS, closure,
)
from pydantic import BaseModel

from pipeline.config import Config, load_config
from pipeline.registry import METHODS
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
    if stage == "check":
        # It asks a method only what it says of parameters; what a method computes with is no part of the answer.
        found = {name for name in found if not name.startswith(("pipeline.data", "pipeline.distributed", "pipeline.losses", "pipeline.models"))}
        found |= {"pipeline.models.catalog"} & set(PIPELINE)
        found |= {name for name in PIPELINE if name.startswith("pipeline.methods.")}
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


def test_dvc__the_check_runs_whatever_params_yaml_says() -> None:
    """A dependency named by a parameter is missing when that is mistyped, and DVC would stop before the check can tell."""
    check = _stages_of_dvc()["check"]
    assert not [dep for dep in check["deps"] if "${" in dep or not (ROOT / dep).exists()] and not check.get("params")


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


def test_readme__the_table_of_experiments_keeps_value_interval_and_parameters() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = re.search(r"dvc exp show --only-changed --drop '([^']*)'", text)
    assert pattern
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")).keys() - {"tracking", "launch"}
    kept = ["Experiment", "State", "balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", *(f"{name}.key" for name in sections)]
    dropped = ["Created", "pretraining_gain", "pretrained.video.balanced_accuracy", "features.x", "models/encoders", "params.yaml", "data/frames/main"]
    assert [name for name in [*kept, *dropped] if re.match(pattern[1], name)] == dropped, "DVC drops what the pattern matches from its start"


# --- (g) params.yaml and the models ----------------------------------------------------------------------------------


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((model for part in typing.get_args(annotation) if (model := _inner_model(part))), None)
    return None


def _compare(model: type[BaseModel], values: dict[str, Any], place: str) -> Iterator[str]:
    """Differences between a model and its section; an `optional` section need not name all keys (a comment there does)."""
    fields = model.model_fields
    if not place.endswith("optional."):
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
