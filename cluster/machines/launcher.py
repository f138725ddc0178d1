"""Files of Ray's cluster launcher (`ray up`), which starts machines of AWS, of GCP, or your own."""

from __future__ import annotations

import shlex
from pathlib import Path

from cluster.machines.documents import Document, given
from cluster.places.check import excluded, storage_folder
from tvilfm.config import ClusterSection, Config

PROGRAM_FOLDER = "~/tvilfm"
# Ray reads the token from this file if RAY_AUTH_MODE=token.
TOKEN_FILE = "~/.ray/auth_token"
# How long workers wait for a head whose state is in Redis (KubeRay's value). Ray's default of one minute is too short
# to start a machine.
HEAD_AWAY_S = 600
# Required for machines with GPUs: Ray's default images have no driver (GCP) or one that is years old (AWS).
GPU_IMAGE = "a machine image with NVIDIA's driver and Docker"
# Has Docker but no GPU driver; Ray's default.
GCP_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cpu"


def ray_up_aws(config: Config) -> Document:
    """Return the `ray up` file of a cluster of AWS machines."""
    section = config.cluster
    region = given(section.provider.region, "cluster.provider.region", "a region such as us-west-2")
    provider: Document = {"type": "aws", "region": region, "cache_stopped_nodes": False}
    if section.provider.zone:
        provider["availability_zone"] = section.provider.zone
    if section.workers.gpus:
        given(section.provider.machine_image, "cluster.provider.machine_image", GPU_IMAGE)
    disk = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": section.provider.disk_gb, "VolumeType": "gp3"}}]
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}} if section.workers.spot else {}
    same: Document = {"BlockDeviceMappings": disk}
    if section.provider.machine_image:
        same["ImageId"] = section.provider.machine_image
    head = {"InstanceType": _machine(section.head.machine, "head", "m5.2xlarge")}
    worker = {"InstanceType": _machine(section.workers.machine, "workers", "g5.4xlarge")}
    return _launcher(config, provider, ("boto3",), head | same, worker | same | spot)


def ray_up_gcp(config: Config) -> Document:
    """Return the `ray up` file of a cluster of GCP machines."""
    section = config.cluster
    provider = {
        "type": "gcp",
        "region": given(section.provider.region, "cluster.provider.region", "a region such as us-west1"),
        "availability_zone": given(section.provider.zone, "cluster.provider.zone", "a zone such as us-west1-a"),
        "project_id": given(section.provider.project, "cluster.provider.project", "the id of your project"),
    }

    image = section.provider.machine_image
    if section.workers.gpus:
        given(image, "cluster.provider.machine_image", GPU_IMAGE)
    disk = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {"diskSizeGb": section.provider.disk_gb, "sourceImage": image or GCP_IMAGE},
    }
    head = {"machineType": _machine(section.head.machine, "head", "n2-standard-8"), "disks": [disk]}
    worker = {"machineType": _machine(section.workers.machine, "workers", "n1-standard-8"), "disks": [disk]}
    if section.workers.gpus:
        type_ = given(section.workers.accelerator, "cluster.workers.accelerator", "a type such as nvidia-tesla-t4")
        worker["guestAccelerators"] = [{"acceleratorType": type_, "acceleratorCount": section.workers.gpus}]
    # GCP cannot migrate machines with GPUs or spot machines: it ends them when their host needs maintenance.
    scheduling = [{"onHostMaintenance": "TERMINATE"}] * bool(section.workers.gpus or section.workers.spot)
    if scheduling:
        worker["scheduling"] = scheduling + [{"preemptible": True}] * section.workers.spot
    return _launcher(config, provider, ("google-api-python-client", "google-auth"), head, worker)


def ray_up_onprem(config: Config) -> Document:
    """Return the `ray up` file of a cluster of your own machines, which Ray reaches by SSH."""
    section = config.cluster
    if not section.provider.hosts:
        raise ValueError(
            "cluster.provider.hosts: expected the addresses of your machines, the head's first, got none. Set "
            "cluster.provider.hosts=[10.0.0.1,10.0.0.2]."
        )
    head, *workers = section.provider.hosts
    document = _launcher(config, {"type": "local", "head_ip": head, "worker_ips": workers}, (), None, None)
    # Your own machines run anyway, so use all of them.
    return document | {"max_workers": len(workers), "min_workers": len(workers)}


def _launcher(
    config: Config,
    provider: Document,
    head_packages: tuple[str, ...],
    head: Document | None,
    worker: Document | None,
) -> Document:
    """Return the document with what all providers share; `head` and `worker` are None for your own machines."""
    section = config.cluster
    docker, mounts, setup = _software(config, cloud=head is not None)
    auth = {"ssh_user": section.provider.ssh_user}
    if section.provider.ssh_key is not None:
        auth["ssh_private_key"] = str(section.provider.ssh_key)
    if section.token_path is not None:
        mounts[TOKEN_FILE] = str(section.token_path)
    document: Document = {
        "cluster_name": section.name,
        "max_workers": section.workers.max,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": section.workers.idle_minutes,
        "docker": docker,
        "provider": provider,
        "auth": auth,
    }
    if head is not None and worker is not None:
        document["available_node_types"] = _node_types(section, head, worker)
        document["head_node_type"] = "head"
    head_start, worker_start = _start_commands(section)
    return document | {
        "file_mounts": mounts,
        "cluster_synced_files": [],
        "rsync_exclude": excluded(config, Path.cwd()),
        "rsync_filter": [".gitignore"],
        "initialization_commands": [],
        "setup_commands": setup,
        "head_setup_commands": [f"pip install --quiet {' '.join(head_packages)}"] if head_packages else [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", head_start],
        "worker_start_ray_commands": ["ray stop", worker_start],
    }


def _software(config: Config, *, cloud: bool) -> tuple[Document, dict[str, str], list[str]]:
    """Return how a machine gets the program: container, mounted files and commands; a cloud needs an image.

    A container sees the shared folder of the machine, which has to be mounted there.
    """
    section = config.cluster
    if section.image is not None:
        shared = storage_folder(config)
        volumes = [] if shared is None else [f"--volume {shlex.quote(f'{shared}:{shared}')}"]
        docker = {"image": section.image, "container_name": section.name, "pull_before_run": True}
        return docker | {"run_options": ["--ulimit nofile=65536:65536", *volumes]}, {}, []
    if cloud:
        given(None, "cluster.image", "a container image with tvilfm (see the Dockerfile)")
    setup = [
        "test -x ~/.tvilfm/bin/python || (python3 -m venv ~/.tvilfm && "
        "echo 'export PATH=\"$HOME/.tvilfm/bin:$PATH\"' >> ~/.bashrc)",
        f"~/.tvilfm/bin/pip install --quiet --constraint {PROGRAM_FOLDER}/constraints.txt {PROGRAM_FOLDER}",
    ]
    return {}, {PROGRAM_FOLDER: "."}, setup


def _node_types(section: ClusterSection, head: Document, worker: Document) -> Document:
    """Return Ray's two types of machines, from the provider's description of each."""
    resources = {"CPU": section.workers.cpus} | ({"GPU": section.workers.gpus} if section.workers.gpus else {})
    return {
        "head": {"resources": {"CPU": section.head.cpus}, "node_config": head, "min_workers": 0, "max_workers": 0},
        "worker": {
            "resources": resources,
            "node_config": worker,
            "min_workers": section.workers.min,
            "max_workers": section.workers.max,
        },
    }


def _start_commands(section: ClusterSection) -> tuple[str, str]:
    """Return the commands that start Ray on the head and on a worker."""
    environment = "export RAY_AUTH_MODE=token; " if section.token_path is not None else ""
    # Clusters that share a Redis are kept apart by their names.
    redis = f"RAY_external_storage_namespace={section.name} RAY_REDIS_ADDRESS={section.redis} " if section.redis else ""
    patient = f"RAY_gcs_rpc_server_reconnect_timeout_s={HEAD_AWAY_S} " if section.redis else ""
    ports = section.ports
    start = f"ulimit -n 65536; {environment}"
    return (
        # The dashboard executes any job it receives, so it is reachable only through SSH (`ray dashboard`).
        f"{start}{redis}ray start --head --port={ports.gcs} --dashboard-host=127.0.0.1 "
        f"--dashboard-port={ports.dashboard} --metrics-export-port={ports.metrics} "
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        f"{start}{patient}ray start --address=$RAY_HEAD_IP:{ports.gcs} --metrics-export-port={ports.metrics}",
    )


def _machine(machine: str | None, which: str, example: str) -> str:
    return given(machine, f"cluster.{which}.machine", f"a machine type such as {example}")
