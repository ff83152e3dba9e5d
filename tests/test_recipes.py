"""Data set recipes: each on a tree of its layout made on the spot (POCUS on the real files), hostile trees, prepared tables, clones."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sample_media as sample
import yaml

from pipeline import datasets
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.data.extract import extract_source
from pipeline.data.manifest import Manifest
from pipeline.data.recipes.base import Expect, Recipe, Row, read_table
from pipeline.data.recipes.catalog import RECIPES, recipe
from pipeline.data.recipes.endoscopy import PHASES, TOOLS
from pipeline.data.recipes.fetch import fetch_pocus
from pipeline.data.recipes.lung import UPSTREAM_FOLDERS, UPSTREAM_REVISION
from pipeline.data.recipes.prepare import official_folds, prepare
from pipeline.data.splits import make_splits
from pipeline.errors import DataError
from pipeline.presets import preset_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small image that the trees of a test link to; recipes look at names, not pixels."""
    folder = sample.write_frame_folder(tmp_path_factory.mktemp("picture") / "one", 1)
    return next(folder.iterdir())


def put(source: Path, target: Path) -> Path:
    """A file of the content of `source`, as a hard link: thousands of them cost nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)
    return target


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def flat(root: Path, picture: Path, starts: list[str], videos: int, frames: int, name: str = "{video}_frame{number}.jpg") -> None:
    """`videos` folders that begin with `starts` in turn and hold `frames` pictures together."""
    for index in range(videos):
        video = f"{starts[index % len(starts)]}clip_{index:04d}"
        (root / video).mkdir(parents=True)
        for number in range(frames // videos + (index < frames % videos)):
            os.link(picture, root / video / name.format(video=video, number=number))


LIVER, CLUST = [f"F{number}_" for number in range(5)], [f"Rb{number}" for number in range(1, 6)]
LUNG = ["Ali", "Bli", "Ple", "Oth"]


def us4(root: Path, picture: Path) -> None:
    flat(root / "Butterfly", picture, ["Reg", "Cov"], 22, 1533)
    flat(root / "CLUST_50", picture, CLUST, 63, 126)
    flat(root / "Liver", picture, LIVER, 296, 600)
    flat(root / "LUSMS", picture, LUNG, 670, 1400)


def gbusv(root: Path, picture: Path) -> None:
    for folder, videos, frames in (("malignant", 32, 12251), ("non-malignant", 32, 3549)):
        flat(root / folder, picture, [f"{folder}_"], videos, frames, "{number:05d}.jpg")


def gbcu(root: Path, picture: Path) -> None:
    number = 0
    for split, counts in (("train", (401, 509, 223)), ("test", (31, 49, 42))):
        lines = []
        for label, count in enumerate(counts):
            for _ in range(count):
                put(picture, root / "imgs" / f"im{number:05d}.jpg")
                lines.append(f"im{number:05d}.jpg,{label}\n")
                number += 1
        write(root / f"{split}.txt", "".join(lines))


def busi(root: Path, picture: Path) -> None:
    for label, count in (("benign", 437), ("malignant", 210), ("normal", 133)):
        for number in range(1, count + 1):
            put(picture, root / "Dataset_BUSI_with_GT" / label / f"{label} ({number}).png")
            put(picture, root / "Dataset_BUSI_with_GT" / label / f"{label} ({number})_mask.png")
    put(picture, root / "Dataset_BUSI_with_GT" / "benign" / "benign (4)_mask_1.png")


def phase_file(seconds: int, first: int = 0) -> str:
    """Rows at 25 a second; the phase changes every two seconds."""
    rows = [f"{row}\t{PHASES[(first + row // 50) % 7]}" for row in range(25 * seconds)]
    return "\n".join(["Frame\tPhase", *rows]) + "\n"


def cholec80(root: Path, picture: Path, videos: range = range(1, 81), seconds: int = 4) -> None:
    for number in videos:
        name = f"video{number:02d}"
        for second in range(1, seconds + 1):
            put(picture, root / "frames" / name / f"{name}_{second:06d}.png")
        write(root / "phase_annotations" / f"{name}-phase.txt", phase_file(seconds, number))
        write(root / "tool_annotations" / f"{name}-tool.txt", "\t".join(["Frame", *TOOLS]) + "\n0" + "\t0" * 7 + "\n")


def box(label: str, *more: str) -> str:
    corners = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    return "<annotation>" + "".join(f"<object><name>{name}</name>{corners}</object>" for name in (label, *more)) + "</annotation>"


def polypsset(root: Path, picture: Path) -> None:
    for number, label in ((1, "adenomatous"), (2, "hyperplastic"), (3, "Adenomatous")):
        put(picture, root / "train2019" / "Image" / f"{number}.jpg")
        write(root / "train2019" / "Annotation" / f"{number}.xml", box(label))
    for part in ("val2019", "test2019"):
        for sequence, label in (("1", "adenomatous"), ("2", "hyperplastic")):
            for number in (1, 2):
                put(picture, root / part / "Image" / sequence / f"{number}.jpg")
                write(root / part / "Annotation" / sequence / f"{number}.xml", box(label))


def polypdiag(root: Path, picture: Path) -> None:
    for number in range(4):
        put(picture, root / "videos" / f"clip{number}.mp4")
    write(root / "splits" / "train.txt", "clip0.mp4,0\nclip1.mp4,1\n")
    write(root / "splits" / "test.txt", "clip2.mp4,0\nclip3.mp4,1\n")


def folder(root: Path, picture: Path) -> None:
    put(picture, root / "ill" / "a.jpg")
    put(picture, root / "well" / "b.jpg")


UPSTREAM_HEADER = "Date added,Current location,Filename,Label,Lung Severity Score,License,InThisRepo,Type,Probe,Patient ID / Name\n"


def upstream(root: Path, picture: Path) -> None:
    rows = []
    for name, label, probe, patient in (
        ("Cov-Atlas+(44).gif", "COVID-19", "convex", "36"), ("Pneu_Avi.v2.mp4", "Bacterial pneumonia", "convex", "37"),
        ("Reg_liftl_case3_clip2.mp4", "regular", "convex", "40"), ("Vir_one.MP4", "Viral pneumonia", "linear", "nd"),
    ):
        put(picture, root / "data" / "pocus_videos" / probe / name)
        rows.append(f"20.04.20,pocus_videos/{probe.title()},{name.rsplit('.', 1)[0]},{label},2,CC BY 4.0,Yes,video,{probe},{patient}\n")
    put(picture, root / "data" / "pocus_videos" / "linear" / "label_uncertain" / "Cov_maybe .mpeg")
    rows.append("20.04.20,x,Cov_maybe,COVID-19,,None,Yes,video,linear,5\n")
    put(picture, root / "data" / "pocus_images" / "Convex" / "covid" / "Cov-Atlas+(44).gif_frame18.jpg")
    rows.append("20.04.20,butterfly,Cov-Butterfly-COVID Lung 2,COVID-19,,None,No,video,convex,\n")
    write(root / "data" / "dataset_metadata.csv", UPSTREAM_HEADER + "".join(rows))
    write(root / "README.md", "POCUS")


TREES: dict[str, Callable[[Path, Path], None]] = {
    "butterfly": lambda root, picture: flat(root, picture, ["Reg", "Cov"], 22, 1533),
    "clust": lambda root, picture: flat(root, picture, CLUST, 63, 3150, "{number:05d}.jpg"),
    "lusms": lambda root, picture: flat(root, picture, LUNG, 670, 1400),
    "liver": lambda root, picture: flat(root, picture, LIVER, 296, 600),
    "us4": us4, "gbusv": gbusv, "gbcu": gbcu, "busi": busi, "cholec80": cholec80, "polypsset": polypsset, "polypdiag": polypdiag, "folder": folder,
    "pocus": upstream,
}
SMALL = {
    "polypsset": tuple(Expect("frames", number, split=split) for split, number in (("train", 3), ("validation", 4), ("test", 4))),
    **{name: (Expect("videos", videos), Expect("frames", frames)) for name, videos, frames in (
        ("lusms", 670, 1400), ("liver", 296, 600), ("us4", 1051, 3659))},
}


def fitting(name: str) -> Recipe:
    """The recipe, with published counts of the miniature where the real set has tens of thousands of files."""
    return dataclasses.replace(recipe(name), published=SMALL[name]) if name in SMALL else recipe(name)


def built(name: str, tmp_path: Path, picture: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    TREES[name](root, picture)
    return root


# --- every recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__the_right_tree_has_no_deviation(name: str, tmp_path: Path, picture: Path) -> None:
    item = fitting(name)
    scan = item.scan(built(name, tmp_path, picture))
    assert item.check(scan) == []
    assert all(row.label for row in scan.rows) or name == "cholec80"
    paths = [row.path for row in scan.rows]
    assert paths == sorted(set(paths)) and not any("_mask" in path for path in paths)


FIRST = {  # a file, or the folder of a video, that the recipe must miss
    "butterfly": "Cov*", "clust": "Rb1*", "lusms": "Ali*", "liver": "F0*", "us4": "Liver/F0*", "gbusv": "malignant/m*", "gbcu": "imgs/im00000.jpg",
    "busi": "*/benign/benign (1).png", "cholec80": "frames/video07", "polypsset": "train2019/Annotation/2.xml", "polypdiag": "videos/clip2.mp4",
    "pocus": "data/pocus_videos/convex/Pneu_Avi.v2.mp4",
}


@pytest.mark.parametrize(("name", "pattern"), FIRST.items())
def test_recipe__a_missing_file_is_named_or_counted(name: str, pattern: str, tmp_path: Path, picture: Path) -> None:
    root, item = built(name, tmp_path, picture), fitting(name)
    gone = sorted(root.glob(pattern))[0]
    for path in sorted(gone.rglob("*"), reverse=True) if gone.is_dir() else ():
        path.unlink()
    if gone.is_dir():
        gone.rmdir()
    else:
        gone.unlink()
    deviations = item.check(item.scan(root))
    named = [line for line in deviations if line.startswith("missing:") and gone.stem in line]
    counted = [line for line in deviations if line.startswith("count of") and line.endswith("missing)")]
    assert named or counted, deviations


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("folder",)])
def test_recipe__a_folder_of_another_kind_is_refused_with_the_layout(name: str, tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "nothing here")
    with pytest.raises(DataError, match=r"not the layout of .*\n(.*\n)*.*Found: notes.txt"):
        recipe(name).scan(tmp_path)
    with pytest.raises(DataError, match="the folder does not exist"):
        recipe(name).scan(tmp_path / "absent")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__facts_are_there(name: str) -> None:
    item = recipe(name)
    for text in (item.title, item.about, item.citation, item.licence, item.layout, item.labels, item.patients, item.certainty):
        assert text.strip()
    assert item.obtain and set(item.presets) <= set(preset_names())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key in item.settings:
        section, field = key.split(".")
        assert field in params[section]
    assert item.title in datasets.show_dataset(name) and name in datasets.list_datasets()


def test_recipe__counts_are_those_published() -> None:
    published = {name: [(item.what, item.number) for item in recipe(name).published][:2] for name in ("butterfly", "clust", "lusms", "liver", "us4")}
    assert published == {
        "butterfly": [("videos", 22), ("frames", 1533)], "clust": [("videos", 63), ("frames", 3150)], "lusms": [("videos", 670), ("frames", 6834)],
        "liver": [("videos", 296), ("frames", 11714)], "us4": [("videos", 1051), ("frames", 23231)],
    }
    assert [item.number for item in recipe("polypsset").published] == [28773, 4254, 4872]
    assert [item.number for item in recipe("busi").published] == [437, 210, 133]


def test_catalog__unknown_names_and_variants() -> None:
    with pytest.raises(DataError, match="Did you mean 'cholec80'"):
        recipe("cholec8")
    with pytest.raises(DataError, match="unknown variant '50/50'. Allowed: 40/8/32, 40/40"):
        recipe("cholec80").scan(ROOT, "50/50")


# --- single recipes ------------------------------------------------------------------------------------------------------


def test_pocus__the_real_files_are_as_published(shared: Path) -> None:
    item = recipe("pocus")
    scan = item.scan(shared / "data" / "pocus")
    assert item.check(scan) == [] and scan.notes == []
    assert (Expect("videos", 96).found(scan.rows), Expect("images", 21).found(scan.rows), Expect("patients", 45).found(scan.rows)) == (96, 21, 45)
    folds = official_folds(item, scan.rows)
    assert [len(fold["test_paths"]) for fold in folds] == [17, 19, 18, 16, 19]
    assert scan.settings["data.include"] == {"probe": ["convex"]}


def test_pocus__upstream_quirks(tmp_path: Path, picture: Path) -> None:
    scan = recipe("pocus").scan(built("pocus", tmp_path, picture))
    rows = {Path(row.path).name: row for row in scan.rows}
    assert len(rows) == 5, "frames cut from videos are no stills"
    assert rows["Cov_maybe .mpeg"].label == "uncertain" and rows["Vir_one.MP4"].patient == ""
    assert rows["Reg_liftl_case3_clip2.mp4"].patient == "upstream-7", "the row is shifted: 40 is the age"
    assert rows["Pneu_Avi.v2.mp4"].label == "pneumonia" and rows["Cov_maybe .mpeg"].extra["licence"] == ""
    assert any("divide one person" in note for note in scan.notes) and any("no licence" in note for note in scan.notes)


def test_pocus__tables_and_files_that_disagree(tmp_path: Path, picture: Path) -> None:
    put(picture, tmp_path / "images" / "a.png")
    put(picture, tmp_path / "images" / "extra.png")
    header = "path,label,patient_id,probe,source,licence\n"
    write(tmp_path / "videos.csv", header + "images/gone.mp4,covid,p1,convex,x,CC\n")
    write(tmp_path / "images.csv", header + "images/a.png,covid,p1,convex,x,CC\n")
    write(tmp_path / "cv_reference.json", json.dumps({"folds": [{"test_paths": ["images/a.png"]}, {"test_paths": ["b.png"]}]}))
    scan = recipe("pocus").scan(tmp_path)
    deviations = recipe("pocus").check(scan)
    assert deviations[:3] == [
        "missing: images/gone.mp4 (videos.csv line 2)", "surplus: images/extra.png stands in no table", "missing: b.png (cv_reference.json)"]
    assert "count of videos: 0 found, 96 published (96 missing)" in deviations
    write(tmp_path / "cv_reference.json", '{"folds": [{"test_paths": 3}]}')
    with pytest.raises(DataError, match="cv_reference.json: must look like"):
        recipe("pocus").scan(tmp_path)


def test_us4__twelve_classes_or_those_of_the_parts(tmp_path: Path, picture: Path) -> None:
    root = built("us4", tmp_path, picture)
    merged, parts = (recipe("us4").scan(root, variant) for variant in ("merged", "parts"))
    assert {row.label for row in merged.rows} == {*CLUST, "F0", "F1", "F2", "F3", "F4", "normal", "abnormal"}
    assert {row.extra["part"]: row.label for row in parts.rows}["Ple"] == "pleura"
    flat(root, picture, ["Xyz"], 1, 3)
    scan = recipe("us4").scan(root)
    assert any("begins with 'Xyz', which is no label" in line for line in scan.deviations)
    assert "count of videos: 1052 found, 1051 published (1 surplus)" in recipe("us4").check(scan)


def test_flat__pictures_that_are_no_video(tmp_path: Path, picture: Path) -> None:
    flat(tmp_path, picture, ["Reg"], 1, 3)
    put(picture, tmp_path / "Cov_single" / "left.jpg")
    (tmp_path / "Cov_empty").mkdir()
    scan = recipe("butterfly").scan(tmp_path)
    assert any(line.startswith("wrong: Cov_single holds 1 pictures that are no video") for line in scan.deviations)
    assert "missing: Cov_empty is an empty folder" in scan.deviations


def test_gbusv__without_class_folders_and_extended(tmp_path: Path, picture: Path) -> None:
    flat(tmp_path, picture, ["Video_"], 64, 158, "{number:05d}.jpg")
    scan = recipe("gbusv").scan(tmp_path)
    assert any("pretraining only" in note for note in scan.notes)
    assert recipe("gbusv").check(scan) == ["count of frames: 158 found, 15800 published (15642 missing)"]
    assert recipe("gbusv").check(scan, "extended") == ["count of videos: 64 found, 91 published (27 missing)"]


def test_gbcu__wrong_class_and_double_line(tmp_path: Path, picture: Path) -> None:
    root = built("gbcu", tmp_path, picture)
    lines = (root / "test.txt").read_text(encoding="utf-8").splitlines()
    write(root / "test.txt", "\n".join([lines[0][:-1] + "7", *lines[1:], "im00000.jpg,0"]))
    deviations = recipe("gbcu").check(recipe("gbcu").scan(root))
    assert "wrong: test.txt line 1: class '7'; expected 0 (normal), 1 (benign) or 2 (malignant)" in deviations
    assert any("imgs/im00000.jpg is listed twice (train.txt line 1 and test.txt line 123)" in line for line in deviations)
    assert "count of images, label normal, split test: 30 found, 31 published (1 missing)" in deviations


def test_busi__counts_by_class(tmp_path: Path, picture: Path) -> None:
    root = built("busi", tmp_path, picture)
    put(picture, root / "Dataset_BUSI_with_GT" / "malignant" / "malignant (211).png")
    scan = recipe("busi").scan(root)
    assert recipe("busi").check(scan) == ["count of images, label malignant: 211 found, 210 published (1 surplus)"]
    assert "781 mask images are left out" in scan.notes


def test_cholec80__annotations_are_compared(tmp_path: Path, picture: Path) -> None:
    root = built("cholec80", tmp_path, picture)
    write(root / "phase_annotations" / "video03-phase.txt", phase_file(1))
    write(root / "phase_annotations" / "video04-phase.txt", "Frame\tPhase\n0\tLunch\n99\tLunch\n")
    (root / "phase_annotations" / "video05-phase.txt").unlink()
    write(root / "tool_annotations" / "video06-tool.txt", "Frame\tHammer\n")
    put(picture, root / "frames" / "other" / "a.png")
    deviations = recipe("cholec80").check(recipe("cholec80").scan(root))
    assert "wrong: phase_annotations/video03-phase.txt ends at row 24, 4 frames need 75" in deviations
    assert any("video04-phase.txt: phase Lunch; known: Preparation" in line for line in deviations)
    assert any(line.startswith("missing: phase_annotations/video05-phase.txt: not found") for line in deviations)
    assert any("video06-tool.txt: header Frame Hammer; expected Frame Grasper" in line for line in deviations)
    assert any(line.startswith("surplus: frames/other/a.png") for line in deviations) and len(deviations) == 5


def test_cholec80__official_splits(tmp_path: Path, picture: Path) -> None:
    root = built("cholec80", tmp_path, picture)
    fold, = official_folds(recipe("cholec80"), recipe("cholec80").scan(root).rows)
    assert (len(fold["train"]), len(fold["test_patients"]), fold["inner"][0]["validation"]) == (48, 32, [f"video{n}" for n in range(41, 49)])
    fold, = official_folds(recipe("cholec80"), recipe("cholec80").scan(root, "40/40").rows)
    assert fold["test_patients"][0] == "video41" and len(fold["train"]) == len(fold["test_patients"]) == 40 and "inner" not in fold


def test_polypsset__sequences_are_no_classes(tmp_path: Path, picture: Path) -> None:
    root = built("polypsset", tmp_path, picture)
    write(root / "val2019" / "Annotation" / "2" / "1.xml", box("adenomatous"))
    scan = fitting("polypsset").scan(root)
    rows = {row.path: row for row in scan.rows}
    assert rows["test2019/Image/2"].label == "hyperplastic" and rows["test2019/Image/2"].patient == "test2019/2"
    assert rows["val2019/Image/2"].label == "", "boxes of both kinds"
    assert rows["train2019/Image/3.jpg"].label == "adenomatous" and rows["train2019/Image/3.jpg"].kind == "image"
    assert len(scan.boxes) == 11 and ("train2019/Image/1.jpg", "adenomatous", 1, 2, 30, 40) in scan.boxes


@pytest.mark.parametrize(("text", "says"), [
    ('<!DOCTYPE a [<!ENTITY b "b">]><annotation/>', "has a document type"), ("<annotation>", "no VOC annotation"),
    (box("tumour"), "object 'tumour'"), (box("adenomatous").replace("<xmin>1</xmin>", ""), "no VOC annotation"),
])
def test_polypsset__hostile_annotations(text: str, says: str, tmp_path: Path, picture: Path) -> None:
    root = built("polypsset", tmp_path, picture)
    write(root / "train2019" / "Annotation" / "1.xml", text)
    deviations = fitting("polypsset").check(fitting("polypsset").scan(root))
    assert len(deviations) == 1 and deviations[0].startswith("wrong: train2019/Annotation/1.xml") and says in deviations[0]


# --- hostile trees and tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "says"), [
    ("../../etc/passwd,a", r"t.csv line 2: path '../../etc/passwd' is empty or leads out"), ("/etc/passwd,a", "leads out of the folder"),
    ("C:\\x.mp4,a", "leads out of the folder"), ("x.mp4,=cmd()", "column label begins like a spreadsheet formula: '=cmd"),
    ("x.mp4,+1+cmd|' /C calc'!A0", "spreadsheet formula"), ("x.mp4,@SUM(A1)", "spreadsheet formula"), (f"x.mp4,{'a' * 2000}", "holds 2000 characters"),
    ('x.mp4,"two\nlines"', "line break or control character"), ("x.mp4", "does not have 2 cells"), (f"x.mp4,{'a' * 200_000}", "not CSV"),
])
def test_table__hostile_rows_are_named(row: str, says: str, tmp_path: Path) -> None:
    write(tmp_path / "t.csv", f"path,label\n{row}\n")
    with pytest.raises(DataError, match=says):
        read_table(tmp_path, "t.csv", ("path", "label"), path_column="path")


def test_table__plain_signs_are_no_formula(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "path,label\n-clip+1.mp4,+\nb.mp4,-1\n")
    assert [row.cells["label"] for row in read_table(tmp_path, "t.csv", ("path", "label"), path_column="path")] == ["+", "-1"]


def test_table__a_link_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.csv", "path,label\na,b\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(DataError, match="t.csv: leads out of the folder"):
        read_table(tmp_path / "set", "t.csv", ("path", "label"))
    with pytest.raises(DataError, match="no column path, label. Found: a"):
        read_table(tmp_path, write(tmp_path / "u.csv", "a\n1\n").name, ("path", "label"))


def test_scan__links_out_and_odd_names(tmp_path: Path, picture: Path) -> None:
    outside = tmp_path / "outside"
    flat(outside, picture, ["Cov"], 1, 3)
    root = tmp_path / "tree"
    flat(root, picture, ["Reg"], 2, 6)
    (root / "Cov_link").symlink_to(outside)
    flat(root, picture, ["Cov\n"], 1, 2)
    flat(root, picture, ["Cov é, \"x\""], 1, 2)
    scan = recipe("butterfly").scan(root)
    assert len(scan.rows) == 3 and any("links lead out" in note for note in scan.notes)
    assert any("a name that no table can hold" in line for line in scan.deviations)
    done = prepare(recipe("butterfly"), scan, tmp_path / "out")
    with open(done.files[0], encoding="utf-8", newline="") as handle:
        assert [row["path"] for row in csv.DictReader(handle)] == [row.path for row in scan.rows]


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


def run_stages(item: Recipe, root: Path, project: Path, monkeypatch: pytest.MonkeyPatch, **more: object) -> tuple[Manifest, object]:
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
    assert {videos[video] for video in fold.inner[0].validation} == {"video41"}


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
