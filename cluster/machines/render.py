"""Render the files that create a cluster from the `cluster` section of the run description.

Ray's cluster launcher (`ray up`) and KubeRay start machines. Serve's config file starts the retrieval service on them.
Slurm allocates machines for one command. Documents are dictionaries until they are written. Files that run a job or
the service contain the run description, so that it does not depend on the container image.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import jinja2

from cluster.machines.documents import Document, to_text
from cluster.machines.kubernetes import CONFIG_PATH, KEYS_PATH, kuberay_cluster, kuberay_job, kuberay_service
from cluster.machines.launcher import ray_up_aws, ray_up_gcp, ray_up_onprem
from cluster.machines.overlay import overlaid
from cluster.machines.postgres import gallery_url, read_url
from cluster.places.check import absolute_paths, storage_folder
from cluster.serve.environment import http_options, serve_environment
from tvilfm.config import ClusterSection, Config, resolve, to_yaml

JOIN_S = 600  # in which all machines of a Slurm job join Ray


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
    overlay = config.cluster.overlay
    if target == "slurm":
        if overlay is not None:
            raise ValueError(
                f"cluster.overlay: expected null for slurm, got {overlay}. Give options on sbatch's command line."
            )
        return slurm(config, command)
    documents = DOCUMENTS[target](config, command)
    return to_text(*(documents if overlay is None else overlaid(documents, overlay)))


def serve_config(config: Config) -> Document:
    """Return the Serve config of the retrieval service, for `serve deploy` and for a RayService."""
    config = _on_the_cluster(config)
    limit = config.cluster.max_replicas_per_node
    deployments = ["Replica", *(["Encoder"] if config.serve.shared_encoders else [])]
    spread = {"deployments": [{"name": name, "max_replicas_per_node": limit} for name in deployments]} if limit else {}
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(config.serve),
        "controller_options": {"runtime_env": {"env_vars": serve_environment(config.serve)}},
        "logging_config": {"encoding": "JSON"},
        "applications": [
            {
                "name": "tvilfm",
                "route_prefix": "/",
                "import_path": "cluster.serve.application:application",
                "args": {"config": config.model_dump(mode="json")},
                **spread,
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
        joins=JOIN_S // 2,
        python=shlex.quote(section.python),
        token=None if section.token_path is None else shlex.quote(str(section.token_path)),
        options=_sbatch_options(section),
        description=to_yaml(resolve(config.model_dump(mode="json"), ["cluster.address=null"])),
        entrypoint=_entrypoint(config, command, '"$description"', quoted=True),
        sweep=_begun(config, shlex.split(command)),
    )


def _sbatch_options(section: ClusterSection) -> list[str]:
    """Return the options of the batch script that follow from `cluster.slurm`."""
    slurm = section.slurm
    options = [f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(slurm, name))]
    options.append(f"--output={slurm.log}")
    if slurm.requeue_s is not None:
        options += [f"--signal=B:USR1@{slurm.requeue_s}", "--open-mode=append"]
    if slurm.requeue_s is not None or section.workers.spot:
        options.append("--requeue")
    return options


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


def _kuberay_job(config: Config, command: str) -> list[Document]:
    entrypoint = _entrypoint(config, command, CONFIG_PATH)
    return kuberay_job(config, entrypoint, to_yaml(_with_database(_on_the_cluster(config))))


def _kuberay_service(config: Config, command: str) -> list[Document]:
    description = _with_database(_on_the_cluster(config))
    if config.cluster.kubernetes.keys_secret is not None:
        description = resolve(description.model_dump(mode="json"), [f"serve.keys={KEYS_PATH}"])
    return kuberay_service(config, to_text(serve_config(description)))


def _with_database(config: Config) -> Config:
    """Return the description with the gallery in the rendered server, unless it names another place."""
    if config.cluster.database.image is None or config.gallery.url is not None:
        return config
    urls = {"url": gallery_url(config), "read_url": read_url(config)}
    return resolve(config.model_dump(mode="json"), [f"gallery.{key}={json.dumps(url)}" for key, url in urls.items()])


DOCUMENTS: dict[str, Callable[[Config, str], list[Document]]] = {
    "ray-up-aws": lambda config, command: [ray_up_aws(config)],
    "ray-up-gcp": lambda config, command: [ray_up_gcp(config)],
    "ray-up-onprem": lambda config, command: [ray_up_onprem(config)],
    "kuberay-cluster": lambda config, command: kuberay_cluster(config),
    "kuberay-job": _kuberay_job,
    "kuberay-service": _kuberay_service,
    "serve-config": lambda config, command: [serve_config(config)],
}
TARGETS = (*DOCUMENTS, "slurm")
