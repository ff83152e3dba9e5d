"""Work on files in processes of their own: a file that crashes its decoder costs that file, never the run.

Used by the extract stage and by `sonoscope inspect`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from pipeline.data.limits import STALL_SECONDS, limit_process

__all__ = ["CRASHED", "run_isolated", "usable_cores"]

Task = TypeVar("Task")
Result = TypeVar("Result")

CRASHED = f"reading it ended the decoding process (crash, out of memory, or no frame within {STALL_SECONDS} seconds)"


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Set up a worker: one thread, limits, a silent end on Ctrl-C, and no life after the parent's death."""
    cv2.setNumThreads(1)
    limit_process()
    # A job in the background of a shell ignores Ctrl-C as a whole; its workers must not die of it alone.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A killed parent cannot tell its workers; without this they would wait for tasks for ever.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_pool(function: Callable[[Task], Result], waiting: deque[Task], workers: int, suspects: list[Task]) -> Iterator[Result]:
    """Work through `waiting`; if a worker process dies, put the tasks under way into `suspects` and return."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    running: dict[Future[Result], Task] = {}
    try:
        while (waiting or running) and not suspects:
            # Few tasks at a time, so that the death of a process leaves few suspects.
            while waiting and len(running) < 2 * workers:
                task = waiting.popleft()
                try:
                    running[pool.submit(function, task)] = task
                except BrokenProcessPool:
                    suspects.append(task)
                    break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    suspects.append(task)
        suspects += running.values()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_isolated(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, crashed: Callable[[Task], Result]
) -> Iterator[Result]:
    """Results in the order they come. A task that kills its process is found by trying the suspects one by one.

    Args:
        function: importable by name; never raises. workers: processes. crashed: the result of a task that kills its process.
    """
    waiting = deque(tasks)
    while waiting:
        suspects: list[Task] = []
        yield from _run_pool(function, waiting, workers, suspects)
        for task in suspects:
            dead: list[Task] = []
            yield from _run_pool(function, deque([task]), 1, dead)
            if dead:
                yield crashed(task)
