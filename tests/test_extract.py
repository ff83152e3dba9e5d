"""The extract stage: complete stores, quarantine, reuse after a kill, dying decoders, full disks, no names in files."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import sample_dicom
import sample_media as sample
from fuzz_extraction import Trial, full_disk
from scratch_project import make_project
from scratch_project import run as scratch_run
from pipeline.config import Config
from pipeline.data import extract as extract_module
from pipeline.data.extract import Extracted, Task, extract_one, extract_source, extraction_fingerprint
from pipeline.data.manifest import Manifest, pseudonym, read_hints
from pipeline.data.splitting import make_splits
from pipeline.data.store import FrameStore
from pipeline.data.video import Media, find_media
from pipeline.errors import ConfigError, DataError
from pipeline.files import hash_file
from pipeline.parameters import DataParams, ExtractParams, SourceParams


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the current one, so that scratch results go there."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**params: object) -> Config:
    extract = {"workers": 2, "short_side": 32, **params}
    return Config(data=DataParams(source="clips", pseudonym_key="k"), extract=ExtractParams(**extract))


def run(settings: Config, source: str = "main") -> dict[str, float]:
    return extract_source(source, settings, Path("frames"), Path("report"))


def clips(labels: bool = True) -> Path:
    """Two videos, one GIF, a frame folder and a still of three patients; one clip is unlabelled."""
    root = Path("clips")
    sample.write_video(root / "one" / "a b.mp4", 8, seed=1)
    sample.write_video(root / "two" / "a b.avi", 5, seed=2)
    sample.write_gif(root / "Größe+1.gif", 4)
    sample.write_frame_folder(root / "Video_1", 6)
    sample.write_image(root / "still.png", 3, seed=3)
    if labels:
        rows = "one/a b.mp4,sick,Anna", "two/a b.avi,well,Bert", "Video_1,sick,Anna", "still.png,well,Cleo"
        (root / "labels.csv").write_text("\n".join(["path,label,patient", *rows]), encoding="utf-8")
    return root


def store_bytes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path("frames").iterdir())}


def test_extract__complete_store(capsys: pytest.CaptureFixture[str]) -> None:
    clips()
    metrics = run(config())
    rows = {row.path: row for row in Manifest.read(Path("frames/manifest.csv")).rows}
    assert {path: (row.kind, row.frames) for path, row in rows.items()} == {
        "Größe+1.gif": ("video", 4), "Video_1": ("frames", 6), "one/a b.mp4": ("video", 8), "still.png": ("image", 1),
        "two/a b.avi": ("video", 5),
    }
    anna = pseudonym("Anna", "k")
    assert (rows["Video_1"].patient, rows["one/a b.mp4"].patient, rows["Größe+1.gif"].patient) == (anna, anna, "")
    assert (rows["still.png"].label, rows["Größe+1.gif"].label) == ("well", "")
    sized = rows["one/a b.mp4"]
    assert (sized.width, sized.stored_height, sized.stored_width) == (64, 32, 43)
    store = FrameStore(Path("frames"))
    assert [sample.number(store.frame(rows["two/a b.avi"].video, index)) for index in range(5)] == list(range(5))
    expected = {"rows": 5, "videos": 4, "images": 1, "frames": 24, "decoded": 24, "quarantined": 0, "labelled": 4}
    assert {key: metrics[key] for key in expected} == expected and metrics["patients"] == 3
    assert json.loads(Path("report/metrics.json").read_text()) == metrics
    assert Path("report/contact_sheet_1.png").stat().st_size > 1000
    names = {path.name for path in Path("frames").iterdir()}
    stored = {f"{row.video}{end}" for row in rows.values() for end in (".tar", ".idx.npy")}
    assert names == {"hints.json", "manifest.csv", "quarantine.csv", *stored}
    assert "1 of 5 files have no label" in capsys.readouterr().err


def test_extract__again_is_identical_and_decodes_nothing() -> None:
    clips()
    run(config())
    before = store_bytes()
    for path in Path("frames").iterdir():
        path.unlink()
    metrics = run(config(workers=1))
    assert store_bytes() == before
    assert (metrics["reused"], metrics["frames_per_second_processed"], metrics["decoded"]) == (5, 0.0, 24)


def test_extract__from_nothing_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clips()
    run(config())
    before = store_bytes()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
    assert run(config(workers=1))["reused"] == 0
    assert store_bytes() == before


def test_extract__one_more_video_is_the_only_work() -> None:
    root = clips()
    run(config())
    sample.write_video(root / "new.avi", 3, seed=9)
    (root / "still.png").unlink()
    (root / "labels.csv").unlink()
    metrics = run(config())
    assert (metrics["reused"], metrics["rows"]) == (4, 5)
    tars = {path.stem for path in Path("frames").glob("*.tar")}
    assert tars == {row.video for row in Manifest.read(Path("frames/manifest.csv")).rows}, "the removed still is gone"


def test_extract__other_parameters_do_not_reuse() -> None:
    clips()
    run(config())
    assert run(config(short_side=16))["reused"] == 0
    assert run(config(on_error="fail", max_pixels=10**6))["reused"] == 5, "these change no stored byte"


def test_extract__damaged_scratch_is_done_again() -> None:
    clips()
    run(config())
    before = store_bytes()
    scratch = Path(".scratch/extract") / extraction_fingerprint(config().extract)
    first, second, *_ = sorted(scratch.glob("*.tar"))
    first.unlink()
    first.write_bytes(b"short")
    second.with_suffix(".json").write_text("{")
    assert run(config())["reused"] == 3
    assert store_bytes() == before


def test_extract__table_rate_is_part_of_the_reuse() -> None:
    root = Path("clips")
    sample.write_frame_folder(root / "Video_1", 6)
    for fps, frames in (("4", 3), ("2", 6)):
        (root / "labels.csv").write_text(f"path,label,fps\nVideo_1,a,{fps}\n")
        metrics = run(config(frames_per_second=2))
        assert (metrics["frames"], metrics["reused"]) == (frames, 0)


def bad_clips() -> None:
    root = clips(labels=False)
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("no video\n" * 100)


def test_quarantine__listed_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    bad_clips()
    metrics = run(config())
    assert (metrics["rows"], metrics["quarantined"]) == (5, 2)
    with open("frames/quarantine.csv", encoding="utf-8", newline="") as handle:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(handle)}
    assert listed["empty.mp4"] == "the file is empty" and "not a video" in listed["text.mp4"] and len(listed) == 2
    assert "unreadable: text.mp4: not a video" in capsys.readouterr().err


def test_fail__names_all_after_writing_the_rest() -> None:
    bad_clips()
    with pytest.raises(DataError, match="2 of 7 files cannot be read") as caught:
        run(config(on_error="fail"))
    assert "empty.mp4: the file is empty" in str(caught.value) and "text.mp4: not a video" in str(caught.value)
    assert len(Manifest.read(Path("frames/manifest.csv")).rows) == 5


def test_nothing_readable__is_an_error_even_with_quarantine() -> None:
    Path("clips").mkdir()
    Path("clips/empty.mp4").touch()
    with pytest.raises(DataError, match="1 of 1 files cannot be read"):
        run(config())


def test_identical_content__one_row() -> None:
    root = Path("clips")
    sample.write_video(root / "x" / "same.avi", 4)
    (root / "y").mkdir()
    (root / "y" / "same.avi").write_bytes((root / "x" / "same.avi").read_bytes())
    (root / "t.csv").write_text("path,label,patient\nx/same.avi,a,1\ny/same.avi,b,2\n")
    metrics = run(config())
    (row,) = Manifest.read(Path("frames/manifest.csv")).rows
    assert (metrics["rows"], metrics["merged_copies"], row.path, row.label) == (1, 1, "x/same.avi", "")
    assert "same content under two patients" in row.warnings
    assert row.patient == min(pseudonym("1", "k"), pseudonym("2", "k"))


def test_names__stay_out_of_file_names_and_metrics() -> None:
    clips()
    run(config())
    written = [str(path) for folder in ("frames", "report", ".scratch") for path in Path(folder).rglob("*")]
    for text in (*written, Path("report/metrics.json").read_text()):
        assert not any(name in text for name in ("a b", "Anna", "Größe", "still", "Video_1"))
    assert "Anna" not in Path("frames/manifest.csv").read_text(encoding="utf-8")


def test_source__extra_and_unknown() -> None:
    clips()
    data = DataParams(source="gone", extra_sources={"more": SourceParams(path="clips")})
    settings = config().model_copy(update={"data": data})
    assert run(settings, "more")["rows"] == 5
    assert {row.source for row in Manifest.read(Path("frames/manifest.csv")).rows} == {"more"}
    with pytest.raises(ConfigError, match="source 'mor': unknown. Allowed: main, more"):
        run(settings, "mor")


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk is full .*finished videos are kept"), (errno.EACCES, "cannot be written")],
)
def test_write_failure__is_fatal_and_clear(monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    clips()

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(extract_module, "write_video", full)
    (media, *_) = find_media(Path("clips")).media
    result = extract_one(Task(media, ExtractParams(), None, Path(".")))
    assert result.reason == ""
    monkeypatch.setattr(extract_module, "_run_tasks", lambda tasks, workers: iter([result]))
    with pytest.raises(DataError, match=message):
        run(config())


def test_full_disk__while_filling_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    clips()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(extract_module.os, "link", full)
    with pytest.raises(DataError, match="frames: the disk is full"):
        run(config())
    assert not Path("frames/manifest.csv").exists(), "half a store must not look whole"


def test_tell__counts_warnings_by_kind_in_plain_words(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("decoded 8 frames where the header claims 9; colour Doppler", "decoded 5 frames where the header claims 7", "colour Doppler", "")
    extract_module._tell([], [], [SimpleNamespace(warnings=text) for text in texts], Path("frames/manifest.csv"))
    assert capsys.readouterr().err.splitlines() == [
        "warning: 2 of 4 files: decoded 8 frames where the header claims 9 (the first of them; the others with other numbers); see frames/manifest.csv",
        "warning: 2 of 4 files: colour Doppler; see frames/manifest.csv",
    ]


def warned(text: str) -> list[str]:
    """The warnings that stand apart, whole."""
    lines = text.splitlines()
    found = [place for place, line in enumerate(lines) if line.startswith("WARNING: ")]
    assert all(lines[place - 1] == lines[place + 1] == "" for place in found)
    return [lines[place] for place in found]


def test_label_column__unknown_is_said_before_anything_is_decoded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = clips(labels=False)
    (root / "labels.csv").write_text("path,befund,patient\none/a b.mp4,sick,Anna\n")
    before = []
    extract_all = extract_module._extract_all
    monkeypatch.setattr(extract_module, "_extract_all", lambda *given: before.append(capsys.readouterr().err) or extract_all(*given))
    run(config())
    (said,) = warned(before[0])
    assert "labels.csv: no column is taken for the label (columns found: path, befund, patient)" in said and "all videos stay unlabelled" in said
    assert said.endswith("If befund is the label: -S data.label_column=befund")
    hints = read_hints(Path("frames"))
    assert hints["label"] in said
    with pytest.raises(DataError, match=r"no video of clips has a label.*found: path, befund, patient.*-S data.label_column=befund\. Check data.labels"):
        make_splits(Manifest.read(Path("frames/manifest.csv")), config(), hints=hints)


def test_patient_column__unknown_is_said_before_anything_is_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    root = clips()
    table = root / "labels.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("patient", "person"), encoding="utf-8")
    run(config())
    (said,) = warned(capsys.readouterr().err)
    assert "4 of 4 labelled files have no patient" in said and "(columns found: path, label, person)" in said
    assert said.endswith("If person is the patient: -S data.patient_column=person")
    assert run(config()) and "patient" in read_hints(Path("frames"))
    capsys.readouterr()
    table.write_text(table.read_text(encoding="utf-8").replace("person", "patient"), encoding="utf-8")
    run(config())
    assert not warned(capsys.readouterr().err) and read_hints(Path("frames")) == {}


def test_patients__of_dicom_headers_need_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    sample_dicom.write(Path("clips/cine.dcm"), np.zeros((4, 32, 40), np.uint8))
    Path("clips/labels.csv").write_text("path,label\ncine.dcm,sick\n")
    run(config())
    assert not warned(capsys.readouterr().err)


def test_place__copies_across_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    clips()
    run(config())
    before = store_bytes()

    def other_device(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(extract_module.os, "link", other_device)
    run(config())
    assert store_bytes() == before
    assert all(path.stat().st_nlink == 1 for path in Path("frames").glob("*.tar"))


class Deadly:
    """Stands for a file whose decoding kills the process."""

    def __fspath__(self) -> str:
        os._exit(3)

    def stat(self) -> os.stat_result:
        return os.stat(__file__)


def test_dying_decoder__only_its_file_is_lost(tmp_path: Path) -> None:
    clips()
    media = find_media(Path("clips")).media
    bad = Media("bad.mp4", "video", Deadly())  # type: ignore[arg-type]
    tasks = [Task(item, ExtractParams(), None, tmp_path) for item in (media[0], bad, *media[1:])]
    results: dict[str, Extracted] = {result.path: result for result in extract_module._run_tasks(tasks, 2)}
    assert len(results) == 6
    assert [path for path, result in results.items() if result.reason] == ["bad.mp4"]
    assert "ended the decoding process" in results["bad.mp4"].reason


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Twelve videos and their undisturbed store."""
    return Trial(tmp_path_factory.mktemp("trial"))


def test_kill__again_and_again_costs_the_videos_in_flight_at_most(trial: Trial, tmp_path: Path) -> None:
    """SIGKILL at five moments of one extraction: all that is visible is whole, and the last run gives the undisturbed bytes."""
    left = 0
    for more, delay in ((0, 0.3), (1, 0.0), (2, 0.01), (3, 0.0), (3, 0.02)):
        left = trial.kill(tmp_path / "project", left + more, delay)
    trial.heal(tmp_path / "project")


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_full_disk__one_clear_error_and_the_next_run_goes_on(trial: Trial, tmp_path: Path, share: float) -> None:
    """A file system that is really full, at several stages of the work."""
    whole = sum(len(data) for data in trial.expected.values()) // 1024
    said = full_disk(trial, tmp_path / "disk", int(share * whole))
    if said is None:
        pytest.skip("needs the right to mount a tmpfs")
    assert said, "the disk was to be too small"


def test_repro__one_more_video_changes_its_own_files_only(tmp_path: Path) -> None:
    """Of the store, `dvc repro` changes the new video's files and the manifest, nothing else."""
    root = clips()
    (root / "labels.csv").unlink()
    project = make_project(tmp_path / "project", {"data.source": str(root.resolve()), "extract.workers": 1, "tracking.enabled": False})
    scratch_run(project, "dvc", "init", "--quiet", check=False)
    listings = []
    for _ in range(2):
        scratch_run(project, "dvc", "repro", "extract")
        listings.append({path.name: hash_file(path) for path in (project / "data/frames/main").iterdir()})
        sample.write_video(root / "new.avi", 3, seed=9)
    before, after = listings
    video = next(row.video for row in Manifest.read(project / "data/frames/main/manifest.csv").rows if row.path == "new.avi")
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith(video)} == {"manifest.csv"} and f"{video}.tar" in changed
