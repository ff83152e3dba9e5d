"""Source folders that no reader may hang on, crash on or leave: pipes, devices, loops, hostile names, closed folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fuzz_seeds import Seed, damage

__all__ = ["CASES", "as_nobody", "build"]

NOBODY = 65534
NAMES = (
    "new\nline", "bell\x07", "esc\x1b[31m", "\u202egnp", "-rf", "%05d", "a#b?c", "http:", "con", " ", "'\"`$(id)", "e\u0301", "\u0130\u0131",
    "x" * 240, "\u00e4" * 120, "concat:a|b", "file:a", "pipe:0", "*", "a;b", "\\..\\..\\b", ".hidden", "..x", "\ud800",
)


def _good(seeds: list[Seed], rng: np.random.Generator) -> Seed:
    media = [seed for seed in seeds if seed.kind == "media" and seed.name.startswith(("clip", "still", "dicom_"))]
    return media[rng.integers(len(media))]


def _pipes(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    for name in ("clip.mp4", "still.png", "labels.csv", "scan.dcm", "noname", "folder/1.png", "folder/2.png", "mixed/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        os.mkfifo(root / name)
    for name in ("mixed/2.png", "mixed/3.png", "real.png"):
        (root / name).write_bytes(next(seed.data for seed in seeds if seed.name == "still.png"))


def _devices(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    for name, minor in (("zero.mp4", 5), ("null.png", 3), ("full.avi", 7), ("labels.csv", 5)):
        try:
            os.mknod(root / name, 0o20666, os.makedev(1, minor))
        except OSError:
            (root / name).symlink_to("/dev/zero")
    (root / "link.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(root)
        listener.bind("socket.mp4")
        os.chdir(root.parent)


def _loops(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    (root / "here").symlink_to(".")
    (root / "up").symlink_to("..")
    (root / "root").symlink_to("/")
    (root / "labels.csv").symlink_to("labels.csv")
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    (root / "passwd.csv").symlink_to("/etc/passwd")
    (root / "real.png").write_bytes(next(seed.data for seed in seeds if seed.name == "still.png"))


def _names(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    for name in NAMES:
        seed = _good(seeds, rng)
        ending = os.fsencode(Path(seed.name).suffix)
        raw = name.encode("utf-8", "surrogatepass").replace(b"/", b"_")[: 255 - len(ending)] + ending
        with open(os.fsencode(root) + b"/" + raw, "wb") as out:
            out.write(seed.data)
    for number, raw in enumerate((b"byte\xff\xfe", b"\x80", b"\xed\xa0\x80 surrogate", bytes(range(1, 32)))):
        seed = _good(seeds, rng)
        with open(os.fsencode(root) + b"/" + raw + str(number).encode() + os.fsencode(Path(seed.name).suffix), "wb") as out:
            out.write(seed.data)


def _deep(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    """Longer than a path may be: reached by changing into it step by step."""
    before = os.getcwd()
    os.chdir(root)
    try:
        for _ in range(60):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
            Path("clip.png").write_bytes(b"x")
    finally:
        os.chdir(before)


def _many(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    """Hundreds of nested folders, folders with the names of files, empty folders."""
    folder = root
    for number in range(300):
        folder = folder / str(number)
    folder.mkdir(parents=True)
    (folder / "clip.png").write_bytes(next(seed.data for seed in seeds if seed.name == "still.png"))
    for name in ("clip.mp4", "labels.csv", "1.png", "x.dcm", "empty"):
        (root / name).mkdir()


def _closed(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    for name in ("closed", "closed/inner", "listed", "frames"):
        (root / name).mkdir()
    for name in ("closed/inner/a.png", "listed/b.png", "frames/1.png", "frames/2.png", "c.png", "d.mp4", "open.png"):
        (root / name).write_bytes(next(seed.data for seed in seeds if seed.name == "still.png"))
    for name in ("frames/2.png", "c.png", "d.mp4", "closed"):
        (root / name).chmod(0)
    (root / "listed").chmod(0o444)


def _closed_table(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    (root / "open.png").write_bytes(next(seed.data for seed in seeds if seed.name == "still.png"))
    (root / "labels.csv").write_text("path,label\nopen.png,x\n")
    (root / "labels.csv").chmod(0)


def _mixed(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    """Several damaged files and a table that names them."""
    lines = ["path,label,patient"]
    for number in range(int(rng.integers(2, 6))):
        seed, _ = damage([seed for seed in seeds if seed.kind == "media"], 10_000 + number, int(rng.integers(2**31)))
        name = f"{number}{Path(seed.name).suffix}"
        (root / name).write_bytes(seed.data)
        lines.append(f"{name},{'xy'[number % 2]},p{number}")
    (root / "labels.csv").write_text("\n".join(lines))


def _frames(root: Path, seeds: list[Seed], rng: np.random.Generator) -> None:
    """A frame folder whose pictures are of any kind, damaged or not."""
    (root / "clip").mkdir()
    pictures = [seed for seed in seeds if seed.kind == "media" and Path(seed.name).suffix in (".png", ".jpg", ".tif", ".bmp", ".gif", ".dcm")]
    for number in range(4):
        seed, _ = damage(pictures, int(rng.integers(3 * len(pictures))), int(rng.integers(2**31)))
        (root / "clip" / f"{number}{('.png', '.jpg', '.tif')[number % 3]}").write_bytes(seed.data)


CASES: dict[str, Callable[[Path, list[Seed], np.random.Generator], None]] = {
    "pipes": _pipes, "devices and a socket": _devices, "links in circles": _loops, "hostile names": _names, "deeper than a path": _deep,
    "nested": _many, "closed": _closed, "closed table": _closed_table, "mixed": _mixed, "frame folder": _frames,
}


def build(root: Path, case: int, seed: int, seeds: list[Seed]) -> str:
    """Make one source folder; the first cases go through all kinds, later ones repeat those that chance decides."""
    rng = np.random.default_rng([seed, 7, case])
    root.mkdir()
    names = list(CASES)
    name = names[case] if case < len(names) else ("mixed", "frame folder", "hostile names")[rng.integers(3)]
    CASES[name](root, seeds, rng)
    return name


@contextmanager
def as_nobody(wanted: bool) -> Iterator[None]:
    """Without the rights of root, to which no folder is closed."""
    if not wanted or not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
