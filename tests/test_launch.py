"""How a stage starts its processes: how many, with how many threads, and what is said when one fails or is stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from pipeline import launch as launch_module
from pipeline.errors import ConfigError, PipelineError, StoppedError
from pipeline.launch import is_worker, launch, process_count, threads_per_process
from pipeline.parameters import LaunchParams


def test_process_count__given_or_one_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count(LaunchParams(processes=3)) == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(LaunchParams()) == 4
    assert process_count(LaunchParams(device="cpu")) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert process_count(LaunchParams()) == 1
    with pytest.raises(ConfigError, match=r"launch\.processes: got 0; allowed: auto, or a number from 1 up"):
        process_count(LaunchParams(processes=0))


def test_threads_per_process__given_or_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads_per_process(LaunchParams()) == 8
    assert threads_per_process(LaunchParams(), 3) == 2
    assert threads_per_process(LaunchParams(threads=3), 2) == 3, "a given number is the number of each process"
    assert threads_per_process(LaunchParams(), 100) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_per_process(LaunchParams()) == 2
    assert threads_per_process(LaunchParams(threads=0)) == 1


def test_is_worker__asks_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert is_worker() is False
    assert launch_module.worker_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert is_worker() is True
    assert launch_module.worker_rank() == 1


class FakeTorchrun:
    """Stands for the child process: remembers its signals and ends with `code`, or when a signal comes."""

    started: list[list[str]]
    code = 0
    raises: BaseException | None = None

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.command, self.environment, self.signals = command, env, []
        type(self).last = self

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def wait(self) -> int:
        if self.raises:
            error, type(self).raises = self.raises, None
            raise error
        if self.during:
            signal.raise_signal(self.during)
        return self.code

    during: int | None = None


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> type[FakeTorchrun]:
    kind = type("Child", (FakeTorchrun,), {})
    monkeypatch.setattr(launch_module.subprocess, "Popen", kind)
    return kind


def test_launch__command_and_environment(torchrun: type[FakeTorchrun]) -> None:
    launch(Path("stages/pretrain.py"), ["--fold", "1"], 2, 3)
    assert torchrun.last.command[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "stages/pretrain.py",
        "--fold",
        "1",
    ]
    assert torchrun.last.environment["OMP_NUM_THREADS"] == "3"


def test_launch__failure_of_a_worker(torchrun: type[FakeTorchrun]) -> None:
    torchrun.code = 1
    with pytest.raises(
        PipelineError,
        match=r"^pretrain\.py: 2 processes were started and at least one failed \(exit status 1\); see above\.$",
    ) as error:
        launch(Path("stages/pretrain.py"), [], 2, 1)
    assert not isinstance(error.value, StoppedError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_launch__passes_signals_on_and_says_stopped(torchrun: type[FakeTorchrun], number: signal.Signals) -> None:
    torchrun.code, torchrun.during = 1, number
    before = signal.getsignal(number)
    with pytest.raises(
        StoppedError, match=f"^pretrain.py: stopped by {number.name}; each worker says above whether it has saved"
    ):
        launch(Path("stages/pretrain.py"), [], 2, 1)
    assert torchrun.last.signals == [signal.SIGTERM]
    assert signal.getsignal(number) == before


def test_launch__ctrl_c_waits_for_the_workers(torchrun: type[FakeTorchrun]) -> None:
    torchrun.code, torchrun.raises = 1, KeyboardInterrupt()
    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        launch(Path("stages/pretrain.py"), [], 2, 1)
    assert torchrun.last.signals == [], "the terminal has told them already"


def test_launch__finished_in_spite_of_a_signal(torchrun: type[FakeTorchrun]) -> None:
    """The workers were done before the signal reached them: that is a success."""
    torchrun.during = signal.SIGTERM
    launch(Path("stages/pretrain.py"), [], 2, 1)
