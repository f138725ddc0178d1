"""Render the files that create a cluster from the `cluster` section of the run description.

Ray's cluster launcher (`ray up`) and KubeRay start machines. Serve's config file starts the retrieval service on them.
Slurm allocates machines for one command. Documents are dictionaries until they are written. Files that run a job or
the service contain the run description, so that it does not depend on the container image.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from cluster.places.check import absolute_paths, excluded, storage_folder
from tvilfm.config import Config, ServeSection, resolve, to_yaml

Document = dict[str, Any]

API = "ray.io/v1"
CONFIG_FOLDER = "/etc/tvilfm"
CONFIG_PATH = f"{CONFIG_FOLDER}/ray_config.yaml"
PROGRAM_FOLDER = "~/tvilfm"
USER_ID = 1000  # user of the Dockerfile
# Ray reads the token from this file if RAY_AUTH_MODE=token.
TOKEN_FILE = "~/.ray/auth_token"
REQUEST_S = 120.0  # timeout of a request to the service: above that of its replicas, which answer 503
# Time between the end of a job and the deletion of its cluster, in which the dashboard can still be read.
KEPT_AFTER_END_S = 300
# How long workers wait for a head whose state is in Redis (KubeRay's value). Ray's default of one minute is too short
# to start a machine.
HEAD_AWAY_S = 600
# If a proxy dies, a replica that was answering it through Ray blocks all its requests until the head notices (Ray 2.60:
# its event loop waits in `WaitAllObjectsReported`). With gRPC it does not block. gRPC's default message limit is 4 MB.
SERVE_ENV = {"RAY_SERVE_PROXY_USE_GRPC": "1", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}
# Required for machines with GPUs: Ray's default images have no driver (GCP) or one that is years old (AWS).
GPU_IMAGE = "a machine image with NVIDIA's driver and Docker"
# Has Docker but no GPU driver; Ray's default.
GCP_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cpu"


def render(target: str, config: Config, *, command: str = "run") -> str:
    """Return the text of a file that creates a cluster or runs a command on one.

    Args:
        target: a key of `TARGETS`.
        config: the run description.
        command: for kuberay-job and slurm, a tvilfm command that takes --config, without its overrides.

    Raises:
        ValueError: the description lacks a value that this target needs, or has one that it does not support.
    """
    if target not in TARGETS:
        raise ValueError(f"--target: expected one of {', '.join(TARGETS)}, got {target}. Choose one of them.")
    return TARGETS[target](config, command)


# Ray's cluster launcher


def ray_up_aws(config: Config) -> Document:
    """Return the `ray up` file of a cluster of AWS machines."""
    section = config.cluster
    region = _given(section.provider.region, "cluster.provider.region", "a region such as us-west-2")
    provider: Document = {"type": "aws", "region": region, "cache_stopped_nodes": False}
    if section.provider.zone:
        provider["availability_zone"] = section.provider.zone
    if section.workers.gpus:
        _given(section.provider.machine_image, "cluster.provider.machine_image", GPU_IMAGE)
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
        "region": _given(section.provider.region, "cluster.provider.region", "a region such as us-west1"),
        "availability_zone": _given(section.provider.zone, "cluster.provider.zone", "a zone such as us-west1-a"),
        "project_id": _given(section.provider.project, "cluster.provider.project", "the id of your project"),
    }

    image = section.provider.machine_image
    if section.workers.gpus:
        _given(image, "cluster.provider.machine_image", GPU_IMAGE)
    disk = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {"diskSizeGb": section.provider.disk_gb, "sourceImage": image or GCP_IMAGE},
    }
    head = {"machineType": _machine(section.head.machine, "head", "n2-standard-8"), "disks": [disk]}
    worker = {"machineType": _machine(section.workers.machine, "workers", "n1-standard-8"), "disks": [disk]}
    if section.workers.gpus:
        type_ = _given(section.workers.accelerator, "cluster.workers.accelerator", "a type such as nvidia-tesla-t4")
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
    section = config.cluster
    cloud = head is not None
    auth = {"ssh_user": section.provider.ssh_user}
    if section.provider.ssh_key is not None:
        auth["ssh_private_key"] = str(section.provider.ssh_key)
    mounts, setup = {}, []
    docker: Document = {}
    if section.image is None:
        if cloud:
            _given(None, "cluster.image", "a container image with tvilfm (see the Dockerfile)")
        mounts[PROGRAM_FOLDER] = "."
        setup = [
            "test -x ~/.tvilfm/bin/python || (python3 -m venv ~/.tvilfm && "
            "echo 'export PATH=\"$HOME/.tvilfm/bin:$PATH\"' >> ~/.bashrc)",
            f"~/.tvilfm/bin/pip install --quiet --constraint {PROGRAM_FOLDER}/constraints.txt {PROGRAM_FOLDER}",
        ]
    else:
        docker = {"image": section.image, "container_name": section.name, "pull_before_run": True}
        docker["run_options"] = ["--ulimit nofile=65536:65536"]
    if section.token_path is not None:
        mounts[TOKEN_FILE] = str(section.token_path)
    environment = "export RAY_AUTH_MODE=token; " if section.token_path is not None else ""
    redis = f"RAY_REDIS_ADDRESS={section.redis} " if section.redis else ""
    patient = f"RAY_gcs_rpc_server_reconnect_timeout_s={HEAD_AWAY_S} " if section.redis else ""
    ports = section.ports
    start = f"ulimit -n 65536; {environment}"
    document: Document = {
        "cluster_name": section.name,
        "max_workers": section.workers.max,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": section.workers.idle_minutes,
        "docker": docker,
        "provider": provider,
        "auth": auth,
    }
    if cloud:
        resources = {"CPU": section.workers.cpus} | ({"GPU": section.workers.gpus} if section.workers.gpus else {})
        document["available_node_types"] = {
            "head": {"resources": {"CPU": section.head.cpus}, "node_config": head, "min_workers": 0, "max_workers": 0},
            "worker": {
                "resources": resources,
                "node_config": worker,
                "min_workers": section.workers.min,
                "max_workers": section.workers.max,
            },
        }
        document["head_node_type"] = "head"
    return document | {
        "file_mounts": mounts,
        "cluster_synced_files": [],
        "rsync_exclude": excluded(config, Path.cwd()),
        "rsync_filter": [".gitignore"],
        "initialization_commands": [],
        "setup_commands": setup,
        "head_setup_commands": [f"pip install --quiet {' '.join(head_packages)}"] if head_packages else [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            # The dashboard executes any job it receives, so it is reachable only through SSH (`ray dashboard`).
            f"{start}{redis}ray start --head --port={ports.gcs} --dashboard-host=127.0.0.1 "
            f"--dashboard-port={ports.dashboard} --metrics-export-port={ports.metrics} "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start}{patient}ray start --address=$RAY_HEAD_IP:{ports.gcs} --metrics-export-port={ports.metrics}",
        ],
    }


def _machine(given: str | None, which: str, example: str) -> str:
    return _given(given, f"cluster.{which}.machine", f"a machine type such as {example}")


def _given(value: str | None, key: str, what: str) -> str:
    if value is None:
        raise ValueError(f"{key}: expected {what}, got null. Set it in ray_config.yaml or as {key}=... .")
    return value


# KubeRay


def kuberay_cluster(config: Config) -> Document:
    """Return a RayCluster, which runs until it is deleted."""
    return _resource(config, "RayCluster", _ray_cluster(config))


def kuberay_job(config: Config, command: str) -> list[Document]:
    """Return a ConfigMap with the run description, and a RayJob: a cluster that is deleted after one command."""
    driver = config.cluster.driver
    spec = {
        "entrypoint": _entrypoint(config, command, CONFIG_PATH),
        "entrypointNumCpus": driver.cpus,
        "entrypointNumGpus": driver.gpus,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_AFTER_END_S,
        "rayClusterSpec": _ray_cluster(config, with_config=True),
    }
    description = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.cluster.name}-config"},
        "data": {"ray_config.yaml": to_yaml(_on_the_cluster(config))},
    }
    return [description, _resource(config, "RayJob", spec)]


def kuberay_service(config: Config) -> Document:
    """Return a RayService: a cluster that serves. When its file changes, a new cluster replaces it without downtime."""
    if config.serve.host != "0.0.0.0":
        raise ValueError(
            f"serve.host: expected 0.0.0.0 for a service on Kubernetes, got {config.serve.host}. Set "
            "serve.host=0.0.0.0, and serve.keys, which it requires."
        )
    if config.serve.tls_cert is not None:
        # KubeRay checks the health of a pod's proxy over plain HTTP.
        raise ValueError(
            f"serve.tls_cert: expected null for a service on Kubernetes, got {config.serve.tls_cert}. Terminate "
            "TLS at the ingress of the cluster."
        )
    spec = {
        "serveConfigV2": _yaml(serve_config(config)),
        "rayClusterConfig": _ray_cluster(config),
    }
    return _resource(config, "RayService", spec)


def _resource(config: Config, kind: str, spec: Document) -> Document:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": config.cluster.name}, "spec": spec}


def _ray_cluster(config: Config, *, with_config: bool = False) -> Document:
    section = config.cluster
    workers = section.workers
    if workers.spot and not workers.node_selector:
        raise ValueError(
            "cluster.workers.node_selector: expected the label of your spot nodes with workers.spot, got none. GKE: "
            "cloud.google.com/gke-spot=true, EKS: eks.amazonaws.com/capacityType=SPOT."
        )
    metrics = {"metrics-export-port": str(section.ports.metrics)}
    spec: Document = {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": workers.min < workers.max,
        "autoscalerOptions": {"idleTimeoutSeconds": workers.idle_minutes * 60, "upscalingMode": "Default"},
        "headGroupSpec": {
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                "port": str(section.ports.gcs),
                "dashboard-port": str(section.ports.dashboard),
                **metrics,
            },
            "template": _pod(config, "head", section.head.cpus, section.head.memory_gb, 0, with_config=with_config),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": workers.min,
                "minReplicas": workers.min,
                "maxReplicas": workers.max,
                "rayStartParams": metrics,
                "template": _pod(
                    config, "worker", workers.cpus, workers.memory_gb, workers.gpus, with_config=with_config
                ),
            }
        ],
    }
    if section.token_path is not None:
        spec["authOptions"] = {"mode": "token"}  # the operator creates the token and stores it in a secret
    if section.redis is not None:
        spec["gcsFaultToleranceOptions"] = {"redisAddress": section.redis}
    return spec


def _pod(config: Config, role: str, cpus: int, memory_gb: int, gpus: int, *, with_config: bool) -> Document:
    section = config.cluster
    resources = {"cpu": str(cpus), "memory": f"{memory_gb}G"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    ports = {"metrics": section.ports.metrics, "serve": config.serve.port}
    if role == "head":
        ports = {"gcs-server": section.ports.gcs, "dashboard": section.ports.dashboard, **ports}
    container: Document = {
        "name": f"ray-{role}",
        "image": _given(section.image, "cluster.image", "a container image with tvilfm (see the Dockerfile)"),
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if (storage := storage_folder(config)) is not None:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": f"{section.name}-storage"}})
        mounts.append({"name": "storage", "mountPath": str(storage)})
    if with_config:
        volumes.append({"name": "config", "configMap": {"name": f"{section.name}-config"}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    if mounts:
        container["volumeMounts"] = mounts
    if section.env:
        container["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": f"{section.name}-env", "key": name}}}
            for name in section.env
        ]
    spec: Document = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER_ID, "fsGroup": USER_ID},
        "containers": [container],
    }
    if volumes:
        spec["volumes"] = volumes
    if role == "worker":
        if section.workers.node_selector:
            spec["nodeSelector"] = dict(label.split("=", 1) for label in section.workers.node_selector)
        if gpus:
            spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


# What runs on a cluster


def http_options(section: ServeSection) -> Document:
    """Return the host, port, timeout and TLS files of Serve, in the form of `HTTPOptions` and of its config files."""
    options = {"host": section.host, "port": section.port, "request_timeout_s": REQUEST_S}
    if section.tls_cert is not None:
        options |= {"ssl_certfile": str(section.tls_cert), "ssl_keyfile": str(section.tls_key)}
    return options


def serve_config(config: Config) -> Document:
    """Return the Serve config of the retrieval service, for `serve deploy` and for a RayService."""
    config = _on_the_cluster(config)
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(config.serve),
        "controller_options": {"runtime_env": {"env_vars": dict(SERVE_ENV)}},  # proxies and replicas inherit them
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": "tvilfm",
                "route_prefix": "/",
                "import_path": "cluster.serve.application:application",
                "args": {"config": config.model_dump(mode="json")},
            }
        ],
    }


def slurm(config: Config, command: str) -> str:
    """Return a batch script that starts Ray on the machines of a Slurm job (head on the first) and runs a command."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster", "machines/templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    section = config.cluster
    return environment.get_template("slurm.sh.j2").render(
        section=section,
        workers=section.workers,
        nodes=max(section.workers.max, 1),
        python=shlex.quote(section.python),
        token=None if section.token_path is None else shlex.quote(str(section.token_path.expanduser())),
        description=to_yaml(resolve(config.model_dump(mode="json"), ["cluster.address=null"])),
        entrypoint=_entrypoint(config, command, '"$description"', quoted=True),
        sweep=_begun(config, shlex.split(command)),
    )


def _begun(config: Config, words: list[str]) -> str | None:
    """Return the path of the file that a started sweep has, quoted for a shell; None for another command."""
    if words[0] != "tune":
        return None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("space", type=Path)
    parser.add_argument("--name")
    options, _ = parser.parse_known_args(words[1:])
    return shlex.quote(str(config.run.dir / (options.name or options.space.stem) / "tune" / "tuner.pkl"))


def _on_the_cluster(config: Config) -> Config:
    """Return the description for a job on the cluster: absolute paths, and no cluster address."""
    overrides = absolute_paths(config, storage_folder(config))
    # A job connects to the cluster that it runs on.
    return resolve(config.model_dump(mode="json"), [*overrides, "cluster.address=null"])


def _entrypoint(config: Config, command: str, path: str, *, quoted: bool = False) -> str:
    words = shlex.split(command)
    if not words or any("=" in word or word.startswith(("--config", "--size")) for word in words):
        raise ValueError(
            f"--command: expected a tvilfm command such as run or 'tune ablations', got {command!r}. The file contains "
            "the run description: give --size and overrides to `tvilfm cluster render`."
        )
    given = path if quoted else shlex.quote(path)
    return f"{shlex.join((config.cluster.python, '-m', 'cluster', *words))} --config {given}"


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as blocks and uses no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(*documents: Document) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


TARGETS: dict[str, Callable[[Config, str], str]] = {
    "ray-up-aws": lambda config, command: _yaml(ray_up_aws(config)),
    "ray-up-gcp": lambda config, command: _yaml(ray_up_gcp(config)),
    "ray-up-onprem": lambda config, command: _yaml(ray_up_onprem(config)),
    "kuberay-cluster": lambda config, command: _yaml(kuberay_cluster(config)),
    "kuberay-job": lambda config, command: _yaml(*kuberay_job(config, command)),
    "kuberay-service": lambda config, command: _yaml(kuberay_service(config)),
    "serve-config": lambda config, command: _yaml(serve_config(config)),
    "slurm": slurm,
}
