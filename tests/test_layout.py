"""The order of the code itself: who may import whom, sizes, documentation, light start-up, the README's list of files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from layout_rules import LEVEL, PIPELINE, READS_ENVIRONMENT, ROOT, SOURCES, STAGES, imports

def _trees() -> Iterator[tuple[str, ast.Module]]:
    for name, path in SOURCES.items():
        yield name, ast.parse(path.read_text(encoding="utf-8"))


# --- (a) import direction --------------------------------------------------------------------------------------------


def _level(name: str) -> int | None:
    return LEVEL.get(name, LEVEL.get(f"{name.rsplit('.', 1)[0]}.*"))


def test_imports__every_module_has_its_place() -> None:
    assert not [name for name in PIPELINE if _level(name) is None], "not in ORDER: give it a line in tests/layout_rules.py"
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
