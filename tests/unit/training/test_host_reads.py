"""A training step computes on the device alone: no value is read on the host, and batches are prepared ahead."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import until
from tests.unit.training.test_optim import make_model
from tvilfm.config import LossSection, OptimSection
from tvilfm.data.transforms import draw
from tvilfm.data.tri_modal import RECIPES, Batch
from tvilfm.losses.objective import JointObjective
from tvilfm.training import readings as readings_module
from tvilfm.training.optim import StageOptimizer
from tvilfm.training.prefetch import AHEAD, prefetch
from tvilfm.training.readings import LossReadings
from tvilfm.training.step import StageStep

aten = torch.ops.aten
# Operations whose result, or the size of it, has to be known on the host before the next operation.
READS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten._coalesce.default),
    aten.equal.default,
}


class HostReads(TorchDispatchMode):
    """Counts operations that a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in READS or masks:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _batch(rows: int, *, text: bool) -> Batch:
    rng = np.random.default_rng(0)
    tokens = torch.randint(5, 500, (rows, 7))
    tokens[:, -1] = 49407
    return Batch(
        labels=torch.arange(rows) // 2,
        pixels={recipe: torch.randint(0, 256, (rows, 32, 16, 3), dtype=torch.uint8) for recipe in RECIPES},
        draws={recipe: draw(recipe, rows, rng, height=32, width=16, pad=2) for recipe in RECIPES},
        features={},
        tokens=tokens if text else None,
        filter_tokens=tokens[:, 2:] if text else None,
    )


def _parts(*, text: bool) -> tuple[StageStep, StageOptimizer]:
    model = make_model(text=text, num_classes=4)
    optimizer = StageOptimizer(model, OptimSection())
    return StageStep(model.train(), JointObjective(LossSection()), pad=2), optimizer


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_a_step_reads_no_value_on_the_host(text: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings_module, "READ_S", 3600)
    step, optimizer = _parts(text=text)
    batch = _batch(8, text=text)
    told: list[Any] = []
    readings, scaler = LossReadings(0, 3, told.append), torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.zeros(()))  # starts it
    with HostReads() as reads:
        for _ in range(3):
            optimizer.zero_grad()
            total = readings.add(step(batch))
            scaler.scale(total).backward()
            optimizer.step(scaler)
            scaler.update()
    assert reads.found == {} and told == []
    record = readings.means()
    assert [line["step"] for line in told] == [1, 2, 3]
    assert record["loss"] == pytest.approx(sum(np.mean([line[name] for line in told]) for name in ("id", "wrt")))


def test_the_counter_of_host_reads_sees_them() -> None:
    values = torch.arange(4)
    with HostReads() as reads:
        _ = float(values[0]), values[values > 1], values.unique(), bool(values.any())
    assert sum(reads.found.values()) == 4


def test_a_term_that_is_not_finite_is_named_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings_module, "READ_S", 3600)
    monkeypatch.setattr(readings_module, "MAX_UNREAD", 4)
    readings = LossReadings(2, 9, lambda record: None)
    terms = [{"id": torch.tensor(1.0), "wrt": torch.tensor(float(step))} for step in range(3)]
    terms[1]["wrt"] /= 0
    for one in terms:
        readings.add(one)
    with pytest.raises(FloatingPointError, match=r"^loss\.wrt: .* got inf in epoch 2, batch 1\. "):
        readings.add(terms[0])
    lenient = LossReadings(2, 9, lambda record: None, may_overflow=True)
    for one in terms:
        lenient.add(one)
    assert lenient.means()["wrt"] == 1.0  # of steps 0 and 2


def test_batches_come_in_order_are_prepared_ahead_and_no_further() -> None:
    made: list[int] = []

    def batches() -> Iterator[Batch]:
        for number in range(10):
            made.append(number)
            batch = _batch(2, text=False)
            batch.labels.fill_(number)
            yield batch

    prepared = prefetch(batches(), torch.device("cpu"))
    assert int(next(prepared).labels[0]) == 0
    until(lambda: len(made) == 1 + AHEAD + 1)  # one is being handed over
    assert [int(batch.labels[0]) for batch in prepared] == list(range(1, 10))


def test_an_error_of_a_batch_comes_in_its_place_and_a_reader_that_stops_leaves_no_thread() -> None:
    def failing() -> Iterator[Batch]:
        yield _batch(2, text=False)
        raise ValueError("a batch without images")

    before = threading.active_count()
    prepared = prefetch(failing(), torch.device("cpu"))
    next(prepared)
    with pytest.raises(ValueError, match="a batch without images"):
        next(prepared)
    endless = prefetch(iter(lambda: _batch(2, text=False), None), torch.device("cpu"))
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
