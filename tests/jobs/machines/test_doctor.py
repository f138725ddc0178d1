"""The doctor: its check of every node, its findings, and the command's exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli.app import main
from cluster.machines.doctor import PACKAGES, Facts, Finding, examine, judge
from cluster.machines.sharing import LOCK, marked, unshared, without_locks
from tests.paths import REPOSITORY
from tvilfm.config import load_config

SOUND = Facts(
    host="one",
    python="3.11.7",
    packages=dict.fromkeys(PACKAGES, "1.0"),
    gpus=(),
    torch=None,
    data=None,
    runs=None,
    disk_gb=500.0,
    spill_gb=500.0,
    shared_gb=16.0,
    storage=None,
)
RESOURCES = {"CPU": 8.0}


def judged(
    *facts: Facts, resources: dict[str, float] = RESOURCES, overrides: tuple[str, ...] = (), clock_s: float = 0.1
) -> list[Finding]:
    config = load_config(overrides=["run.dir=/mnt/runs", *overrides])
    nodes = {f"{index}" * 12: found for index, found in enumerate(facts)}
    findings = judge(config, nodes, dict.fromkeys(nodes, resources), dict.fromkeys(nodes, clock_s))
    return [found for found in findings if found.state != "good"]


def test_sound_machines_have_nothing_to_fix() -> None:
    assert judged(SOUND, replace(SOUND, host="two")) == []


@pytest.mark.parametrize(
    ("change", "what", "found", "fix"),
    [
        (
            {"packages": {**SOUND.packages, "psycopg-binary": "1", "psycopg": None}},
            "packages",
            "without psycopg",
            "Install tvilfm",
        ),
        ({"torch": "libcuda.so.1: cannot open"}, "torch", "libcuda", "driver"),
        ({"data": False}, "dataset", "is missing", "on every machine"),
        (
            {"runs": "/r: expected a place to write, got no. Mount it writable."},
            "run.dir",
            "/r: exp",
            "Mount it writable.",
        ),
        ({"disk_gb": 2.0}, "disk for run.dir", "2.0 GB free, less than 10", "run.dir"),
        ({"spill_gb": 9.0}, "disk for Ray", "9.0 GB free", "--temp-dir"),
        ({"unshared": ["/mnt/s"]}, "shared storage", "/mnt/s is another folder", "cluster.storage"),
        ({"without_locks": ["/mnt/s"]}, "locks", "/mnt/s is shared, but", "nolock"),
        ({"shared_gb": 0.06}, "shared memory", "0.1 GB free, less than 1", "--shm-size"),
    ],
)
def test_what_is_wrong_on_a_machine_is_named_with_its_fix(
    change: dict[str, object], what: str, found: str, fix: str
) -> None:
    (finding,) = judged(replace(SOUND, host="bad", **change))
    assert (finding.where, finding.what, finding.state) == ("bad", what, "fault")
    assert found in finding.found and fix in finding.fix


@pytest.mark.parametrize(("clock_s", "found"), [(60.4, "60 s ahead of"), (-7.0, "7 s behind")])
def test_a_clock_that_differs_is_a_fault(clock_s: float, found: str) -> None:
    (finding,) = judged(SOUND, clock_s=clock_s)
    assert (finding.what, finding.state) == ("clock", "fault") and found in finding.found


def test_a_folder_that_is_another_on_some_machine_is_found_and_one_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, other = str(tmp_path / "shared"), str(tmp_path / "other")
    with marked([shared, "/dev/null/nowhere"]) as (written, name):
        assert written == [shared]
        assert unshared([shared, other], name) == [other] and without_locks([shared, other], name) == []
        (tmp_path / "shared" / LOCK.format(name)).unlink()  # as where locks are of one machine only
        assert without_locks([shared], name) == [shared]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == []


def test_storage_is_looked_at_only_where_there_is_some() -> None:
    broken = replace(SOUND, storage="s3://b: expected a place to write, got no. Make the bucket.")
    (finding,) = judged(broken, overrides=("cluster.storage=s3://b",))
    assert (finding.what, finding.fix) == ("storage", "Make the bucket.")
    assert judged(broken) == []


def test_gpus_that_ray_promises_and_torch_does_not_see_are_a_fault() -> None:
    promised = {"CPU": 8.0, "GPU": 2.0}
    assert judged(replace(SOUND, gpus=("H200", "H200")), resources=promised) == []
    (finding,) = judged(replace(SOUND, gpus=("H200",)), resources=promised)
    assert (finding.what, finding.state) == ("torch", "fault") and "sees 1 of Ray's 2 GPUs" in finding.found


def test_machines_that_differ_are_told_which_and_how_many() -> None:
    other = replace(SOUND, host="two", python="3.12.1", packages={**SOUND.packages, "ray": "2.59"})
    python, ray = judged(SOUND, replace(SOUND, host="three"), other)
    assert (python.what, python.found) == ("Python differs", "3.11.7 on 2, 3.12.1 on 1")
    assert (ray.what, ray.found, ray.state) == ("ray differs", "1.0 on 2, 2.59 on 1", "fault")


def test_training_that_does_not_fit_is_a_note_where_machines_may_be_added() -> None:
    (note,) = judged(SOUND, overrides=("cluster.train_workers=2", "cluster.gpus_per_worker=1"))
    assert (note.state, note.found) == ("note", "needs 2 workers of 2 CPUs and 1 GPU, the cluster has room for 0")
    (fault,) = judged(SOUND, overrides=("cluster.cpus_per_train_worker=9", "cluster.workers.max=0"))
    assert (fault.state, fault.found) == ("fault", "needs 1 worker of 9 CPUs, the cluster has room for 0")


def test_several_machines_without_a_place_of_their_own_are_noted() -> None:
    (note,) = judged(SOUND, replace(SOUND, host="two"), overrides=("run.dir=runs",))
    assert (note.what, note.state) == ("run.dir", "note") and "cluster.storage" in note.fix


@pytest.mark.slow
def test_the_command_ends_1_when_something_is_wrong_and_0_else(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for data, status in (("tests", 0), ("nowhere", 1)):
        arguments = [f"run.dir={tmp_path}", "data.name=folder", f"data.root={REPOSITORY / data}"]
        monkeypatch.setattr(sys, "argv", ["tvilfm", "doctor", *arguments, f"cluster.storage={tmp_path / 'stored'}"])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr().out
        assert int(end.value.code or 0) == status, printed
        assert "on every machine" in printed if status else "fault" not in printed
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_facts_are_those_of_this_machine_and_this_folder(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    findings = examine(load_config(overrides=["run.dir=looked-at"]))
    assert [path.name for path in tmp_path.iterdir()] == ["looked-at"]
    by_what = {finding.what: finding for finding in findings}
    assert by_what["Python"].found == ".".join(map(str, sys.version_info[:3]))
    assert by_what["resources"].found.startswith("4 CPUs")
    assert by_what["run.dir"].found == "written, read, deleted"


# Two nodes, of which one goes: a process of its own, so that the Ray of the other tests is left alone.
DRIVER = """
import json, os, sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from dataclasses import asdict
from ray.cluster_utils import Cluster

from cluster.machines.doctor import examine
from tvilfm.config import load_config

nodes = Cluster()
head = nodes.add_node(num_cpus=1, include_dashboard=False)
second = nodes.add_node(num_cpus=1, include_dashboard=False)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
config = load_config(overrides=[f"run.dir={sys.argv[1]}"])
both = [asdict(finding) for finding in examine(config)]
nodes.remove_node(second)
one = [asdict(finding) for finding in examine(config)]
print(json.dumps([both, one]))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.slow
def test_every_node_is_looked_at_and_a_lost_one_is_counted(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_BACKEND_LOG_LEVEL": "fatal"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    both, one = json.loads(done.stdout.splitlines()[-1])
    assert len({finding["where"] for finding in both if finding["what"] == "Python"}) == 2
    assert next(finding for finding in both if finding["what"] == "resources")["found"] == "2 CPUs, 0 GPUs"
    assert "1 machine, 1 lost since its start" in one[0]["found"]
    assert len([finding for finding in one if finding["what"] == "Python"]) == 1
