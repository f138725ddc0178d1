"""Batches of what several requests need."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar

import pytest

from cluster.serve.batching import Batcher


class Doubling:
    """Work that doubles numbers, once it is told to; it fails for a batch with a zero."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.goes_on = asyncio.Event()

    async def __call__(self, batch: list[int]) -> list[int]:
        self.batches.append(batch)
        await self.goes_on.wait()
        if 0 in batch:
            raise ValueError("expected no zero")
        return [2 * number for number in batch]


async def started(batcher: Batcher[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(batcher(number)) for number in numbers]
    for _ in range(3):  # until the first is at work
        await asyncio.sleep(0)
    return tasks


def test_what_comes_during_a_batch_is_the_next_one() -> None:
    async def scenario() -> None:
        work = Doubling()
        batcher = Batcher(work, size=3)
        first = await started(batcher, 1)
        rest = await started(batcher, 2, 3, 4, 5)
        assert work.batches == [[1]]
        work.goes_on.set()
        assert await asyncio.gather(*first, *rest) == [2, 4, 6, 8, 10]
        assert work.batches == [[1], [2, 3, 4], [5]]

    asyncio.run(scenario())


def test_an_item_fails_for_its_own_fault_only() -> None:
    async def scenario() -> None:
        work = Doubling()
        batcher = Batcher(work, size=3)
        tasks = [*await started(batcher, 1), *await started(batcher, 0, 2, 3)]
        work.goes_on.set()
        first, failed, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert [first, *others] == [2, 4, 6] and str(failed) == "expected no zero"
        assert await batcher(4) == 8  # it is idle again

    asyncio.run(scenario())


def test_an_error_that_is_no_items_fault_ends_all_that_wait() -> None:
    async def scenario() -> None:
        work = Doubling()
        batcher = Batcher(work, size=2, shared=(ValueError,))
        tasks = [*await started(batcher, 0), *await started(batcher, 1, 2, 3)]
        work.goes_on.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in errors] == ["expected no zero"] * 4
        assert work.batches == [[0]] and await batcher(4) == 8

    asyncio.run(scenario())


def test_a_batch_is_not_part_of_the_request_that_began_it() -> None:
    request: ContextVar[str] = ContextVar("request", default="none")

    async def scenario() -> None:
        async def work(batch: list[int]) -> list[str]:
            return [request.get()] * len(batch)

        request.set("the first")
        assert await Batcher(work, size=2)(1) == "none"

    asyncio.run(scenario())


def test_a_batch_that_is_cancelled_leaves_the_batcher_usable() -> None:
    async def scenario() -> None:
        calls = 0

        async def work(batch: list[int]) -> list[int]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise asyncio.CancelledError
            return batch

        batcher = Batcher(work, size=1)
        first, second = await asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError) and second == 2
        assert await batcher(3) == 3

    asyncio.run(scenario())


def test_a_request_that_ended_is_not_in_a_later_batch() -> None:
    async def scenario() -> None:
        work = Doubling()
        batcher = Batcher(work, size=4)
        first, running = await started(batcher, 1), await started(batcher, 2, 3)
        running[0].cancel()
        first[0].cancel()
        work.goes_on.set()
        assert await running[1] == 6
        assert work.batches == [[1], [3]]
        with pytest.raises(asyncio.CancelledError):
            await running[0]

    asyncio.run(scenario())


def test_a_batch_waits_for_more() -> None:
    async def scenario() -> None:
        work = Doubling()
        work.goes_on.set()
        batcher = Batcher(work, size=3, wait_ms=50.0)
        tasks = [*await started(batcher, 1), *await started(batcher, 2)]
        assert await asyncio.gather(*tasks) == [2, 4]
        assert work.batches == [[1, 2]]

    asyncio.run(scenario())
