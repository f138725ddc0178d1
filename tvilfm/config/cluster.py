"""The section `cluster`: machines, what they reserve per worker, and where jobs store results."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_keys
from tvilfm.place import Place


class HeadSection(Section):
    """The head node of a rendered cluster."""

    machine: str | None = Field(None, description="machine type of the head, as the cloud names it, such as m5.2xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of the head")
    memory_gb: int = Field(32, ge=1, description="memory of the head, GB")


class WorkersSection(Section):
    """The worker nodes of a rendered cluster."""

    machine: str | None = Field(None, description="machine type of a worker, as the cloud names it, such as g5.4xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of a worker")
    gpus: int = Field(0, ge=0, description="GPUs of a worker")
    accelerator: str | None = Field(
        None, description="type of those GPUs: nvidia-tesla-t4 (GCP; AWS has it in the machine), a100 (Slurm gres)"
    )
    memory_gb: int = Field(32, ge=1, description="memory of a worker, GB")
    min: int = Field(0, ge=0, description="minimum number of workers")
    max: int = Field(2, ge=0, description="maximum number of workers")
    idle_minutes: int = Field(5, ge=1, description="minutes without work after which a worker above min is removed")
    spot: bool = Field(
        False, description="use spot machines for workers, which may be lost at any time; never for the head"
    )
    node_selector: tuple[str, ...] = Field(
        (), description="Kubernetes: labels of the nodes for workers, as key=value; those of spot nodes with spot"
    )

    @model_validator(mode="after")
    def _min_below_max(self) -> WorkersSection:
        if self.min > self.max:
            raise ValueError(f"min: expected at most workers.max = {self.max}, got {self.min}. Raise max.")
        wrong = [label for label in self.node_selector if not all(label.partition("=")[::2])]
        if wrong:
            raise ValueError(f"node_selector: expected labels as key=value, got {wrong[0]}. Put an = between the two.")
        return self


class ProviderSection(Section):
    """The cloud or the hosts of a rendered cluster."""

    region: str | None = Field(None, description="AWS or GCP region, such as us-west-2")
    zone: str | None = Field(None, description="GCP zone, such as us-west1-a; AWS: null = any of the region")
    project: str | None = Field(None, description="GCP project id")
    machine_image: str | None = Field(
        None, description="what cloud machines start from: AMI id, or GCP image path; null = Ray's choice without GPUs"
    )
    disk_gb: int = Field(256, ge=10, description="disk of a cloud machine, GB")
    hosts: tuple[str, ...] = Field((), description="own machines (ray-up-onprem): addresses, the head's first")
    ssh_user: str = Field("ubuntu", description="user that ray up logs in as")
    ssh_key: Path | None = Field(None, description="private key that ray up logs in with; null = as ssh finds it")


class PortsSection(Section):
    """Ports of a rendered cluster's head."""

    gcs: int = Field(6379, ge=1, le=65535, description="port that workers join")
    dashboard: int = Field(8265, ge=1, le=65535, description="dashboard and job server")
    metrics: int = Field(8080, ge=1, le=65535, description="port of Prometheus metrics, on every machine")


class DriverSection(Section):
    """Resources of a submitted job's driver, without the workers that it starts."""

    cpus: float = Field(0, ge=0, description="CPUs of the driver; if all three are 0, it runs on the head")
    gpus: float = Field(0, ge=0, description="GPUs")
    memory_gb: float = Field(0, ge=0, description="memory, GB")


class ClusterSection(Section):
    address: str | None = Field(None, description="Ray address; null = RAY_ADDRESS, or start Ray on this machine")
    train_workers: int = Field(1, ge=1, description="Ray Train workers; each sees p/workers identities per batch")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each train and extraction worker and encoder; 0 = CPU")
    cpus_per_train_worker: float = Field(2, gt=0, description="CPUs (and torch threads) of each train worker")
    extract_workers: int = Field(2, ge=1, description="actors that decode or extract in parallel")
    max_failures: int = Field(
        3, ge=-1, description="maximum restarts of a stage or trial, from its last checkpoint; -1 = unlimited"
    )
    storage: str | None = Field(
        None,
        description="folder that every machine sees (relative paths of a submitted job lie in it), or URI of an object "
        "store, where machines that share no folder keep stages, checkpoints and results; null = this machine alone",
    )
    job_address: str | None = Field(
        None,
        description="Ray's job server; null = RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265",
    )
    token_path: Path | None = Field(
        None,
        description="file with the cluster's token; null = as RAY_AUTH_MODE and RAY_AUTH_TOKEN say. Rendered clusters "
        "ask for a token when it is set",
    )
    python: str = Field("python", description="Python of the cluster's machines that runs a submitted job")
    install: bool = Field(
        False, description="a submitted job first installs pyproject.toml's requirements; our images have them"
    )
    env: tuple[str, ...] = Field((), description="environment variables that a submitted job takes along, where set")
    driver: DriverSection = DriverSection()
    name: str = Field("tvilfm", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$", description="name of a rendered cluster")
    image: str | None = Field(
        None, description="container image of a rendered cluster; null = own machines install this folder"
    )
    redis: str | None = Field(
        None, description="host:port of a Redis that keeps the cluster's state, for a head that may be lost"
    )
    head: HeadSection = HeadSection()
    workers: WorkersSection = WorkersSection()
    provider: ProviderSection = ProviderSection()
    ports: PortsSection = PortsSection()

    @model_validator(mode="after")
    def _storage_is_the_same_everywhere(self) -> ClusterSection:
        if self.storage is not None and Place(self.storage).is_relative:
            raise ValueError(f"storage: expected an absolute path or a URI, got {self.storage}. Begin it with a /.")
        check_no_keys("storage", self.storage)
        return self
