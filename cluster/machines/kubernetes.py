"""Resources of KubeRay, the operator that runs Ray on Kubernetes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from cluster.machines.documents import Document, given, resource
from cluster.machines.postgres import password_variable, postgres
from cluster.places.check import storage_folder
from tvilfm.config import Config, HeadSection, WorkersSection

API = "ray.io/v1"
CONFIG_FOLDER = "/etc/tvilfm"
CONFIG_PATH = f"{CONFIG_FOLDER}/ray_config.yaml"
KEYS_PATH = "/etc/tvilfm-keys/keys.json"  # of a secret
USER_ID = 1000  # user of the Dockerfile
# What namespaces of Kubernetes's restricted profile require.
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
# Time between the end of a job and the deletion of its cluster, in which the dashboard can still be read.
KEPT_AFTER_END_S = 300


def kuberay_cluster(config: Config) -> list[Document]:
    """Return a RayCluster, which runs until it is deleted, and what it needs."""
    return _complete(config, [resource(API, "RayCluster", config.cluster.name, _ray_cluster(config))])


def kuberay_job(config: Config, entrypoint: str, description: str) -> list[Document]:
    """Return a ConfigMap and a RayJob, a cluster that is deleted after one command, and what it needs.

    Args:
        config: the run description.
        entrypoint: the command, which reads `CONFIG_PATH`.
        description: run description of the ConfigMap, which becomes that file.
    """
    driver, name = config.cluster.driver, config.cluster.name
    spec = {
        "entrypoint": entrypoint,
        "entrypointNumCpus": driver.cpus,
        "entrypointNumGpus": driver.gpus,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_AFTER_END_S,
        "submitterPodTemplate": _submitter(config),
        "rayClusterSpec": _ray_cluster(config, with_config=True),
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config"},
        "data": {Path(CONFIG_PATH).name: description},
    }
    return _complete(config, [config_map, resource(API, "RayJob", name, spec)])


def kuberay_service(config: Config, serve_config: str) -> list[Document]:
    """Return a RayService, a cluster that serves, and what it needs.

    When its file changes, a new cluster replaces it without downtime. Its head runs no replica.

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
    cluster = _ray_cluster(config, serves=True)
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = "0"
    spec = {"serveConfigV2": serve_config, "rayClusterConfig": cluster}
    return _complete(config, [resource(API, "RayService", config.cluster.name, spec)])


def _complete(config: Config, documents: list[Document]) -> list[Document]:
    """Return documents of a cluster after those that it needs, with namespace and labels."""
    section = config.cluster.kubernetes
    policies = [_network_policy(config)] if section.network_policy else []
    documents = [*postgres(config), *policies, *documents]
    for document in documents:
        if section.namespace is not None:
            document["metadata"]["namespace"] = section.namespace
        document["metadata"]["labels"] = _labels(config)
    return documents


def _labels(config: Config) -> dict[str, str]:
    own = dict(label.split("=", 1) for label in config.cluster.kubernetes.labels)
    return {"app.kubernetes.io/name": "tvilfm", "app.kubernetes.io/instance": config.cluster.name, **own}


def _network_policy(config: Config) -> Document:
    """Return a policy that opens only the service and the metrics to pods outside of the cluster.

    Anyone who reaches Ray's other ports can execute code. The operator has to reach the dashboard's port.
    """
    section = config.cluster
    pods = {"matchLabels": {key: value for key, value in _labels(config).items() if key.startswith("app.")}}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    spec = {
        "podSelector": pods,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": pods}]},
            {"from": [operator], "ports": [{"port": section.ports.dashboard}, {"port": config.serve.port}]},
            {"ports": [{"port": config.serve.port}, {"port": section.ports.metrics}]},
        ],
    }
    return resource("networking.k8s.io/v1", "NetworkPolicy", section.name, spec)


def _ray_cluster(config: Config, *, with_config: bool = False, serves: bool = False) -> Document:
    section = config.cluster
    groups = {"workers": section.workers, **{group.name: group for group in section.groups}}
    metrics = {"metrics-export-port": str(section.ports.metrics)}
    head = _pod(config, "head", section.head, with_config=with_config, serves=serves)
    spec: Document = {
        "rayVersion": version("ray"),
        "enableInTreeAutoscaling": any(group.min < group.max for group in groups.values()),
        "autoscalerOptions": {
            "idleTimeoutSeconds": section.workers.idle_minutes * 60,
            "upscalingMode": "Default",
            "securityContext": CONTAINER_SECURITY,
        },
        "headGroupSpec": {
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                "port": str(section.ports.gcs),
                "dashboard-port": str(section.ports.dashboard),
                **metrics,
            },
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": group.min,
                "minReplicas": group.min,
                "maxReplicas": group.max,
                "rayStartParams": metrics,
                "template": _worker_pod(config, name, group, with_config=with_config, serves=serves),
            }
            for name, group in groups.items()
        ],
    }
    if section.token_path is not None:
        spec["authOptions"] = {"mode": "token"}  # the operator creates the token and stores it in a secret
    if section.redis is not None:
        spec["gcsFaultToleranceOptions"] = {"redisAddress": section.redis}
        if section.kubernetes.redis_secret is not None:
            password = {"secretKeyRef": {"name": section.kubernetes.redis_secret, "key": "password"}}
            spec["gcsFaultToleranceOptions"]["redisPassword"] = {"valueFrom": password}
    return spec


def _worker_pod(config: Config, name: str, group: WorkersSection, *, with_config: bool, serves: bool) -> Document:
    if group.spot and not group.node_selector:
        key = "cluster.workers" if name == "workers" else f"cluster.groups ({name})"
        raise ValueError(
            f"{key}.node_selector: expected the label of your spot nodes with spot, got none. GKE: "
            "cloud.google.com/gke-spot=true, EKS: eks.amazonaws.com/capacityType=SPOT."
        )
    pod = _pod(config, "worker", group, with_config=with_config, serves=serves)
    tolerations = [_toleration(text) for text in config.cluster.kubernetes.tolerations]
    if group.node_selector:
        pod["spec"]["nodeSelector"] = dict(label.split("=", 1) for label in group.node_selector)
    if group.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        pod["spec"]["tolerations"] = tolerations
    return pod


def _toleration(text: str) -> Document:
    taint, _, effect = text.rpartition(":")
    key, _, value = taint.partition("=")
    return {
        "key": key,
        **({"operator": "Equal", "value": value} if value else {"operator": "Exists"}),
        "effect": effect,
    }


def _pod(
    config: Config, role: str, machine: HeadSection | WorkersSection, *, with_config: bool, serves: bool
) -> Document:
    section = config.cluster
    gpus = machine.gpus if isinstance(machine, WorkersSection) else 0
    resources = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gb}G"}
    resources |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
    ports = {"metrics": section.ports.metrics, "serve": config.serve.port}
    if role == "head":
        ports = {"gcs-server": section.ports.gcs, "dashboard": section.ports.dashboard, **ports}
    container = _container(config, f"ray-{role}", resources)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    volumes = _volumes(config, with_config=with_config, serves=serves)
    if volumes:
        container["volumeMounts"] = [mount for _, mount in volumes]
    variables = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": f"{section.name}-env", "key": name}}}
        for name in section.env
    ]
    variables += [password_variable(config)] * (section.database.image is not None)
    if variables:
        container["env"] = variables
    pod = _pod_of(config, container)
    if volumes:
        pod["spec"]["volumes"] = [volume for volume, _ in volumes]
    return pod


def _submitter(config: Config) -> Document:
    """Return the pod that submits a RayJob's command. Namespaces with restricted pods refuse KubeRay's own."""
    pod = _pod_of(config, _container(config, "ray-job-submitter", {"cpu": "500m", "memory": "500M"}))
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def _container(config: Config, name: str, resources: Document) -> Document:
    return {
        "name": name,
        "image": given(config.cluster.image, "cluster.image", "a container image with tvilfm (see the Dockerfile)"),
        "resources": {"requests": resources, "limits": resources},
        "securityContext": CONTAINER_SECURITY,
    }


def _pod_of(config: Config, container: Document) -> Document:
    section = config.cluster.kubernetes
    spec: Document = {"securityContext": POD_SECURITY, "containers": [container]}
    if section.service_account is not None:
        spec["serviceAccountName"] = section.service_account
    if section.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in section.pull_secrets]
    return {"metadata": {"labels": _labels(config)}, "spec": spec}


def _volumes(config: Config, *, with_config: bool, serves: bool) -> list[tuple[Document, Document]]:
    """Return the volumes of a pod, each with its mount."""
    section = config.cluster
    volumes: list[tuple[Document, Document]] = []
    if (storage := storage_folder(config)) is not None:
        claim = section.kubernetes.claim or f"{section.name}-storage"
        volume = {"name": "storage", "persistentVolumeClaim": {"claimName": claim}}
        volumes.append((volume, {"name": "storage", "mountPath": str(storage)}))
    if with_config:
        volume = {"name": "config", "configMap": {"name": f"{section.name}-config"}}
        volumes.append((volume, {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}))
    if serves and section.kubernetes.keys_secret is not None:
        volume = {"name": "keys", "secret": {"secretName": section.kubernetes.keys_secret}}
        volumes.append((volume, {"name": "keys", "mountPath": str(Path(KEYS_PATH).parent), "readOnly": True}))
    return volumes
