"""Benchmarks of everything before the network, one thread: reading frames and drawing augmented views."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from harness import compare, make_store, print_table
from PIL import Image, ImageFilter
from torchvision import transforms as tv

from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.store import FrameStore
from pipeline.data.transforms import draw_view, render, resize_frame
from pipeline.parameters import AugmentationParams

SIZE = 224
CROP_ONLY = AugmentationParams(crop="random", horizontal_flip=0, jitter=0, blur=0)
FULL = AugmentationParams()


def reading(folder: Path, repeats: int, quick: bool) -> None:
    """Random single frames of 256 x 256 pixels, warm page cache: from the tars, from files, from memory."""
    for color in (False, True):
        name = "colour" if color else "grey"
        store = make_store(folder / name, videos=8, frames=12 if quick else 24, size=256, color=color)
        files = _unpack(store, folder / f"{name}_files", color)
        cache = FrameCache(gather_videos([store]), 256)
        asked = [(int(v), int(n)) for v, n in np.random.default_rng(0).integers(0, [8, 12 if quick else 24], (500, 2))]
        ids = [row.video for row in store.manifest.rows]
        flag = cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE

        def from_files(files: dict = files, asked: list = asked, flag: int = flag) -> int:
            for pair in asked:
                cv2.imread(files[pair], flag)
            return len(asked)

        def from_store(store: FrameStore = store, asked: list = asked, ids: list = ids) -> int:
            for video, number in asked:
                store.frame(ids[video], number)
            return len(asked)

        def from_memory(cache: FrameCache = cache, asked: list = asked) -> int:
            # Copied, because the cache hands out a reference and looking at no pixel would cost nothing.
            for _ in range(20):
                for video, number in asked:
                    cache.frame(video, number).copy()
            return 20 * len(asked)

        cases = {
            "one JPEG file a frame, cv2.imread": from_files,
            "FrameStore.frame (tar, mapped)": from_store,
            "FrameCache.frame and a copy (in memory)": from_memory,
        }
        taken = compare(cases, repeats)
        print_table(f"Reading, {name}, 256 px, 1 thread", taken, "images", baseline="one JPEG file a frame, cv2.imread")


def _unpack(store: FrameStore, folder: Path, color: bool) -> dict[tuple[int, int], str]:
    """The same JPEG bytes as single files; path by (video, frame)."""
    folder.mkdir()
    paths = {}
    for video, row in enumerate(store.manifest.rows):
        tar = (store.folder / f"{row.video}.tar").read_bytes()
        index = np.load(store.folder / f"{row.video}.idx.npy", allow_pickle=False)
        for number, (offset, length) in enumerate(index.tolist()):
            path = folder / f"{row.video}_{number:05d}.jpg"
            path.write_bytes(tar[offset : offset + length])
            paths[video, number] = str(path)
    return paths


def augmentation(folder: Path, repeats: int, quick: bool) -> None:
    """uint8 frames in memory to uint8 views of 224 x 224 in one array, 1 thread: ours, OpenCV by hand, torchvision."""
    store = make_store(folder / "views", videos=8, frames=4, size=256, color=False)
    grey = [frame for row in store.manifest.rows for frame in store.frames(row.video, range(row.frames))]
    for channels in (1, 3):
        for name, side, params in (("crop only", 256, CROP_ONLY), ("full", 280, FULL)):
            frames = [resize_frame(frame, side) for frame in grey]
            if channels == 3:
                frames = [cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB) for frame in frames]
            out = np.empty((len(frames), SIZE, SIZE, *(() if channels == 1 else (3,))), np.uint8)
            passes = 2 if quick else 8
            cases = {
                "torchvision, PIL": _torchvision(frames, params, out, 1 if quick else 2),
                "OpenCV by hand": _by_hand(frames, params, out, passes),
                "draw_view + render": _ours(frames, params, out, passes),
            }
            taken = compare(cases, repeats)
            title = f"Augmentation, {name}, {'grey' if channels == 1 else 'colour'}, {side} to {SIZE} px, 1 thread"
            print_table(title, taken, "images", baseline="torchvision, PIL")


def _ours(frames: list[np.ndarray], params: AugmentationParams, out: np.ndarray, passes: int) -> Callable[[], int]:
    rng = np.random.default_rng(0)

    def case() -> int:
        for _ in range(passes):
            for row, frame in enumerate(frames):
                render(frame, draw_view(params, rng, frame.shape[:2], SIZE), SIZE, out[row])
        return passes * len(frames)

    return case


def _by_hand(frames: list[np.ndarray], params: AugmentationParams, out: np.ndarray, passes: int) -> Callable[[], int]:
    """The same operations as a bare loop that could serve nothing else: the floor for `draw_view` + `render`."""
    rng = random.Random(0)
    resized = params.crop == "resized"

    def view(frame: np.ndarray) -> np.ndarray:
        width = rng.randint(180, 280) if resized else SIZE
        height = rng.randint(180, 280) if resized else SIZE
        left, top = rng.randint(0, frame.shape[1] - width), rng.randint(0, frame.shape[0] - height)
        image = frame[top : top + height, left : left + width]
        if resized:
            image = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        if rng.random() < params.horizontal_flip:
            image = cv2.flip(image, 1)
        if rng.random() < params.jitter:
            image = cv2.addWeighted(image, rng.uniform(0.7, 1.3), image, 0, rng.uniform(-20, 20))
        if rng.random() < params.blur:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, 2.0))
        return image

    def case() -> int:
        for _ in range(passes):
            for row, frame in enumerate(frames):
                out[row] = view(frame)
        return passes * len(frames)

    return case


def _torchvision(
    frames: list[np.ndarray], params: AugmentationParams, out: np.ndarray, passes: int
) -> Callable[[], int]:
    """torchvision's PIL transforms with the same operations and probabilities (blur: Pillow's, as in MoCo v2)."""
    if params.crop == "random":
        pipeline = tv.RandomCrop(SIZE)
    else:
        jitter = tv.ColorJitter(brightness=params.brightness, contrast=params.contrast)
        blur = tv.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
        pipeline = tv.Compose([
            tv.RandomResizedCrop(SIZE, params.scale, params.ratio), tv.RandomHorizontalFlip(params.horizontal_flip),
            tv.RandomApply([jitter], params.jitter), tv.RandomApply([blur], params.blur),
        ])
    pictures = [Image.fromarray(frame) for frame in frames]

    def case() -> int:
        for _ in range(passes):
            for row, picture in enumerate(pictures):
                out[row] = np.asarray(pipeline(picture))
        return passes * len(pictures)

    return case
