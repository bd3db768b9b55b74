"""Several processes that do one work: what each of them has found goes to all, and so does what fails in one.

Messages go through gloo, on the CPU, over a process group of their own, in which nobody waits for another longer than
a timeout.

A group has threads, and they must end before the interpreter does: one that still holds a tensor by then aborts its
process. So nothing that may outlive a call, such as an error with its frames, holds the group: they hold a reference
that ends with the call.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, NoReturn, TypeVar, cast

from torch import distributed as dist

from .checks import number
from .errors import DepgraphError

T = TypeVar("T")
ProcessGroup = Callable[[], Any]  # gives a process group, as long as the call lasts for which it is
UNCHANGED = "nothing was changed here"
START = 600.0  # seconds within which processes that torchrun started find each other
CALLS = count()  # all processes call equally often, so that the same number stands for the same call


@contextmanager
def group_of_all(timeout: float, left: str = UNCHANGED) -> Iterator[ProcessGroup]:
    """A process group for the messages of one call, which ends with the call, however that ends.

    Args:
        timeout: seconds that a process waits for another.
        left: what an error says of what is left.

    Raises:
        DepgraphError: a process ended, or kept this one waiting for longer.
    """
    number("timeout", timeout, 0, above=True)
    with _no_longer_than(timeout, left):
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        try:
            yield weakref.ref(group)
        finally:
            dist.destroy_process_group(group)
            del group


@contextmanager
def _no_longer_than(timeout: float, left: str) -> Iterator[None]:
    """A process that ended, or does not answer, is an error here and not a wait without an end."""
    try:
        yield
    except DepgraphError:
        raise
    except RuntimeError as error:  # what torch.distributed raises, in frames that hold the group
        traceback.clear_frames(error.__traceback__)
        raise DepgraphError(
            f"another process exited or did not respond within {timeout:g} s: {error}\n"
            f"  {left}; see the output of the other processes"
        ) from error


def gathered(work: Callable[[], T], group: ProcessGroup) -> list[T]:
    """What `work` gives in each process. Where it raises in one, all raise."""
    mine: tuple[Any, str] = None, ""
    cause: Exception | None = None
    try:
        mine = work(), ""
    except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for this process
        mine, cause = (None, f"{type(error).__name__}: {error}"), error
    every: list[Any] = [None] * dist.get_world_size(group())
    dist.all_gather_object(every, mine, group=group())
    if isinstance(cause, DepgraphError):
        raise cause
    problems = [f"process {i}: {text}" for i, (_, text) in enumerate(every) if text]
    if problems:
        raise DepgraphError("pruning failed in\n  " + "\n  ".join(problems)) from cause
    return [value for value, _ in every]


@dataclass
class Processes:
    """Those that do one work, or one alone.

    All of them call `gathered` equally often: what fails in one between two calls is told to the others in the next.

    Attributes:
        group: through which they talk; None where there is one alone.
        rank: the number of this one.
        count: how many there are.
        over: whether all know that something failed.
    """

    group: ProcessGroup | None = None
    rank: int = 0
    count: int = 1
    over: bool = False

    def gathered(self, value: T) -> list[T]:
        """The `value` of each."""
        if self.group is None:
            return [value]
        self.over = True
        found = gathered(lambda: value, self.group)
        self.over = False
        return found

    def of_first(self, value: T | None) -> T:
        """The `value` of the first, which that of the others is not."""
        return cast(T, self.gathered(value)[0])

    def failed(self, error: Exception) -> NoReturn:
        """Raise an error, and tell the others."""

        def work() -> NoReturn:
            raise error

        if self.group is not None:
            with suppress(RuntimeError):  # the others may be gone
                gathered(work, self.group)
        raise error

    def dealt(self, sizes: Mapping[str, int]) -> set[str]:
        """The names that are for this process: the largest first, each to the one that has the least so far."""
        loads, own = [0] * self.count, set()
        for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
            to = loads.index(min(loads))
            loads[to] += sizes[name]
            if to == self.rank:
                own.add(name)
        return own


@contextmanager
def together(timeout: float, left: str = UNCHANGED) -> Iterator[Processes]:
    """The processes of the default group, or those that torchrun started, which all do what follows; else this one alone.

    Args:
        timeout: as for `group_of_all`.
        left: likewise.

    Raises:
        DepgraphError: what a process raised, in all of them; or a process ended, or kept the others waiting too long.
    """
    number("timeout", timeout, 0, above=True)
    if _count() == 1:
        yield Processes()
        return
    with _default_group(min(timeout, START), left), group_of_all(timeout, left) as group:
        found = Processes(group, dist.get_rank(group()), dist.get_world_size(group()))
        try:
            yield found
        except Exception as error:
            if not found.over:
                found.failed(error)
            raise
        found.gathered(None)


def is_first() -> bool:
    """Whether this process is the one of several that speaks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return _count() == 1 or os.environ.get("RANK", "0") == "0"


def _count() -> int:
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


@contextmanager
def _default_group(timeout: float, left: str) -> Iterator[None]:
    """The one that is there, or one for this call, of the processes that torchrun started."""
    if dist.is_initialized():
        yield
        return
    with _no_longer_than(timeout, left):
        store, rank, world = _meeting_point()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"depgraph {next(CALLS)}", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


@cache
def _meeting_point() -> tuple[Any, int, int]:
    """What torchrun's variables say: a store in which processes find each other, this one's rank, and how many there are.

    It outlives a group. What one has written into it stays, so each needs a prefix of its own: with the addresses of an
    earlier group processes would wait for each other without an end.
    """
    found: tuple[Any, int, int] = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))
    return found
