"""Masks end to end: no text in any stored frame, decisions by parameters and by a person, reuse, sheets, bounded memory."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import sample_dicom
import sample_scan as sample

from pipeline.config import Config
from pipeline.data import masking
from pipeline.data.extract import extract_source, extraction_fingerprint
from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.masking import Decision, Masker, is_doppler, read_review
from pipeline.data.recipes.catalog import recipe
from pipeline.data.recipes.prepare import prepare
from pipeline.data.store import FrameStore
from pipeline.data.video import MediaReader, find_media
from pipeline.errors import ConfigError, DataError
from pipeline.files import shield, unshield
from pipeline.parameters import DataParams, ExtractParams, MaskParams

LEVEL = 24
"""Grey levels a stored pixel may show outside the mask: JPEG rings around the picture's edge. Letters have 200 and more."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the current one, so that scratch results go there."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(mask: dict[str, object] | None = None, **extract: object) -> Config:
    params = {"workers": 1, "short_side": 256, "mask": {"mode": "sector", **(mask or {})}, **extract}
    return Config(data=DataParams(source="clips", pseudonym_key="k", labels="none"), extract=ExtractParams(**params))


def run(settings: Config) -> dict[str, float]:
    return extract_source("main", settings, Path("frames"), Path("report"))


def rows() -> dict[str, VideoRow]:
    return {row.path: row for row in Manifest.read(Path("frames/manifest.csv")).rows}


def table(name: str) -> list[dict[str, str]]:
    with open(Path("report") / name, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read(name: str) -> MediaReader:
    (media,) = (item for item in find_media(Path("clips")).media if item.path == name)
    return MediaReader(media, config().extract)


def at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 0


@pytest.mark.parametrize("geometry", sample.GEOMETRIES)
@pytest.mark.parametrize(("color", "max_frames"), [("gray", None), ("rgb", 7)])
def test_stored_frames__hold_no_text_and_the_whole_area(geometry: str, color: str, max_frames: int | None) -> None:
    clip = sample.scan(geometry, (480, 360), frames=30, seed=5)
    sample.write_clip(Path("clips/a.avi"), clip.frames)
    run(config(color=color, max_frames=max_frames))
    store = FrameStore(Path("frames"))
    row = rows()["a.avi"]
    mask = store.mask(row.video)
    assert mask is not None and (row.stored_width, row.stored_height) == (341, 256)
    assert row.mask == geometry and (row.mask_confidence or 0) > 0.92 and abs((row.mask_share or 0) - mask.mean()) < 1e-3
    size = (row.stored_width, row.stored_height)
    written, sector = at(clip.written, size), cv2.resize(clip.sector.astype(np.uint8), size, interpolation=cv2.INTER_AREA) > 0
    assert not (mask & written & ~sector).any()
    assert (mask & sector).sum() >= 0.97 * sector.sum()
    assert row.frames == (30 if max_frames is None else 7)
    for index in range(row.frames):
        frame = store.frame(row.video, index)
        assert frame.max(axis=2 if frame.ndim == 3 else None, initial=0).max() > 60
        assert frame[written & ~at(sector, size)].max() <= LEVEL, f"frame {index}"


def test_mode_none__stores_what_was_stored_before() -> None:
    clip = sample.scan("convex", frames=8)
    sample.write_clip(Path("clips/a.avi"), clip.frames)
    metrics = run(config({"mode": "none"}))
    row = rows()["a.avi"]
    assert (row.mask, row.mask_confidence, row.mask_share) == ("", None, None)
    assert FrameStore(Path("frames")).mask(row.video) is None
    assert not list(Path("report").glob("masks*")) and not any(name.startswith("masks") for name in metrics)
    assert FrameStore(Path("frames")).frame(row.video, 0)[at(clip.written, (row.stored_width, row.stored_height))].max() > 150


def test_reuse__keeps_masks_and_reports() -> None:
    for seed, geometry in enumerate(sample.GEOMETRIES):
        sample.write_clip(Path(f"clips/{geometry}.avi"), sample.scan(geometry, frames=8, seed=seed).frames)
    assert run(config())["masks_convex"] == 1
    before = {path.name: path.read_bytes() for path in (*Path("frames").iterdir(), *Path("report").glob("masks*"))}
    for path in Path("frames").iterdir():
        path.unlink()
    metrics = run(config())
    assert (metrics["reused"], metrics["masks_convex"], metrics["masks_linear"], metrics["masks_review"]) == (3, 1, 1, 0)
    after = {path.name: path.read_bytes() for path in (*Path("frames").iterdir(), *Path("report").glob("masks*"))}
    assert after == before and sum(name.endswith(".mask.png") for name in after) == 3
    for path in Path(".scratch").rglob("*.mask.png"):
        path.unlink()
    assert run(config())["reused"] == 0, "a lost mask is found again"
    assert run(config({"min_confidence": 0.5}))["reused"] == 0


def test_turned_off__removes_masks_of_earlier_runs() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.scan(frames=8).frames)
    run(config())
    run(config({"mode": "none"}))
    assert not list(Path("frames").glob("*.mask.png")) and not list(Path("report").glob("masks*"))
    assert not Path("report/review.csv").exists()


def test_fingerprint__masks_count_only_when_they_are_on() -> None:
    params = config({"mode": "none"}).extract
    assert extraction_fingerprint(params) == extraction_fingerprint(config({"mode": "none", "dual": "left"}).extract)
    on = config().extract
    assert len({extraction_fingerprint(item) for item in (params, on, config({"crop": True}).extract)}) == 3
    assert extraction_fingerprint(on) == extraction_fingerprint(config({"review": "r.csv"}).extract), "it counts for each video"


@pytest.mark.parametrize(("policy", "share"), [("wide", 0.9), ("mask", 0.9), ("keep", 1.0)])
def test_low_confidence__as_the_parameters_say(policy: str, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    clip = sample.scan("convex")
    cv2.imwrite(str(Path("clips").mkdir() or "clips/still.png"), clip.frames[0])
    metrics = run(config({"low_confidence": policy}))
    row = rows()["still.png"]
    assert metrics["masks_review"] == 1
    assert (row.mask_share == 1.0) == (policy == "keep") and (row.mask_share or 0) <= share
    assert row.mask == ("kept" if policy == "keep" else "convex")
    assert "mask: low confidence" in row.warnings and "mask: low confidence" in capsys.readouterr().err
    (listed,) = table("review.csv")
    assert (listed["video"], listed["decision"], listed["sheet"]) == (row.video, "", "masks_1.png")
    assert "brightness" in listed["reasons"]
    if policy == "wide":
        frame = FrameStore(Path("frames")).frame(row.video, 0)
        assert frame[:20, :60].max() <= LEVEL, "the name at the corner is gone"


def test_low_confidence__exclude_goes_to_quarantine() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.scan(frames=8).frames)
    (Path("clips") / "b.png").write_bytes(cv2.imencode(".png", sample.scan().frames[0])[1].tobytes())
    metrics = run(config({"low_confidence": "exclude"}))
    assert (metrics["rows"], metrics["quarantined"]) == (1, 1)
    assert "no sure mask" in Path("frames/quarantine.csv").read_text()


def test_still__surely_masked_is_not_on_the_review_list() -> None:
    """A still's confidence ends at 0.75, so it has a threshold of its own; 1 lists all of them."""
    Path("clips").mkdir()
    cv2.imwrite("clips/a.png", sample.scan("convex", seed=1).frames[0])
    run(config({"min_confidence_still": 0.5}))
    assert table("review.csv") == [] and (table("masks.csv")[0]["action"], rows()["a.png"].warnings) == ("masked", "")
    run(config({"min_confidence_still": 1.0}))
    assert [row["action"] for row in table("review.csv")] == ["wide"] and "mask: low confidence" in rows()["a.png"].warnings


def test_nothing_found__keeps_everything() -> None:
    sample.write_clip(Path("clips/black.avi"), np.zeros((8, 120, 160), np.uint8))
    run(config())
    assert (rows()["black.avi"].mask, rows()["black.avi"].mask_share) == ("kept", 1.0)
    assert table("masks.csv")[0]["review"] == "1"


@pytest.mark.parametrize("dual", ["keep", "larger", "left", "right", "exclude"])
def test_dual__as_the_parameters_say(dual: str) -> None:
    clip = sample.side_by_side("convex")
    sample.write_clip(Path("clips/a.avi"), clip.frames)
    sample.write_clip(Path("clips/one.avi"), sample.scan(frames=6).frames)
    metrics = run(config({"dual": dual}))
    if dual == "exclude":
        assert metrics["quarantined"] == 1 and "side by side" in Path("frames/quarantine.csv").read_text()
        return
    row = rows()["a.avi"]
    mask = FrameStore(Path("frames")).mask(row.video)
    assert mask is not None and metrics["masks_dual"] == 1 and "two pictures side by side" in row.warnings
    half = mask.shape[1] // 2
    both = (bool(mask[:, :half].any()), bool(mask[:, half:].any()))
    assert both == {"keep": (True, True), "left": (True, False), "right": (False, True)}.get(dual, both) and any(both)


@pytest.mark.parametrize(("color", "doppler"), [("gray", "keep"), ("rgb", "keep"), ("gray", "exclude")])
def test_doppler__is_found_and_treated_as_the_parameters_say(color: str, doppler: str) -> None:
    sample.write_clip(Path("clips/flow.avi"), sample.with_doppler(sample.scan("linear", frames=40)).frames)
    sample.write_clip(Path("clips/grey.avi"), sample.scan("linear", frames=40, seed=2).frames)
    metrics = run(config({"doppler": doppler}, color=color))
    if doppler == "exclude":
        assert [row["path"] for row in csv.DictReader(open("frames/quarantine.csv", encoding="utf-8"))] == ["flow.avi"]
    else:
        assert metrics["masks_doppler"] == 1 and "colour Doppler" in rows()["flow.avi"].warnings


@pytest.mark.parametrize(("kind", "action"), [(2, "exclude"), (2, "keep"), (1, "exclude")])
def test_doppler__that_a_dicom_region_names(kind: int, action: str) -> None:
    """The flow may be too small to be seen."""
    clip = sample.scan("linear", frames=20)
    regions = sample_dicom.region(0, 0, clip.frames.shape[2] - 1, clip.frames.shape[1] - 1, data=kind)
    path = sample_dicom.write(Path("clips/a.dcm"), clip.frames, SequenceOfUltrasoundRegions=regions)
    (media,) = (item for item in find_media(path.parent).media if item.path == path.name)
    reader = MediaReader(media, config({"doppler": action}).extract)
    if kind == 2 and action == "exclude":
        with pytest.raises(DataError, match="a.dcm: colour Doppler"):
            list(reader.jpegs())
        return
    list(reader.jpegs())
    assert reader.masker is not None and reader.masker.report.doppler == (kind == 2)
    assert ("colour Doppler" in reader.facts.warnings) == (kind == 2)


@pytest.mark.parametrize("doppler", ["keep", "exclude"])
def test_doppler__that_begins_late_in_a_long_clip(doppler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first frames wait for the mask; colour is looked for in all of them, in bounded memory."""
    clip = sample.scan("linear", frames=600)
    grey = np.repeat(clip.frames[..., None], 3, axis=3)
    grey[440:480] = sample.with_doppler(clip).frames[440:480]
    sample.write_clip(Path("clips/late.avi"), grey)
    sample.write_clip(Path("clips/none.avi"), np.delete(grey, slice(440, 480), axis=0))
    monkeypatch.setattr(masking, "MEMORY", 20 * clip.frames[0].nbytes)
    reader = read("none.avi")
    assert len(list(reader.jpegs())) == 560 and reader.masker is not None and not reader.masker.report.doppler
    assert len(reader.masker._colours) <= 24
    (media,) = (item for item in find_media(Path("clips")).media if item.path == "late.avi")
    reader = MediaReader(media, config({"doppler": doppler}).extract)
    if doppler == "exclude":
        with pytest.raises(DataError, match="late.avi: colour Doppler"):
            list(reader.jpegs())
        return
    assert len(list(reader.jpegs())) == 600 and reader.masker is not None
    assert reader.masker.report.doppler and reader.masker.report.review and "colour Doppler" in reader.facts.warnings


def test_is_doppler__not_tints_logos_or_colour_pictures() -> None:
    clip = sample.scan("convex", frames=10)
    grey = np.repeat(clip.frames[..., None], 3, axis=3)
    sepia = np.clip(grey * np.array([0.7, 1.0, 1.25]), 0, 255).astype(np.uint8)
    logo = grey.copy()
    logo[:, 120:140, 180:200] = (200, 60, 20)
    endoscopy = np.clip(grey * np.array([0.3, 0.5, 1.6]), 0, 255).astype(np.uint8)
    for pictures in (grey, sepia, logo, endoscopy):
        assert not is_doppler(pictures, clip.sector)
    flow = sample.with_doppler(clip).frames
    assert is_doppler(flow, clip.sector) and is_doppler(flow[:1], clip.sector), "also on a still"
    assert not is_doppler(flow, np.zeros_like(clip.sector))


def test_crop__stores_the_box_of_the_mask() -> None:
    clip = sample.scan("linear", frames=8)
    sample.write_clip(Path("clips/a.avi"), clip.frames)
    run(config({"crop": True}))
    row = rows()["a.avi"]
    store = FrameStore(Path("frames"))
    frame, mask = store.frame(row.video, 3), store.mask(row.video)
    assert mask is not None and frame.shape == mask.shape == (row.stored_height, row.stored_width)
    assert mask.all(0).any() and mask.any(0).all() and mask.any(1).all()
    assert (row.width, row.height) == (400, 300) and row.stored_width < 0.7 * 341


def test_review__a_person_decides(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("accept", "keep", "exclude", "box", "open")
    Path("clips").mkdir()
    for seed, name in enumerate(names):
        cv2.imwrite(f"clips/{name}.png", sample.scan("convex", seed=seed).frames[0])
    run(config())
    ids = {path: row.video for path, row in rows().items()}
    lines = ["video,path,decision,x0,y0,x1,y1", f"{ids['accept.png']},,accept,,,,", ",keep.png,Keep,,,,", ",exclude.png,exclude,,,,"]
    lines += [",box.png,box,100,50,300,250", f"{ids['open.png']},,,,,,"]
    Path("decided.csv").write_text("\n".join(lines))
    metrics = run(config({"review": "decided.csv"}))
    found = rows()
    assert metrics["reused"] == 1, "only the video without a decision"
    assert set(found) == {"accept.png", "keep.png", "box.png", "open.png"}
    assert "left out by extract.mask.review" in Path("frames/quarantine.csv").read_text()
    assert (found["keep.png"].mask, found["box.png"].mask) == ("kept", "box")
    mask = FrameStore(Path("frames")).mask(found["box.png"].video)
    assert mask is not None and np.allclose(cv2.boundingRect(mask.astype(np.uint8)), np.array([100, 50, 200, 200]) * 256 / 300, atol=1)
    assert [row["video"] for row in table("review.csv")] == [ids["open.png"]]
    assert (found["accept.png"].mask_share or 1) < (found["open.png"].mask_share or 0) + 1e-9
    assert run(config({"review": "decided.csv"}))["reused"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,verdict\na,keep\n", "found columns path, verdict"),
        ("path,decision\na,maybe\n", "row 2: decision 'maybe' for a; allowed"),
        ("path,decision,x0,y0,x1,y1\na,box,1,2,x,4\n", "row 2: a box needs whole numbers"),
        ("path,decision,x0,y0,x1,y1\na,box,5,2,1,4\n", "row 2: the box .* is empty"),
        ("path,decision\n,keep\n", "row 2: decision 'keep' for nothing"),
    ],
)
def test_read_review__names_the_row(text: str, message: str) -> None:
    Path("r.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_review(Path("r.csv"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_review(Path("absent.csv"))


def test_tables__no_cell_is_a_formula_and_every_name_comes_back() -> None:
    """Hostile names through all tables that people open: recipe, manifest, masks, review list filled in, quarantine."""
    for seed, name in enumerate(("@well", "=SUM(A1)", "'=SUM(A1)", "'-y", "-x", "+z")):
        Path("clips", name).mkdir(parents=True)
        cv2.imwrite(f"clips/{name}/a.png", sample.scan("convex", seed=seed).frames[0])
    Path("clips/@well/=bad.png").write_bytes(b"no picture")
    paths = {media.path for media in find_media(Path("clips")).media}
    labels = {path: path.split("/")[0] for path in paths}
    settings = prepare(recipe("folder"), recipe("folder").scan(Path("clips")), Path("out")).settings
    data = DataParams(source="clips", labels=settings["data.labels"], include=settings["data.include"], pseudonym_key="k")

    def extracted(**mask: object) -> dict[str, VideoRow]:
        run(Config(data=data, extract=ExtractParams(workers=1, short_side=256, mask=MaskParams(mode="sector", **mask))))
        return rows()

    found = extracted(min_confidence=1.0)
    assert {path: row.label for path, row in found.items()} == {path: labels[path] for path in paths - {"@well/=bad.png"}}
    tables = [Path("out/labels.csv"), *Path("frames").glob("*.csv"), *Path("report").glob("*.csv")]
    assert len(tables) >= 5 and all(path.stat().st_size for path in tables)
    cells = [cell for path in tables for cells in csv.reader(path.open(encoding="utf-8", newline="")) for cell in cells]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r") and cell]
    listed = [unshield(row["path"]) for row in table("review.csv")]
    assert set(listed) == set(found)
    decided = [{**row, "decision": "keep", "video": ""} for row in table("review.csv")]
    with open("decided.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(decided[0]))
        writer.writeheader()
        writer.writerows(decided)
    assert {row.mask for row in extracted(min_confidence=1.0, review="decided.csv").values()} == {"kept"}


@pytest.mark.parametrize("text", ["=1", "-a.avi", "'=1", "''@x", "'plain", "plain", "", "\tx", "'", "a=1", "'\r"])
def test_shield__gives_every_text_back_and_no_formula(text: str) -> None:
    assert unshield(shield(text)) == text
    assert not shield(text).startswith(("=", "+", "-", "@", "\t", "\r"))


def test_review__rows_that_match_no_file_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("clips").mkdir()
    for seed in range(2):
        cv2.imwrite(f"clips/{seed}.png", sample.scan("convex", seed=seed).frames[0])
    Path("r.csv").write_text("video,path,decision\n,0.png,keep\n,old/1.png,keep\nffffffffffffffff,0.png,keep\n0123456789abcdef,,accept\n,gone.png,\n")
    run(config({"review": "r.csv"}))
    told = capsys.readouterr().err
    assert "extract.mask.review: 2 rows match no file: row 3 (old/1.png), row 5 (0123456789abcdef)\n" in told
    assert "1 of 2 videos have a doubtful mask; text may remain beside the picture: look at report/masks_1.png and decide in report/review.csv" in told
    Path("r.csv").write_text("path,decision\n0.png,keep\n1.png,keep\n")
    run(config({"review": "r.csv"}))
    told = capsys.readouterr().err
    assert "no file" not in told and "doubtful" not in told


def test_memory__long_videos_are_masked_from_their_first_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = sample.scan("convex", (320, 240), frames=60)
    sample.write_clip(Path("clips/a.avi"), clip.frames)
    monkeypatch.setattr(masking, "MEMORY", 10 * 320 * 240)
    waits = []
    decide = Masker.decide
    monkeypatch.setattr(Masker, "decide", lambda self, frames, size: (waits.append(len(frames)), decide(self, frames, size))[1])
    reader = read("a.avi")
    frames = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE) for jpeg in reader.jpegs()]
    assert waits == [10] and reader.facts.frames == len(frames) == 60
    assert all(frame[clip.written].max() <= LEVEL for frame in frames)


@pytest.mark.parametrize("memory", [10 * 320 * 240, 1 << 30])
def test_depth_change__a_picture_that_outgrows_its_mask_is_told(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (sample.scan("convex", (320, 240), frames=count, zoom=zoom, overlays=("text",)) for count, zoom in ((60, 0.55), (60, 1.0)))
    sample.write_clip(Path("clips/a.avi"), np.concatenate([small.frames, large.frames]))
    sample.write_clip(Path("clips/b.avi"), np.concatenate([large.frames, large.frames]))
    monkeypatch.setattr(masking, "MEMORY", memory)
    readers = [read(name) for name in ("a.avi", "b.avi")]
    warned = []
    for reader in readers:
        assert sum(1 for _ in reader.jpegs()) == 120
        warned.append(any("reaches beyond" in text for text in reader.facts.warnings))
    masker = readers[0].masker
    assert masker is not None and masker.mask is not None
    kept = ((masker.mask > 0) & large.sector).sum() / large.sector.sum()
    if memory > 1 << 20:
        assert kept > 0.97 and warned == [False, False], "all frames count"
    else:
        assert kept < 0.8 and warned == [True, False]
        assert masker.report.review and "beyond the mask" in masker.report.reasons[-1]


def test_dicom__regions_of_the_header_are_used() -> None:
    clip = sample.scan("linear", (320, 240), frames=10, overlays=("text", "bar"))
    y, x = (np.flatnonzero(clip.sector.any(axis)) for axis in (1, 0))
    region = sample_dicom.region(int(x[0]), int(y[0]), int(x[-1]), int(y[-1]))
    sample_dicom.write(Path("clips/a.dcm"), clip.frames, SequenceOfUltrasoundRegions=region)
    run(config())
    row = rows()["a.dcm"]
    frame = FrameStore(Path("frames")).frame(row.video, 5)
    assert row.mask == "linear" and frame[clip.written].max() <= LEVEL


def test_sheets__show_the_least_sure_first() -> None:
    Path("clips").mkdir()
    sample.write_clip(Path("clips/a.avi"), sample.scan(frames=8).frames)
    cv2.imwrite("clips/z.png", sample.scan().frames[0])
    run(config())
    listed = table("masks.csv")
    assert [row["review"] for row in listed] == ["1", "0"]
    sheet = cv2.imread("report/masks_1.png")
    assert sheet is not None and (sheet == (0, 255, 0)).all(2).any(), "an outline"
    assert [row["path"] for row in table("review.csv")] == ["z.png"], "a person has to find the file"
    assert "z.png" not in Path("report/masks.csv").read_text()
    previews = list(Path(".scratch").rglob("*.preview.png"))
    assert len(previews) == 2 and not any(path.stat().st_mode & 0o077 for path in previews), "they show what is written there"


def test_store_mask__damaged_is_named() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.scan(frames=8).frames)
    run(config())
    row = rows()["a.avi"]
    path = Path("frames") / f"{row.video}.mask.png"
    path.unlink()
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="missing, damaged or of another size"):
        FrameStore(Path("frames")).mask(row.video)


def test_manifest__of_an_older_version_says_what_to_do() -> None:
    sample.write_clip(Path("clips/a.avi"), sample.scan(frames=8).frames)
    run(config())
    lines = Path("frames/manifest.csv").read_text().splitlines()
    Path("old.csv").write_text("\n".join(line.rsplit(",", 3)[0] for line in lines))
    with pytest.raises(DataError, match=r"columns missing: mask, mask_confidence, mask_share.*extract stage again"):
        Manifest.read(Path("old.csv"))


def test_decision__excludes_before_anything_is_stored() -> None:
    masker = Masker(MaskParams(mode="sector"), "a", decision=Decision("box", (900, 900, 950, 950)))
    with pytest.raises(DataError, match="lies outside the picture"):
        masker.decide(list(sample.scan(frames=6).frames), (400, 300))


@pytest.mark.parametrize(("name", "panes", "doppler"), [("gdcm-US-ALOKA-16.dcm", 2, False), ("US1_J2KR.dcm", 1, True)])
def test_real_dicom__panes_and_doppler(shared: Path, name: str, panes: int, doppler: bool) -> None:
    path = shared / "data/extra/dicom" / name
    media = [item for item in find_media(path.parent).media if item.path == name]
    reader = MediaReader(media[0], ExtractParams(mask=MaskParams(mode="sector")))
    list(reader.jpegs())
    assert reader.masker is not None
    assert (reader.masker.report.panes, reader.masker.report.doppler) == (panes, doppler)
    assert reader.masker.report.review
