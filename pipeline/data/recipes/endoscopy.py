"""Recipes of endoscopy: Cholec80 (phases of every frame), PolypsSet (boxes, sequences that are no classes), PolypDiag."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from pipeline.data.frame_labels import read_frame_labels
from pipeline.data.recipes.base import (
    Expect,
    Recipe,
    Row,
    Scan,
    below,
    inside,
    media_below,
    read_table,
)
from pipeline.errors import DataError

__all__ = ["CHOLEC80", "PHASES", "POLYPDIAG", "POLYPSSET", "TOOLS"]

PHASES = (
    "Preparation", "CalotTriangleDissection", "ClippingCutting", "GallbladderDissection", "GallbladderRetraction", "CleaningCoagulation",
    "GallbladderPackaging",
)
TOOLS = ("Grasper", "Bipolar", "Hook", "Scissors", "Clipper", "Irrigator", "SpecimenBag")
_STRIDE = 25
"""Rows of a phase file from one second to the next."""
_VIDEO = re.compile(r"video(\d\d)")
_MAX_XML = 1 << 20


@dataclass(frozen=True)
class _Cholec80(Recipe):
    """Videos, or frames cut once a second, with a phase file and a tool file each."""

    def read(self, root: Path, variant: str) -> Scan:
        prefix = below(root, "phase_annotations")
        kinds = [name for name in ("frames", "videos") if prefix is not None and (root / prefix / name).is_dir()]
        if prefix is None or not kinds:
            raise self.foreign(root)
        scan, kind = Scan(root, form=kinds[0]), kinds[0]
        if len(kinds) == 2:
            scan.notes.append("frames and videos are both there: the frames are used")
        media = media_below(root, f"{prefix}{kind}/", notes=scan.notes)
        for path, item in media.items():
            name = PurePosixPath(path).stem
            if not (match := _VIDEO.fullmatch(name)) or (item.kind == "frames") != (kind == "frames"):
                scan.deviations.append(f"surplus: {path} is none of {kind}/video01 to video80")
                continue
            frames = sum(1 for file in item.location.iterdir() if file.name[0] != ".") if item.kind == "frames" else 0
            self._annotations(scan, root, prefix, name, frames)
            scan.rows.append(Row(path, item.kind, patient=name, split=_cholec_split(int(match[1]), variant), frames=frames))
        met = {row.patient for row in scan.rows}
        scan.deviations += [f"missing: {prefix}{kind}/{name}" for number in range(1, 81) if (name := f"video{number:02d}") not in met]
        scan.settings = {"data.frame_labels": f"{prefix}phase_annotations/{{stem}}-phase.txt"}
        # Of a video, a second is 25 rows and one frame is kept a second; frames are those seconds already.
        scan.settings |= {"data.frame_label_stride": _STRIDE} if kind == "frames" else {"extract.frames_per_second": 1}
        return scan

    def _annotations(self, scan: Scan, root: Path, prefix: str, name: str, frames: int) -> None:
        """Compare the two annotation files of a video with what they should hold."""
        shown = f"{prefix}phase_annotations/{name}-phase.txt"
        try:
            labels = read_frame_labels(inside(root, shown), shown)
        except DataError as error:
            scan.deviations.append(f"{'missing' if 'not found' in str(error) else 'wrong'}: {error}")
        else:
            foreign = sorted(set(labels.names) - set(PHASES))
            if foreign:
                scan.deviations.append(f"wrong: {shown}: phase {', '.join(foreign[:5])}; known: {', '.join(PHASES)}")
            last = int(labels.frames[-1])
            if frames and last + _STRIDE < _STRIDE * (frames - 1):
                scan.deviations.append(f"wrong: {shown} ends at row {last}, {frames} frames need {_STRIDE * (frames - 1)}")
        shown = f"{prefix}tool_annotations/{name}-tool.txt"
        try:
            with open(inside(root, shown), encoding="utf-8-sig") as handle:
                header = handle.readline(_MAX_XML).split()
        except (DataError, OSError, UnicodeDecodeError) as error:
            scan.deviations.append(f"missing: {error}" if isinstance(error, DataError) else f"wrong: {shown}: cannot be read as UTF-8 text")
        else:
            if header != ["Frame", *TOOLS]:
                scan.deviations.append(f"wrong: {shown}: header {' '.join(header)[:200]}; expected Frame {' '.join(TOOLS)}")


def _cholec_split(number: int, variant: str) -> str:
    if variant == "40/40":
        return "train" if number <= 40 else "test"
    return "train" if number <= 40 else "validation" if number <= 48 else "test"


CHOLEC80 = _Cholec80(
    name="cholec80", title="Cholec80",
    about="80 videos of gallbladder removal with the phase of every frame (7 phases) and the presence of 7 tools once a second.",
    citation="Twinanda et al. 2017 (EndoNet), IEEE TMI 36(1):86, doi:10.1109/TMI.2016.2593957",
    licence="CC BY-NC-SA 4.0, non-commercial research only",
    obtain=(
        "fill in the request form on camma.unistra.fr (datasets, Cholec80) and accept its terms",
        "unpack the archive (about 85 GB); give the folder that holds videos (or frames), phase_annotations and tool_annotations",
    ),
    layout="videos/video01.mp4 ... video80.mp4        or frames/video01/video01_000001.png ... (one a second)\n"
    "phase_annotations/video01-phase.txt      Frame<TAB>Phase, a row a frame at 25 a second\n"
    "tool_annotations/video01-tool.txt        Frame<TAB>Grasper ... SpecimenBag, a row every 25 frames",
    labels="phase_annotations, by name: " + ", ".join(PHASES),
    patients="one video, one patient: assumed, as all publications do",
    certainty="split 40/8/32 as in the published program; other publications use 40/40. Tools are checked, but no stage reads them. Training "
    "of the fold includes videos 41-48, of which epochs are chosen; the published encoder saw 01-40 only",
    published=(Expect("files", 80), Expect("patients", 80)),
    settings={"extract.color": "rgb", "data.classes": list(PHASES)},
    variants={"40/8/32": "train 01-40, validation 41-48, test 49-80", "40/40": "train 01-40, test 41-80"},
    split_by="patient",
    presets=("phases_cholec80",),
)


@dataclass(frozen=True)
class _PolypsSet(Recipe):
    """VOC boxes; training images lie flat, validation and test have one numbered folder a sequence."""

    def read(self, root: Path, variant: str) -> Scan:
        prefix = below(root, "train2019", "test2019")
        if prefix is None:
            raise self.foreign(root)
        scan = Scan(root)
        # A flat folder of numbered pictures would be taken for one video, so its files are named.
        flat = [f"{prefix}{part}/Image/{item.name}" for part in _POLYP_SPLITS if (root / prefix / part / "Image").is_dir()
                for item in (root / prefix / part / "Image").iterdir() if item.is_file()]
        media = media_below(root, prefix, named=flat, notes=scan.notes)
        for path, item in media.items():
            part, *rest = path.removeprefix(prefix).split("/")
            if part not in _POLYP_SPLITS or rest[:1] != ["Image"]:
                scan.deviations.append(f"surplus: {path} lies outside train2019, val2019 and test2019 / Image")
                continue
            names = sorted(file.name for file in item.location.iterdir() if file.name[0] != ".") if item.kind == "frames" else [""]
            labels: set[str] = set()
            for name in names:
                picture = f"{path}/{name}" if name else path
                labels |= self._boxes(scan, root, picture)
            label = next(iter(labels)) if len(labels) == 1 else ""
            patient = f"{part}/{rest[1]}" if len(rest) > 2 or item.kind == "frames" else ""
            scan.rows.append(Row(path, item.kind, label, patient, _POLYP_SPLITS[part], len(names) if item.kind == "frames" else 0))
        without = sum(not row.label for row in scan.rows)
        if without:
            scan.notes.append(f"{without} of {len(scan.rows)} rows have no box, or boxes of both kinds, and stay unlabelled")
        return scan

    def _boxes(self, scan: Scan, root: Path, picture: str) -> set[str]:
        """Labels of the boxes of one picture; the boxes go into the scan."""
        shown = str(PurePosixPath(picture.replace("/Image/", "/Annotation/", 1)).with_suffix(".xml"))
        try:
            path = inside(root, shown)
            raw = path.read_bytes() if path.stat().st_size <= _MAX_XML else b"<!DOCTYPE"
            # Entities are how a small file asks for gigabytes; VOC files have none.
            if b"<!" in raw:
                raise DataError(f"{shown}: too large, or has a document type; expected a plain VOC annotation")
            tree = ElementTree.fromstring(raw)
            found = set()
            for item in tree.iter("object"):
                label = (item.findtext("name") or "").strip().casefold()
                corners = [round(float(item.findtext(f"bndbox/{key}") or "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
                if label not in ("adenomatous", "hyperplastic"):
                    raise DataError(f"{shown}: object '{label[:40]}'; known: adenomatous, hyperplastic")
                scan.boxes.append((picture, label, corners[0], corners[1], corners[2], corners[3]))
                found.add(label)
            return found
        except (ElementTree.ParseError, ValueError, OverflowError) as error:
            scan.deviations.append(f"wrong: {shown}: no VOC annotation ({error})")
        except DataError as error:
            scan.deviations.append(f"{'missing' if 'not found' in str(error) else 'wrong'}: {error}")
        return set()


_POLYP_SPLITS = {"train2019": "train", "val2019": "validation", "test2019": "test"}

POLYPSSET = _PolypsSet(
    name="polypsset", title="PolypsSet",
    about="Colonoscopy frames with boxes of adenomatous and hyperplastic polyps, collected from several sources.",
    citation="Li et al. 2021, PLOS ONE 16(8):e0255809; doi:10.7910/DVN/FCBUOR",
    licence="see the terms on its page; not confirmed",
    obtain=("Harvard Dataverse, doi:10.7910/DVN/FCBUOR", "unpack it; give the folder that holds train2019, val2019 and test2019"),
    layout="train2019/Image/1.jpg ...         train2019/Annotation/1.xml ...\n"
    "val2019/Image/1/1.jpg ...         val2019/Annotation/1/1.xml ...    (one folder a sequence)\n"
    "test2019/Image/1/1.jpg ...        test2019/Annotation/1/1.xml ...",
    labels="object names of the boxes: adenomatous, hyperplastic. The numbered folders are sequences, not classes",
    patients="validation and test: the sequence; training: unknown, so only the official split is safe",
    certainty="counts of train and test from a secondary page, of val from memory of one; what unit the publication classifies is not known. "
    "Boxes are written to boxes.csv; no stage crops by them. Each training picture is a video of its own in the frame store",
    published=(Expect("frames", 28773, split="train"), Expect("frames", 4254, split="validation"), Expect("frames", 4872, split="test")),
    settings={"extract.color": "rgb", "data.classes": ["adenomatous", "hyperplastic"]},
)


@dataclass(frozen=True)
class _PolypDiag(Recipe):
    """Videos in one folder; lists of `path,label` for train, val and test."""

    def read(self, root: Path, variant: str) -> Scan:
        prefix = below(root, "videos", "splits")
        files = [(split, f"{prefix}splits/{name}.{ending}") for split, name in _DIAG_LISTS for ending in ("txt", "csv")]
        lists = {split: file for split, file in files if (root / file).is_file()}
        if prefix is None or "train" not in lists:
            raise self.foreign(root)
        scan = Scan(root)
        media = media_below(root, f"{prefix}videos/", notes=scan.notes)
        met: dict[str, str] = {}
        for split, file in lists.items():
            for row in read_table(root, file, ("file", "class"), "file", ("file", "class")):
                path = f"{prefix}videos/{row.cells['file']}"
                if path in met:
                    scan.notes.append(f"{path} is listed twice ({met[path]} and {row.where}); the first counts")
                    continue
                met[path] = row.where
                if path not in media:
                    scan.deviations.append(f"missing: {path} ({row.where})")
                elif row.cells["class"] not in ("0", "1"):
                    scan.deviations.append(f"wrong: {row.where}: label '{row.cells['class']}'; expected 0 or 1")
                else:
                    scan.rows.append(Row(path, media[path].kind, row.cells["class"], split=split, frames=0))
        scan.deviations += [f"surplus: {path} stands in no list" for path in media if path not in met]
        return scan


_DIAG_LISTS = (("train", "train"), ("test", "test"), ("validation", "val"))

POLYPDIAG = _PolypDiag(
    name="polypdiag", title="PolypDiag",
    about="Colonoscopy clips labelled with or without polyp, as Endo-FM prepares them.",
    citation="Tian et al. 2022, MICCAI (contrastive transformer for polyp frames); Wang et al. 2023 (Endo-FM)",
    licence="not stated; its sources (Hyper-Kvasir, LDPolypVideo) have terms of their own",
    obtain=(
        "the links stand on github.com/openmedlab/Endo-FM and github.com/tianyu0207/weakly-polyp",
        "unpack it; give the folder that holds videos and splits",
    ),
    layout="videos/clip_0001.mp4 ...\nsplits/train.txt, val.txt, test.txt     lines clip_0001.mp4,0   (or .csv)",
    labels="0 or 1 of the lists, as they are",
    patients="unknown: every clip counts as one patient",
    certainty="no counts are checked; that 1 means polyp, and that val.txt repeats test.txt in some copies, is hearsay",
    settings={"data.group": "video", "extract.color": "rgb", "data.classes": ["0", "1"]},
)
