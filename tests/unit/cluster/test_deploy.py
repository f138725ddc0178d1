"""Rendered files are what the program that reads them takes: Ray's launcher, KubeRay, Serve, Slurm."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.machines import render as machines
from cluster.machines.render import CONFIG_PATH, TARGETS, render
from cluster.places.check import excluded
from cluster.serve.encoder import Encoder
from cluster.serve.environment import REQUEST_S, serve_environment
from cluster.serve.replica import Replica
from tests.paths import REPOSITORY
from tvilfm.config import Config, load_config

IMAGE = "cluster.image=registry/tvilfm:1"
AWS = (
    IMAGE,
    "cluster.provider={region: us-west-2, machine_image: ami-1}",
    "cluster.head.machine=m5.2xlarge",
    "cluster.workers.machine=g5.xlarge",
)
GCP = (
    IMAGE,
    "cluster.provider={region: us-west1, zone: us-west1-a, project: reid, machine_image: projects/a/global/images/b}",
    "cluster.head.machine=n2-standard-8",
    "cluster.workers.machine=n1-standard-8",
    "cluster.workers.accelerator=nvidia-tesla-t4",
)
ONPREM = ("cluster.provider.hosts=[10.0.0.1, 10.0.0.2, 10.0.0.3]", "cluster.provider.ssh_user=reid")
KUBERNETES = (IMAGE, "cluster.storage=/mnt/shared")
SERVED = ("serve.host=0.0.0.0", "serve.keys=keys.json")
LAUNCHERS = {"ray-up-aws": AWS, "ray-up-gcp": GCP, "ray-up-onprem": ONPREM}

SCHEMAS = Path(__file__).parent / "kuberay"  # as the operator publishes them


def rendered(target: str, *overrides: str, command: str = "run") -> list[dict[str, Any]]:
    config = load_config(Path("ray_config.yaml"), overrides, size="tiny")
    return list(yaml.safe_load_all(render(target, config, command=command)))


def closed(schema: Any) -> Any:
    """Return a copy of a schema that refuses unknown fields, as `kubectl apply` does."""
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    if "properties" in schema:
        copy["properties"] = {name: closed(field) for name, field in schema["properties"].items()}
        copy.setdefault("additionalProperties", False)
    for keyword in ("items", "additionalProperties"):
        if keyword in copy:
            copy[keyword] = closed(copy[keyword])
    return copy


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft7Validator]:
    """By kind, a validator of KubeRay's documents. Rules in Kubernetes' expression language are not evaluated."""
    found = {}
    for path in SCHEMAS.glob("*.yaml.gz"):
        definition = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)["spec"]
        (version,) = (version for version in definition["versions"] if version["name"] == "v1")
        found[definition["names"]["kind"]] = jsonschema.Draft7Validator(closed(version["schema"]["openAPIV3Schema"]))
    return found


@pytest.mark.parametrize("target", LAUNCHERS)
@pytest.mark.parametrize("more", [(), ("cluster.token_path=/t", "cluster.redis=r:6379", "cluster.workers.spot=true")])
def test_launcher_files_pass_rays_own_validation(target: str, more: tuple[str, ...]) -> None:
    (document,) = rendered(target, *LAUNCHERS[target], "cluster.workers.gpus=2", *more)
    validate_config(prepare_config(document))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(document | {"max_worker": 2}))
    start = " ".join(document["head_start_ray_commands"])
    assert ("RAY_external_storage_namespace=tvilfm " in start) == bool(more)
    assert ("RAY_REDIS_ADDRESS=r:6379 ray start" in start) == bool(more)
    joins = " ".join(document["worker_start_ray_commands"])
    assert ("RAY_gcs_rpc_server_reconnect_timeout_s=600 ray start" in joins) == bool(more)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert ("RAY_AUTH_MODE=token" in " ".join(document[commands])) == bool(more)
    assert document["file_mounts"].get("~/.ray/auth_token") == ("/t" if more else None)


def test_a_cluster_on_aws_has_the_machines_of_the_description() -> None:
    (document,) = rendered(
        "ray-up-aws",
        *AWS,
        "cluster.workers={min: 1, max: 5, cpus: 4, gpus: 1, spot: true}",
        "cluster.provider.disk_gb=99",
    )
    head, worker = (document["available_node_types"][name] for name in ("head", "worker"))
    assert (worker["min_workers"], worker["max_workers"], document["max_workers"]) == (1, 5, 5)
    assert worker["resources"] == {"CPU": 4, "GPU": 1} and head["resources"] == {"CPU": 8}
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 99


def test_a_cluster_on_gcp_has_its_accelerators_on_the_workers() -> None:
    (document,) = rendered("ray-up-gcp", *GCP, "cluster.workers={gpus: 2, spot: true, accelerator: nvidia-tesla-t4}",
                           "cluster.workers.machine=n1-standard-8")  # fmt: skip
    head, worker = (document["available_node_types"][name]["node_config"] for name in ("head", "worker"))
    assert worker["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 2}]
    assert {"preemptible": True} in worker["scheduling"]
    assert not {"guestAccelerators", "scheduling"} & set(head)


def test_a_container_sees_the_shared_folder_of_its_machine() -> None:
    (document,) = rendered("ray-up-aws", *AWS, "cluster.storage=/mnt/my data")
    assert "--volume '/mnt/my data:/mnt/my data'" in document["docker"]["run_options"]
    (document,) = rendered("ray-up-aws", *AWS, "cluster.storage=s3://bucket/runs")
    assert not any("--volume" in option for option in document["docker"]["run_options"])


def test_own_machines_are_all_used_and_install_the_program() -> None:
    (document,) = rendered("ray-up-onprem", *ONPREM)
    prepared = prepare_config(document)["available_node_types"]["local.cluster.node"]
    assert (prepared["min_workers"], prepared["max_workers"]) == (2, 2)
    assert document["provider"]["head_ip"] == "10.0.0.1" and "docker" in document
    assert document["file_mounts"] == {"~/tvilfm": "."}
    assert any("--constraint ~/tvilfm/constraints.txt" in line for line in document["setup_commands"])
    assert {".git", "/runs"} <= set(document["rsync_exclude"])


@pytest.mark.parametrize(
    ("target", "kind", "more"),
    [
        ("kuberay-cluster", "RayCluster", ()),
        ("kuberay-job", "RayJob", ("cluster.driver={cpus: 2, gpus: 1}",)),
        ("kuberay-service", "RayService", SERVED),
    ],
)
def test_kubernetes_files_use_kuberays_fields_only(
    validators: dict[str, jsonschema.Draft7Validator], target: str, kind: str, more: tuple[str, ...]
) -> None:
    every = (
        "cluster.token_path=/t",
        "cluster.redis=redis:6379",
        "cluster.env=[HF_TOKEN]",
        "cluster.workers={gpus: 1, spot: true, node_selector: [cloud.google.com/gke-spot=true]}",
        "cluster.groups=[{name: large, cpus: 64, max: 3, node_selector: [disk=ssd]}]",
        "cluster.kubernetes={namespace: reid, labels: [team=a], service_account: runner, pull_secrets: [registry], "
        "tolerations: [dedicated=reid:NoSchedule, spot:NoExecute], claim: everyones, keys_secret: keys, "
        "redis_secret: redis}",
        "cluster.database={image: postgres, vector_image: pgvector, backup: s3://b/p, backup_secret: s3}",
    )
    for options in ((), every):
        document = rendered(target, *KUBERNETES, *more, *options)[-1]
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
        validators[kind].validate(document)
    text = json.dumps(document)
    assert '"nvidia.com/gpu": "1"' in text and '"cloud.google.com/gke-spot": "true"' in text
    assert '"secretKeyRef": {"name": "tvilfm-env", "key": "HF_TOKEN"}' in text
    for given in ('"claimName": "everyones"', '"key": "password"', '"value": "reid", "effect": "NoSchedule"'):
        assert given in text
    assert document["metadata"] == {
        "name": "tvilfm",
        "namespace": "reid",
        "labels": {"app.kubernetes.io/name": "tvilfm", "app.kubernetes.io/instance": "tvilfm", "team": "a"},
    }
    for pod in pods_of(document):
        assert (pod["serviceAccountName"], pod["imagePullSecrets"]) == ("runner", [{"name": "registry"}])
        # What the restricted profile requires: https://kubernetes.io/docs/concepts/security/pod-security-standards
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def pods_of(node: Any) -> list[dict[str, Any]]:
    """Return every pod's spec below a node of a document."""
    if isinstance(node, list):
        return [pod for item in node for pod in pods_of(item)]
    if not isinstance(node, dict):
        return []
    own = [node] if "containers" in node else []
    return own + [pod for below in node.values() for pod in pods_of(below)]


def documents_of(target: str, *overrides: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in rendered(target, *KUBERNETES, *overrides)}


def test_workers_are_several_groups_and_the_head_of_a_service_runs_no_replica() -> None:
    groups = "cluster.groups=[{name: large, cpus: 64, max: 3}]"
    cluster = documents_of("kuberay-service", *SERVED, groups)["RayService"]["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (large,) = (group for group in cluster["workerGroupSpecs"] if group["groupName"] == "large")
    assert large["maxReplicas"] == 3
    assert large["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "64"
    assert "num-cpus" not in documents_of("kuberay-cluster")["RayCluster"]["spec"]["headGroupSpec"]["rayStartParams"]


def test_other_pods_reach_only_the_service_and_the_metrics() -> None:
    documents = documents_of("kuberay-cluster")
    own, operator, others = documents["NetworkPolicy"]["spec"]["ingress"]
    assert own == {"from": [{"podSelector": documents["NetworkPolicy"]["spec"]["podSelector"]}]}
    assert "podSelector" in operator["from"][0] and {"port": 8265} in operator["ports"]
    assert others == {"ports": [{"port": 8000}, {"port": 8080}]}
    labels = documents["RayCluster"]["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert "NetworkPolicy" not in documents_of("kuberay-cluster", "cluster.kubernetes.network_policy=false")


def test_keys_of_a_service_come_from_a_secret() -> None:
    service = documents_of("kuberay-service", *SERVED, "cluster.kubernetes.keys_secret=people")["RayService"]["spec"]
    served = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]["config"]["serve"]["keys"]
    for pod in pods_of(service):
        assert {"name": "keys", "secret": {"secretName": "people"}} in pod["volumes"]
        assert {"name": "keys", "mountPath": str(Path(served).parent), "readOnly": True} in pod["containers"][0][
            "volumeMounts"
        ]


def test_replicas_are_spread_over_machines() -> None:
    (document,) = rendered("serve-config", "run.dir=/r", "cluster.max_replicas_per_node=2", "serve.shared_encoders=1")
    (application,) = ServeDeploySchema.model_validate(document).applications
    spread = {deployment.name: deployment.max_replicas_per_node for deployment in application.deployments}
    assert spread == {Replica.__name__: 2, Encoder.__name__: 2}


def test_the_gallerys_server_has_pgvector_backups_and_a_password_that_nobody_writes_down() -> None:
    database = "cluster.database={image: p:18, vector_image: v:18, backup: s3://b/p, instances: 3}"
    documents = documents_of("kuberay-service", *SERVED, database)
    server = documents["Cluster"]["spec"]
    assert (server["instances"], server["imageName"]) == (3, "p:18")
    assert server["postgresql"]["extensions"] == [{"name": "pgvector", "image": {"reference": "v:18"}}]
    assert documents["Database"]["spec"]["extensions"] == [{"name": "vector"}]
    (plugin,) = server["plugins"]
    assert plugin["parameters"]["barmanObjectName"] == documents["ObjectStore"]["metadata"]["name"]
    assert documents["ScheduledBackup"]["spec"]["cluster"]["name"] == documents["Cluster"]["metadata"]["name"]
    service = documents["RayService"]["spec"]
    gallery = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]["config"]["gallery"]
    assert gallery["url"] == "postgresql://tvilfm@tvilfm-gallery-rw/tvilfm?sslmode=require"
    assert gallery["read_url"] == "postgresql://tvilfm@tvilfm-gallery-ro/tvilfm?sslmode=require"
    secret = {"secretKeyRef": {"name": "tvilfm-gallery-app", "key": "password"}}
    for pod in pods_of(service):
        assert {"name": "PGPASSWORD", "valueFrom": secret} in pod["containers"][0]["env"]
    assert set(documents_of("kuberay-service", *SERVED)) == {"NetworkPolicy", "RayService"}


def test_an_overlay_is_merged_last(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        """
kind: RayCluster
spec:
  autoscalerOptions: null
  workerGroupSpecs:
    - groupName: workers
      template:
        spec:
          containers: [{name: ray-worker, imagePullPolicy: Always}]
    - groupName: extra
      replicas: 1
---
kind: ConfigMap
apiVersion: v1
metadata: {name: mine}
"""
    )
    plain, own = documents_of("kuberay-cluster"), documents_of("kuberay-cluster", f"cluster.overlay={overlay}")
    workers, extra = own["RayCluster"]["spec"].pop("workerGroupSpecs")
    assert extra == {"groupName": "extra", "replicas": 1} and own.pop("ConfigMap")["metadata"] == {"name": "mine"}
    assert workers["template"]["spec"]["containers"][0].pop("imagePullPolicy") == "Always"
    assert [workers] == plain["RayCluster"]["spec"].pop("workerGroupSpecs")
    assert plain["RayCluster"]["spec"].pop("autoscalerOptions") and own == plain
    with pytest.raises(ValueError, match=r"cluster\.overlay: expected null for slurm"):
        render("slurm", load_config(overrides=[f"cluster.overlay={overlay}"]))
    overlay.write_text("[1")
    with pytest.raises(ValueError, match=r"cluster\.overlay: expected a YAML file"):
        rendered("kuberay-cluster", *KUBERNETES, f"cluster.overlay={overlay}")


def test_the_check_of_fields_finds_one_that_is_not_kuberays(validators: dict[str, jsonschema.Draft7Validator]) -> None:
    document = rendered("kuberay-cluster", *KUBERNETES)[-1]
    head, (worker,) = document["spec"]["headGroupSpec"], document["spec"]["workerGroupSpecs"]
    worker["maxReplica"] = 3
    worker["template"]["spec"]["containers"][0]["volumeMount"] = []
    head["rayStartParams"]["port"] = 6379
    del head["template"]["spec"]["containers"][0]["name"]
    faults = {
        error.json_path.removeprefix("$.spec."): error.validator
        for error in validators["RayCluster"].iter_errors(document)
    }
    assert faults == {
        "workerGroupSpecs[0]": "additionalProperties",
        "workerGroupSpecs[0].template.spec.containers[0]": "additionalProperties",
        "headGroupSpec.rayStartParams.port": "type",
        "headGroupSpec.template.spec.containers[0]": "required",
    }


def test_a_rendered_service_listens_as_tvilfm_serve_does() -> None:
    tls = ("serve.tls_cert=tls/cert.pem", "serve.tls_key=/etc/key.pem")
    (document,) = rendered("serve-config", "cluster.storage=/mnt/shared", *tls)
    options = ServeDeploySchema.model_validate(document).http_options
    assert (options.ssl_certfile, options.ssl_keyfile) == ("/mnt/shared/tls/cert.pem", "/etc/key.pem")
    assert options.request_timeout_s == REQUEST_S
    (document,) = rendered("serve-config", "run.dir=/r")
    assert "ssl_certfile" not in document["http_options"]


def test_a_rayjob_brings_the_description_that_its_command_reads(tmp_path: Path) -> None:
    _, description, job = rendered(
        "kuberay-job", *KUBERNETES, "train.p=2", "cluster.address=ray://x:1", command="train --stage base"
    )
    assert job["spec"]["entrypoint"] == f"python -m cluster train --stage base --config {CONFIG_PATH}"
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts == {"storage": "/mnt/shared", "config": str(Path(CONFIG_PATH).parent)}
        assert volumes["config"]["configMap"]["name"] == description["metadata"]["name"]
    (tmp_path / "ray_config.yaml").write_text(description["data"]["ray_config.yaml"])
    config = load_config(tmp_path / "ray_config.yaml")
    assert (config.train.p, str(config.run.dir), config.cluster.address) == (2, "/mnt/shared/runs", None)


def test_the_service_passes_serves_validation_and_names_an_application_that_there_is() -> None:
    (document,) = rendered("serve-config", "run.dir=/mnt/shared/runs", "serve.port=8123")
    schema = ServeDeploySchema.model_validate(document)
    (application,) = schema.applications
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8123)
    config = Config.model_validate(application.args["config"])
    assert config.run.path == Path("/mnt/shared/runs/tiny")
    module, _, name = application.import_path.partition(":")
    source = ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    variables = {"env_vars": serve_environment(config.serve)}
    assert schema.controller_options is not None and schema.controller_options.runtime_env == variables
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(document | {"applications": [{"name": "tvilfm"}]})

    service = rendered("kuberay-service", *KUBERNETES, *SERVED)[-1]
    served = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert served.applications[0].args["config"]["serve"]["keys"] == "/mnt/shared/keys.json"


# Stand-ins of a Slurm of two machines: they write down what they are asked, and run what srun is given.
STUBS = {
    "scontrol": "printf 'one\\ntwo\\n'",
    "hostname": "[[ $1 == --ip-address ]] && echo 127.0.1.1 || echo 10.0.0.7 10.0.0.8",  # as on Debian
    "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done; "$@"',
    "fake-python": 'echo "python $*" >> "$LOG"; [[ $2 != cluster ]] || { cat "${@: -1}" > "$LOG.yaml"; exit 3; }\n'
    '[[ $3 != status ]] || printf "Active:\\n 1 node_a\\n 1 node_b\\nPending:\\n (no pending nodes)\\n"',
}


def _slurm(folder: Path, stubs: dict[str, str]) -> dict[str, str]:
    """The environment of a batch script where these programs are."""
    (folder / "bin").mkdir()
    for name, body in stubs.items():
        stub = folder / "bin" / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        **{"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "any"},
    }


def test_the_slurm_script_starts_every_machine_and_ends_with_the_commands_status(tmp_path: Path) -> None:
    environment = _slurm(tmp_path, STUBS)
    python = tmp_path / "bin" / "fake-python"
    config = load_config(
        Path("ray_config.yaml"),
        [
            *(f"cluster.python={python}", "cluster.workers={gpus: 4, accelerator: a100, max: 2}"),
            *(
                "cluster.token_path=/t k",
                "cluster.slurm={partition: gpu, account: reid, time: 24:00:00, requeue_s: 90}",
            ),
        ],
        size="tiny",
    )
    script = tmp_path / "job.sh"
    script.write_text(render("slurm", config, command="tune ablations"))
    assert "#SBATCH --nodes=2" in script.read_text() and "#SBATCH --gres=gpu:a100:4" in script.read_text()
    for option in ("partition=gpu", "account=reid", "time=24:00:00", "output=%x-%j.log", "signal=B:USR1@90", "requeue"):
        assert f"#SBATCH --{option}\n" in script.read_text()
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    log = (tmp_path / "log").read_text()
    assert re.search(
        r"python -m ray\.scripts\.scripts start --head --block --node-ip-address=10\.0\.0\.7 --port=6379", log
    )
    assert re.search(r"srun .*-w two .* start --block --address=10\.0\.0\.7:6379 .*--num-gpus=4", log)
    assert f"python -m cluster tune ablations --config {tmp_path}/ray_config.7.yaml" in log
    assert load_config(tmp_path / "log.yaml") == config

    # Requeued, a sweep that had begun continues; another command has no such option.
    environment["SLURM_RESTART_COUNT"] = "1"
    subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=60, check=False)
    assert "--resume" not in (tmp_path / "log").read_text()
    begun = tmp_path / "runs" / "ablations" / "tune" / "tuner.pkl"
    begun.parent.mkdir(parents=True)
    begun.touch()
    subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=60, check=False)
    assert f"--config {tmp_path}/ray_config.7.yaml --resume\n" in (tmp_path / "log").read_text()
    assert "--resume" not in render("slurm", config, command="run")


def test_a_slurm_job_stops_before_its_limit_and_is_queued_again(tmp_path: Path) -> None:
    working = 'echo "token $RAY_AUTH_TOKEN" >> "$LOG"; trap "echo interrupted >> $LOG; exit 130" TERM\n'
    working += '[[ $2 != cluster ]] || { kill -USR1 "$PPID"; for _ in {1..100}; do sleep 0.1; done; }\n'
    scontrol = 'echo "scontrol $*" >> "$LOG"; ' + STUBS["scontrol"]
    environment = _slurm(tmp_path, {**STUBS, "fake-python": working + STUBS["fake-python"], "scontrol": scontrol})
    overrides = [f"cluster.python={tmp_path}/bin/fake-python", "cluster.slurm.requeue_s=60"]
    script = render("slurm", load_config(Path("ray_config.yaml"), overrides, size="tiny"))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    log = (tmp_path / "log").read_text()
    assert log.index("interrupted") < log.index("scontrol requeue 7"), done.stderr
    assert re.search(r"^token [0-9a-f]{64}$", log, re.MULTILINE)  # of this job alone


def test_a_slurm_job_needs_all_its_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "JOIN_S", 4)
    environment = _slurm(tmp_path, STUBS)
    overrides = [f"cluster.python={tmp_path}/bin/fake-python", "cluster.workers.max=3"]
    script = render("slurm", load_config(Path("ray_config.yaml"), overrides, size="tiny"))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "expected 3 machines to join Ray, got 2" in done.stderr
    assert "-m cluster" not in (tmp_path / "log").read_text()


def test_the_slurm_script_ends_where_ray_does_not_start(tmp_path: Path) -> None:
    environment = _slurm(tmp_path, {**STUBS, "fake-python": "exit 1"})
    config = load_config(Path("ray_config.yaml"), [f"cluster.python={tmp_path}/bin/fake-python"], size="tiny")
    script = render("slurm", config, command="tune ablations --name mine")
    assert "runs/mine/tune/tuner.pkl" in script
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Ray did not start on one" in done.stderr


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        ("ray-up-azure", (), r"--target: expected one of ray-up-aws, "),
        ("ray-up-aws", (), r"cluster\.provider\.region: expected a region"),
        ("ray-up-aws", AWS[1:], r"cluster\.image: expected a container image"),
        (
            "ray-up-aws",
            (*AWS, "cluster.workers.gpus=1", "cluster.provider.machine_image=null"),
            r"cluster\.provider\.machine_image: expected a machine image with NVIDIA's driver",
        ),
        ("ray-up-aws", AWS[:-1], r"cluster\.workers\.machine: expected a machine type"),
        ("ray-up-gcp", (*GCP[:-1], "cluster.workers.gpus=1"), r"cluster\.workers\.accelerator: expected a type"),
        (
            "ray-up-gcp",
            (*GCP, "cluster.workers.gpus=1", "cluster.provider.machine_image=null"),
            r"cluster\.provider\.machine_image: expected a machine image with NVIDIA's driver",
        ),
        ("ray-up-onprem", (), r"cluster\.provider\.hosts: expected the addresses"),
        ("kuberay-cluster", (), r"cluster\.image: expected a container image"),
        (
            "kuberay-cluster",
            (IMAGE, "cluster.workers.spot=true"),
            r"cluster\.workers\.node_selector: expected the label",
        ),
        ("kuberay-job", (IMAGE,), r"run\.dir: expected an absolute path for other machines, got runs"),
        ("kuberay-service", KUBERNETES, r"serve\.host: expected 0\.0\.0\.0"),
        (
            "kuberay-service",
            (*KUBERNETES, *SERVED, "serve.tls_cert=/c", "serve.tls_key=/k"),
            r"serve\.tls_cert: expected null for a service on Kubernetes",
        ),
    ],
)
def test_what_a_target_lacks_is_named(target: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(target, *overrides)


@pytest.mark.parametrize("command", ["", "run train.p=2", "run --size tiny"])
def test_a_command_that_brings_its_own_description_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match=r"--command: expected a tvilfm command"):
        rendered("kuberay-job", *KUBERNETES, command=command)


def test_every_target_renders() -> None:
    given = {**LAUNCHERS, "serve-config": ("run.dir=/r",), "slurm": (), "kuberay-service": (*KUBERNETES, *SERVED)}
    for target in TARGETS:
        config = load_config(Path("ray_config.yaml"), given.get(target, KUBERNETES))
        assert render(target, config).strip()


def test_the_dockerfile_copies_what_there_is_and_runs_as_nobody_special() -> None:
    lines = (
        (REPOSITORY / "cluster" / "machines" / "templates" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    )
    copies = [line.split()[1:] for line in lines if line.startswith("COPY")]
    sources = [word for words in copies for word in words[:-1] if not word.startswith("--")]
    assert {"pyproject.toml", "constraints.txt", "tvilfm", "cluster", "tune_spaces", "ray_config.yaml"} <= set(sources)
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert {line.split()[-1] for line in lines if line.startswith("FROM")} == {"program", "cpu", "cuda"}
    assert any("--constraint program/constraints.txt" in line for line in lines)
    assert not any("://" in line for line in lines)
    # KubeRay's probes, and the PATH of the login shells that Ray is started from.
    assert any("apt-get install" in line and "wget" in line.split() for line in lines)
    (profile,) = (line.split("'")[1] for line in lines if "/etc/profile.d/" in line)
    shell = ["bash", "-c", f"PATH=/usr/bin; {profile}; echo $PATH"]
    assert subprocess.check_output(shell, text=True) == "/opt/tvilfm/bin:/usr/bin\n"


def test_what_does_not_travel_names_the_descriptions_own_folders(tmp_path: Path) -> None:
    config = load_config(
        overrides=["run.dir=out", "data.name=folder", f"data.root={tmp_path}/crops", "gallery.url=postgresql://host/g"]
    )
    assert {"/out", "/crops", ".git", "*.safetensors"} <= set(excluded(config, tmp_path))
    assert "/crops" not in excluded(config, tmp_path / "below")


def test_no_secret_travels_by_its_short_name_and_no_data_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    (tmp_path / "elsewhere").mkdir()
    (work / "real").mkdir(parents=True)
    (work / "data").symlink_to(tmp_path / "elsewhere")
    (work / "runs").symlink_to(work / "real")
    config = load_config(
        overrides=["run.dir=runs", "data.name=folder", "data.root=data", "cluster.token_path=~/work/token"]
    )
    assert {"/data", "/runs", "/real", "/token"} <= set(excluded(config, work))
