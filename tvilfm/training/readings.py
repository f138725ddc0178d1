"""Loss terms of an epoch. They stay on the device and are read on the host together, about once a second.

To read a value on the host waits until the device has computed it, and the device then waits for the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

READ_S = 1.0
MAX_UNREAD = 256  # steps


class LossReadings:
    """Collects the terms of every step, reports them in order, and checks that they are finite.

    Args:
        epoch: number of the epoch.
        num_steps: steps of the epoch.
        listener: called with epoch, step, num_steps, steps_per_s and the terms of every step, some steps later.
        may_overflow: leave out terms that are not finite; the gradient scaler skips such steps.
    """

    def __init__(
        self,
        epoch: int,
        num_steps: int,
        listener: Callable[[Mapping[str, float | int]], None],
        *,
        may_overflow: bool = False,
    ) -> None:
        self._epoch, self._num_steps, self._listener, self._may_overflow = epoch, num_steps, listener, may_overflow
        self._unread: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._read = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._started = self._last = time.monotonic()

    def add(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of a step's terms. Values that are due are read.

        Raises:
            FloatingPointError: a term of this step or of an earlier one is not finite; the message names term, epoch
                and batch.
        """
        values_T = torch.stack(list(terms.values()))
        self._names = tuple(terms)
        self._unread.append(values_T.detach())
        if len(self._unread) >= MAX_UNREAD or time.monotonic() - self._last > READ_S:
            self.read()
        return values_T.sum()

    def read(self) -> None:
        """Read all values that were added.

        Raises:
            FloatingPointError: see `add`.
        """
        if not self._unread:
            return
        steps = torch.stack(self._unread).tolist()
        self._unread = []
        self._last = time.monotonic()
        for values in steps:
            self._take(dict(zip(self._names, values, strict=True)))

    def _take(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
            elif not self._may_overflow:
                raise FloatingPointError(
                    f"loss.{name}: expected a finite number, got {value} in epoch {self._epoch}, batch {self._read}. "
                    "Lower the learning rate or check this batch's images."
                )
        self._read += 1
        rate = self._read / (time.monotonic() - self._started)
        record = {"epoch": self._epoch, "step": self._read, "num_steps": self._num_steps, "steps_per_s": rate}
        self._listener({**record, **values})

    def means(self) -> dict[str, float | int]:
        """Read the rest; return the epoch, the mean of every term over its finite steps, their sum, and the seconds."""
        self.read()
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        seconds = time.monotonic() - self._started
        return {"epoch": self._epoch, **means, "loss": sum(means.values()), "seconds": seconds}
