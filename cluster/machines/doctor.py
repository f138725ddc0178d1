"""Check every machine of a cluster as a job would use it, and say what is wrong and how to fix it.

A task pinned to each node collects facts about its machine. The driver judges all facts together, so that every
machine is judged by the same rules and differences between machines are found.
"""

from __future__ import annotations

import os
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

from cluster.machines.room import described, fitting_workers
from cluster.machines.sharing import clock_difference, marked, shared_places, unshared, without_locks
from cluster.places.check import absolute_paths, check_storage, storage_folder
from cluster.session import address_of, session
from tvilfm.config import Config, resolve
from tvilfm.versions import UNKNOWN, version_of

PACKAGES = ("tvilfm", "ray", "torch", "torchvision", "transformers", "pyarrow", "psycopg")
ANSWER_S = 120.0  # the first task of a node waits until its process has imported torch
# Ray spills objects to disk and a run writes checkpoints there; the object store is in shared memory.
FREE_DISK_GB = 10.0
FREE_SHARED_GB = 1.0
CLOCK_S = 5.0  # difference of clocks that is a fault

State = Literal["good", "note", "fault"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about one machine, collected by a task on it.

    Attributes:
        host: name of the machine.
        python: version of Python.
        packages: installed versions; None = not installed.
        gpus: names of the GPUs that torch sees.
        torch: error of torch if it cannot be used, or None.
        data: whether the dataset's folder exists; None = the dataset is rendered if it is missing.
        runs: why `run.dir` cannot be written, or None.
        disk_gb: free disk space for `run.dir`.
        spill_gb: free disk space where Ray spills objects.
        shared_gb: free shared memory; None = the system has none.
        storage: why `cluster.storage` cannot be used, or None.
        unshared: places of `shared_places` in which it does not see what the driver wrote.
        without_locks: shared folders in which it does not see the driver's lock.
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
    unshared: Sequence[str] = ()
    without_locks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check, of one machine or of the whole cluster."""

    where: str
    what: str
    found: str
    state: State = "good"
    fix: str = ""


def examine(config: Config) -> list[Finding]:
    """Check the cluster that a command with this description would use.

    Raises:
        ConnectionError: no cluster answers at `cluster.address`.
    """
    # Workers do not run in the current folder, so relative paths are made absolute.
    paths = absolute_paths(config, storage_folder(config) or Path.cwd())
    everywhere = resolve(config.model_dump(mode="json"), paths)
    values = everywhere.model_dump(mode="json")
    with session(config.cluster):
        nodes = ray.nodes()
        address = ray.get_runtime_context().gcs_address
        alive = {node["NodeID"]: node for node in nodes if node["Alive"]}
        pinned = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in alive}
        with marked(shared_places(everywhere)) as markers:
            looking = {
                node: _look.options(scheduling_strategy=pinned[node]).remote(values, node_temp_dir(entry), markers)
                for node, entry in alive.items()
            }
            ray.wait(list(looking.values()), num_returns=len(looking), timeout=ANSWER_S)
            facts, silent = _answers(looking, alive)
        clocks = {node: clock_difference(pinned[node], ANSWER_S) for node in facts}
        token = os.environ.get("RAY_AUTH_MODE") == "token"
    resources = {node: entry["Resources"] for node, entry in alive.items()}
    joined = _joined(config, address, len(alive), len(nodes) - len(alive))
    return [joined, *_protected(config, token), *silent, *judge(config, facts, resources, clocks)]


def _answers(
    looking: Mapping[str, ray.ObjectRef[dict[str, Any]]], alive: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Facts], list[Finding]]:
    """Return the facts of machines that answered, and a finding for each that did not."""
    facts: dict[str, Facts] = {}
    silent: list[Finding] = []
    for node, answer in looking.items():
        try:
            facts[node] = Facts(**ray.get(answer, timeout=0.1))
        except (ray.exceptions.RayError, TimeoutError) as error:
            silent.append(_silent(alive[node]["NodeManagerAddress"], error))
    return facts, silent


def _protected(config: Config, token: bool) -> Iterator[Finding]:
    """Yield whether the cluster requires a token, and whether others can read the token's file."""
    if address_of(config.cluster) == "local":
        return
    advice = "Restart Ray with RAY_AUTH_MODE=token on every machine; set cluster.token_path for rendered clusters."
    yield Finding(
        where="cluster",
        what="token",
        found="required" if token else "not required: anyone who reaches its ports can execute code",
        state="good" if token else "note",
        fix="" if token else advice,
    )
    path = config.cluster.token_path
    if path is not None and path.exists() and path.stat().st_mode & 0o077:
        found = f"{path} can be read by other users"
        yield Finding(where="driver", what="cluster.token_path", found=found, state="fault", fix=f"chmod 600 {path}")


def node_temp_dir(entry: Mapping[str, Any]) -> str:
    """Return the folder of a node's Ray session, derived from the path of its socket."""
    return str(Path(entry["RayletSocketName"]).parents[2])


def _joined(config: Config, address: str, alive: int, gone: int) -> Finding:
    text = f"{address}, {alive} machine{'s' * (alive > 1)}" + (f", {gone} lost since its start" if gone else "")
    if config.cluster.address is None:
        text += " (cluster.address is null: RAY_ADDRESS or this machine)"
    return Finding(where="cluster", what="Ray", found=text)


def _silent(host: str, error: Exception) -> Finding:
    fix = "See its log in the dashboard; restart Ray on it with the same versions of Python and ray as on the head."
    if isinstance(error, TimeoutError):
        fix = "It may be busy: check again when its jobs have ended, or see its log in the dashboard."
    reason = str(error).strip().splitlines() or ["no answer"]
    return Finding(where=host, what="answer", found=f"{type(error).__name__}: {reason[0]}", state="fault", fix=fix)


@ray.remote(num_cpus=0, max_retries=0)
def _look(values: dict[str, Any], temporary: str, markers: tuple[list[str], str]) -> dict[str, Any]:
    config = Config.model_validate(values)
    return asdict(look(config, Path(temporary), markers))


def look(config: Config, temporary: Path, markers: tuple[list[str], str]) -> Facts:
    """Return the facts of this machine.

    Args:
        config: run description of the jobs.
        temporary: folder of the node's Ray session.
        markers: what `marked` yielded to the driver.
    """
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
        unshared=unshared(*markers),
        without_locks=without_locks(*markers),
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


def judge(
    config: Config,
    facts: Mapping[str, Facts],
    resources: Mapping[str, Mapping[str, float]],
    clocks: Mapping[str, float],
) -> list[Finding]:
    """Return the findings that follow from the facts of all machines.

    Args:
        config: run description of the jobs.
        facts: node -> facts, of every node that answered.
        resources: node -> resources that Ray has registered for it.
        clocks: node -> seconds by which its clock is ahead of the driver's.
    """
    findings: list[Finding] = []
    names = _names(facts)
    for node, node_facts in facts.items():
        findings += _machine(config, names[node], node_facts, resources[node])
        findings += _shared(names[node], node_facts, clocks[node])
    return [*findings, *_differences(facts), *_together(config, len(facts), resources)]


def _names(facts: Mapping[str, Facts]) -> dict[str, str]:
    """Return node -> host name, followed by the beginning of the node id where several nodes share a host."""
    hosts = {node: node_facts.host for node, node_facts in facts.items()}
    times = Counter(hosts.values())
    return {node: host if times[host] == 1 else f"{host} {node[:6]}" for node, host in hosts.items()}


def _machine(config: Config, where: str, facts: Facts, resources: Mapping[str, float]) -> Iterator[Finding]:
    yield Finding(where=where, what="Python", found=facts.python)
    missing = [name for name, installed in facts.packages.items() if installed is None]
    yield Finding(
        where=where,
        what="packages",
        found=f"without {', '.join(missing)}" if missing else f"ray {facts.packages['ray']}",
        state="fault" if missing else "good",
        fix="Install tvilfm on it with constraints.txt, or start the cluster from the tvilfm image." if missing else "",
    )
    yield _torch(where, facts, resources)
    yield _place(where, "run.dir", facts.runs)
    if config.cluster.storage is not None:
        yield _place(where, "storage", facts.storage)
    if facts.data is not None:
        yield Finding(
            where=where,
            what="dataset",
            found=f"{config.data_root} {'exists' if facts.data else 'is missing'}",
            state="good" if facts.data else "fault",
            fix="" if facts.data else "Copy it to this path on every machine, or set data.root to shared storage.",
        )
    fix = "Delete old runs, or set run.dir to a larger disk."
    yield _enough(where, "disk for run.dir", facts.disk_gb, FREE_DISK_GB, fix)
    fix = "Delete old files on it, or start Ray with --temp-dir on a larger disk."
    yield _enough(where, "disk for Ray", facts.spill_gb, FREE_DISK_GB, fix)
    if facts.shared_gb is not None:
        fix = "Give the container more: docker run --shm-size=8g; on Kubernetes, mount an emptyDir of medium Memory."
        yield _enough(where, "shared memory", facts.shared_gb, FREE_SHARED_GB, fix)


def _shared(where: str, facts: Facts, clock_s: float) -> Iterator[Finding]:
    for place in facts.unshared:
        yield Finding(
            where=where,
            what="shared storage",
            found=f"{place} is another folder here than on the driver's machine",
            state="fault",
            fix="Mount the same storage there on every machine, or set cluster.storage to an object store.",
        )
    for place in facts.without_locks:
        yield Finding(
            where=where,
            what="locks",
            found=f"{place} is shared, but its locks are not",
            state="fault",
            fix="Mount it with locks (NFS: without nolock or local_lock), or start each run on one machine only.",
        )
    if abs(clock_s) > CLOCK_S:
        found = f"{abs(clock_s):.0f} s {'ahead of' if clock_s > 0 else 'behind'} the driver's"
        fix = "Set it by NTP (timedatectl set-ntp true): stores refuse requests of another time."
        yield Finding(where=where, what="clock", found=found, state="fault", fix=fix)


def _torch(where: str, facts: Facts, resources: Mapping[str, float]) -> Finding:
    version, promised = facts.packages["torch"], int(resources.get("GPU", 0))
    if facts.torch is not None:
        fix = "Reinstall torch for this machine's CUDA driver, or fix the driver (nvidia-smi)."
        return Finding(where=where, what="torch", found=facts.torch, state="fault", fix=fix)
    if promised > len(facts.gpus):
        # A task that requests no GPU sees all of them.
        fix = "Fix the driver (nvidia-smi), or install torch with CUDA."
        text = f"{version}, sees {len(facts.gpus)} of Ray's {promised} GPUs"
        return Finding(where=where, what="torch", found=text, state="fault", fix=fix)
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(facts.gpus).items())
    return Finding(where=where, what="torch", found=f"{version}, {gpus or 'CPU'}")


def _place(where: str, what: str, trouble: str | None) -> Finding:
    if trouble is None:
        return Finding(where=where, what=what, found="written, read, deleted")
    # The last sentence of the error says how to fix it.
    problem, _, fix = trouble.rpartition(". ")
    return Finding(where=where, what=what, found=problem, state="fault", fix=fix)


def _enough(where: str, what: str, free: float, least: float, fix: str) -> Finding:
    good = free >= least
    text = f"{free:.1f} GB free" + ("" if good else f", less than {least:g}")
    return Finding(where=where, what=what, found=text, state="good" if good else "fault", fix="" if good else fix)


def _differences(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    seen: dict[str, Counter[str]] = {"Python": Counter(node_facts.python for node_facts in facts.values())}
    for name in PACKAGES:
        seen[name] = Counter(str(node_facts.packages[name]) for node_facts in facts.values())
    for name, versions in seen.items():
        if len(versions) > 1:
            counted = ", ".join(f"{version} on {times}" for version, times in versions.most_common())
            fix = "Install the same version on all machines: use the same image or the same constraints.txt."
            yield Finding(where="cluster", what=f"{name} differs", found=counted, state="fault", fix=fix)


def _together(config: Config, nodes: int, resources: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    section = config.cluster
    totals = {name: sum(of.get(name, 0) for of in resources.values()) for name in ("CPU", "GPU")}
    yield Finding(where="cluster", what="resources", found=f"{totals['CPU']:g} CPUs, {totals['GPU']:g} GPUs")
    if (room := fitting_workers(section, resources.values())) < section.train_workers:
        # An autoscaler may add the missing machines on demand.
        yield Finding(
            where="cluster",
            what="training",
            found=f"needs {described(section)}, the cluster has room for {room}",
            state="note" if section.workers.max else "fault",
            fix="Lower cluster.train_workers, cpus_per_train_worker or gpus_per_worker, unless machines are added on "
            "demand.",
        )
    if nodes > 1 and config.cluster.storage is None and not config.run.dir.is_absolute():
        yield Finding(
            where="cluster",
            what="run.dir",
            found=f"{config.run.dir} is relative, on {nodes} machines",
            state="note",
            fix="Runs need one folder that all machines share: set cluster.storage, or set run.dir to a path on shared "
            "storage.",
        )


def table_of(findings: Sequence[Finding]) -> Table:
    """Return the findings as a table for a terminal."""
    table = Table()
    for heading in ("machine", "check", "result", "", "how to fix it"):
        table.add_column(heading, overflow="fold")
    colours = {"good": "green", "note": "yellow", "fault": "red"}
    for finding in findings:
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(*map(Text, (finding.where, finding.what, finding.found)), state, Text(finding.fix))
    return table
