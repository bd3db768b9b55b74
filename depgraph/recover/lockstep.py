"""Runs that stop at each consumer: all batches through both models side by side, layer by layer, in one pass.

A run can't be left in the middle of a forward and taken up again, but a thread can wait there. So each run has a thread;
one of them works at a time, and the others wait at the consumer they have come to. When all batches stand at a layer, its
weight is solved for; then they continue with the new weight. The cost is one pass for each model, the memory what all
batches' runs hold at one layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..data.aside import Waiting
from ..data.calibration import Batch
from ..data.consumers import Consumer
from ..data.watch import Call, StopRun, Watch
from ..surgery.on_demand import OnDemand


class Run:
    """A model on one batch, which stops at the calls of consumers."""

    def __init__(
        self, model: nn.Module, wanted: list[Consumer], batch: Batch, before: bool, joins: list[Consumer],
        waiting: Waiting | None = None,
    ) -> None:  # fmt: skip
        """Stop `before` each call, or else after it; at those in `joins` when their result is added to a stream.

        While it stops, its activations are where `waiting` has room for them.
        """
        self.watch = Watch(model, wanted, self._stop, before, choices=True, joins=joins)
        self.activations = None if waiting is None else waiting.of_a_run()
        self.watch.activations = self.activations
        self.batch = batch
        self.call: Call | None = None
        self.done = self.closing = False
        self.failure: BaseException | None = None
        self._go, self._come = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def advance(self) -> Call | None:
        """Go on to the next call of a consumer; None at the end of the run. What the run raises is raised here."""
        self.call = None
        if not self.done:
            self._go.release()
            self._come.acquire()
            if self.failure is not None:
                raise self.failure
        return self.call

    def to(self, consumer: Consumer) -> Call | None:
        """Continue to the next call of this consumer; None where there is none."""
        while (call := self.advance()) is not None:
            if call.consumer is consumer:
                return call
        return None

    def close(self) -> None:
        """End the run where it stands."""
        self.closing, self.call = True, None
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.05)
        if self.activations is not None:
            self.activations.end()

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self.closing:
                self.watch.run_prepared(self.batch)
        except BaseException as error:  # noqa: BLE001  raised again where the run is waited for
            self.failure = error
        finally:
            self.done = True
            self._come.release()

    def _stop(self, call: Call) -> None:
        if self.closing:
            raise StopRun
        self.call = call
        if self.activations is not None:
            self.activations.wait()
        self._come.release()
        self._go.acquire()
        if self.closing:
            raise StopRun
        if self.activations is not None:
            self.activations.go_on()

    @contextmanager
    def there(self, changed: bool = False) -> Iterator[bool]:
        """What the call at which it stands was given is in memory; it may be `changed`. Whether it was not before."""
        if self.activations is None or not self.activations.away:
            yield False
            return
        self.activations.bring()
        try:
            yield True
        finally:
            self.activations.take_away(changed)

    def write(self, name: str, values: torch.Tensor) -> None:
        """Tensor `name` has changed: so must this run's copy, where it has one."""
        mine: Any = self.watch.tensors[name]
        if not isinstance(mine, OnDemand) and mine.data_ptr() != values.data_ptr():
            with torch.no_grad():
                mine.copy_(values)
