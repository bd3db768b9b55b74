"""Run a function in a process of its own, with a limit on its time and its memory.

A benchmark over hundreds of architectures meets crashes, endless loops and exhausted memory. Processes are forked from
a server that has imported torch and the model libraries already, so that each costs no start-up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

BUILD_LIMIT = 180.0  # seconds for what comes before the measured part
MEMORY_LIMIT = 14 * 2**30  # bytes of address space
PRELOAD = ["benchmarks.isolate", "benchmarks.models", "timm", "torchvision", "torch_pruning"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its `row`, or why there is none (`error`), and the `seconds` of its measured part."""

    row: Row
    error: str
    seconds: float


def isolated(function: Callable[..., Row], *args: Any, limit: float) -> Outcome:
    """Call `function(started, *args)` in a new process and return its result.

    Args:
        function: importable by name; it calls `started()` when what it should be timed for begins. Until then it has
            `BUILD_LIMIT` seconds, afterwards `limit`.
        args: picklable arguments.
        limit: seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return _collect(receiver, process, limit)
    finally:
        process.kill()
        process.join()
        receiver.close()


def _collect(receiver: Connection, process: Any, limit: float) -> Outcome:
    """Wait for the two messages of a child, each within its limit."""
    start = time.monotonic()
    try:
        if not receiver.poll(BUILD_LIMIT):
            return Outcome({}, f"not built within {BUILD_LIMIT:g} s", 0.0)
        kind, value = receiver.recv()
        start = time.monotonic()
        if kind == "started":
            if not receiver.poll(limit):
                return Outcome({}, f"time limit of {limit:g} s", limit)
            kind, value = receiver.recv()
    except EOFError:
        process.join()
        return Outcome({}, f"process died with exit code {process.exitcode}", time.monotonic() - start)
    seconds = time.monotonic() - start
    return Outcome({}, value, seconds) if kind == "error" else Outcome(value, "", seconds)


def _child(sender: Connection, function: Callable[..., Row], args: tuple[Any, ...]) -> None:
    """Body of the process: one thread, no output, every exception sent back as text."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            row = function(lambda: sender.send(("started", None)), *args)
            sender.send(("row", row))
        except BaseException as error:
            sender.send(("error", _brief(error)))


def _brief(error: BaseException) -> str:
    """The exception in one line, with the last place in the code that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{place}"
