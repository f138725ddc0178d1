"""Resources of KubeRay, the operator that runs Ray on Kubernetes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.machines.documents import Document, given
from cluster.places.check import storage_folder
from tvilfm.config import Config

API = "ray.io/v1"
CONFIG_FOLDER = "/etc/tvilfm"
CONFIG_PATH = f"{CONFIG_FOLDER}/ray_config.yaml"
USER_ID = 1000  # user of the Dockerfile
# Time between the end of a job and the deletion of its cluster, in which the dashboard can still be read.
KEPT_AFTER_END_S = 300


def kuberay_cluster(config: Config) -> Document:
    """Return a RayCluster, which runs until it is deleted."""
    return _resource(config, "RayCluster", _ray_cluster(config))


def kuberay_job(config: Config, entrypoint: str, description: str) -> list[Document]:
    """Return a ConfigMap and a RayJob: a cluster that is deleted after one command.

    Args:
        config: the run description.
        entrypoint: the command, which reads `CONFIG_PATH`.
        description: run description of the ConfigMap, which becomes that file.
    """
    driver = config.cluster.driver
    spec = {
        "entrypoint": entrypoint,
        "entrypointNumCpus": driver.cpus,
        "entrypointNumGpus": driver.gpus,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_AFTER_END_S,
        "rayClusterSpec": _ray_cluster(config, with_config=True),
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.cluster.name}-config"},
        "data": {Path(CONFIG_PATH).name: description},
    }
    return [config_map, _resource(config, "RayJob", spec)]


def kuberay_service(config: Config, serve_config: str) -> Document:
    """Return a RayService: a cluster that serves. When its file changes, a new cluster replaces it without downtime.

    Args:
        config: the run description.
        serve_config: Serve's config file.
    """
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
    spec = {"serveConfigV2": serve_config, "rayClusterConfig": _ray_cluster(config)}
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
        "image": given(section.image, "cluster.image", "a container image with tvilfm (see the Dockerfile)"),
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
