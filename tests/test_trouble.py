"""Each trouble is found where it was planted, with its numbers, and clips without trouble raise nothing."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

import sample_dicom
import sample_trouble as sample
from pipeline.data.inspect import FileReport, Look, inspect_file
from pipeline.data.probe import container_of
from pipeline.data.sniffing import sniff
from pipeline.data.trouble import KINDS, SEVERITIES, FrameWatch, check_cuts, check_frames, check_times, detail, tint, turn
from pipeline.data.video import Media, MediaReader
from pipeline.parameters import ExtractParams


def look(path: Path, quick: bool = False) -> FileReport:
    return inspect_file(Look(Media(path.name, sniff(path), path), quick))


def codes(path: Path, quick: bool = False) -> dict[str, str]:
    return {finding.code: finding.text for finding in look(path, quick).findings}


def seen(frames: np.ndarray) -> dict[str, str]:
    watch = FrameWatch()
    for frame in frames:
        watch.see(frame)
    return {finding.code: finding.text for finding in watch.findings()}


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_clean__raises_nothing(tmp_path: Path, seed: int, name: str) -> None:
    assert codes(sample.write_clip(tmp_path / name, sample.speckle(40, seed))) == {}


def test_static__one_picture_with_codec_noise(tmp_path: Path) -> None:
    still = np.repeat(sample.speckle(1), 30, axis=0)
    assert "all 30 frames" in codes(sample.write_clip(tmp_path / "a.mp4", still))["static"]
    noisy = np.clip(still + np.random.default_rng(0).choice([-1, 0, 1], still.shape, p=[0.1, 0.8, 0.1]), 0, 255).astype(np.uint8)
    assert set(seen(noisy)) == {"static"}


def test_repeats__share_and_number_of_pictures() -> None:
    frames = np.repeat(sample.speckle(20), 3, axis=0)
    assert seen(frames) == {"repeats": "68 % of neighbours are almost equal: 20 different pictures in 60 frames"}
    few = np.concatenate([sample.speckle(36), np.repeat(sample.speckle(1, 5), 5, axis=0)])
    assert "repeats" not in seen(few), "4 of 40 neighbours"


@pytest.mark.parametrize(("dark", "code"), [(slice(0, 4), "black-start"), (slice(15, 18), "black-inside"), (slice(36, 40), "black-end")])
def test_black__where_it_stands(dark: slice, code: str) -> None:
    frames = sample.speckle(40)
    frames[dark] = 1
    frames[dark, :6, :6] = 200  # a logo stays
    assert seen(frames) == {code: f"frames {dark.start} to {dark.stop - 1} of 40"}


def test_black__whole_clip_and_dim_clips() -> None:
    assert set(seen(np.zeros((10, 64, 64), np.uint8))) == {"black"}
    dim = (sample.speckle(30) // 24).astype(np.uint8)
    assert 1 < dim.mean() < 3.5
    assert not {code for code in seen(dim) if code.startswith("black")}, "a dim clip is not black"


def test_cuts__between_two_recordings(tmp_path: Path) -> None:
    frames = np.concatenate([sample.speckle(25, 1), sample.speckle(25, 2), sample.speckle(10, 3)])
    report = look(sample.write_clip(tmp_path / "a.avi", frames))
    assert [finding.text for finding in report.findings] == ["at frames 25, 50 of 60"]
    assert [frame for frame, _ in report.pictures] in ([24, 25], [49, 50])
    assert all(cv2.imdecode(np.frombuffer(jpeg, np.uint8), 0).shape[1] == 144 for _, jpeg in report.pictures)


def test_cuts__frozen_clips_that_jump_are_none() -> None:
    jumpy = np.repeat(sample.speckle(200)[::8], 5, axis=0)
    assert "repeats" in seen(jumpy)
    assert "cut" not in codes_of_frames(jumpy)
    slides = np.concatenate([np.repeat(sample.speckle(1, seed), 20, axis=0) for seed in (1, 2)])
    assert codes_of_frames(slides)["cut"] == "at frame 20 of 40", "two frozen pictures are two recordings"


def codes_of_frames(frames: np.ndarray) -> dict[str, str]:
    grey, small = frames.astype(np.float32), [detail(frame) for frame in frames]
    turns = np.array([turn(first, second) for first, second in pairwise(small)])
    steps = np.abs(np.diff(grey, axis=0)).mean((1, 2))
    return {finding.code: finding.text for finding in check_cuts(grey.mean((1, 2)), steps, turns)}


def test_cuts__coming_out_of_black_is_none() -> None:
    frames = sample.speckle(40)
    frames[:10] = 0
    assert codes_of_frames(frames) == {}


def test_frames__none_and_one() -> None:
    assert check_frames(np.zeros(1), np.zeros(0)) == [] and seen(sample.speckle(1)) == {}


def test_watch__sizes_may_change_and_costs_little() -> None:
    watch = FrameWatch()
    for frame in (*sample.speckle(3), *sample.speckle(3, size=(96, 80))):
        watch.see(frame)
    assert watch.steps[2] == 255.0 and not watch.findings()
    frames = np.random.default_rng(0).integers(0, 255, (20, 500, 500), np.uint8)
    started = time.process_time()
    for _ in range(5):
        for frame in frames:
            watch.see(frame)
    assert (time.process_time() - started) / 100 < 0.0005, "a frame costs about 0.04 ms"


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [
    np.arange(50) * 40.0, np.round(np.arange(50) * 1000 / 30), np.append(540 + np.arange(49) * 40.0, 0.0), [0.0, 40.0], [],
])
def test_times__constant_rate(times: list[float]) -> None:
    """Rounded times, and MPEG-2's fall back to 0 at the end, are no change of rate."""
    assert check_times(times) == []


def test_times__variable_rate(tmp_path: Path) -> None:
    gaps = np.random.default_rng(0).uniform(60, 90, 60)
    assert check_times(np.cumsum(gaps))[0].code == "variable-rate"
    holes = np.cumsum([40.0] * 20 + [120.0] + [40.0] * 20 + [120.0] + [40.0] * 20)
    assert "0.040 to 0.120 s" in check_times(holes)[0].text
    path = sample.write_uneven_gif(tmp_path / "a.gif", sample.speckle(12), [50, 100] * 6)
    assert "gaps of 0.050 to 0.100 s" in codes(path)["variable-rate"]


# --- headers ----------------------------------------------------------------------------------------------------------


def test_header__rotation_sound_and_square_pixels(tmp_path: Path) -> None:
    path = sample.write_clip(tmp_path / "a.mp4", sample.speckle(12))
    assert codes(path, quick=True) == {}
    sample.add_sound(path)
    assert set(codes(path)) == {"audio"}
    sample.stretch(path, 9, 8)
    assert codes(path)["aspect"] == "sample aspect ratio 9:8"
    sample.turn(path)
    report = look(path, quick=True)
    assert {finding.code for finding in report.findings} == {"audio", "aspect", "rotated"}
    assert "applied" in next(finding.text for finding in report.findings if finding.code == "rotated")
    reader = MediaReader(Media("a.mp4", "video", path), ExtractParams())
    list(reader.jpegs())
    assert (reader.facts.width, reader.facts.height) == (128, 160), "extraction turns it"


def test_header__content_and_extension(tmp_path: Path) -> None:
    path = sample.write_clip(tmp_path / "a.mp4", sample.speckle(12)).rename(tmp_path / "b.avi")
    assert codes(path) == {"extension": "mp4 inside, named .avi"}
    assert container_of(path) == "mp4"


def test_header__odd_tiny_and_huge_sizes(tmp_path: Path) -> None:
    odd = sample.write_uneven_gif(tmp_path / "a.gif", sample.speckle(12, size=(161, 127)), [100] * 12)
    assert codes(odd) == {"odd-size": "161 x 127 pixels"}
    assert set(codes(sample.write_clip(tmp_path / "b.avi", sample.speckle(12, size=(96, 80))))) == {"tiny"}
    cv2.imwrite(str(tmp_path / "c.png"), np.full((600, 2400), 90, np.uint8))
    assert set(codes(tmp_path / "c.png")) == {"huge"}


def test_stills__orientation_alpha_depth(tmp_path: Path) -> None:
    from PIL import Image

    grey = sample.speckle(1, size=(160, 128))[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=exif)
    assert codes(tmp_path / "turned.jpg")["rotated"] == "EXIF orientation 6: 90 degrees, applied"
    reader = MediaReader(Media("turned.jpg", "image", tmp_path / "turned.jpg"), ExtractParams())
    list(reader.jpegs())
    assert (reader.facts.width, reader.facts.height) == (128, 160), "extraction turns it"
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    assert set(codes(tmp_path / "alpha.png")) == {"alpha"} and set(codes(tmp_path / "deep.png")) == {"deep"}


def test_tint__blue_and_grey() -> None:
    grey = np.repeat(sample.speckle(1)[0][:, :, None], 3, axis=2)
    blue = np.minimum(grey.astype(int) + [12, 0, 0], 255).astype(np.uint8)
    assert tint(grey) == (0, 0) and tint(grey[:, :, 0]) == (0, 0)
    assert 11 < tint(blue)[1] <= 12 and tint(blue)[0] == 0


def test_advice__names_written_files_with_their_folder() -> None:
    named = [word.strip(".,;()") for kind in KINDS.values() for word in kind.advice.split() if word.strip(".,;()").endswith((".csv", ".png", ".json"))]
    assert named and all("/" in name for name in named)


def test_dicom__tags_that_tell(tmp_path: Path) -> None:
    plain = sample_dicom.write(tmp_path / "a.dcm", sample.speckle(10))
    assert codes(plain) == {}
    two = sample_dicom.region(0, 0, 60, 60)
    two.append(sample_dicom.region(70, 0, 120, 60, data=2)[0])
    odd = sample_dicom.write(
        tmp_path / "b.dcm", sample.speckle(10).astype(np.uint16) * 16, FrameTime="", BurnedInAnnotation="YES",
        UltrasoundColorDataPresent=1, SequenceOfUltrasoundRegions=two,
    )
    assert set(codes(odd, quick=True)) == {"deep", "regions", "burnt-in", "colour-flow", "no-rate"}
    vector = sample_dicom.write(
        tmp_path / "c.dcm", sample.speckle(10), FrameTime="", FrameTimeVector=["0", "40", "80"] + ["40", "80"] * 3 + ["40"],
    )
    assert set(codes(vector)) == {"variable-rate"}


def test_dicom__no_word_of_the_header(tmp_path: Path) -> None:
    path = sample_dicom.write(tmp_path / "a.dcm", sample.speckle(10), PatientID="HOSP-4711")
    said = repr(inspect_file(Look(Media("a.dcm", "video", path), False, "key")))
    assert not [secret for secret in sample_dicom.SECRETS if secret in said]
    assert look(path).header.patient.startswith("P")


@pytest.mark.parametrize("raw", [b"", b"\x00" * 500, b"RIFF\x00\x00\x00\x00AVI LIST", b"\x00\x00\x00\x18ftypmp42" + bytes(40)])
def test_unreadable__says_why(tmp_path: Path, raw: bytes) -> None:
    for name in ("a.mp4", "a.avi", "a.png", "a.dcm"):
        (tmp_path / name).write_bytes(raw)
        report = look(tmp_path / name)
        assert not report.readable and report.findings[-1].text, name


def test_kinds__are_complete_and_plain() -> None:
    assert {kind.severity for kind in KINDS.values()} == set(SEVERITIES)
    for code, kind in KINDS.items():
        assert kind.title and kind.advice and not kind.advice.endswith("."), code
        assert ";" not in kind.title, "warnings in manifest.csv are separated by semicolons"


# --- extraction says it too -------------------------------------------------------------------------------------------


def test_extraction__warns_of_frozen_and_black_frames(tmp_path: Path) -> None:
    frames = np.repeat(sample.speckle(15), 2, axis=0)
    frames[:3] = 0
    path = sample.write_clip(tmp_path / "a.avi", frames)
    for color in ("gray", "rgb"):
        reader = MediaReader(Media("a.avi", "video", path), ExtractParams(color=color))
        list(reader.jpegs())
        assert [text.split(":")[0] for text in reader.facts.warnings] == ["frames repeat", "black lead-in"]
        assert not any(";" in text for text in reader.facts.warnings)
