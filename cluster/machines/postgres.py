"""The gallery's PostgreSQL server on Kubernetes, run by the operator CloudNativePG."""

from __future__ import annotations

from cluster.machines.documents import Document, resource
from tvilfm.config import Config

API = "postgresql.cnpg.io/v1"
BACKUP_API = "barmancloud.cnpg.io/v1"
BACKUP_PLUGIN = "barman-cloud.cloudnative-pg.io"
DATABASE = OWNER = "tvilfm"


def server_name(config: Config) -> str:
    """Return the name of the server's Cluster."""
    return f"{config.cluster.name}-gallery"


def gallery_url(config: Config) -> str:
    """Return the URL of the rendered server, without its password; the service `-rw` leads to the one that writes."""
    return _url(config, "rw")


def read_url(config: Config) -> str | None:
    """Return the URL of the rendered server's replicas, to which the service `-ro` leads; None if there are none."""
    return _url(config, "ro") if config.cluster.database.instances > 1 else None


def _url(config: Config, service: str) -> str:
    return f"postgresql://{OWNER}@{server_name(config)}-{service}/{DATABASE}?sslmode=require"


def password_variable(config: Config) -> Document:
    """Return the variable of a container with the password, from the secret that the operator creates."""
    secret = {"name": f"{server_name(config)}-app", "key": "password"}
    return {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": secret}}


def postgres(config: Config) -> list[Document]:
    """Return the documents of the server, its database and its backups; none if `cluster.database.image` is null."""
    section = config.cluster.database
    if section.image is None:
        return []
    name = server_name(config)
    storage: Document = {"size": f"{section.storage_gb}Gi"}
    if section.storage_class is not None:
        storage["storageClass"] = section.storage_class
    spec: Document = {
        "instances": section.instances,
        "imageName": section.image,
        "storage": storage,
        "bootstrap": {"initdb": {"database": DATABASE, "owner": OWNER}},
        "postgresql": {"extensions": [{"name": "pgvector", "image": {"reference": section.vector_image}}]},
    }
    if config.cluster.kubernetes.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in config.cluster.kubernetes.pull_secrets]
    database: Document = {
        "name": DATABASE,
        "owner": OWNER,
        "cluster": {"name": name},
        "extensions": [{"name": "vector"}],
    }
    backups: list[Document] = []
    if section.backup is not None:
        plugin = {"name": BACKUP_PLUGIN, "isWALArchiver": True, "parameters": {"barmanObjectName": f"{name}-backup"}}
        spec["plugins"] = [plugin]
        backups = _backups(config, name)
    return [resource(API, "Cluster", name, spec), resource(API, "Database", name, database), *backups]


def _backups(config: Config, name: str) -> list[Document]:
    section = config.cluster.database
    configuration: Document = {"destinationPath": section.backup, "wal": {"compression": "gzip"}}
    if section.backup_endpoint is not None:
        configuration["endpointURL"] = section.backup_endpoint
    if section.backup_secret is None:
        configuration["s3Credentials"] = {"inheritFromIAMRole": True}
    else:
        configuration["s3Credentials"] = {
            "accessKeyId": {"name": section.backup_secret, "key": "ACCESS_KEY_ID"},
            "secretAccessKey": {"name": section.backup_secret, "key": "SECRET_ACCESS_KEY"},
        }
    store = {"configuration": configuration, "retentionPolicy": f"{section.backup_days}d"}
    schedule = {
        "schedule": section.backup_schedule,
        "backupOwnerReference": "self",
        "cluster": {"name": name},
        "method": "plugin",
        "pluginConfiguration": {"name": BACKUP_PLUGIN},
    }
    return [
        resource(BACKUP_API, "ObjectStore", f"{name}-backup", store),
        resource(API, "ScheduledBackup", name, schedule),
    ]
