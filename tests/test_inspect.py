"""`sonoscope inspect` end to end: every oddity of a folder in one run, its files, its page, and the quirks of the real clips."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import sample_dicom
import sample_media
import sample_trouble as sample
from pipeline.cli import main
from pipeline.data import inspect as inspect_module
from pipeline.data.inspect import FileReport, Inspection, Look, inspect_file, inspect_folder, shortcuts
from pipeline.data.inspect_report import as_text, summary
from pipeline.data.pool import CRASHED, run_isolated
from pipeline.data.probe import Header
from pipeline.data.video import Media
from pipeline.errors import DataError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without params.yaml as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(inspection: Inspection) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, finding in inspection.all_findings():
        found.setdefault(finding.code, set()).add(path)
    return found


def table() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("inspection/files.csv").read_text(encoding="utf-8").splitlines()))


def odd_folder(root: Path) -> Path:
    """One of everything."""
    sample.write_clip(root / "one/scan.avi", sample.speckle(40, 1))
    sample.write_clip(root / "two/Scan.AVI", sample.speckle(40, 2))
    sample.write_clip(root / "Größe.avi", sample.speckle(40, 3))
    sample.write_clip(root / "static.avi", np.repeat(sample.speckle(1, 4), 20, axis=0))
    sample.write_clip(root / "short.avi", sample.speckle(5, 5))
    shutil.copy(root / "one/scan.avi", root / "copy.avi")
    half = sample.speckle(40, 2, size=(160, 128))[:, 4:124, 5:155]
    sample.write_clip(root / "re-encoded.mp4", np.ascontiguousarray(half))
    sample_media.write_frame_folder(root / "pictures", 8)
    sample_dicom.write(root / "ward/cine.dcm", sample.speckle(12, 6))
    (root / "bad\nname.mp4").write_bytes(b"nothing of the kind")
    (root / "empty.mp4").touch()
    (root / "notes.docx").write_text("x")
    (root / ".hidden").write_text("x")
    (root / "sizes.csv").write_text("name,width\none/scan.avi,3\n")
    (root / "out.mp4").symlink_to("/etc/hostname")
    rows = ["one/scan.avi,sick,Anna", "two/Scan.AVI,well,Bert", "copy.avi,well,Cleo", "gone.avi,well,Bert", "static.avi,sick,", "short.avi,sick,Anna"]
    (root / "labels.csv").write_text("\n".join(["path,label,patient", *rows]), encoding="utf-8")
    return root


def test_inspect__every_oddity_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    odd_folder(Path("clips"))
    assert main(["inspect", "clips", "--workers", "2"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(Path("inspection/summary.json").read_text(encoding="utf-8"))
    found = {code: {item["path"] for item in entry["found"]} for code, entry in facts["findings"].items()}
    bad = "bad\\x0aname.mp4"
    expected = {
        "unreadable": {bad, "empty.mp4"}, "labels": {""}, "same-content": {"copy.avi"}, "same-content-labels": {"copy.avi"},
        "same-content-patients": {"copy.avi"}, "near-duplicate": {"re-encoded.mp4"}, "no-table": {""}, "static": {"static.avi"}, "short": {"short.avi"},
        "same-name": {"one/scan.avi"}, "not-ascii": {"Größe.avi"}, "not-printable": {bad},
        "not-read": {"notes.docx"}, "link-outside": {"out.mp4"}, "no-patient": {"static.avi"}, "few-patients": {""},
        "tiny": {"pictures"},
    }
    assert {code: found.get(code) for code in expected} == expected
    assert set(found) - set(expected) <= {"no-label"}
    assert (facts["files"], facts["unreadable"], facts["frame_folders"], facts["videos"]) == (11, 2, 1, 8)
    assert "gone.avi" in facts["findings"]["labels"]["found"][0]["what"]
    assert "cannot be read" in text and "inspection/index.html" in text and "Traceback" not in text
    assert max(map(len, text.splitlines())) < 400
    rows = table()
    by_path = {row["path"]: row for row in rows}
    assert len(rows) == 11 + 2 and by_path["empty.mp4"]["readable"] == "no" and "empty" in by_path["empty.mp4"]["errors"]
    assert "as one/scan.avi" in by_path["copy.avi"]["warnings"] and "as copy.avi" in by_path["one/scan.avi"]["warnings"], "both rows name the other"
    assert facts["findings"]["near-duplicate"]["count"] == 1 and facts["notes"] == [], "a pair counts once; what is a finding is no note as well"
    assert float(by_path["static.avi"]["repeated_share"]) > 0.9 and by_path["one/scan.avi"]["frames"] == "40"


def test_inspect__many_equal_names_cost_no_more_each() -> None:
    files = [FileReport(f"{number}/scan.avi", "video", patient=f"P{number}") for number in range(20000)]
    media = {report.path: Media(report.path, "video", Path(report.path)) for report in files}
    inspect_module._check_names(files, media, Path())
    inspect_module._say_pairs("same-content", files, "")
    assert [finding.text for finding in files[1].findings] == [
        "as 0/scan.avi, 2/scan.avi, 3/scan.avi and 19996 more", "as 0/scan.avi, 2/scan.avi, 3/scan.avi and 19996 more",
        "P0 and P1 and P10: as 0/scan.avi, 2/scan.avi, 3/scan.avi and 19996 more",
    ]  # fmt: skip


def test_inspect__page_is_self_contained_and_escaped() -> None:
    root = odd_folder(Path("clips"))
    sample.write_clip(root / "<b>&amp;.avi", np.repeat(sample.speckle(1, 7), 20, axis=0))
    assert main(["inspect", "clips", "--out", "page"]) == 0
    page = Path("page/index.html").read_text(encoding="utf-8")
    assert "<b>&amp;.avi" not in page and "&lt;b&gt;&amp;amp;.avi" in page
    assert not re.search(r"<script|<link|(src|href)=\"(?!data:)|url\(", page) and "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") >= 3 and "Keep it where the videos are kept" in page


def test_inspect__nobody_of_a_dicom_header_is_named() -> None:
    sample_dicom.write(Path("clips/cine.dcm"), sample.speckle(12, 6))
    sample_dicom.write(Path("clips/other.dcm"), sample.speckle(12, 7))
    for path in Path("clips").iterdir():
        path.rename(path.with_name(path.name[0] + ".dcm"))
    assert main(["inspect", "clips"]) == 0
    for path in Path("inspection").iterdir():
        assert not [secret for secret in sample_dicom.SECRETS if secret in path.read_text(encoding="utf-8")], path
    rows = table()
    assert rows[0]["patient"] == rows[1]["patient"] != ""


def test_inspect__quick_reads_headers_only(capsys: pytest.CaptureFixture[str]) -> None:
    root = odd_folder(Path("clips"))
    sample.add_sound(root / "re-encoded.mp4")
    assert main(["inspect", "clips", "--quick", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["quick"] and {"audio", "unreadable", "same-content", "labels", "short"} <= set(facts["findings"])
    assert not {"static", "near-duplicate", "repeats"} & set(facts["findings"])


def test_inspect__empty_folder_and_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("clips").mkdir()
    assert main(["inspect", "clips"]) == 2 and "clips: no video, picture or DICOM file" in capsys.readouterr().err
    assert not Path("inspection").exists()
    assert main(["inspect", "nowhere"]) == 2 and "no such folder" in capsys.readouterr().err
    assert main(["inspect", "clips", "--labels", "lables.csv"]) == 2 and "lables.csv" in capsys.readouterr().err


def test_inspect__output_inside_the_folder_is_not_looked_at() -> None:
    sample.write_clip(Path("a.avi"), sample.speckle(12))
    for _ in range(2):
        inspection = inspect_folder(Path(), quick=True, ignore=Path("inspection"))
        assert main(["inspect", ".", "--quick"]) == 0
    assert [report.path for report in inspection.files] == ["a.avi"] and not inspection.others


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may open everything")
def test_inspect__locked_folder() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.speckle(12))
    locked = Path("clips/locked")
    locked.mkdir(mode=0o000)
    try:
        assert paths(inspect_folder(Path("clips"), quick=True))["locked"] == {"locked"}
    finally:
        locked.chmod(0o700)


class Deadly:
    """Stands for a file whose decoding kills the process."""

    def __fspath__(self) -> str:
        os._exit(3)

    def stat(self) -> os.stat_result:
        return os.stat(__file__)


def test_inspect__a_crashing_decoder_costs_its_file() -> None:
    good = sample.write_clip(Path("a.avi"), sample.speckle(12))
    tasks = [Look(Media("a.avi", "video", good), True), Look(Media("b.avi", "video", Deadly()), True)]  # type: ignore[arg-type]
    reports = {report.path: report for report in inspect_module._look_at_all(tasks, 2)}
    assert reports["a.avi"].readable and reports["b.avi"].findings[0].text == CRASHED
    assert list(run_isolated(inspect_file, [], 1, lambda task: FileReport("", ""))) == []


def test_inspect__numbered_stills_in_class_folders_are_a_warning() -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        path = Path("clips", ("benign", "malignant")[number % 2], f"{number // 2}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = cv2.GaussianBlur(rng.normal(size=(90, 120)).astype(np.float32), (0, 0), 4)
        cv2.imwrite(str(path), np.clip(120 + 400 * noise, 0, 255).astype(np.uint8))
    found = inspect_folder(Path("clips"))
    assert [(file.kind, file.label) for file in found.files] == [("image", "benign")] * 4 + [("image", "malignant")] * 4
    (said,) = (finding.text for finding in found.findings if finding.code == "numbered")
    assert "each taken as a still" in said and "warnings\n" in as_text(summary(found)) and said not in found.notes


@pytest.mark.parametrize("table", [False, True])
def test_inspect__one_recording_in_three_files_is_named_once(table: bool) -> None:
    """Class folders may be no classes at all, so that only a table's contradiction is an error."""
    frames = sample.speckle(40, 2, size=(160, 128))
    sample.write_clip(Path("clips/dicom/a.avi"), frames)
    sample.write_clip(Path("clips/dicom/b.mp4"), np.ascontiguousarray(frames[:, 4:124, 5:155]))
    sample.write_clip(Path("clips/video/c.mp4"), np.ascontiguousarray(frames[:, 2:126, 3:157]))
    shutil.copy("clips/dicom/a.avi", "clips/video/copy.avi")
    if table:
        rows = ("dicom/a.avi,x", "dicom/b.mp4,x", "video/c.mp4,y", "video/copy.avi,y")
        Path("clips/labels.csv").write_text("\n".join(["path,label", *rows]))
    facts = summary(inspect_folder(Path("clips")))["findings"]
    (said,) = facts["near-duplicate"]["found"]
    assert said["path"] == "dicom/a.avi" and said["what"].startswith("as dicom/b.mp4, video/c.mp4 (likeness at least ")
    words, severity = ("labels", "error") if table else ("folders", "warning")
    assert {code for code in facts if code.endswith(("-labels", "-folders"))} == {f"near-duplicate-{words}", f"same-content-{words}"}
    assert facts[f"near-duplicate-{words}"]["severity"] == facts[f"same-content-{words}"]["severity"] == severity


def test_inspect__of_an_unreadable_file_only_that_is_said() -> None:
    frames = np.zeros((2, 32, 40), np.uint8)
    sample_dicom.write(Path("clips/cine.dcm"), frames)
    data = Path("clips/cine.dcm").read_bytes()
    Path("clips/cine.dcm").write_bytes(data[: -frames.nbytes])
    (file,) = inspect_folder(Path("clips")).files
    assert [finding.code for finding in file.findings] == ["unreadable"]


def test_inspect__needs_no_torch_and_no_params() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.speckle(5))
    script = "import sys; from pipeline.cli import main; main(['inspect', 'clips']); print('torch' in sys.modules, 'pandas' in sys.modules)"
    project = Path(inspect_module.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(project)},
    )
    assert done.stdout.splitlines()[-1] == "False False", done.stdout


# --- shortcuts --------------------------------------------------------------------------------------------------------


def report(path: str, label: str, patient: str, width: int = 300, fps: float = 20.0, tint: float = 0.0) -> FileReport:
    return FileReport(path, "video", 1, Header("mp4", "h264", width, 300, fps), 50, label=label, patient=patient, tint=(tint, tint))


def test_shortcuts__told_with_numbers() -> None:
    files = [report(f"{i}.mpeg", "well", f"W{i % 3}") for i in range(8)]
    files += [report(f"{i}.mp4", ("well", "sick")[i % 2], f"P{i}") for i in range(12)]
    found = [finding.text for finding in shortcuts(files)]
    assert len(found) == 1 and found[0].startswith("extension alone tells") and "all 8 with .mpeg are well" in found[0]
    tinted = [report(f"{i}.mp4", ("well", "sick")[i % 2], f"P{i}", tint=12.0 * (i % 2)) for i in range(12)]
    assert shortcuts(tinted)[0].text.startswith("colour tint alone tells 100 % of the classes right (guessing: 50 %)")


def test_shortcuts__none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    files = [report(f"{i}.mp4", ("well", "sick")[i % 2], f"P{i}", width=300 + 2 * int(rng.integers(3))) for i in range(60)]
    assert shortcuts(files) == []
    assert shortcuts([report(f"{i}.mp4", "well", f"P{i}") for i in range(20)]) == [], "one class"
    one = [report(f"{i}.mov", "sick", "P") for i in range(8)] + [report(f"{i}.mp4", ("well", "sick")[i % 2], f"Q{i}") for i in range(20)]
    assert not any(".mov" in finding.text for finding in shortcuts(one)), "one patient's files are of one class anyway"


def test_text__says_for_how_many_files_the_patient_is_known() -> None:
    files = [report("a.mp4", "x", "P1"), report("b.mp4", "x", "P1"), report("c.mp4", "y", "")]
    assert as_text(summary(Inspection(Path("x"), False, files))).splitlines()[0].endswith("3 labelled, 1 patient (known for 2 of 3 files)")
    assert as_text(summary(Inspection(Path("x"), False, files[:2]))).splitlines()[0].endswith("2 labelled, 1 patient")


def test_text__of_a_clean_folder() -> None:
    assert as_text(summary(Inspection(Path("x"), False, [report("a.mp4", "", "")]))).endswith("nothing wrong was found")


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocus(shared: Path) -> dict[str, dict[str, str]]:
    """Code to path to text, for the real lung clips."""
    found: dict[str, dict[str, str]] = {}
    for path, finding in inspect_folder(shared / "data/pocus").all_findings():
        found.setdefault(finding.code, {})[path.rsplit("/", 1)[-1] or finding.text] = finding.text
    return found


def test_pocus__frames(pocus: dict[str, dict[str, str]]) -> None:
    assert pocus["cut"] == {"pneu-radiopaeda.mp4": "at frames 60, 180 of 223"}
    assert pocus["black-start"] == {"Reg_northumbria_0409_set3_vid2.avi": "frames 0 to 3 of 94"}
    assert pocus["black-inside"] == {"Pneu_northumbria_0409_set2_vid2.avi": "frames 15 to 17 of 93"}
    recorded = ("volpecelli", "lightbeam_mov6", "Cov-Atlas-suspectedCovid", "Cov-Atlas-pleural", "prospective", "combatting", "whitelung", "radiopaeda")
    assert all(any(part in name for part in recorded) for name in pocus["repeats"]) and len(pocus["repeats"]) == 18
    shares = {name: int(text.split()[0]) for name, text in pocus["repeats"].items()}
    assert min(shares.values()) in range(28, 30) and max(shares.values()) in range(62, 65)
    assert not {"static", "variable-rate", "black", "black-end", "unreadable", "size-changes"} & set(pocus)


def test_pocus__headers(pocus: dict[str, dict[str, str]]) -> None:
    ends = ("0409_set5_vid2", "1009_vid3", "1009_vid5", "1009_vid6", "1009_vid7")
    assert set(pocus["extension"]) == {f"Reg_northumbria_{end}.avi" for end in ends}
    assert len(pocus["aspect"]) == 5 and all("combatting" in name for name in pocus["aspect"])
    assert len(pocus["count"]) == 13 and all(name.endswith(".mpeg") for name in pocus["count"])
    assert (len(pocus["audio"]), len(pocus["odd-size"]), len(pocus["alpha"])) == (8, 18, 3)
    assert {"Cov_convex_volpecelli_sonographic_v1.mov", "Pneu_Basal-pneumonia-RUQ_crop.mp4"} <= set(pocus["tint"])


def test_pocus__copies_and_shortcuts(pocus: dict[str, dict[str, str]]) -> None:
    first, second = {"Pneu_Avi_Video_002.mp4", "Pneu_northumbria_1009_vid1.avi"}, {"Vir_prospective_file1.mp4", "Vir_or_Pneu_prospective_file4.mp4"}
    assert set(pocus["near-duplicate"]) == first | second and set(pocus["near-duplicate-labels"]) == second
    said = " ".join(pocus["shortcut"])
    assert "all 18 with .mpeg are regular" in said and "6 of 7 with .mov are covid" in said


def test_extra__real_files(shared: Path) -> None:
    found = paths(inspect_folder(shared / "data/extra", labels="none"))
    assert found["variable-rate"] == {"video/butterfly-ocular-phantom.mp4"} and found["static"] == {"video/sonosite-anon-eye1-video.mp4"}
    assert found["unreadable"] == {"dicom/emri_small_jpeg_2k_lossless_too_short.dcm"} and "tiny" not in found
    assert "dicom/gdcm-US-ALOKA-16.dcm" in found["regions"] & found["deep"]
    assert {"dicom/US1_J2KR.dcm", "dicom/examples_rgb_color.dcm"} <= found["near-duplicate"], "one picture in two encodings"


def test_missing_table__is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels.csv"):
        inspect_folder(tmp_path, labels="labels.csv")
