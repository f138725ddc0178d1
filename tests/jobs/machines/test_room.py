"""Training workers that do not fit on the cluster are refused, or the progress line says what they wait for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.machines import room
from cluster.machines.room import awaited, fitting_workers, require_room, worker_resources
from cluster.progress import noted
from tests.processes import until
from tvilfm.config import ClusterSection, WorkersSection

TWO_CPUS = ClusterSection(cpus_per_train_worker=2)


def test_a_worker_is_not_split_between_machines() -> None:
    machines = [{"CPU": 3.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert fitting_workers(TWO_CPUS, machines) == 1 + 4 + 32
    assert fitting_workers(TWO_CPUS.model_copy(update={"gpus_per_worker": 1.0}), machines) == 1 + 1


def test_workers_that_never_fit_are_refused(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    require_room(TWO_CPUS.model_copy(update={"train_workers": 2}))
    large = TWO_CPUS.model_copy(update={"train_workers": 3})
    with pytest.raises(
        ValueError, match=r"room for 3 workers of 2 CPUs, got one with room for 2 \(1 machine, 4 CPUs, 0"
    ):
        require_room(large)
    machines = {"image": "tvilfm:1", "workers": WorkersSection(cpus=4, max=2)}
    with pytest.raises(ValueError, match=r"cluster\.train_workers"):  # Ray on this machine does not grow
        require_room(large.model_copy(update=machines))
    require_room(large.model_copy(update={**machines, "address": "head:6379"}))


@pytest.mark.parametrize(
    ("address", "image", "gpus", "expected"),
    [
        (None, "i", 0, 1),
        ("ray://head:10001", None, 0, 1),
        ("ray://head:10001", "i", 0, 12),
        ("ray://head:10001", "i", 1, 3),
    ],
)
def test_machines_that_a_cluster_may_add_have_room(
    address: str | None, image: str | None, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(room, "machines", lambda: [{"CPU": 2.0}])  # of the head alone
    workers = {"max": 3, "cpus": 8, "gpus": 1}
    described = {"address": address, "image": image, "gpus_per_worker": gpus, "workers": workers}
    assert room.largest_room(ClusterSection.model_validate(described)) == expected


@pytest.fixture
def groups(ray_session: None) -> Iterator[list[PlacementGroup]]:
    made: list[PlacementGroup] = []
    yield made
    for group in made:
        remove_placement_group(group)


def test_the_progress_line_says_what_workers_wait_for(groups: list[PlacementGroup], tmp_path: Path) -> None:
    path = tmp_path / "progress.json"

    def asked(workers: int) -> None:
        groups.append(placement_group([worker_resources(TWO_CPUS)] * workers))

    asked(2)
    ray.get(groups[0].ready())
    assert awaited(TWO_CPUS, 2) == ""
    asked(2)
    until(lambda: awaited(TWO_CPUS, 2).startswith("waits until other work"))
    asked(3)
    path.write_text(json.dumps({"done": 5, "total": 9, "note": "loss 1", "unit": None}))
    with noted(path, lambda: awaited(TWO_CPUS, 3)):
        until(lambda: "waits" in path.read_text())
    expected = {"done": 5, "total": 9, "unit": None, "note": "waits for machines: 3 workers of 2 CPUs, room for 2"}
    assert json.loads(path.read_text()) == expected
