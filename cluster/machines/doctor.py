"""Look at every machine of a cluster as a job will meet it, and say what is wrong and how to mend it.

A task pinned to each node collects facts; what follows from them is decided here, in one place, so that the same
fact is judged alike everywhere and differences between machines are seen.
"""

from __future__ import annotations

import platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.table import Table
from rich.text import Text

from cluster.places.check import absolute_paths, check_storage, storage_folder
from cluster.session import session
from tvilfm.config import Config, resolve
from tvilfm.versions import UNKNOWN, version_of

PACKAGES = ("tvilfm", "ray", "torch", "torchvision", "transformers", "pyarrow", "pylance")
ANSWER_S = 120.0  # a node's first task waits for its process, which imports torch
# Ray spills objects, and a run its checkpoints, to disk; its object store lies in shared memory.
FREE_DISK_GB = 10.0
FREE_SHARED_GB = 1.0

State = Literal["good", "note", "fault"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a task found on its machine.

    Attributes:
        host: name of the machine.
        python: its version.
        packages: installed versions; None = not installed.
        gpus: names of the GPUs that torch sees.
        torch: what torch says when it cannot be used, or None.
        data: whether the dataset's folder is there; None = it is rendered where it is absent.
        runs: why the runs' folder cannot be written, or None.
        disk_gb: free for the runs, or where they will be.
        spill_gb: free where Ray spills.
        shared_gb: free shared memory; None = the system has none.
        storage: why `cluster.storage` cannot be used, or None.
    """

    host: str
    python: str
    packages: Mapping[str, str | None]
    gpus: Sequence[str]
    torch: str | None
    data: bool | None
    runs: str | None
    disk_gb: float
    spill_gb: float
    shared_gb: float | None
    storage: str | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at, on one machine or on all."""

    where: str
    what: str
    found: str
    state: State = "good"
    mend: str = ""


def examine(config: Config) -> list[Finding]:
    """Look at the cluster that a command with this description would use.

    Raises:
        ConnectionError: no cluster answers at `cluster.address`.
    """
    # Workers run in other folders.
    paths = absolute_paths(config, storage_folder(config) or Path.cwd())
    values = resolve(config.model_dump(mode="json"), paths).model_dump(mode="json")
    with session(config.cluster):
        nodes = ray.nodes()
        address = ray.get_runtime_context().gcs_address
        alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
        gone = len(nodes) - len(alive)
        looking = {
            node: _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                values, node_temp_dir(entry)
            )
            for node, entry in alive.items()
        }
        ray.wait(list(looking.values()), num_returns=len(looking), timeout=ANSWER_S)
        facts: dict[str, Facts] = {}
        silent: list[Finding] = []
        for node, answer in looking.items():
            try:
                facts[node] = Facts(**ray.get(answer, timeout=0.1))
            except (ray.exceptions.RayError, TimeoutError) as error:
                silent.append(_silent(alive[node]["NodeManagerAddress"], error))
    resources = {node: entry["Resources"] for node, entry in alive.items()}
    return [_joined(config, address, len(alive), gone), *silent, *judge(config, facts, resources)]


def node_temp_dir(entry: Mapping[str, Any]) -> str:
    """The folder of a node's Ray session, from its socket's path."""
    return str(Path(entry["RayletSocketName"]).parents[2])


def _joined(config: Config, address: str, alive: int, gone: int) -> Finding:
    found = f"{address}, {alive} machine{'s' * (alive > 1)}" + (f", {gone} lost since its start" if gone else "")
    if config.cluster.address is None:
        found += " (cluster.address is null: RAY_ADDRESS, or this machine)"
    return Finding(where="cluster", what="Ray", found=found)


def _silent(host: str, error: Exception) -> Finding:
    mend = "See its log in the dashboard; restart Ray there with the same Python and ray as on the head."
    if isinstance(error, TimeoutError):
        mend = "It may be busy: look again when its jobs have ended, or see its log in the dashboard."
    reason = str(error).strip().splitlines() or ["no answer"]
    return Finding(where=host, what="answer", found=f"{type(error).__name__}: {reason[0]}", state="fault", mend=mend)


@ray.remote(num_cpus=0, max_retries=0)
def _look(values: dict[str, Any], temporary: str) -> dict[str, Any]:
    config = Config.model_validate(values)
    return asdict(look(config, Path(temporary)))


def look(config: Config, temporary: Path) -> Facts:
    """The facts of this machine."""
    gpus: list[str] = []
    problem = None
    try:
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        torch.zeros(1, device="cuda" if gpus else "cpu").sum().item()
    except (ImportError, OSError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    shared = Path("/dev/shm")
    storage = config.cluster.storage
    runs = config.run.dir
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        packages={name: _installed(name) for name in PACKAGES},
        gpus=gpus,
        torch=problem,
        data=None if config.data.name == "synthetic" else config.data_root.is_dir(),
        runs=_trouble(str(runs)),
        disk_gb=_free_gb(runs),
        spill_gb=_free_gb(temporary),
        shared_gb=_free_gb(shared) if shared.exists() else None,
        storage=None if storage is None else _trouble(storage),
    )


def _installed(name: str) -> str | None:
    version = version_of(name)
    return None if version == UNKNOWN else version


def _trouble(uri: str) -> str | None:
    try:
        check_storage(uri)
    except ValueError as error:
        return str(error)
    return None


def _free_gb(path: Path) -> float:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def judge(config: Config, facts: Mapping[str, Facts], resources: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """What follows from the facts of all machines.

    Args:
        config: what the jobs will want.
        facts: of every node that answered.
        resources: what Ray believes each node has.
    """
    findings: list[Finding] = []
    names = _names(facts)
    for node, found in facts.items():
        findings += _machine(config, names[node], found, resources[node])
    return [*findings, *_differences(facts), *_together(config, len(facts), resources)]


def _names(facts: Mapping[str, Facts]) -> dict[str, str]:
    """Host names; those of several nodes on one machine with the beginning of their ids."""
    times = Counter(found.host for found in facts.values())
    return {node: found.host if times[found.host] == 1 else f"{found.host} {node[:6]}" for node, found in facts.items()}


def _machine(config: Config, where: str, found: Facts, resources: Mapping[str, float]) -> Iterator[Finding]:
    yield Finding(where=where, what="Python", found=found.python)
    missing = [name for name, installed in found.packages.items() if installed is None]
    yield Finding(
        where=where,
        what="packages",
        found=f"without {', '.join(missing)}" if missing else f"ray {found.packages['ray']}",
        state="fault" if missing else "good",
        mend="Install tvilfm there with its constraints, or start the cluster from its image." if missing else "",
    )
    yield _torch(where, found, resources)
    yield _place(where, "run.dir", found.runs)
    if config.cluster.storage is not None:
        yield _place(where, "storage", found.storage)
    if found.data is not None:
        yield Finding(
            where=where,
            what="dataset",
            found=f"{config.data_root} {'is there' if found.data else 'is not there'}",
            state="good" if found.data else "fault",
            mend="" if found.data else "Put it there on every machine, or set data.root to storage they share.",
        )
    mend = "Delete old runs, or set run.dir to a larger disk."
    yield _enough(where, "disk for run.dir", found.disk_gb, FREE_DISK_GB, mend)
    mend = "Delete old files there, or start Ray with --temp-dir on a larger disk."
    yield _enough(where, "disk for Ray", found.spill_gb, FREE_DISK_GB, mend)
    if found.shared_gb is not None:
        mend = "Give a container more: docker run --shm-size=8g, or Kubernetes an emptyDir of medium Memory there."
        yield _enough(where, "shared memory", found.shared_gb, FREE_SHARED_GB, mend)


def _torch(where: str, found: Facts, resources: Mapping[str, float]) -> Finding:
    version, promised = found.packages["torch"], int(resources.get("GPU", 0))
    if found.torch is not None:
        mend = "Reinstall torch for this machine's CUDA driver, or mend the driver (nvidia-smi)."
        return Finding(where=where, what="torch", found=found.torch, state="fault", mend=mend)
    if promised > len(found.gpus):
        # A task that asks for no GPU sees them all.
        mend = "Mend the driver (nvidia-smi), or install torch with CUDA."
        text = f"{version}, sees {len(found.gpus)} of Ray's {promised} GPUs"
        return Finding(where=where, what="torch", found=text, state="fault", mend=mend)
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(found.gpus).items())
    return Finding(where=where, what="torch", found=f"{version}, {gpus or 'CPU'}")


def _place(where: str, what: str, trouble: str | None) -> Finding:
    if trouble is None:
        return Finding(where=where, what=what, found="written, read, deleted")
    # The error of the test ends with its advice.
    said, _, mend = trouble.rpartition(". ")
    return Finding(where=where, what=what, found=said, state="fault", mend=mend)


def _enough(where: str, what: str, free: float, least: float, mend: str) -> Finding:
    good = free >= least
    found = f"{free:.1f} GB free" + ("" if good else f", less than {least:g}")
    return Finding(where=where, what=what, found=found, state="good" if good else "fault", mend="" if good else mend)


def _differences(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    seen: dict[str, Counter[str]] = {"Python": Counter(found.python for found in facts.values())}
    for name in PACKAGES:
        seen[name] = Counter(str(found.packages[name]) for found in facts.values())
    for name, versions in seen.items():
        if len(versions) > 1:
            counted = ", ".join(f"{version} on {times}" for version, times in versions.most_common())
            mend = "Install the same on all: the same image, or the same constraints.txt."
            yield Finding(where="cluster", what=f"{name} differs", found=counted, state="fault", mend=mend)


def _together(config: Config, nodes: int, resources: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    section = config.cluster
    totals = {name: sum(of.get(name, 0) for of in resources.values()) for name in ("CPU", "GPU")}
    yield Finding(where="cluster", what="resources", found=f"{totals['CPU']:g} CPUs, {totals['GPU']:g} GPUs")
    wanted = {
        "CPU": section.train_workers * section.cpus_per_train_worker,
        "GPU": section.train_workers * section.gpus_per_worker,
    }
    for name, amount in wanted.items():
        if amount > totals[name]:
            # With an autoscaler the missing machines may come when they are asked for.
            yield Finding(
                where="cluster",
                what="training",
                found=f"wants {amount:g} {name}s, the cluster has {totals[name]:g}",
                state="note" if section.workers.max else "fault",
                mend="Lower cluster.train_workers, cpus_per_train_worker or gpus_per_worker, unless machines are added "
                "on demand.",
            )
    if nodes > 1 and config.cluster.storage is None and not config.run.dir.is_absolute():
        yield Finding(
            where="cluster",
            what="run.dir",
            found=f"{config.run.dir} of {nodes} machines",
            state="note",
            mend="Runs need one folder that all machines see: set cluster.storage, or run.dir to a path on it.",
        )


def table_of(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal."""
    table = Table()
    for heading in ("machine", "what", "found", "", "how to mend it"):
        table.add_column(heading, overflow="fold")
    colours = {"good": "green", "note": "yellow", "fault": "red"}
    for finding in findings:
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(*map(Text, (finding.where, finding.what, finding.found)), state, Text(finding.mend))
    return table
