"""How many training workers a cluster has room for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ray

from cluster.session import address_of
from tvilfm.config import ClusterSection


def worker_resources(section: ClusterSection) -> dict[str, float]:
    """Return the CPUs and GPUs that each training worker reserves."""
    gpus = {"GPU": section.gpus_per_worker} if section.gpus_per_worker else {}
    return {"CPU": section.cpus_per_train_worker, **gpus}


def described(section: ClusterSection, workers: float | None = None) -> str:
    """Return training workers in words, such as `4 workers of 2 CPUs and 1 GPU`."""
    count = section.train_workers if workers is None else workers
    parts = [f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in worker_resources(section).items()]
    return f"{count} worker{'s' * (count != 1)} of {' and '.join(parts)}"


def fitting_workers(section: ClusterSection, machines: Iterable[Mapping[str, float]]) -> int:
    """Return how many training workers fit on machines at the same time. A worker cannot be split between machines.

    Args:
        section: what each worker reserves.
        machines: resource -> amount, per machine.
    """
    needed = worker_resources(section)
    return sum(min(int(of.get(name, 0) // amount) for name, amount in needed.items()) for of in machines)


def machines() -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster that this process has joined."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def largest_room(section: ClusterSection) -> int:
    """Return how many training workers fit on the cluster, at its maximum size if machines are added on demand."""
    room = fitting_workers(section, machines())
    if address_of(section) != "local" and section.image is not None:  # the autoscaler starts machines from this image
        workers = section.workers
        room = max(room, fitting_workers(section, [{"CPU": workers.cpus, "GPU": workers.gpus}] * workers.max))
    return room


def require_room(section: ClusterSection) -> None:
    """Check that all training workers fit on the cluster, because Ray would wait for room without an end.

    Raises:
        ValueError: they do not fit, and no machines are added on demand.
    """
    room = largest_room(section)
    if room < section.train_workers:
        raise ValueError(
            f"cluster.train_workers: expected a cluster with room for {described(section)}, got one with room for "
            f"{room} ({_amounts(machines())}). Lower cluster.train_workers, cpus_per_train_worker or gpus_per_worker, "
            "or add machines."
        )


def awaited(section: ClusterSection, workers: int) -> str:
    """Return what training workers that are not placed wait for; empty if they are placed.

    Args:
        section: what each worker reserves.
        workers: number of workers.
    """
    asked = [worker_resources(section)] * workers
    groups = ray.util.placement_group_table().values()
    waiting = ("PENDING", "RESCHEDULING")
    if not any(group["state"] in waiting and list(group["bundles"].values()) == asked for group in groups):
        return ""
    room = fitting_workers(section, machines())
    if room < workers:
        return f"waits for machines: {described(section, workers)}, room for {room}"
    return f"waits until other work on the cluster frees room for {described(section, workers)}"


def _amounts(of: list[dict[str, float]]) -> str:
    totals = {name: sum(one.get(name, 0) for one in of) for name in ("CPU", "GPU")}
    counted = ", ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in totals.items())
    return f"{len(of)} machine{'s' * (len(of) != 1)}, {counted}"
