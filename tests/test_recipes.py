"""Data set recipes: each on a tree of its layout made on the spot, POCUS on the real files, hostile trees and tables."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import sample_media as sample
import yaml
from recipe_trees import CLUST, box, built, fitting, flat, phase_file, put, write

from pipeline import datasets
from pipeline.data.recipes.base import Expect, read_table
from pipeline.data.recipes.catalog import RECIPES, recipe
from pipeline.data.recipes.prepare import official_folds, prepare
from pipeline.errors import DataError
from pipeline.presets import preset_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small image that the trees of a test link to; recipes look at names, not pixels."""
    folder = sample.write_frame_folder(tmp_path_factory.mktemp("picture") / "one", 1)
    return next(folder.iterdir())


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
    gone = min(root.glob(pattern))
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
    assert [item.number for item in recipe("gbusv").published] == [64, 15800, 32, 32, 12251, 3549]


def test_docs__name_every_recipe() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == list(RECIPES)


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
    assert any("no table can hold its name" in line for line in scan.deviations)
    done = prepare(recipe("butterfly"), scan, tmp_path / "out")
    with open(done.files[0], encoding="utf-8", newline="") as handle:
        assert [row["path"] for row in csv.DictReader(handle)] == [row.path for row in scan.rows]


def selection(root: Path, picture: Path) -> None:
    """The smallest POCUS selection."""
    put(picture, root / "videos" / "a.mp4")
    header = "path,label,patient_id,probe,source,licence\n"
    write(root / "videos.csv", header + "videos/a.mp4,covid,p1,convex,x,CC\n")
    write(root / "images.csv", header)
    write(root / "cv_reference.json", '{"folds": [{"test_paths": ["videos/a.mp4"]}]}')


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Cut off, changed, replaced, or with something planted in it."""
    planted = rng.choice([b"\0", b'"', b"\n", b",", b"..", b"\x1b[31m", b"9" * 5000, b"[" * 60, b"\xff\xfe"])
    place = rng.randrange(len(raw) + 1)
    return rng.choice([raw[:place], raw[:place] + planted + raw[place:], raw[:place] + rng.randbytes(9) + raw[place + 9:], rng.randbytes(place), b""])


@pytest.mark.parametrize("name", ["pocus", "polypdiag", "polypsset"])
def test_scan__damaged_tables_are_errors_or_deviations(name: str, tmp_path: Path, picture: Path) -> None:
    """Seeded damage to every table and annotation; nothing but a DataError, and no escape sequence in what is said."""
    if name == "pocus":
        selection(tmp_path / "tree", picture)
    root = tmp_path / "tree" if name == "pocus" else built(name, tmp_path, picture)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".csv", ".txt", ".json", ".xml"))
    rng, refused = random.Random(0), 0
    for _ in range(100):
        path = rng.choice(files)
        raw = path.read_bytes()
        path.write_bytes(damaged(raw, rng))
        try:
            said = "\n".join(recipe(name).check(recipe(name).scan(root)))
        except DataError as error:
            said, refused = str(error), refused + 1
        assert "\x1b" not in said
        path.write_bytes(raw)
    assert refused or name == "polypsset"
