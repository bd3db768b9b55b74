"""Run a function in a process of its own, with a limit on its processor time and its memory.

A benchmark over hundreds of architectures meets crashes, endless loops and exhausted memory. Processes are forked from
a server that has imported torch and the model libraries already, so that each costs no start-up. Times are processor
times on one thread: on a machine with other work to do they say more than the clock.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

BUILD_LIMIT = 180.0  # seconds for what comes before the measured part
PATIENCE = 10  # a process that makes so little progress that it takes this many times its limit by the clock is ended
MEMORY_LIMIT = 14 * 2**30  # bytes of address space
PRELOAD = ["benchmarks.preload"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its `row`, or why there is none (`error`), and the seconds of its measured part."""

    row: Row
    error: str
    seconds: float


def isolated(function: Callable[..., Row], *args: Any, limit: float) -> Outcome:
    """Call `function(started, *args)` in a new process and return its result.

    Args:
        function: importable by name; it calls `started()` when what it should be timed for begins. Until then it has
            `BUILD_LIMIT` seconds, afterwards `limit`.
        args: picklable arguments.
        limit: seconds of processor time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, limit, function, args))
    process.start()
    sender.close()
    outcome = None
    try:
        if receiver.poll(PATIENCE * (BUILD_LIMIT + limit)):
            outcome = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Outcome({}, f"time limit of {limit:g} s", limit)
        return Outcome({}, f"process died with exit code {process.exitcode}", 0.0)
    finally:
        process.kill()
        process.join()
        receiver.close()
    return outcome or Outcome({}, f"time limit of {limit:g} s", limit)


def _limit_time(seconds: float) -> None:
    """End this process once it has used so much more processor time."""
    end = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _child(sender: Connection, limit: float, function: Callable[..., Row], args: tuple[Any, ...]) -> None:
    """Body of the process: one thread, no output, every exception sent back as text."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    start = time.process_time()
    _limit_time(BUILD_LIMIT)

    def started() -> None:
        nonlocal start
        start = time.process_time()
        _limit_time(limit)

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            row, error = function(started, *args), ""
        except BaseException as problem:
            row, error = {}, _brief(problem)
    sender.send(Outcome(row, error, time.process_time() - start))


def _brief(error: BaseException) -> str:
    """The exception in one line, with the last place in the code that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{place}"
