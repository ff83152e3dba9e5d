"""Recipes of other ultrasound: the parts of US-4 (flat folders of frames), gallbladder videos and images, breast images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.recipes.base import (
    Expect,
    Recipe,
    Row,
    Scan,
    below,
    media_below,
    read_table,
)
from pipeline.data.video import Media

__all__ = ["BUSI", "BUTTERFLY", "CLUST", "GBCU", "GBUSV", "LIVER", "LUSMS", "US4"]

_BY_VIDEO = {"data.group": "video"}


def _frames(media: Media) -> int:
    """Pictures of a frame folder, 0 for anything else."""
    return sum(item.is_file() and item.name[0] != "." for item in media.location.iterdir()) if media.kind == "frames" else 0


def _videos(root: Path, scan: Scan) -> list[tuple[Media, int]]:
    """Frame folders and video files with their frames; single pictures and empty folders become deviations."""
    found, loose = [], {}
    for path, media in media_below(root, notes=scan.notes).items():
        if media.kind == "image":
            loose.setdefault(str(PurePosixPath(path).parent), []).append(path)
        else:
            found.append((media, _frames(media)))
    for folder, paths in loose.items():
        scan.deviations.append(
            f"wrong: {folder} holds {len(paths)} pictures that are no video: frames are numbered files (00001.jpg, or folder_frame1.jpg), at "
            "least two, alone in a folder"
        )
    empty = (item for item in root.iterdir() if item.is_dir() and not item.is_symlink() and item.name[0] != "." and not any(item.iterdir()))
    scan.deviations += sorted(f"missing: {item.name} is an empty folder" for item in empty)
    return found


@dataclass(frozen=True)
class _Flat(Recipe):
    """One folder a video, anywhere below the root; the first three characters of its name are the label."""

    prefixes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """For each variant: label by the three characters."""

    def read(self, root: Path, variant: str) -> Scan:
        scan, known = Scan(root), self.prefixes[variant]
        for media, frames in _videos(root, scan):
            start = PurePosixPath(media.path).name[:3]
            if start not in known:
                scan.deviations.append(f"wrong: {media.path} begins with '{start}', which is no label; known: {', '.join(known)}")
            scan.rows.append(Row(media.path, media.kind, known.get(start, ""), frames=frames, extra={"part": start}))
        return scan


_VARIANTS = {"merged": "the twelve classes of the publication", "parts": "the labels of each part"}


def _flat(
    name: str, title: str, about: str, videos: int, frames: int, prefixes: Mapping[str, Mapping[str, str]], obtain: tuple[str, ...],
    certainty: str, licence: str = "not stated; ask its authors before you hand anything on", citation: str = "",
) -> Recipe:
    """A part of US-4: they share everything but names, labels and counts."""
    first = list(next(iter(prefixes.values())))
    return _Flat(
        name=name, title=title, about=about, licence=licence, obtain=obtain, certainty=certainty, prefixes=prefixes,
        citation=citation or "Chen et al. 2021 (USCL), MICCAI, arXiv:2011.13066",
        layout=f"{first[0]}..._1/{first[0]}..._1_frame1.jpg, frame2.jpg ...\n{first[-1]}..._2/00001.jpg, 00002.jpg ...   (any numbered names)",
        labels="first three characters of the folder name: " + "; ".join(
            f"{start} {label}" for start, label in next(iter(prefixes.values())).items()),
        patients="unknown: every video counts as one patient, so clips of one person may lie on both sides of a fold",
        published=(Expect("videos", videos), Expect("frames", frames)), settings=_BY_VIDEO,
        variants={key: text for key, text in _VARIANTS.items() if key in prefixes},
    )


_BUTTERFLY = {"Reg": "regular", "Cov": "covid"}
_CLUST = {f"Rb{number}": f"Rb{number}" for number in range(1, 6)}
_LIVER = {f"F{number}_": f"F{number}" for number in range(5)}
_LUSMS = {"Ali": "a-lines", "Bli": "b-lines", "Ple": "pleura", "Oth": "other"}
_MERGED = _CLUST | _LIVER | {"Reg": "normal", "Ali": "normal"} | dict.fromkeys(("Cov", "Bli", "Ple", "Oth"), "abnormal")
_USCL = "the link stands on github.com/983632847/USCL (Google Drive); read the terms there and unpack it into one folder"
_LOCAL = "not released whole: ask the authors of USCL (github.com/983632847/USCL), then put its folders into one folder"

BUTTERFLY = _flat(
    "butterfly", "Butterfly COVID-19 lung videos", "22 lung videos (Butterfly gallery) as USCL, UCL and HiCo pretrain on them.", 22, 1533,
    {"": _BUTTERFLY}, (_USCL,), "frames (1,533) come from a secondary page; videos by class are not published. POCUS upstream describes a "
    "Butterfly set of its own (21 videos), which may overlap with clips of other collections: compare before testing on POCUS",
    licence="none stated by Butterfly: no redistribution",
)
CLUST = _flat(
    "clust", "CLUST liver ultrasound", "63 liver sequences (respiratory motion) with 50 frames each, as in US-4.", 63, 3150, {"": _CLUST},
    ("the challenge's own data: clust.ethz.ch (registration); US-4's 50 frames a video: " + _LOCAL,),
    "counts are those of the US-4 copy (50 frames a video), not of the challenge; what Rb1 to Rb5 mean is not published",
)
LUSMS = _flat(
    "lusms", "COVID19-LUSMS lung ultrasound", "670 lung videos labelled by sign, a part of US-4.", 670, 6834, {"": _LUSMS}, (_LOCAL,),
    "videos come from the published program; frames (6,834) are the published total of US-4 less the other parts",
)
LIVER = _flat(
    "liver", "Liver fibrosis ultrasound", "296 liver videos with fibrosis stage F0 to F4, a part of US-4.", 296, 11714, {"": _LIVER}, (_LOCAL,),
    "videos come from the published program, frames from a secondary page",
)
US4 = _flat(
    "us4", "US-4", "The four parts butterfly, clust, lusms and liver in one folder.", 1051, 23231,
    {"merged": _MERGED, "parts": _BUTTERFLY | _CLUST | _LIVER | _LUSMS}, (_USCL, _LOCAL),
    "videos come from the published program, frames from a secondary page. Parts in folders of their own are read, too",
)


@dataclass(frozen=True)
class _Gbusv(Recipe):
    """Frame folders, unlabelled or below folders of the two classes."""

    def read(self, root: Path, variant: str) -> Scan:
        scan = Scan(root)
        for media, frames in _videos(root, scan):
            folders = [part.casefold().replace("_", "-") for part in PurePosixPath(media.path).parts[:-1]]
            label = next((_GB_FOLDERS[part] for part in folders if part in _GB_FOLDERS), "")
            scan.rows.append(Row(media.path, media.kind, label, frames=frames))
        if not any(row.label for row in scan.rows):
            scan.notes.append("no class folders (malignant, non-malignant): the videos serve pretraining only")
        return scan

    def expected(self, scan: Scan, variant: str) -> tuple[Expect, ...]:
        counts = _GB_EXTENDED if variant == "extended" else self.published
        named = any(row.label for row in scan.rows)
        return tuple(expect for expect in counts if named or not expect.label)


_GB_EXTENDED = (Expect("videos", 91), Expect("videos", 59, "malignant"), Expect("videos", 32, "non-malignant"))
_GB_OTHER = ("non-malignant", "nonmalignant", "benign", "ben")
_GB_FOLDERS = dict.fromkeys(("malignant", "mal"), "malignant") | dict.fromkeys(_GB_OTHER, "non-malignant")
_GB_CITATION = "Basu et al. 2022, {}"
_GB_AGREEMENT = (
    "print and sign the licence agreement on {page}",
    "a permanent employee or faculty member signs and sends it; requests by students are not answered, their supervisor has to ask",
    "the authors mail a link; unpack it into one folder",
)

GBUSV = _Gbusv(
    name="gbusv", title="GBUSV gallbladder ultrasound videos",
    about="64 gallbladder videos (32 malignant, 32 not), 360 x 480 pixels, one scanner; the pretraining set of UCL.",
    citation=_GB_CITATION.format("MICCAI, arXiv:2207.13148"),
    licence="signed agreement, research only, no redistribution",
    obtain=tuple(line.format(page="gbc-iitd.github.io/data/gbusv") for line in _GB_AGREEMENT),
    layout="Video_1/00000.jpg, 00001.jpg ...\nVideo_2/...\nor malignant/Video_1/..., non-malignant/Video_2/...",
    labels="folder malignant or non-malignant (benign) above the video, if there is one; else unlabelled",
    patients="unknown: every video counts as one patient (the page does not say how many patients there are)",
    certainty="layout: from the publication's program; how the archive names the class of a video was not seen",
    presets=("ucl_official_gb",),
    published=(
        Expect("videos", 64), Expect("frames", 15800), Expect("videos", 32, "malignant"), Expect("videos", 32, "non-malignant"),
        Expect("frames", 12251, "malignant"), Expect("frames", 3549, "non-malignant"),
    ),
    settings=_BY_VIDEO, variants={"2022": "64 videos", "extended": "91 videos (2024)"},
)


@dataclass(frozen=True)
class _Gbcu(Recipe):
    """Images in one folder; train.txt and test.txt with a class number each."""

    def read(self, root: Path, variant: str) -> Scan:
        prefix = below(root, "imgs", "train.txt", "test.txt")
        if prefix is None:
            raise self.foreign(root)
        scan, classes = Scan(root), ("normal", "benign", "malignant")
        tables = {split: read_table(root, f"{prefix}{split}.txt", ("file", "class"), "file", ("file", "class")) for split in ("train", "test")}
        named = [f"{prefix}imgs/{row.cells['file']}" for rows in tables.values() for row in rows]
        media = media_below(root, f"{prefix}imgs/", named, scan.notes)
        met: dict[str, str] = {}
        for split, rows in tables.items():
            for row in rows:
                path, number = f"{prefix}imgs/{row.cells['file']}", row.cells["class"]
                if path in met:
                    scan.deviations.append(f"wrong: {path} is listed twice ({met[path]} and {row.where})")
                    continue
                met[path] = row.where
                if path not in media:
                    scan.deviations.append(f"missing: {path} ({row.where})")
                elif number not in ("0", "1", "2"):
                    scan.deviations.append(f"wrong: {row.where}: class '{number}'; expected 0 (normal), 1 (benign) or 2 (malignant)")
                else:
                    scan.rows.append(Row(path, media[path].kind, classes[int(number)], split=split))
        scan.deviations += [f"surplus: {path} stands in neither train.txt nor test.txt" for path in media if path not in met]
        return scan


GBCU = _Gbcu(
    name="gbcu", title="GBCU gallbladder cancer images",
    about="1,255 gallbladder ultrasound images of 218 patients: normal, benign, malignant (by biopsy).",
    citation=_GB_CITATION.format("CVPR, arXiv:2204.11433"),
    licence="signed agreement, research only, no redistribution",
    obtain=tuple(line.format(page="gbc-iitd.github.io/data/gbcu") for line in _GB_AGREEMENT),
    layout="imgs/im00001.jpg ...\ntrain.txt, test.txt     lines im00001.jpg,0\nbbox_annot.json, roi_pred.json   (boxes; not read)",
    labels="second value in train.txt and test.txt: 0 normal, 1 benign, 2 malignant",
    patients="not in the archive. The official split divides patients (says the page); folds drawn here could not",
    certainty="counts by class and split are published by the authors; the form of a line (name,class) comes from users of the archive. "
    "Patients (218) cannot be checked",
    published=(
        Expect("images", 1255),
        *(Expect("images", number, label) for label, number in (("normal", 432), ("benign", 558), ("malignant", 265))),
        *(Expect("images", number, label, split) for split, numbers in (("train", (401, 509, 223)), ("test", (31, 49, 42)))
          for label, number in zip(("normal", "benign", "malignant"), numbers, strict=True)),
    ),
    settings=_BY_VIDEO | {"data.classes": ["normal", "benign", "malignant"]},
)


@dataclass(frozen=True)
class _Busi(Recipe):
    """Three class folders; masks lie beside the images."""

    def read(self, root: Path, variant: str) -> Scan:
        prefix = below(root, "benign", "malignant", "normal")
        if prefix is None:
            raise self.foreign(root)
        scan, masks = Scan(root), 0
        for label in ("benign", "malignant", "normal"):
            files = [f"{prefix}{label}/{item.name}" for item in (root / prefix / label).iterdir() if item.is_file()]
            for path, media in media_below(root, f"{prefix}{label}/", named=files).items():
                if "_mask" in PurePosixPath(path).stem:
                    masks += 1
                elif media.kind != "image":
                    scan.deviations.append(f"surplus: {path} is no image")
                else:
                    scan.rows.append(Row(path, media.kind, label))
        scan.notes.append(f"{masks} mask images are left out")
        return scan


_BUSI_SETTINGS: dict[str, Any] = _BY_VIDEO | {"data.classes": ["benign", "malignant", "normal"]}

BUSI = _Busi(
    name="busi", title="BUSI breast ultrasound images",
    about="780 breast ultrasound images: benign, malignant, normal, with lesion masks.",
    citation="Al-Dhabyani et al. 2020, Data in Brief 28:104863, doi:10.1016/j.dib.2019.104863",
    licence="not clearly stated by its authors (mirrors say CC BY 4.0, public domain or other): check before you hand it on",
    obtain=(
        "the authors' page: scholar.cu.edu.eg/?q=afahmy/pages/dataset (Dataset_BUSI_with_GT)",
        "unpack it; give the folder that holds benign, malignant and normal",
    ),
    layout="benign/benign (1).png, benign (1)_mask.png, benign (4)_mask_1.png ...\nmalignant/malignant (1).png ...\nnormal/normal (1).png ...",
    labels="the folder",
    patients="unknown (600 women, 780 images): every image counts as one patient, joined only where pictures nearly equal one another",
    certainty="counts by class are published. Known flaws: about 235 duplicated images, 8 lesions both benign and malignant, some axilla "
    "images, overlays on 295 (Pawlowska et al. 2023, PMC10293973): image-level folds give numbers that are too good",
    published=tuple(Expect("images", number, label) for label, number in (("benign", 437), ("malignant", 210), ("normal", 133))),
    settings=_BUSI_SETTINGS,
)
