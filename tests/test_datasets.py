"""`sonoscope data`: prepared tables and what the stages make of them, the command, and clones broken off at any step."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sample_media as sample
import yaml
from fake_experiment import FakeExperiment
from recipe_trees import built, phase_file, put, write

from pipeline import datasets
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.data.extract import extract_source
from pipeline.data.labels import read_labelled_media
from pipeline.data.manifest import Manifest
from pipeline.data.recipes import fetch
from pipeline.data.recipes.base import Recipe, Row
from pipeline.data.recipes.catalog import recipe
from pipeline.data.recipes.endoscopy import PHASES, TOOLS
from pipeline.data.recipes.fetch import fetch_pocus
from pipeline.data.recipes.lung import UPSTREAM_FOLDERS, UPSTREAM_REVISION
from pipeline.data.recipes.prepare import official_folds, prepare
from pipeline.data.splits import Splits
from pipeline.data.splitting import make_splits
from pipeline.errors import DataError
from pipeline.evaluation import predictions
from pipeline.evaluation.metrics import aggregate
from pipeline.evaluation.summary import summarise
from pipeline.parameters import DataParams

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small image that the trees of a test link to; recipes look at names, not pixels."""
    folder = sample.write_frame_folder(tmp_path_factory.mktemp("picture") / "one", 1)
    return next(folder.iterdir())


# --- prepare, and what the stages make of it -----------------------------------------------------------------------------


def test_prepare__writes_nothing_into_the_data_and_says_what_changed(tmp_path: Path, picture: Path) -> None:
    root, item = built("polypdiag", tmp_path, picture), recipe("polypdiag")
    scan = item.scan(root)
    with pytest.raises(DataError, match="own folder"):
        prepare(item, scan, root / "sub")
    assert not prepare(item, scan, tmp_path / "out").changed and not prepare(item, scan, tmp_path / "out").changed
    scan.rows = [dataclasses.replace(scan.rows[0], label="1"), *scan.rows[1:]]
    assert prepare(item, scan, tmp_path / "out").changed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["labels.csv", "split.json"]


def test_folds__unlabelled_rows_and_sets_without_a_split() -> None:
    rows = [Row("a", "video", "x", split="train"), Row("b", "video", "", split="train"), Row("c", "video", "x", split="test")]
    assert official_folds(recipe("polypdiag"), rows) == [{"test_paths": ["c"], "train": ["a"]}]
    assert official_folds(recipe("busi"), [Row("a", "image", "x")]) == []


def run_stages(item: Recipe, root: Path, project: Path, monkeypatch: pytest.MonkeyPatch, **more: object) -> tuple[Manifest, Splits]:
    """prepare, then the extract and split stages with the settings it returns."""
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_ROOT", str(project))
    done = prepare(item, item.scan(root), project / "data" / "recipes" / item.name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key, value in (done.settings | {"extract.workers": 1, "split.inner_folds": 2} | more).items():
        section, field = key.split(".")
        assert field in params[section]
        params[section][field] = value
    write(project / "params.yaml", yaml.safe_dump(params))
    config = load_config(project / "params.yaml")
    extract_source("main", config, project / "data" / "frames" / "main", project / "reports")
    manifest = Manifest.read(project / "data" / "frames" / "main" / "manifest.csv")
    return manifest, make_splits(manifest, config)


def test_stages__the_real_clips_are_read_as_the_reference_split_has_them(shared: Path, tmp_path: Path) -> None:
    item = recipe("pocus")
    done = prepare(item, item.scan(shared / "data" / "pocus"), tmp_path)
    data = {key.removeprefix("data."): value for key, value in done.settings.items() if key.startswith("data.")}
    found = read_labelled_media("main", DataParams(**data))
    tested = [path for fold in json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))["folds"] for path in fold["test_paths"]]
    classes = set(data["classes"])
    assert sorted(tested) == sorted(path for path, label in found.labels.items() if label.label in classes) and len(tested) == 89


def test_stages__read_what_prepare_wrote_of_pocus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, tests, rows = tmp_path / "pocus", [[], []], []
    for number in range(12):
        label = ("covid", "pneumonia", "regular")[number % 3]
        path = sample.write_video(root / "videos" / "convex" / f"{label}_{number}.mp4", 4, seed=number)
        tests[number // 6].append(path.relative_to(root).as_posix())
        rows.append(f"videos/convex/{path.name},{label},p{number:03d},convex,x,CC BY 4.0\n")
    sample.write_video(root / "videos" / "linear" / "covid_left_out.mp4", 4, seed=99)
    rows.append("videos/linear/covid_left_out.mp4,covid,p099,linear,x,CC BY 4.0\n")
    header = "path,label,patient_id,probe,source,licence\n"
    write(root / "videos.csv", header + "".join(rows))
    write(root / "images.csv", header)
    write(root / "cv_reference.json", json.dumps({"folds": [{"test_paths": paths} for paths in tests]}))
    manifest, splits = run_stages(recipe("pocus"), root, tmp_path / "project", monkeypatch)
    assert len(manifest.rows) == 12 and len({row.patient for row in manifest.rows}) == 12
    paths = {row.video: row.path for row in manifest.rows}
    assert [sorted(paths[video] for video in fold.test) for fold in splits.folds] == [sorted(part) for part in tests]
    assert judge(splits, tmp_path / "judged")["pretrained"]["video"]["n"] == 12


def judge(splits: Splits, folder: Path) -> dict[str, Any]:
    """Made-up predictions of a split's models through the checks and numbers of the evaluate stage."""
    fake = FakeExperiment(folder, given=splits, skill={"pretrained": 2.0}, params={"split": {"file": "split.json"}})
    items = predictions.read_items(fake.folders)
    predictions.check_items(items, splits, ["pretrained"], [0])
    rows = predictions.test_rows(items, splits)
    assert set(rows["video"]) == {video for fold in splits.folds for video in fold.test}
    held = {video for fold in splits.folds for video in fold.inner[0].validation}
    assert {video for item in items for video in item.table.loc[item.table["part"] == "validation", "video"]} == held
    tables = {"frame": rows} | {level: aggregate(rows, splits.classes, level) for level in ("video", "patient")}
    return summarise(fake.config, splits, items, tables)


def test_stages__read_what_prepare_wrote_of_gbcu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and test lists of images: one fixed division, whose epoch is chosen on a part of its training images."""
    root, lists = tmp_path / "gbcu", {"train": 18, "test": 6}
    first = 0
    for part, count in lists.items():
        for number in range(first, first + count):
            sample.write_image(root / "imgs" / f"im{number:05d}.jpg", number, seed=number)
        write(root / f"{part}.txt", "".join(f"im{number:05d}.jpg,{number % 3}\n" for number in range(first, first + count)))
        first += count
    manifest, splits = run_stages(recipe("gbcu"), root, tmp_path / "project", monkeypatch)
    names = {row.video: int(Path(row.path).stem[2:]) for row in manifest.rows}
    fold, = splits.folds
    assert sorted(names[video] for video in fold.test) == list(range(18, 24))
    assert sorted(names[video] for video in fold.train) == list(range(18)) and len(fold.inner) == 2
    numbers = judge(splits, tmp_path / "judged")
    assert (numbers["folds"], numbers["pretrained"]["video"]["n"]) == (1, 6) and splits.stamp == "", "patients are not in the archive"


@pytest.mark.parametrize("kind", ["frames", "videos"])
def test_stages__read_what_prepare_wrote_of_cholec80(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, numbers = tmp_path / "cholec80", (1, 2, 41, 49)
    for number in numbers:
        name = f"video{number:02d}"
        if kind == "frames":
            sample.write_frame_folder(root / "frames" / name, 6, name + "_{:06d}.png")
        else:
            sample.write_video(root / "videos" / f"{name}.mp4", 60, fps=25.0, seed=number)
        write(root / "phase_annotations" / f"{name}-phase.txt", phase_file(6))
        write(root / "tool_annotations" / f"{name}-tool.txt", "\t".join(["Frame", *TOOLS]) + "\n")
    manifest, splits = run_stages(
        recipe("cholec80"), root, tmp_path / "project", monkeypatch, **{"data.classes": list(PHASES[: 3 if kind == "frames" else 2])})
    assert {row.kind for row in manifest.rows} == {"stretch"} and {row.label for row in manifest.rows} <= set(PHASES)
    videos = {row.video: Path(row.path.split("#")[0]).stem for row in manifest.rows}
    fold, = splits.folds
    assert {videos[video] for video in fold.test} == {"video49"} and {videos[video] for video in fold.train} == {"video01", "video02", "video41"}
    assert {videos[video] for video in fold.inner[0].validation} == {"video41"} and len(fold.inner) == 1
    assert {videos[video] for video in fold.inner[0].train} == {"video01", "video02"}
    assert judge(splits, tmp_path / "judged")["pretrained"]["video"]["n"] == len(fold.test), "the validation part is never judged"


# --- the command and the clone -------------------------------------------------------------------------------------------


def test_command__check_and_prepare(tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = built("butterfly", tmp_path, picture)
    assert main(["data", "check", "butterfly", str(root)]) == 0
    assert "as published (2 counts compared)" in capsys.readouterr().out
    put(picture, root / "Cov_more" / "1.jpg")
    put(picture, root / "Cov_more" / "2.jpg")
    assert main(["data", "check", "butterfly", str(root)]) == 1
    assert "count of videos: 23 found, 22 published (1 surplus)" in capsys.readouterr().out
    assert main(["data", "prepare", "butterfly", str(root), "--out", str(tmp_path / "my out")]) == 0
    words = shlex.split(capsys.readouterr().out.split("run it with:")[1].replace("\\\n", " "))
    assert words[:3] == ["dvc", "exp", "run"] and f"data.source={root}" in words and "data.group=video" in words
    assert f"data.labels='{tmp_path}/my out/labels.csv'" in words and "data.include={dataset:[butterfly]}" in words
    assert main(["data", "check", "butterfly", str(tmp_path / "nowhere")]) == 2


def test_command__its_words_mean_the_settings() -> None:
    """In the grammar DVC reads, behind the shell."""
    from dvc.utils.hydra import to_hydra_overrides

    settings = {
        "data.source": "/a b/ü+(x)'s", "data.include": {"dataset": ["us4"], "probe": ["convex"]}, "data.classes": ["0", "1"], "split.folds": [0],
        "data.frame_labels": "x/{stem}-phase.txt",
    }
    words = [word for word in shlex.split(datasets.run_words(settings).replace("\\\n", " "))[3:] if word != "-S"]
    assert {item.key_or_group: item.value() for item in to_hydra_overrides(words)} == settings


def test_command__fetch_asks_and_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "fetch", "gbusv"]) == 0
    assert "sign the licence agreement on gbc-iitd.github.io/data/gbusv" in capsys.readouterr().out
    assert main(["data", "fetch", "pocus", str(tmp_path / "pocus")]) == 2
    assert "nothing was downloaded" in capsys.readouterr().err and not (tmp_path / "pocus").exists()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def origin(tmp_path: Path, picture: Path) -> tuple[str, str]:
    """A bare repository of the upstream layout with a later commit on top: its URL and the revision to fetch."""
    work = built("pocus", tmp_path, picture)
    write(work / "code" / "big.bin", "not wanted")
    (work / "data" / "pocus_videos" / "convex" / "link.mp4").symlink_to("/etc/passwd")
    git(work, "init", "--quiet")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "data")
    revision = git(work, "rev-parse", "HEAD")
    write(work / "later.txt", "later")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "later")
    bare = tmp_path / "origin.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(work), str(bare))
    for key in ("allowAnySHA1InWant", "allowFilter"):
        git(bare, "config", f"uploadpack.{key}", "true")
    return bare.as_uri(), revision


def test_fetch__only_the_data_at_the_revision(origin: tuple[str, str], tmp_path: Path) -> None:
    url, revision = origin
    target, said = tmp_path / "clone", []
    fetch_pocus(target, url=url, revision=revision, tell=said.append)
    assert sorted(path.name for path in target.iterdir()) == [".git", "data"] and git(target, "rev-parse", "HEAD") == revision
    assert not (target / "data" / "pocus_videos" / "convex" / "link.mp4").is_symlink(), "a link would lead out of the folder"
    assert said[1:] == list(UPSTREAM_FOLDERS)
    assert len(recipe("pocus").scan(target).rows) == 6
    fetch_pocus(target, url=url, revision=revision, tell=said.append)
    (target / "data" / "dataset_metadata.csv").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="1 files differ from the revision: data/dataset_metadata.csv"):
        fetch_pocus(target, url=url, revision=revision)


def test_fetch__continues_after_every_step(origin: tuple[str, str], tmp_path: Path) -> None:
    """Broken off wherever it says something, the next run finishes the clone."""
    url, revision = origin

    class Stop(Exception):
        pass

    for steps in range(1 + len(UPSTREAM_FOLDERS)):
        target, left = tmp_path / f"clone{steps}", [steps]

        def tell(line: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop(line)

        with pytest.raises(Stop):
            fetch_pocus(target, url=url, revision=revision, tell=tell)
        fetch_pocus(target, url=url, revision=revision, tell=lambda line: None)
        assert recipe("pocus").check(recipe("pocus").scan(target))[0].startswith("surplus:")


@pytest.mark.parametrize("done", [0, 1, 3, 5, 7])
def test_fetch__continues_after_a_kill_while_the_clone_is_set_up(
    done: int, origin: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, revision = origin
    real, calls = fetch._git, []

    def killed(folder: Path, *words: str) -> str:
        calls.append(words)
        if len(calls) > done:
            raise KeyboardInterrupt
        return real(folder, *words)

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "_git", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_pocus(tmp_path / "clone", url=url, revision=revision)
    fetch_pocus(tmp_path / "clone", url=url, revision=revision, tell=lambda line: None)
    assert git(tmp_path / "clone", "config", "remote.origin.partialclonefilter") == "blob:none"
    assert len(recipe("pocus").scan(tmp_path / "clone").rows) == 6


def test_fetch__refusals(origin: tuple[str, str], tmp_path: Path) -> None:
    url, revision = origin
    with pytest.raises(DataError, match="a commit is 40 hex digits"):
        fetch_pocus(tmp_path / "a", url=url, revision="--upload-pack=evil")
    with pytest.raises(DataError, match="git fetch failed"):
        fetch_pocus(tmp_path / "b", url=url, revision="0" * 40, tell=lambda line: None)
    write(tmp_path / "c" / "mine.txt", "mine")
    with pytest.raises(DataError, match="not empty and no clone"):
        fetch_pocus(tmp_path / "c", url=url, revision=revision)
    fetch_pocus(tmp_path / "d", url=url, revision=revision, tell=lambda line: None)
    with pytest.raises(DataError, match="is a clone of"):
        fetch_pocus(tmp_path / "d", url="file:///elsewhere.git", revision=revision)
    assert len(UPSTREAM_REVISION) == 40


def test_fetch__through_the_command(origin: tuple[str, str], tmp_path: Path) -> None:
    url, revision = origin
    text = datasets.fetch_dataset("pocus", tmp_path / "clone", accepted=True, url=url, revision=revision)
    assert "POCUS lung ultrasound (upstream)" in text and "sonoscope data prepare pocus" in text
