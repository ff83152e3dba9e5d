"""What `sonoscope doctor` finds out about the machine: Python, packages, torch, devices, memory, OpenCV and codecs.

Libraries are probed in processes of their own with a time limit, so that one that crashes or hangs is reported
instead of ending the report. Nothing here names a user or a host.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Check", "locked_versions", "machine_checks", "no_answer"]

GIB = 1024**3
TORCH_SECONDS, OPENCV_SECONDS = 180.0, 60.0
"""A cold import of torch from a slow disk takes a minute; a hang does not end."""

_TORCH_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
facts = {"torch": torch.__version__, "cuda_build": torch.version.cuda, "devices": []}
import torchvision
from torchvision.ops import nms
nms(torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.]), 0.5)
facts["torchvision"] = torchvision.__version__
facts["gloo"] = dist.is_available() and dist.is_gloo_available()
facts["nccl"] = dist.is_available() and dist.is_nccl_available()
facts["mps"] = torch.backends.mps.is_available()
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        facts["devices"].append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    facts["sum"] = float(torch.ones(8, device="cuda").sum())
print(json.dumps(facts))
"""

_OPENCV_PROBE = """
import json, sys, pathlib
import numpy, cv2
folder = pathlib.Path(sys.argv[1])
frames = [numpy.full((64, 96, 3), 40 * index + 20, numpy.uint8) for index in range(5)]
read = {}
for kind, code in (("mp4", "mp4v"), ("avi", "MJPG"), ("gif", None)):
    path = str(folder / f"probe.{kind}")
    if code is None:
        from PIL import Image
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    else:
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*code), 10.0, (96, 64))
        for frame in frames:
            writer.write(frame)
        writer.release()
    capture, count = cv2.VideoCapture(path), 0
    while True:
        good, image = capture.read()
        if not good:
            break
        # Lossy codecs move a flat grey by a few steps; a wrong frame is 40 away.
        count += abs(float(image.mean()) - (40 * count + 20)) < 12
    read[kind] = count
print(json.dumps({"version": cv2.__version__, "read": read}))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    """`ok`, `warning` (works, with a loss), or `problem` (something will fail)."""
    found: str
    todo: str = ""


def no_answer(name: str, late: subprocess.TimeoutExpired) -> Check:
    """What is slow is not known to be broken."""
    found = f"no answer within {late.timeout:g} s; the machine may be busy"
    return Check(name, "warning", found, "run 'sonoscope doctor' again when less is running; if it stays silent, it hangs")


def _probe(code: str, *arguments: str, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Run `code` in a fresh interpreter; its JSON line, or None and what went wrong in one line.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode < 0:
        return None, f"the process died of signal {-done.returncode}"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (ValueError, IndexError):
        return None, lines[-1].strip() if lines else f"exit code {done.returncode}"


def locked_versions(lock: Path) -> dict[str, str]:
    """Package to exact version of a compiled lock, for this Python and system: other markers are left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not re.match(r"[A-Za-z0-9]", line):
            continue
        requirement = Requirement(line.rstrip("\\ "))
        if requirement.marker is None or requirement.marker.evaluate():
            versions[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    return versions


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Check("python", "ok", version)
    return Check("python", "problem", version, "use Python 3.10 to 3.13: make install PYTHON=python3.12")


def _packages(root: Path) -> list[Check]:
    """Installed versions against the lock."""
    lock = root / "requirements.lock"
    if not lock.is_file():
        return [Check("packages", "warning", "no requirements.lock here", "run from the project folder")]
    missing, different, same = [], [], 0
    for name, wanted in sorted(locked_versions(lock).items()):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # The headless wheel stands in for opencv-python where the system has no libGL.
            try:
                installed = importlib.metadata.version(f"{name}-headless") if name == "opencv-python" else ""
            except importlib.metadata.PackageNotFoundError:
                installed = ""
        if not installed:
            missing.append(name)
        elif installed.split("+")[0] != wanted:
            different.append(f"{name} {installed} (lock: {wanted})")
        else:
            same += 1
    checks = []
    if missing:
        checks.append(Check("packages", "problem", f"missing: {', '.join(missing)}", "make install"))
    if different:
        checks.append(
            Check(
                "packages",
                "warning",
                f"{same} as locked; not as locked: {', '.join(different)}",
                "make install gives the locked versions; others may work, but results may differ",
            )
        )
    return checks or [Check("packages", "ok", f"{same} packages, all as locked")]


def _nvidia_present() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def _torch() -> list[Check]:
    """torch and torchvision as a pair, devices, communication, precision."""
    try:
        facts, wrong = _probe(_TORCH_PROBE, seconds=TORCH_SECONDS)
    except subprocess.TimeoutExpired as late:
        return [no_answer("torch", late)]
    if facts is None:
        return [
            Check(
                "torch",
                "problem",
                f"torch and torchvision do not work together: {wrong}",
                "make install; torch and torchvision must come from the same place and be a matching pair",
            )
        ]
    checks = [Check("torch", "ok", f"torch {facts['torch']} with torchvision {facts['torchvision']}")]
    devices = facts["devices"]
    if devices:
        text = "; ".join(f"{d['name']} {d['free'] / GIB:.0f} of {d['total'] / GIB:.0f} GiB free" for d in devices)
        checks.append(Check("gpu", "ok", text))
        checks.append(
            Check("bfloat16", "ok", "native on the GPU")
            if facts["bf16"]
            else Check("bfloat16", "ok", "not native on this GPU; pretrain.precision auto uses float32")
        )
    elif _nvidia_present():
        build = f"torch is built for CUDA {facts['cuda_build']}" if facts["cuda_build"] else "torch is a CPU-only build"
        checks.append(
            Check(
                "gpu",
                "warning",
                f"an NVIDIA driver is here, but torch sees no GPU; {build}",
                "compare with the CUDA version that nvidia-smi shows; update the driver, or check CUDA_VISIBLE_DEVICES",
            )
        )
    elif facts["mps"]:
        checks.append(
            Check("gpu", "ok", "Apple MPS is here; the stages use the CPU (launch.device: auto, cpu or cuda)")
        )
    else:
        checks.append(Check("gpu", "ok", "none; the CPU is used, in float32"))
    if not facts["gloo"]:
        checks.append(Check("distributed", "problem", "torch without gloo", "install the torch of requirements.lock"))
    elif len(devices) > 1 and not facts["nccl"]:
        checks.append(Check("distributed", "warning", "gloo, no NCCL for several GPUs", "install a torch with NCCL"))
    else:
        checks.append(Check("distributed", "ok", "gloo and nccl" if facts["nccl"] else "gloo"))
    return checks


def _gib(count: float) -> str:
    return f"{count / GIB:.0f} GiB" if count >= 10 * GIB else f"{count / GIB:.1f} GiB"


def _memory_limit() -> int | None:
    """The memory limit of the container, where there is one, in bytes."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _cores() -> int:
    """Cores this process may use, fewer than the machine has under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resources(root: Path) -> list[Check]:
    """CPU, memory, disk and shared memory."""
    import psutil

    memory = psutil.virtual_memory()
    total = min(memory.total, _memory_limit() or memory.total)
    free = min(memory.available, total)
    checks = [
        Check("cpu", "ok", f"{_cores()} cores usable"),
        Check("memory", "ok", f"{_gib(free)} of {_gib(total)} free")
        if free >= 2 * GIB
        else Check(
            "memory",
            "warning",
            f"{_gib(free)} of {_gib(total)} free",
            "lower pretrain.memory_budget_mb, batch_size and extract.workers",
        ),
    ]
    for name, folder, little in (
        ("disk", root, 5),
        ("scratch disk", root / ".scratch", 5),
        ("shared memory", Path("/dev/shm"), 0.25),
    ):
        if not folder.exists():
            continue
        free = shutil.disk_usage(folder).free
        if free >= little * GIB:
            checks.append(Check(name, "ok", f"{_gib(free)} free"))
        elif name == "shared memory":
            checks.append(
                Check(
                    name,
                    "warning",
                    f"{_gib(free)} free in /dev/shm",
                    "in a container: docker run --shm-size=2g; several processes a machine need it",
                )
            )
        else:
            checks.append(
                Check(
                    name,
                    "warning" if free > GIB else "problem",
                    f"{_gib(free)} free",
                    "make room, or put the project on a larger disk; 'dvc gc --workspace' drops old results",
                )
            )
    return checks


def _opencv(folder: Path) -> list[Check]:
    """Whether cv2 imports, and whether it reads what it wrote."""
    try:
        facts, wrong = _probe(_OPENCV_PROBE, str(folder), seconds=OPENCV_SECONDS)
    except subprocess.TimeoutExpired as late:
        return [no_answer("opencv", late)]
    if facts is None:
        if re.search(r"libGL|libgthread|libglib|libEGL|libxcb|libSM|libXext", wrong):
            todo = (
                "make install (puts the headless wheel in its place), or as administrator: "
                "apt-get install libgl1 libglib2.0-0"
            )
        else:
            todo = "make install"
        return [Check("opencv", "problem", wrong, todo)]
    checks = [Check("opencv", "ok", facts["version"])]
    bad = [f"{kind}: {count} of 5 frames" for kind, count in facts["read"].items() if count != 5]
    if bad:
        checks.append(
            Check(
                "codecs",
                "warning",
                "; ".join(bad),
                "this OpenCV cannot write or read these; make install gives one that can",
            )
        )
    else:
        checks.append(Check("codecs", "ok", f"{', '.join(facts['read'])} written and read back"))
    return checks


def machine_checks(root: Path) -> list[Check]:
    """All checks of the machine for the project in `root`; takes some seconds, most of them the import of torch."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        opencv = _opencv(Path(folder))
    return [_python(), *_packages(root), *_torch(), *_resources(root), *opencv]
