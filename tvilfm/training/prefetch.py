"""Batches prepared ahead of the step that needs them, and copied to the device while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch

from tvilfm.data.tri_modal import Batch

AHEAD = 2


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on the device, in order. A thread prepares the next `AHEAD` of them.

    For a CUDA device, the thread puts a batch into pinned memory and copies it on a stream of its own, so the copy and
    the computation of the batch before it overlap.

    Raises:
        Exception: the error that a batch raised, in its place.
    """
    ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=AHEAD)
    stop = threading.Event()

    def put(item: Batch | Exception | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def prepare() -> None:
        try:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            for batch in batches:
                put(_on_device(batch, device, stream))
                if stop.is_set():
                    return
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if device.type == "cuda":
                for tensor in item.tensors():
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield item
    finally:
        stop.set()
        thread.join()


def _on_device(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> Batch:
    if stream is None:
        return batch.to(device)
    with torch.cuda.stream(stream):
        copied = batch.pin_memory().to(device)
    stream.synchronize()  # of this thread only; the pinned memory may then be used again
    return copied
