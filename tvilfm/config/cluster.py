"""The section `cluster`: machines, resources per worker, and the storage of results."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_keys
from tvilfm.place import Place


class HeadSection(Section):
    """The head node of a rendered cluster."""

    machine: str | None = Field(None, description="cloud machine type of the head, such as m5.2xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of the head")
    memory_gb: int = Field(32, ge=1, description="memory of the head, GB")


class WorkersSection(Section):
    """The worker nodes of a rendered cluster."""

    machine: str | None = Field(None, description="cloud machine type of a worker, such as g5.4xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of a worker")
    gpus: int = Field(0, ge=0, description="GPUs of a worker")
    accelerator: str | None = Field(
        None, description="GPU type: nvidia-tesla-t4 (GCP), a100 (Slurm gres); AWS: part of workers.machine"
    )
    memory_gb: int = Field(32, ge=1, description="memory of a worker, GB")
    min: int = Field(0, ge=0, description="minimum number of workers")
    max: int = Field(2, ge=0, description="maximum number of workers")
    idle_minutes: int = Field(5, ge=1, description="idle minutes after which a worker above workers.min is removed")
    spot: bool = Field(
        False, description="use spot machines, which the cloud may take back, for workers; never for the head"
    )
    node_selector: tuple[str, ...] = Field(
        (), description="Kubernetes: labels of worker nodes, as key=value; with spot, labels of spot nodes"
    )

    @model_validator(mode="after")
    def _min_below_max(self) -> WorkersSection:
        if self.min > self.max:
            raise ValueError(f"min: expected at most workers.max = {self.max}, got {self.min}. Lower min or raise max.")
        wrong = [label for label in self.node_selector if not all(label.partition("=")[::2])]
        if wrong:
            raise ValueError(
                f"node_selector: expected labels as key=value, got {wrong[0]}. Write a key, = and a value."
            )
        return self


class GroupSection(WorkersSection):
    """A further group of worker nodes, besides `cluster.workers`."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?$", description="name of the group")


class KubernetesSection(Section):
    """What a rendered cluster needs of its Kubernetes namespace."""

    namespace: str | None = Field(None, description="namespace of all resources; null = that of kubectl")
    labels: tuple[str, ...] = Field((), description="labels of all resources and pods, as key=value")
    service_account: str | None = Field(None, description="service account of the pods; null = the default one")
    pull_secrets: tuple[str, ...] = Field((), description="secrets with credentials of the image registry")
    tolerations: tuple[str, ...] = Field(
        (), description="taints that worker pods tolerate, as key:effect or key=value:effect"
    )
    claim: str | None = Field(
        None, description="claim of shared storage (ReadWriteMany); several clusters may use it; null = <name>-storage"
    )
    keys_secret: str | None = Field(
        None, description="secret whose key keys.json is the file of serve.keys; null = serve.keys is on shared storage"
    )
    redis_secret: str | None = Field(None, description="secret whose key password is Redis's; null = no password")
    network_policy: bool = Field(
        True, description="close all ports but those of the service and the metrics to other pods"
    )

    @model_validator(mode="after")
    def _readable(self) -> KubernetesSection:
        for label in self.labels:
            if not all(label.partition("=")[::2]):
                raise ValueError(f"labels: expected key=value, got {label}. Write a key, = and a value.")
        for toleration in self.tolerations:
            key, _, effect = toleration.rpartition(":")
            if not key or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
                raise ValueError(
                    f"tolerations: expected key:effect or key=value:effect, got {toleration}. The effects are "
                    "NoSchedule, PreferNoSchedule and NoExecute."
                )
        return self


class DatabaseSection(Section):
    """The PostgreSQL server of the gallery on Kubernetes, run by the operator CloudNativePG."""

    image: str | None = Field(
        None, description="image of PostgreSQL 18 made for CloudNativePG; null = the gallery's server is not rendered"
    )
    vector_image: str | None = Field(None, description="extension image of pgvector for the same PostgreSQL and system")
    instances: int = Field(2, ge=1, description="servers: one that writes, and copies of it that take over")
    storage_gb: int = Field(50, ge=1, description="disk of each server, GB")
    storage_class: str | None = Field(None, description="storage class of the disks; null = the default one")
    backup: str | None = Field(None, description="object store URI of backups, such as s3://bucket/path; null = none")
    backup_endpoint: str | None = Field(None, description="URL of an S3 server that is not Amazon's")
    backup_secret: str | None = Field(
        None, description="secret with ACCESS_KEY_ID and SECRET_ACCESS_KEY; null = the role of the service account"
    )
    backup_schedule: str = Field("0 0 2 * * *", description="times of full backups: cron with seconds")
    backup_days: int = Field(30, ge=1, description="days to keep backups")

    @model_validator(mode="after")
    def _complete(self) -> DatabaseSection:
        if self.image is not None and self.vector_image is None:
            raise ValueError(
                "vector_image: expected an extension image of pgvector with database.image, got null. Set it, or set "
                "image to null to use another server."
            )
        check_no_keys("backup", self.backup)
        return self


class SlurmSection(Section):
    """Options of a rendered batch script."""

    partition: str | None = Field(None, description="partition; null = Slurm's default")
    account: str | None = Field(None, description="account that is charged; null = the user's default")
    time: str | None = Field(None, description="time limit, such as 24:00:00 or 2-00:00:00; null = the partition's")
    log: str = Field("%x-%j.log", description="log file; %x = cluster.name, %j = job id")
    requeue_s: int | None = Field(
        None, ge=1, description="seconds before the time limit at which the job stops and is queued again; null = never"
    )


class ProviderSection(Section):
    """The cloud or own machines of a rendered cluster."""

    region: str | None = Field(None, description="AWS or GCP region, such as us-west-2")
    zone: str | None = Field(
        None, description="GCP or AWS zone, such as us-west1-a; AWS: null = any zone of the region"
    )
    project: str | None = Field(None, description="GCP project id")
    machine_image: str | None = Field(
        None, description="boot image: AMI id or GCP image path; null = default of Ray, without GPU drivers"
    )
    disk_gb: int = Field(256, ge=10, description="disk of a cloud machine, GB")
    hosts: tuple[str, ...] = Field((), description="addresses of own machines (ray-up-onprem), the head first")
    ssh_user: str = Field("ubuntu", description="SSH user of ray up")
    ssh_key: Path | None = Field(None, description="private SSH key of ray up; null = default of ssh")


class PortsSection(Section):
    """Ports of a rendered cluster."""

    gcs: int = Field(6379, ge=1, le=65535, description="port that workers connect to")
    dashboard: int = Field(8265, ge=1, le=65535, description="port of the dashboard and the job server")
    metrics: int = Field(8080, ge=1, le=65535, description="port of Prometheus metrics, on every machine")


class DriverSection(Section):
    """Resources of the driver of a submitted job, without the workers that it starts."""

    cpus: float = Field(
        0, ge=0, description="CPUs reserved for a submitted job's driver; if all three are 0, it runs on the head"
    )
    gpus: float = Field(0, ge=0, description="GPUs reserved for the driver")
    memory_gb: float = Field(0, ge=0, description="memory reserved for the driver, GB")


class ClusterSection(Section):
    address: str | None = Field(None, description="Ray address; null = RAY_ADDRESS, or start Ray on this machine")
    train_workers: int = Field(
        1,
        ge=1,
        description="Ray Train workers, which share the images of a batch; a divisor of train.p x train.k",
    )
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs per worker (training, extraction, captions) and per serve encoder; 0 = CPU"
    )
    cpus_per_train_worker: float = Field(2, gt=0, description="CPUs (and torch threads) of each training worker")
    extract_workers: int = Field(2, ge=1, description="actors that extract features in parallel")
    max_failures: int = Field(
        3, ge=-1, description="maximum restarts of a stage or trial, from its last checkpoint; -1 = unlimited"
    )
    storage: str | None = Field(
        None,
        description="shared folder or object store URI for runs (docs/cluster.md); null = this machine only",
    )
    job_address: str | None = Field(
        None,
        description="job server; null = RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265",
    )
    token_path: Path | None = Field(
        None,
        description="token file (rendered clusters require it); null = RAY_AUTH_MODE, RAY_AUTH_TOKEN",
    )
    python: str = Field("python", description="Python executable that runs a submitted job on the cluster")
    install: bool = Field(
        False, description="install the requirements of pyproject.toml before a submitted job; images contain them"
    )
    env: tuple[str, ...] = Field((), description="environment variables that are passed to a submitted job, if set")
    driver: DriverSection = DriverSection()
    name: str = Field("tvilfm", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$", description="name of a rendered cluster")
    image: str | None = Field(
        None, description="container image; null = this folder is installed on own machines (ray-up-onprem)"
    )
    redis: str | None = Field(
        None, description="host:port of a Redis for the cluster state, which then survives a lost head"
    )
    head: HeadSection = HeadSection()
    workers: WorkersSection = WorkersSection()
    groups: tuple[GroupSection, ...] = Field(
        (), description="Kubernetes: further groups of workers, {name: ..., and the keys of workers}"
    )
    max_replicas_per_node: int | None = Field(
        None, ge=1, description="maximum replicas of each serve deployment on one machine; null = no limit"
    )
    overlay: Path | None = Field(
        None, description="YAML file that is merged into a rendered file, last (docs/cluster.md); null = none"
    )
    kubernetes: KubernetesSection = KubernetesSection()
    database: DatabaseSection = DatabaseSection()
    slurm: SlurmSection = SlurmSection()
    provider: ProviderSection = ProviderSection()
    ports: PortsSection = PortsSection()

    @model_validator(mode="after")
    def _storage_is_the_same_everywhere(self) -> ClusterSection:
        if self.storage is not None and Place(self.storage).is_relative:
            raise ValueError(f"storage: expected an absolute path or a URI, got {self.storage}. Start it with /.")
        check_no_keys("storage", self.storage)
        return self

    @model_validator(mode="after")
    def _gpus_are_not_shared(self) -> ClusterSection:
        if self.train_workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker: expected 0 or at least 1 with {self.train_workers} training workers, got "
                f"{self.gpus_per_worker:g}. NCCL needs a GPU per worker: set train_workers=1 or gpus_per_worker=1."
            )
        return self

    @model_validator(mode="after")
    def _secret_of_a_redis(self) -> ClusterSection:
        if self.kubernetes.redis_secret is not None and self.redis is None:
            raise ValueError("kubernetes.redis_secret: expected cluster.redis with it, got null. Set cluster.redis.")
        return self
