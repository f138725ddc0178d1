"""Run what several requests need in one batch, in the one thread that runs the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

# torch prepares each shape anew in each thread, and two threads would wait for each other.
_MODEL_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
T = TypeVar("T")
Item = TypeVar("Item")


async def in_model_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Return the result of `work`, which runs in the process's one thread for the model."""
    return await asyncio.get_running_loop().run_in_executor(_MODEL_THREAD, work, *arguments)


class Batcher(Generic[Item, T]):
    """Collect items while a batch runs; they are the next batch. An item that comes to an idle batcher runs at once.

    `ray.serve.batch` (Ray 2.60) closes a batch before the one before has ended: unless it waits for more items, each
    item is a batch of its own, however many are waiting.

    Args:
        work: returns one result per item of a batch.
        size: maximum number of items in a batch.
        wait_ms: time that each batch waits for more items, in milliseconds.
    """

    def __init__(self, work: Callable[[list[Item]], Awaitable[list[T]]], *, size: int, wait_ms: float = 0.0) -> None:
        self._work, self._size, self._wait_s = work, size, wait_ms / 1000
        self._waiting: list[tuple[Item, asyncio.Future[T]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> T:
        """Return the result of an item.

        Raises:
            Exception: the batch failed; all its items get the same error.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await result

    async def _run(self) -> None:
        while self._waiting:
            if self._wait_s and len(self._waiting) < self._size:
                await asyncio.sleep(self._wait_s)
            batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            batch = [(item, result) for item, result in batch if not result.done()]  # cancelled requests
            try:
                results = await self._work([item for item, _ in batch]) if batch else []
            except Exception as error:
                for _, result in batch:
                    if not result.done():
                        result.set_exception(error)
            else:
                for (_, result), value in zip(batch, results, strict=True):
                    if not result.done():
                        result.set_result(value)
        self._task = None
