"""Reading media: every container, sampling, thinning, and every kind of broken file. Run: pytest tests/test_video.py"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import sample_media as sample
from pipeline.data.inspect import Look, inspect_file
from pipeline.data.integrity import lacks_end
from pipeline.data.video import Facts, Media, MediaReader, content_hash, find_media
from pipeline.errors import DataError
from pipeline.parameters import ExtractParams


def read(media: Media, table_fps: float | None = None, **params: object) -> tuple[list[np.ndarray], Facts]:
    """All kept frames as decoded JPEGs, and the facts."""
    reader = MediaReader(media, ExtractParams(**params), table_fps)
    frames = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED) for jpeg in reader.jpegs()]
    return frames, reader.facts


def only(folder: Path) -> Media:
    """The single medium of a folder."""
    (media,) = find_media(folder).media
    return media


def shown(frames: list[np.ndarray]) -> list[int]:
    """The numbers the frames show."""
    return [sample.number(frame) for frame in frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.avi", "a.mov", "a.gif", "really-mp4.mpeg"])
def test_read__every_frame_in_order(tmp_path: Path, name: str) -> None:
    if name.endswith("gif"):
        sample.write_gif(tmp_path / name, 12)
    else:
        sample.write_video(tmp_path / name, 12)
    frames, facts = read(only(tmp_path))
    assert shown(frames) == list(range(12))
    assert (facts.frames, facts.frames_decoded, facts.frames_claimed) == (12, 12, 12)
    assert (facts.fps, facts.fps_source) == (pytest.approx(10.0), "container")
    assert facts.warnings == []


def test_read__grey_is_one_channel_and_rgb_three(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "a.avi", 3)
    grey, facts = read(only(tmp_path))
    assert grey[0].shape == (48, 64) and facts.channels == 1
    color, facts = read(only(tmp_path), color="rgb")
    assert color[0].shape == (48, 64, 3) and facts.channels == 3


def test_read__shrinks_to_the_short_side_and_never_enlarges(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "a.avi", 2, size=(96, 64))
    frames, facts = read(only(tmp_path), short_side=32)
    assert frames[0].shape == (32, 48)
    assert (facts.width, facts.height, facts.stored_width, facts.stored_height) == (96, 64, 48, 32)
    frames, facts = read(only(tmp_path), short_side=256)
    assert frames[0].shape == (64, 96)


@pytest.mark.parametrize(
    ("fps", "rate", "expected"),
    [
        (30.0, 10.0, list(range(0, 30, 3))),
        (10.0, 4.0, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28]),
        (10.0, 25.0, list(range(30))),
        (10.0, 0.5, [0, 20]),
    ],
)
def test_sampling__by_time(tmp_path: Path, fps: float, rate: float, expected: list[int]) -> None:
    sample.write_video(tmp_path / "a.avi", 30, fps=fps)
    frames, facts = read(only(tmp_path), frames_per_second=rate)
    assert shown(frames) == expected
    assert (facts.frames, facts.frames_decoded) == (len(expected), 30)


def test_cap__evenly_spaced_over_the_sampled_frames(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "a.avi", 31, fps=30)
    assert shown(read(only(tmp_path), max_frames=4)[0]) == [0, 10, 20, 30]
    assert abs(shown(read(only(tmp_path), max_frames=1)[0])[0] - 15) <= 1
    assert shown(read(only(tmp_path), max_frames=100)[0]) == list(range(31))
    assert shown(read(only(tmp_path), max_frames=3, frames_per_second=10)[0]) == [0, 15, 30]


def test_cap__bounded_memory_stays_near_even_spacing(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "a.avi", 60)
    numbers = shown(read(only(tmp_path), max_frames=3)[0])
    # 60 frames are more than 8 x 3, so the stride doubled: each may be off by an eighth of the spacing (29.5).
    assert len(numbers) == 3 and np.abs(np.array(numbers) - [0, 29.5, 59]).max() <= 29.5 / 8


def test_fps__table_where_the_container_states_none(tmp_path: Path) -> None:
    sample.write_frame_folder(tmp_path / "clip", 10)
    frames, facts = read(only(tmp_path), table_fps=10.0, frames_per_second=5)
    assert shown(frames) == [0, 2, 4, 6, 8]
    assert (facts.fps, facts.fps_source) == (10.0, "table")
    frames, facts = read(only(tmp_path), frames_per_second=5)
    assert len(frames) == 10 and facts.fps is None and facts.fps_source == "none"
    assert facts.warnings == ["frame rate unknown: every frame kept"]


def test_frame_folder__natural_order(tmp_path: Path) -> None:
    sample.write_frame_folder(tmp_path / "Video_1", 12, "{}.png")
    media = only(tmp_path)
    assert (media.path, media.kind) == ("Video_1", "frames")
    assert shown(read(media)[0]) == list(range(12))


def test_frame_folder__not_when_a_table_names_its_images(tmp_path: Path) -> None:
    sample.write_frame_folder(tmp_path / "stills", 3)
    found = find_media(tmp_path, {"stills/00001.jpg"})
    expected = [(f"stills/0000{index}.jpg", "image") for index in range(3)]
    assert [(item.path, item.kind) for item in found.media] == expected


def test_frame_folder__other_files_make_it_a_plain_folder(tmp_path: Path) -> None:
    sample.write_frame_folder(tmp_path / "mixed", 2)
    sample.write_video(tmp_path / "mixed" / "a.avi", 2)
    assert [item.kind for item in find_media(tmp_path).media] == ["image", "image", "video"]


@pytest.mark.parametrize("extension", [".jpg", ".JPG", ".png", ".bmp", ".tif"])
def test_still__is_one_frame(tmp_path: Path, extension: str) -> None:
    sample.write_image(tmp_path / f"still{extension}", 7)
    media = only(tmp_path)
    frames, facts = read(media, frames_per_second=1, max_frames=5)
    assert media.kind == "image" and shown(frames) == [7]
    assert (facts.frames, facts.fps, facts.fps_source, facts.warnings) == (1, None, "none", [])


def test_still__pages_and_depth_are_recorded(tmp_path: Path) -> None:
    pages = [Image.fromarray(sample.picture(index)) for index in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert read(only(tmp_path))[1].warnings == ["still with 3 pages: only the first is kept"]
    (tmp_path / "pages.tif").unlink()
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(tmp_path / "deep.png")
    frames, facts = read(only(tmp_path))
    assert "more than 8 bits" in facts.warnings[0] and abs(int(frames[0][0, 0]) - 40000 // 257) <= 1


def test_kind__by_content_not_by_extension(tmp_path: Path) -> None:
    sample.write_image(tmp_path / "still.png").rename(tmp_path / "still.mp4")
    assert only(tmp_path).kind == "image"


def broken(tmp_path: Path, case: str) -> Path:
    """One bad file of each kind."""
    whole = sample.write_video(tmp_path / "made" / "whole.mp4", 20).read_bytes()
    picture = sample.write_image(tmp_path / "made" / "whole.jpg", size=(200, 200)).read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    content = {
        "empty.mp4": b"",
        "empty.jpg": b"",
        "text.mp4": b"this is no video\n" * 500,
        "noise.avi": noise,
        "cut.mp4": whole[: len(whole) // 2],
        "header.mp4": whole[:40],
        "cut.jpg": picture[: len(picture) // 2],
        "playlist.mp4": b"ffconcat version 1.0\nfile 'made/whole.mp4'\n",
        "hls.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nmade/whole.mp4\n#EXT-X-ENDLIST\n",
    }[case]
    path = tmp_path / case
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "case",
    ["empty.mp4", "empty.jpg", "text.mp4", "noise.avi", "cut.mp4", "header.mp4", "cut.jpg", "playlist.mp4", "hls.mp4"],
)
def test_bad_file__one_clear_error(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, case)
    (media,) = [item for item in find_media(tmp_path, {case}).media if item.path == case]
    with pytest.raises(DataError, match=f"^{path.name}: ") as caught:
        read(media)
    assert str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the decoder's own chatter must not reach the user"


def test_bad_file__zero_frames(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "none.avi", 0)
    with pytest.raises(DataError, match="^none.avi: "):
        read(only(tmp_path))


def test_truncated__what_decodes_is_kept_and_the_loss_recorded(tmp_path: Path) -> None:
    path = sample.write_video(tmp_path / "cut.avi", 20)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    frames, facts = read(only(tmp_path))
    assert 0 < facts.frames_decoded < 20 and facts.frames_claimed == 20
    assert facts.warnings == [f"decoded {len(frames)} frames where the header claims 20"]


def test_truncated__gif_says_so(tmp_path: Path) -> None:
    """It states no number of frames, so that nothing else tells: half of a file was read as a whole recording."""
    path = sample.write_gif(tmp_path / "cut.gif", 20)
    data = path.read_bytes()
    for whole in (data, data + bytes(50), data + b"note"):
        path.write_bytes(whole)
        assert read(only(tmp_path))[1].warnings == []
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        frames, facts = read(only(tmp_path))
        assert 0 < len(frames) < 20 and facts.warnings[0] == "cut off: the file stops before its end mark"
        report = inspect_file(Look(only(tmp_path), True))
        assert [finding.text for finding in report.findings if finding.code == "cut-off"] == ["the gif file stops before its end mark"]


def test_end__gifs_that_are_cut_anywhere(tmp_path: Path) -> None:
    path = sample.write_gif(tmp_path / "a.gif", 2)
    data = path.read_bytes()
    for length in [*range(4, len(data) - 20, 7), *range(len(data) - 20, len(data))]:
        path.write_bytes(data[:length])
        assert lacks_end(path), length
    for other in (data, b"GIF", b"\x00\x00\x01\xba" * 9, b""):
        path.write_bytes(other)
        assert not lacks_end(path)


def test_cut_frame__spoils_the_folder_by_name(tmp_path: Path) -> None:
    folder = sample.write_frame_folder(tmp_path / "clip", 3)
    raw = (folder / "00001.jpg").read_bytes()
    (folder / "00001.jpg").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"clip/00001\.jpg"):
        read(only(tmp_path))


def test_max_pixels__refused_before_decoding(tmp_path: Path) -> None:
    sample.write_video(tmp_path / "a.avi", 2)
    sample.write_image(tmp_path / "b.png")
    for media in find_media(tmp_path).media:
        with pytest.raises(DataError, match="64 x 48 pixels are more than extract.max_pixels"):
            read(media, max_pixels=1000)


def test_size_change__resized_to_the_first_and_recorded(tmp_path: Path) -> None:
    folder = sample.write_frame_folder(tmp_path / "clip", 3)
    sample.write_image(folder / "00003.jpg", 3, size=(80, 80))
    frames, facts = read(only(tmp_path))
    assert {frame.shape for frame in frames} == {(48, 64)}
    assert facts.warnings == ["the frame size changes inside; all were resized to the first"]


def test_find__hidden_files_and_links_outside_are_skipped(tmp_path: Path) -> None:
    root = tmp_path / "root"
    outside = sample.write_image(tmp_path / "outside" / "secret.png")
    sample.write_image(root / "inside.png")
    sample.write_image(root / ".hidden.png")
    sample.write_image(root / ".cache" / "b.png")
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "notes.doc").write_text("x")
    survey = find_media(root)
    assert [item.path for item in survey.media] == ["inside.png"]
    assert "2 links lead out of the source folder" in survey.notes[0]
    assert "1 .doc" in survey.notes[1]


def test_find__hostile_names(tmp_path: Path) -> None:
    names = ["Größe é.png", "with space.png", "a+b.png", "100%.png", "new\nline.png", "-dash.png", "%05d.avi"]
    for index, name in enumerate(names):
        (sample.write_image if name.endswith("png") else sample.write_video)(tmp_path / name, index + 1)
    bad = os.fsencode(tmp_path) + b"/byte\xff.png"
    with open(bad, "wb") as out:
        out.write((tmp_path / "a+b.png").read_bytes())
    media = find_media(tmp_path).media
    assert len(media) == len(names) + 1
    assert {item.path for item in media} == {*names[:4], *names[5:], "new\\x0aline.png", "byte\\xff.png"}
    for item in media:
        item.path.encode("utf-8")
        assert len(read(item)[0]) >= 1


def test_find__missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_media(tmp_path / "nowhere")


def test_content_hash__names_count_in_frame_folders(tmp_path: Path) -> None:
    one, two = sample.write_frame_folder(tmp_path / "a" / "x", 3), sample.write_frame_folder(tmp_path / "b" / "x", 3)
    first, second = (content_hash(Media("x", "frames", folder)) for folder in (one, two))
    assert first == second and len(first) == 64
    (two / "00002.jpg").rename(two / "00007.jpg")
    assert content_hash(Media("x", "frames", two)) != first


def test_real_clips__every_frame_decodes(shared: Path) -> None:
    folder = shared / "data" / "pocus"
    with open(folder / "videos.csv", encoding="utf-8", newline="") as handle:
        table = {row["path"]: row for row in csv.DictReader(handle)}
    media = [item for item in find_media(folder).media if item.kind == "video"]
    assert {item.path for item in media} == set(table) and len(table) == 96
    wrong = []
    for item in media:
        reader = MediaReader(item, ExtractParams(short_side=16))
        count, row = sum(1 for _ in reader.jpegs()), table[item.path]
        facts = reader.facts
        expected = (int(row["n_frames"]), int(row["width"]), int(row["height"]))
        if (count, facts.width, facts.height) != expected or facts.fps != pytest.approx(float(row["fps"]), abs=0.01):
            wrong.append((item.path, count, facts.fps, expected, row["fps"]))
        if any("cut off" in text for text in facts.warnings):
            wrong.append((item.path, facts.warnings))
    assert wrong == []
