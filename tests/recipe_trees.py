"""Trees of public data sets in their layouts, made of links to one small picture: recipes look at names, not pixels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.data.recipes.base import Expect, Recipe
from pipeline.data.recipes.catalog import recipe
from pipeline.data.recipes.endoscopy import PHASES, TOOLS


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
    for folder, videos, frames in (("malignant", 32, 96), ("non-malignant", 32, 64)):
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


def cholec80(root: Path, picture: Path) -> None:
    for number in range(1, 81):
        name = f"video{number:02d}"
        for second in range(1, 5):
            put(picture, root / "frames" / name / f"{name}_{second:06d}.png")
        write(root / "phase_annotations" / f"{name}-phase.txt", phase_file(4, number))
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
        ("lusms", 670, 1400), ("liver", 296, 600), ("us4", 1051, 3659), ("gbusv", 64, 160))},
}


def fitting(name: str) -> Recipe:
    """The recipe, with published counts of the miniature where the real set has tens of thousands of files."""
    return dataclasses.replace(recipe(name), published=SMALL[name]) if name in SMALL else recipe(name)


def built(name: str, tmp_path: Path, picture: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    TREES[name](root, picture)
    return root
