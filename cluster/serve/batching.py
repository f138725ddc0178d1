"""Run what several requests need in one batch, in the one thread that runs the model."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

# torch prepares each shape anew in each thread, and two threads would wait for each other.
_MODEL_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
T = TypeVar("T")
Item = TypeVar("Item")
_Waiting = tuple[Item, asyncio.Future[T]]


async def in_model_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Return the result of `work`, which runs in the process's one thread for the model."""
    return await asyncio.get_running_loop().run_in_executor(_MODEL_THREAD, work, *arguments)


class Batcher(Generic[Item, T]):
    """Collect items while a batch runs; they are the next batch. An item that comes to an idle batcher runs at once.

    `ray.serve.batch` (Ray 2.60) closes a batch before the one before has ended: unless it waits for more items, each
    item is a batch of its own, however many are waiting.

    Args:
        work: returns one result per item of a batch. If it fails for a batch of several items, each item is tried
            alone, so that an item only fails for its own fault.
        size: maximum number of items in a batch.
        wait_ms: time that each batch waits for more items, in milliseconds.
        shared: errors that are no item's fault; they end the batch and all waiting items.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[list[T]]],
        *,
        size: int,
        wait_ms: float = 0.0,
        shared: tuple[type[Exception], ...] = (),
    ) -> None:
        self._work, self._size, self._wait_s, self._shared = work, size, wait_ms / 1000, shared
        self._waiting: list[_Waiting[Item, T]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> T:
        """Return the result of an item.

        Raises:
            Exception: that of `work`.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._task is None:
            # Not in the context of this request: Serve ends calls to other processes with the request of their context.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())
        return await result

    async def _run(self) -> None:
        try:
            while self._waiting:
                if self._wait_s and len(self._waiting) < self._size:
                    await asyncio.sleep(self._wait_s)
                batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
                await self._answer([(item, result) for item, result in batch if not result.done()])
        finally:
            self._task = None

    async def _answer(self, batch: list[_Waiting[Item, T]]) -> None:
        if not batch:  # all requests were cancelled
            return
        try:
            results = await self._work([item for item, _ in batch])
        except self._shared as error:
            batch, self._waiting = batch + self._waiting, []
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
            for one in batch if len(batch) > 1 else ():
                await self._answer([one])
        except asyncio.CancelledError:
            for _, result in batch:
                result.cancel()
            if self._task is None or self._task.cancelling():  # the process ends
                raise
        else:
            for (_, result), value in zip(batch, results, strict=True):
                if not result.done():
                    result.set_result(value)


def _fail(batch: list[_Waiting[Item, T]], error: Exception) -> None:
    for _, result in batch:
        if not result.done():
            result.set_exception(error)
