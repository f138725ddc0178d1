"""A driver joins a cluster of two nodes, and sends a token exactly if the cluster requires one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.paths import REPOSITORY
from tests.processes import kill_tree

NODES = """
import sys
from ray.cluster_utils import Cluster

nodes = Cluster()
for _ in range(2):
    nodes.add_node(num_cpus=1, include_dashboard=False)
print(nodes.address, flush=True)
sys.stdin.read()
nodes.shutdown()
"""
# A node reads the driver's object from the driver, and refuses or is refused if only one of them has a token.
DRIVER = """
import json, os, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from cluster.session import session
from tvilfm.config import ClusterSection

@ray.remote(num_cpus=0, max_retries=0)
def length(content):
    return len(content)

address, cases = sys.argv[1], json.loads(sys.argv[2])
for environment, path in cases:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ |= environment
    try:
        with session(ClusterSection(address=address, token_path=path)):
            content = ray.put(bytes(1_000_000))
            places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
            reads = [length.options(scheduling_strategy=place).remote(content) for place in places]
            print(f"read on {len(ray.get(reads, timeout=60))} nodes", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""
TOKEN = 64 * "t"


def environment_of(home: Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**plain, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def two_nodes(environment: dict[str, str]) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", NODES], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        kill_tree(process)


def joined(address: str, home: Path, *cases: tuple[dict[str, str], str | None]) -> list[str]:
    command = [sys.executable, "-c", DRIVER, address, json.dumps(cases)]
    done = subprocess.run(
        command, env=environment_of(home), cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_a_driver_with_a_token_joins_a_cluster_that_requires_none(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    with two_nodes({**environment_of(tmp_path), "RAY_AUTH_MODE": "disabled"}) as address:
        assert joined(address, tmp_path, ({}, None), ({"RAY_AUTH_TOKEN": TOKEN}, None)) == 2 * ["read on 2 nodes"]


@pytest.mark.long
def test_a_driver_needs_the_token_of_a_cluster_that_requires_one(tmp_path: Path) -> None:
    for name, token in (("right", TOKEN), ("wrong", 64 * "w")):
        (tmp_path / name).write_text(token)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with two_nodes(environment_of(tmp_path) | token) as address:
        none, wrong, *right = joined(
            address,
            tmp_path,
            ({}, None),
            ({}, str(tmp_path / "wrong")),
            ({"RAY_AUTH_TOKEN": 64 * "w"}, str(tmp_path / "right")),
            ({"RAY_AUTH_TOKEN": TOKEN}, None),
        )
    assert none.startswith(f"cluster.token_path: expected the token of the cluster at {address}, got none.")
    assert "got another." in wrong
    assert right == 2 * ["read on 2 nodes"]
