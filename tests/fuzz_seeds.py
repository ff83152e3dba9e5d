"""Healthy and hostile files for the fuzzer, and the ways in which it damages them; all a pure function of a seed."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
import sample_dicom
import sample_media
from PIL import Image
from pydicom.uid import UID

from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.store import write_video

__all__ = ["Seed", "damage", "load_seeds", "make_seeds", "save_seeds"]

VIDEO = "ab" * 8
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
NUMBERS = ("0", "-1", "1e999", "nan", "9" * 30, "9" * 400, "9" * 5000, "0x10", "1.5", "", "\u0661", "true", "null", "[[[[", "\x00", "\u202e", '"')
EXTENSIONS = (".mp4", ".avi", ".mov", ".mpg", ".gif", ".png", ".jpg", ".tif", ".bmp", ".dcm", ".mkv", ".MP4", ".ts", ".h264")
SYNTAXES = {
    "implicit": pydicom.uid.ImplicitVRLittleEndian, "explicit": pydicom.uid.ExplicitVRLittleEndian,
    "big_endian": pydicom.uid.ExplicitVRBigEndian, "deflated": pydicom.uid.DeflatedExplicitVRLittleEndian,
    "jpeg": pydicom.uid.JPEGBaseline8Bit, "jpeg_ls": pydicom.uid.JPEGLSLossless, "jpeg2000": pydicom.uid.JPEG2000Lossless,
    "rle": pydicom.uid.RLELossless,
}


@dataclass(frozen=True)
class Seed:
    """One file before it is damaged. `kind` says which reader gets it: media, labels, manifest, splits, given, store, ..."""

    kind: str
    name: str
    data: bytes


def make_seeds(folder: Path) -> list[Seed]:
    """Seeds of every kind, made in an empty folder."""
    seeds = [*_media(folder / "media"), *_dicom(folder / "dicom"), *_hostile_pictures(), *_hostile_dicom()]
    return seeds + [*_store(folder / "store"), *_tables(), *_weights()]


def _media(folder: Path) -> list[Seed]:
    for ending in (".mp4", ".avi", ".mov"):
        sample_media.write_video(folder / f"clip{ending}", 8)
    writer = cv2.VideoWriter(str(folder / "clip.mpg"), cv2.VideoWriter_fourcc(*"mpg1"), 25, (64, 48))
    for index in range(8):
        writer.write(sample_media.picture(index))
    writer.release()
    sample_media.write_gif(folder / "clip.gif", 5)
    for ending in (".png", ".jpg", ".tif", ".bmp"):
        sample_media.write_image(folder / f"still{ending}", 3)
    pages = [Image.fromarray(sample_media.picture(index)) for index in range(3)]
    pages[0].save(folder / "pages.tiff", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    pages[0].save(folder / "progressive.jpg", progressive=True, quality=80)
    pages[0].quantize(16).save(folder / "palette.png")
    return [Seed("media", path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.stat().st_size]


def _dicom(folder: Path) -> list[Seed]:
    fixed = {"SOPInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.5"}
    for name, syntax in SYNTAXES.items():
        sample_dicom.write(folder / f"{name}.dcm", sample_dicom.cine(3), UID(syntax), **fixed)
    region = sample_dicom.region(2, 2, 20, 20)
    sample_dicom.write(folder / "grey.dcm", sample_dicom.cine(2)[..., 0], SequenceOfUltrasoundRegions=region, **fixed)
    sample_media.write_video(folder / "stream.mp4", 4)
    sample_dicom.write_stream(folder / "stream.dcm", folder / "stream.mp4")
    return [Seed("media", f"dicom_{path.stem}.dcm", path.read_bytes()) for path in sorted(folder.glob("*.dcm"))]


def _hostile_pictures() -> list[Seed]:
    """Small files that claim, or unpack to, far more than they hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(width: int, height: int, rows: int, extra: bytes = b"") -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        packed = zlib.compress(bytes((width + 1) * rows), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")

    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(30_000_000), 9))
    jpeg = cv2.imencode(".jpg", sample_media.picture(3))[1].tobytes()
    place = jpeg.index(b"\xff\xc0") + 5
    large = jpeg[:place] + struct.pack(">HH", 65500, 65500) + jpeg[place + 4:]
    loop = b"II*\0" + struct.pack("<IHHHII", 8, 1, 256, 4, 1, 64) + struct.pack("<I", 8)
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    named = {
        "flat.png": png(7000, 7000, 7000), "bomb.png": png(60000, 60000, 50), "line.png": png(40_000_000, 1, 1), "text.png": png(8, 8, 8, text),
        "large.jpg": large, "loop.tif": loop, "screen.gif": screen + b"\x02\x02\x44\x01\x00;", "nothing.mp4": b"", "zeros.avi": bytes(5000),
        "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    return [Seed("media", name, data) for name, data in named.items()]


def _hostile_dicom() -> list[Seed]:
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    head = bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta)) + meta
    sequence = b"\x18\x00\x11\x60SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    secret = b"\x10\x00\x20\x00LO\x0a\x00HOSP-4711 "
    picture = b"\x28\x00\x10\x00US\x02\x00\x10\x00\x28\x00\x11\x00US\x02\x00\x10\x00"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    item = b"\xfe\xff\x00\xe0"
    named = {
        "deep.dcm": head + secret + sequence * 5000, "deep_closed.dcm": head + sequence * 800 + picture,
        "long.dcm": head + b"\x10\x00\x20\x00UN\0\0\xff\xff\xff\xfe" + secret, "endless.dcm": head + secret + picture + pixels,
        "items.dcm": head + picture + pixels + item * 30000, "fragment.dcm": head + picture + pixels + item + bytes(4) + item + b"\xf0\xff\xff\xff",
        "vr.dcm": head + secret + b"\x28\x00\x10\x00??\x02\x00\x10\x00", "only_head": head, "no_meta.dcm": bytes(128) + b"DICM" + secret,
        "group.dcm": head.replace(struct.pack("<I", len(meta)), b"\xff\xff\xff\xff", 1) + picture,
    }
    return [Seed("media", name, data) for name, data in named.items()]


def _row(**changes: object) -> VideoRow:
    values = dict(
        video=VIDEO, source="main", path="a.mp4", sha256="ab" * 32, patient="P0000000001", label="x", kind="video", frames=3, frames_decoded=3,
        frames_claimed=3, fps=10.0, fps_source="container", width=40, height=30, stored_width=40, stored_height=30, channels=1, bytes=1,
    )
    return VideoRow(**{**values, **changes})


def _store(folder: Path) -> list[Seed]:
    jpegs = [cv2.imencode(".jpg", sample_media.picture(index, (40, 30))[..., 0])[1].tobytes() for index in range(3)]
    write_video(folder, VIDEO, jpegs)
    Manifest([_row(bytes=(folder / f"{VIDEO}.tar").stat().st_size)]).write(folder / "manifest.csv")
    files = [path for path in sorted(folder.iterdir())]
    return [Seed("store", path.name, path.read_bytes()) for path in files] + [Seed("manifest", "manifest.csv", (folder / "manifest.csv").read_bytes())]


def _tables() -> list[Seed]:
    labels = "path,label,patient,fps\na.mp4,sick,Anna,10\nb/c.png,well,Bert,\n\"d,e.avi\",sick,\"Zoë\",25\n"
    folds = [{"fold": 0, "test": ["a"], "train": ["b"], "inner": []}, {"fold": 1, "test": ["b"], "train": ["a"], "inner": []}]
    splits = {
        "schema": 1, "seed": 0, "group": "patient", "manifest_digest": "d", "classes": ["x", "y"], "excluded_classes": {}, "warnings": [],
        "groups": {"a": "P1", "b": "P2"}, "labels": {"a": "x", "b": "y"}, "folds": folds, "unlabelled": [], "unlabelled_blocked": [],
    }
    given = {"folds": [{"test": ["a.mp4"]}, {"test_patients": ["P2", 7], "inner": [{"validation": ["x"]}]}], "classes": ["x"]}
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    params = (Path(__file__).resolve().parents[1] / "params.yaml").read_bytes()
    annotation = "Frame\tPhase\n0\tPreparation\n25\tPreparation\n50\tDissection\n"
    texts = [
        ("labels", "labels.csv", labels), ("splits", "splits.json", json.dumps(splits)), ("given", "given.json", json.dumps(given)),
        ("params", "laughs.yaml", laughs), ("params", "deep.yaml", "data: " + "[" * 20000), ("splits", "deep.json", "[" * 100000),
        ("annotation", "video01-phase.txt", annotation), ("params", "loop.yaml", "data: &x {source: *x}\n"),
        ("params", "laughs_in.yaml", f"{laughs}data:\n  source: *a9\n"),
    ]
    return [Seed(kind, name, text.encode()) for kind, name, text in texts] + [Seed("params", "params.yaml", params)]


def _weights() -> list[Seed]:
    import torch
    from safetensors.torch import save

    tensors = {"conv1.weight": torch.ones(4, 1, 3, 3), "layer1.0.bn1.weight": torch.ones(4), "fc.bias": torch.zeros(2)}
    torch_file = io.BytesIO()
    torch.save({"state_dict": tensors, "epoch": 3}, torch_file)
    old_file = io.BytesIO()
    torch.save(tensors, old_file, _use_new_zipfile_serialization=False)
    return [
        Seed("weights", "a.safetensors", save(tensors, {"format": "pt"})), Seed("weights", "a.pth", torch_file.getvalue()),
        Seed("weights", "old.pt", old_file.getvalue()),
    ]


# --- damage ----------------------------------------------------------------------------------------------------------


def _place(data: bytearray, rng: np.random.Generator, size: int = 1) -> int:
    """A position; half of them near the start, where headers are."""
    limit = max(1, len(data) - size + 1)
    return int(rng.integers(min(limit, 600) if rng.random() < 0.5 else limit))


def _truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: _place(data, rng)]


def _flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    for _ in range(int(2 ** rng.integers(0, 7))):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return data


def _overwrite(data: bytearray, rng: np.random.Generator) -> bytearray:
    start, length = _place(data, rng), int(2 ** rng.integers(0, 10))
    fill = [rng.bytes(length), bytes(length), b"\xff" * length][rng.integers(3)]
    data[start: start + length] = fill[: len(data) - start]
    return data


def _extreme(data: bytearray, rng: np.random.Generator) -> bytearray:
    for _ in range(int(rng.integers(1, 4))):
        code = ("<H", ">H", "<I", ">I", "<Q", ">Q")[rng.integers(6)]
        value = EXTREMES[rng.integers(len(EXTREMES))] & (2 ** (8 * struct.calcsize(code)) - 1)
        place = _place(data, rng, struct.calcsize(code))
        data[place: place + struct.calcsize(code)] = struct.pack(code, value)
    return data


def _insert(data: bytearray, rng: np.random.Generator) -> bytearray:
    place, start = _place(data, rng), _place(data, rng)
    data[place:place] = rng.bytes(int(rng.integers(1, 64))) if rng.random() < 0.5 else data[start: start + 4096]
    return data


def _remove(data: bytearray, rng: np.random.Generator) -> bytearray:
    start = _place(data, rng)
    del data[start: start + int(2 ** rng.integers(0, 11))]
    return data


def _repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data * int(rng.integers(2, 20)) if len(data) < 100_000 else data + data


_FIELDS = re.compile(
    rb"moov|trak|mdia|minf|stbl|stsz|stco|stts|stsc|stsd|mdat|tkhd|mdhd|mvhd|ftyp|mp4v|avc1|RIFF|LIST|avih|strh|strf|movi|idx1|00dc|IHDR|IDAT"
    rb"|UI|US|UL|OB|OW|SQ|DS|IS|LO|PN|UN|\xfe\xff\x00\xe0|\xff[\xc0\xc2\xc4\xda\xdb]|\x00\x00\x01[\xb3\xba\xbb\xe0]|\x2c\x00\x00\x00|BM|II\*|MM"
    rb"|PK[\x01-\x06]{2}|NUMPY"
)


def _declared(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Change a declared size: an integer close to the mark of a known structure."""
    found = [match.span() for match in _FIELDS.finditer(bytes(data[:200_000]))]
    if not found:
        return _extreme(data, rng)
    for _ in range(int(rng.integers(1, 3))):
        start, end = found[rng.integers(len(found))]
        place = max(0, (start - 4, end, end + 2, end + 4, end + int(rng.integers(0, 40)))[rng.integers(5)])
        code = ("<H", ">H", "<I", ">I")[rng.integers(4)]
        value = EXTREMES[rng.integers(len(EXTREMES))] & (2 ** (8 * struct.calcsize(code)) - 1)
        data[place: place + struct.calcsize(code)] = struct.pack(code, value)
    if data[12:16] == b"IHDR":
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))  # else no reader looks any further
    return data


def _numbers(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Replace a number or word of a text."""
    found = [match.span() for match in re.finditer(rb"[\w.]+", bytes(data[:20_000]))]
    for start, end in sorted((found[i] for i in rng.integers(0, len(found), rng.integers(1, 4))), reverse=True) if found else []:
        data[start:end] = NUMBERS[rng.integers(len(NUMBERS))].encode()
    return data


_WAYS: tuple[Callable[[bytearray, np.random.Generator], bytearray], ...] = (
    _truncate, _flip, _overwrite, _extreme, _insert, _remove, _repeat, _declared, _declared, _declared, _numbers,
)


def damage(seeds: list[Seed], case: int, seed: int) -> tuple[Seed, str]:
    """The damaged file of one case, and in words what was done; the first cases are the seeds as they are."""
    if case < len(seeds):
        return seeds[case], "as it is"
    rng = np.random.default_rng([seed, case])
    chosen = seeds[rng.integers(len(seeds))]
    data, done = bytearray(chosen.data), []
    ways = (_numbers, *_WAYS) if chosen.kind not in ("media", "weights") else _WAYS
    for _ in range(int(rng.integers(1, 4))):
        way = ways[rng.integers(len(ways))]
        if data:
            data = way(data, rng)
            done.append(way.__name__.strip("_"))
    name = chosen.name
    if rng.random() < 0.1:
        other = seeds[rng.integers(len(seeds))]
        data, done = data + other.data if rng.random() < 0.5 else bytearray(other.data) + data, [*done, f"joined with {other.name}"]
    if chosen.kind == "media" and rng.random() < 0.15:
        name = Path(name).stem + EXTENSIONS[rng.integers(len(EXTENSIONS))]
    return Seed(chosen.kind, name, bytes(data[:20_000_000])), f"{chosen.name}: {', '.join(done)}"


def save_seeds(folder: Path, seeds: list[Seed]) -> None:
    """Write seeds so that other processes need not make them again."""
    folder.mkdir(parents=True)
    for number, seed in enumerate(seeds):
        (folder / f"{number:03d} {seed.kind} {seed.name}").write_bytes(seed.data)


def load_seeds(folder: Path) -> list[Seed]:
    """What `save_seeds` wrote, in the same order."""
    return [Seed(*path.name.split(" ", 2)[1:], path.read_bytes()) for path in sorted(folder.iterdir())]
