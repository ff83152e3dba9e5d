"""The manifest table and the labels tables: round trips, exact complaints, filters, pseudonyms, identical content."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.labels import Label, LabelledMedia, read_labelled_media
from pipeline.data.manifest import COLUMNS, Manifest, VideoRow, merge_identical, pseudonym
from pipeline.errors import ConfigError, DataError
from pipeline.parameters import DataParams, SourceParams

ROW = VideoRow(
    video="0" * 16, source="main", path="a.mp4", sha256="0" * 64, patient="P0123456789", label="x", kind="video",
    frames=5, frames_decoded=10, frames_claimed=11, fps=9.99, fps_source="container", width=640, height=480,
    stored_width=341, stored_height=256, channels=1, bytes=10240, warnings="one; two",
)


def row(number: int, **changes: object) -> VideoRow:
    return replace(ROW, **{"video": f"{number:016x}", "sha256": f"{number:064x}", "path": f"{number}.mp4", **changes})


def test_manifest__round_trip_and_digest(tmp_path: Path) -> None:
    empty = row(1, fps=None, frames_claimed=None, label="", patient="", warnings="")
    rows = [row(2, path='ü, "q"\nb.avi'), empty, row(3, path="Z")]
    manifest = Manifest(rows)
    manifest.write(tmp_path / "manifest.csv")
    again = Manifest.read(tmp_path / "manifest.csv")
    assert again.rows == manifest.rows and [item.path for item in again.rows][:2] == ["1.mp4", "Z"]
    assert again.digest() == manifest.digest() == Manifest(rows[::-1]).digest()
    assert Manifest([*rows[:2], replace(rows[2], label="y")]).digest() != manifest.digest()
    header = (tmp_path / "manifest.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("schema,video,source,path,sha256,patient,label,kind,frames,")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("schema", "9", "row 2, column schema: found '9'"),
        ("video", "../../etc/passwd", "row 2, column video"),
        ("frames", "five", "row 2, column frames: found 'five'"),
        ("frames", "-1", "row 2, column frames"),
        ("fps", "nan", "row 2, column fps"),
        ("kind", "film", "row 2, column kind: found 'film', allowed: video, image, frames"),
        ("channels", "2", "row 2, column channels"),
    ],
)
def test_manifest__wrong_cell_is_named(tmp_path: Path, column: str, value: str, message: str) -> None:
    path = tmp_path / "manifest.csv"
    Manifest([ROW]).write(path)
    header, line = path.read_text(encoding="utf-8").splitlines()
    cells = line.split(",")
    cells[COLUMNS.index(column)] = value
    path.write_text(f"{header}\n{','.join(cells)}\n", encoding="utf-8")
    with pytest.raises(DataError, match="manifest.csv: ") as caught:
        Manifest.read(path)
    assert message in str(caught.value)


def test_manifest__missing_file_columns_cells_or_twice(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    with pytest.raises(DataError, match="Run the extract stage"):
        Manifest.read(path)
    path.write_text("schema,video\n1,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="columns missing: source, path"):
        Manifest.read(path)
    Manifest([ROW]).write(path)
    path.write_text(path.read_text(encoding="utf-8") + "1,abc\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 3: more or fewer cells"):
        Manifest.read(path)
    Manifest([ROW, replace(ROW, path="b.mp4")]).write(path)
    with pytest.raises(DataError, match="appears twice"):
        Manifest.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        Manifest.read(path)


def test_pseudonym__keyed_and_blank_stays_blank() -> None:
    assert pseudonym("", "key") == ""
    assert pseudonym("Müller", "key") != pseudonym("Müller", "other") != pseudonym("Meier", "other")
    # HMAC-SHA256 of RFC 4231, test case 2.
    assert pseudonym("what do ya want for nothing?", "Jefe") == "P" + "5bdcc146bf"


def test_merge__identical_content() -> None:
    same = [row(1, path="b.mp4", warnings=""), row(1, path="a.mp4", warnings=""), row(2)]
    merged = merge_identical(same)
    assert [item.path for item in merged] == ["2.mp4", "a.mp4"]
    assert (merged[1].label, merged[1].patient, merged[1].warnings) == ("x", "P0123456789", "same content in 2 files")
    (one,) = merge_identical([row(1, path="a", label="y", patient="Pb"), row(1, path="b", label="x", patient="Pa")])
    assert (one.label, one.patient) == ("", "Pa")
    assert one.warnings == (
        "one; two; same content in 2 files; same content under two labels: x y; same content under two patients: Pa Pb"
    )
    (one,) = merge_identical([row(1, path="a", label="", patient=""), row(1, path="b")])
    assert (one.label, one.patient) == ("x", "P0123456789"), "unknown contradicts nothing"


def media(root: Path, *names: str) -> None:
    """Files with distinct contents; labels are read without decoding."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def labelled(root: Path, **params: object) -> LabelledMedia:
    return read_labelled_media("main", DataParams(source=str(root), **params))


def table(root: Path, text: str, name: str = "labels.csv") -> None:
    (root / name).write_text(text, encoding="utf-8")


def test_labels__auto_finds_columns_in_several_tables(tmp_path: Path) -> None:
    media(tmp_path, "v/a.mp4", "v/b.MP4", "i/c.mp4", "free.avi")
    table(tmp_path, "Path,Label,patient_id,fps\nv/a.mp4, sick ,p1,12.5\nv/b.MP4,well,p2,\n", "one.csv")
    table(tmp_path, "\ufefffilename;class;subject\ni\\c.mp4;well;p3\n;;\n", "two.csv")
    table(tmp_path, "x,y\n1,2\n", "other.csv")
    found = labelled(tmp_path)
    assert found.labels == {
        "free.avi": Label(),
        "i/c.mp4": Label("well", "p3"),
        "v/a.mp4": Label("sick", "p1", 12.5),
        "v/b.MP4": Label("well", "p2"),
    }
    assert any("1 of 4 files have no label" in note for note in found.notes)
    assert any(note.startswith("other.csv: no path column") for note in found.notes)


def test_labels__all_problems_at_once(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4", "x/same.mp4", "y/same.mp4")
    table(tmp_path, (
        "path,label,patient,fps\na.mp4,sick,p1,\na.mp4,well,p1,\nb.mp4,well,p2,\nb.mp4,well,p3,\nb.mp5,well,p2,\n"
        "../c.mp4,well,p2,\n/etc/passwd,well,p2,\nsame.mp4,well,p2,\nx/../../d.mp4,well,p2,\n"
        "a.mp4,sick,p1,fast\nb.mp4,well\n,well,p1,\n"
    ))
    with pytest.raises(DataError) as caught:
        labelled(tmp_path)
    text = str(caught.value)
    for part in (
        "10 problems",
        "line 3: 'a.mp4' has label 'well', but 'sick' at labels.csv line 2",
        "line 5: 'b.mp4' has patient 'p3', but 'p2'",
        "line 6: file 'b.mp5' does not exist. Did you mean 'b.mp4'?",
        "line 7: path '../c.mp4' leads out of the folder",
        "line 8: path '/etc/passwd' leads out of the folder",
        "line 9: file 'same.mp4' fits several files (x/same.mp4, y/same.mp4)",
        "line 10: path '../d.mp4' leads out",
        "line 11: column fps: found 'fast'",
        "line 12: does not have 4 cells",
        "line 13: column path is empty",
    ):
        assert part in text


def test_labels__same_name_in_two_folders(tmp_path: Path) -> None:
    media(tmp_path, "x/same.mp4", "y/same.mp4")
    table(tmp_path, "path,label\nx/same.mp4,a\ny/same.mp4,b\n")
    labels = labelled(tmp_path).labels
    assert {path: said.label for path, said in labels.items()} == {"x/same.mp4": "a", "y/same.mp4": "b"}


def test_labels__bare_names_and_other_unicode_spelling(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Größe é.mp4")
    media(tmp_path, "deep/one.mp4", decomposed, "a+b c.avi")
    table(tmp_path, f"name,label\none,a\n{unicodedata.normalize('NFC', decomposed)},b\na+b c,c\n")
    assert {path: said.label for path, said in labelled(tmp_path).labels.items()} == {
        "deep/one.mp4": "a", decomposed: "b", "a+b c.avi": "c",
    }


def test_labels__a_named_file_is_taken_whatever_its_extension(tmp_path: Path) -> None:
    media(tmp_path, "clip.bin", "other.bin")
    table(tmp_path, "path,label\nclip.bin,a\n")
    assert [item.path for item in labelled(tmp_path).media] == ["clip.bin"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,diagnose", "'diagnose' looks like a label column"),
        ("path,lable,patient", "Rename it or set data.label_column"),
    ],
)
def test_labels__slip_in_a_column_name(tmp_path: Path, header: str, message: str) -> None:
    media(tmp_path, "a.mp4")
    table(tmp_path, header + "\n" + ",".join(["a.mp4", "x", "p"][: header.count(",") + 1]) + "\n")
    with pytest.raises(DataError, match=message):
        labelled(tmp_path)


@pytest.mark.parametrize(
    ("text", "role", "message"),
    [
        ("path,befund\na.mp4,x\n", "label", "(columns found: path, befund). If befund is the label: -S data.label_column=befund"),
        ("path,Der Befund,ort\na.mp4,x,y\n", "label", "If one of Der Befund, ort is the label: -S 'data.label_column=Der Befund', for example"),
        ("path,patient\na.mp4,7\n", "label", "(columns found: path, patient). Name it with data.label_column, or add the column"),
        ("datei,befund,patient\na.mp4,x,7\n", "label", "no column is taken for the path or the label (columns found: datei, befund, patient). Name them with"),
        ("a.mp4,sick,Anna\n", "label", "(its first line is no known header)"),
        ("path,label,patient\na.mp4,x,\n", "patient", "labels.csv: column patient is empty there. Fill it"),
    ],
)
def test_hints__name_the_columns_and_the_setting(tmp_path: Path, text: str, role: str, message: str) -> None:
    media(tmp_path, "a.mp4")
    table(tmp_path, text)
    hint = labelled(tmp_path).hints[role]
    assert message in hint and "Anna" not in hint


def test_hints__none_where_nothing_is_missing(tmp_path: Path) -> None:
    media(tmp_path, "one/a.mp4", "two/b.mp4")
    assert "no labels table names a patient" in labelled(tmp_path).hints["patient"], "class folders name no patients"
    assert labelled(tmp_path, labels="none").hints == {}
    table(tmp_path, "path,label,patient\none/a.mp4,x,1\n")
    table(tmp_path, "path,width\none/a.mp4,30\n", "sizes.csv")
    assert labelled(tmp_path).hints == {}


def test_labels__columns_and_table_by_name(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4")
    table(tmp_path, "path,label,Klasse,id\na.mp4,raw,fine,7\n", "my.csv")
    found = labelled(tmp_path, labels="my.csv", label_column="klasse", patient_column="id")
    assert found.labels["a.mp4"] == Label("fine", "7")
    with pytest.raises(DataError, match=r"data.label_column: my.csv has no column 'Klase'. Did you mean 'Klasse'\?"):
        labelled(tmp_path, label_column="Klase")
    with pytest.raises(DataError, match=r"not found in .*Did you mean 'my.csv'\?"):
        labelled(tmp_path, labels="mi.csv")
    with pytest.raises(DataError, match="must lie inside"):
        labelled(tmp_path, labels="../my.csv")
    table(tmp_path, "a,b\n1,2\n", "bad.csv")
    with pytest.raises(DataError, match="no path column .* no label column .*Found: a, b"):
        labelled(tmp_path, labels="bad.csv")


def test_labels__not_utf8(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4")
    (tmp_path / "labels.csv").write_bytes("path,label\na.mp4,Größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="not readable as UTF-8"):
        labelled(tmp_path)


def test_labels__class_folders(tmp_path: Path) -> None:
    media(tmp_path, "sick/a.mp4", "well/b.mp4")
    found = labelled(tmp_path)
    assert [found.labels[item.path] for item in found.media] == [Label("sick"), Label("well")]
    assert {said.label for said in labelled(tmp_path, labels="none").labels.values()} == {""}
    media(tmp_path, "top.mp4")
    assert {said.label for said in labelled(tmp_path).labels.values()} == {""}


def test_include__filters_rows(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4", "b.mp4", "c.mp4", "free.mp4")
    table(tmp_path, "path,label,probe,score\na.mp4,x,convex,1.0\nb.mp4,y,linear,1\nc.mp4,y,convex,2\n")
    assert [item.path for item in labelled(tmp_path, include={"probe": ["convex"]}).media] == ["a.mp4", "c.mp4"]
    both = labelled(tmp_path, include={"Probe": ["convex", "linear"], "score": [1]})
    assert [item.path for item in both.media] == ["a.mp4", "b.mp4"]
    with pytest.raises(ConfigError) as caught:
        labelled(tmp_path, include={"prob": ["convex"], "probe": ["convx"]})
    text = str(caught.value)
    assert "data.include.prob: no such column. Did you mean 'probe'? Columns: path, label, probe, score" in text
    assert "no row has the value 'convx'. Did you mean 'convex'? Values: 'convex' (2), 'linear' (1)" in text
    with pytest.raises(ConfigError, match="no row passes all conditions together"):
        labelled(tmp_path, include={"probe": ["linear"], "score": [2]})
    with pytest.raises(ConfigError, match="needs a labels table"):
        labelled(tmp_path, labels="none", include={"probe": ["convex"]})


def test_media__filters_kinds(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    assert [item.path for item in labelled(tmp_path, media="video").media] == ["a.mp4"]
    assert [item.path for item in labelled(tmp_path, media="image").media] == ["b.png"]
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="no video or image to read is left"):
        labelled(tmp_path, media="image")


def test_source__missing_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.source: folder .* does not exist"):
        labelled(tmp_path / "nowhere")
    params = DataParams(source=str(tmp_path), extra_sources={"more": SourceParams(path=str(tmp_path / "gone"))})
    with pytest.raises(DataError, match="data.extra_sources.more.path"):
        read_labelled_media("more", params)
    (tmp_path / "scan.mha").write_bytes(b"x")
    with pytest.raises(DataError, match="no video or image.*\n.*1 .mha"):
        labelled(tmp_path)


def numbered(root: Path, names: tuple[str, ...], stills: bool, sizes: tuple[int, ...] = (96,)) -> None:
    """Folders of six numbered pictures in one outline: unlike ones, or the frames of a clip."""
    rng = np.random.default_rng(0)
    for folder in names:
        (root / folder).mkdir(parents=True)
        scene = rng.normal(size=(120, 120)).astype(np.float32)
        for number in range(6):
            scene = rng.normal(size=(120, 120)).astype(np.float32) if stills else scene
            picture = cv2.GaussianBlur(scene, (0, 0), 4)[number : number + 96, :96]
            picture = np.clip(120 + 40 * picture / picture.std(), 0, 255) * (np.mgrid[:96, :96][0] < 80)
            size = sizes[number % len(sizes)]
            cv2.imwrite(str(root / folder / f"{number + 1}.png"), cv2.resize(picture.astype(np.uint8), (size, size)))


@pytest.mark.parametrize(("stills", "sizes"), [(True, (96,)), (False, (96, 90, 80))])
def test_numbered_stills_in_class_folders__are_stills_with_labels(tmp_path: Path, stills: bool, sizes: tuple[int, ...]) -> None:
    """Pictures of different patients are unlike one another, or of different sizes: they are no clip."""
    numbered(tmp_path, ("benign", "malignant"), stills, sizes)
    found = labelled(tmp_path)
    assert [item.path for item in found.media] == [f"{name}/{n}.png" for name in ("benign", "malignant") for n in range(1, 7)]
    assert {item.kind for item in found.media} == {"image"}
    assert Counter(said.label for said in found.labels.values()) == {"benign": 6, "malignant": 6}
    assert found.doubtful and "each taken as a still (10 of 10 pairs" in found.doubtful[0] and found.doubtful[0] in found.notes
    assert any("folders benign, malignant give the labels" in note for note in found.notes)


def test_numbered_frames_of_clips__stay_clips(tmp_path: Path) -> None:
    numbered(tmp_path, ("clip1", "clip2", "clip3"), stills=False)
    found = labelled(tmp_path)
    assert [(item.path, item.kind) for item in found.media] == [(name, "frames") for name in ("clip1", "clip2", "clip3")]
    assert not found.doubtful and any("3 folders of numbered pictures are each taken as one clip (0 of 15" in note for note in found.notes)
    assert any("everything is unlabelled" in note for note in found.notes)


def test_numbered_folders__a_table_or_other_files_decide(tmp_path: Path) -> None:
    numbered(tmp_path / "tabled", ("a", "b"), stills=True)
    table(tmp_path / "tabled", "path,label\na,ill\nb,well\n")
    assert [(item.path, item.kind) for item in labelled(tmp_path / "tabled").media] == [("a", "frames"), ("b", "frames")]
    numbered(tmp_path / "mixed", ("a", "b"), stills=True)
    media(tmp_path / "mixed", "c.mp4")
    assert [item.kind for item in labelled(tmp_path / "mixed").media] == ["frames", "frames", "video"]
    numbered(tmp_path / "broken", ("a", "b"), stills=True)
    for path in (tmp_path / "broken").glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:90])
    assert [item.kind for item in labelled(tmp_path / "broken").media] == ["frames", "frames"], "extraction names them"


def test_extra_source__ignores_the_filters_of_the_main_one(tmp_path: Path) -> None:
    media(tmp_path, "a.mp4")
    params = DataParams(
        source="elsewhere", include={"probe": ["convex"]}, media="image", label_column="finding",
        extra_sources={"more": SourceParams(path=str(tmp_path))},
    )
    table(tmp_path, "path,patient\na.mp4,p1\n")
    assert read_labelled_media("more", params).labels == {"a.mp4": Label("", "p1")}


def test_real_tables__auto(shared: Path) -> None:
    found = labelled(shared / "data" / "pocus")
    assert len(found.media) == 117 and all(said.label and said.patient for said in found.labels.values())
    assert len({said.patient for said in found.labels.values()}) == 45
    convex = labelled(shared / "data" / "pocus", include={"probe": ["convex"]}, media="video")
    assert len(convex.media) == 91


def test_notes__say_where_labels_of_frames_come_from(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    framed = DataParams(source=str(tmp_path), frame_labels="marks/{stem}.txt")
    said = "labels come from the annotation file of each video (data.frame_labels: marks/{stem}.txt)"
    assert read_labelled_media("main", framed).notes == [said]
    assert "everything is unlabelled" in read_labelled_media("main", DataParams(source=str(tmp_path))).notes[0]
    (tmp_path / "people.csv").write_text("path,patient\na.mp4,7\n")
    first, second = read_labelled_media("main", framed).notes
    assert first.endswith("it gives the patients") and second == said
