"""Submission: what travels and where its paths lie, and jobs on a Ray head that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import requests
import typer
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from cluster.cli.app import app, main
from cluster.machines import jobs, submit
from cluster.machines.jobs import connect, exit_status, on_this_machine
from cluster.machines.submit import DATA_PARAMETERS, Package, job_paths, package_of, parse
from tests.paths import REPOSITORY
from tests.processes import descendants, free_ports, kill_all
from tests.quick import QUICK, records_of, results_of
from tvilfm.config import load_config
from tvilfm.evaluation.results import Results

DEFAULT = Path("ray_config.yaml")
TOKEN = "a-token-of-the-tests-and-nobody-else"
# Text parameters that are no paths, and files that travel with the program.
OTHER_PARAMETERS = (
    *("config", "size", "space", "name", "seeds", "identities", "scope", "target", "command"),
    *("text", "infrared_caption", "infrared_cameras", "id", "camid", "camera", "since", "key", "person", "expires"),
)


def text_parameters(program: typer.Typer) -> Iterator[str]:
    """Names of the parameters of all commands that take a text or a path."""
    for command in program.registered_commands:
        for name, kind in get_type_hints(command.callback).items():
            inner = {one for part in get_args(kind) for one in get_args(part)}  # of lists
            if {str, Path} & {kind, *get_args(kind), *inner} and command.name != "submit":
                yield name
    for group in program.registered_groups:
        if group.name != "jobs":
            yield from text_parameters(group.typer_instance)


def test_every_text_parameter_of_every_command_is_known_to_be_a_path_or_not() -> None:
    # A new option that names data would otherwise lie, relative, in a folder that Ray throws away.
    found = set(text_parameters(app))
    assert found - {*DATA_PARAMETERS, *OTHER_PARAMETERS, "overrides"} == set()
    assert set(DATA_PARAMETERS) <= found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "submit: expected a command such as"),
        (("rum",), "got rum"),
        (("data",), "got data"),
        (("jobs", "list"), "got jobs list"),
        (("submit", "--", "run"), "got submit"),
        (("run", "train.epoch=3"), "Did you mean train"),
        (("run", "--size", "huge"), "--size: expected one of"),
        (("run", "runs/demo"), "submit: expected section.key=value, got runs/demo"),
    ],
)
def test_a_command_that_cannot_be_is_refused_before_anything_is_sent(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("--", r"\-\-")):
        parse(app, arguments, DEFAULT)


def test_an_option_that_a_command_does_not_have_is_refused() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(app, ["run", "--sise", "tiny"], DEFAULT)


def test_relative_paths_become_absolute_below_the_storage_or_here() -> None:
    arguments = ("run", "--size", "tiny", "data.name=folder", "data.root=crops", "gallery.url=postgresql://host/g")
    here = job_paths(parse(app, arguments, DEFAULT), Path("/home/me"), same_machine=True)
    assert set(here) == {'run.dir="/home/me/runs"', 'data.root="/home/me/crops"'}
    stored = parse(app, (*arguments, "cluster.storage=/mnt/shared", "cluster.address=ray://head:1"), DEFAULT)
    there = job_paths(stored, Path("/home/me"), same_machine=False)
    assert set(there) == {'run.dir="/mnt/shared/runs"', 'data.root="/mnt/shared/crops"', "cluster.address=null"}
    resolved = load_config(DEFAULT, [*arguments[3:], *there], size="tiny")
    assert (str(resolved.run.path), resolved.cluster.address) == ("/mnt/shared/runs/tiny", None)


@pytest.mark.parametrize(
    ("arguments", "same_machine", "message"),
    [
        (("run",), False, r"run\.dir: expected an absolute path for other machines, got runs"),
        (("run", "cluster.storage=s3://bucket/x"), True, r"run\.dir: expected an absolute path for other machines"),
        (("caption", "--out", "captions"), True, r"out: .* got captions\. .* Give /home/me/captions, or a URI"),
        (("find", "/runs/a", "--in", "/crops", "--image", "/a", "--image", "b.jpg"), True, r"image: .* got b\.jpg"),
        (("report", "runs/ablations"), False, r"folder: .* got runs/ablations\. .* Give a path that every machine"),
    ],
)
def test_a_relative_path_that_means_nothing_there_is_refused(
    arguments: tuple[str, ...], same_machine: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        job_paths(parse(app, arguments, DEFAULT), Path("/home/me"), same_machine=same_machine)


def test_paths_that_are_absolute_or_uris_stay() -> None:
    command = parse(app, ("caption", "--out", "s3://b/c", "--images", "/crops", "run.dir=/runs"), DEFAULT)
    assert job_paths(command, Path("/home/me"), same_machine=False) == ()
    assert job_paths(parse(app, ("report", "/runs/a"), DEFAULT), Path("/home/me"), same_machine=False) == ()


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_a_package_has_the_program_and_neither_data_nor_runs_nor_weights_nor_caches(tmp_path: Path) -> None:
    for name in ("ray_config.yaml", "cluster/__main__.py", "tvilfm/data/note.txt"):
        write(tmp_path / name, 3)
    gone = ("runs/a/config.yaml", "crops/1.jpg", "blip.safetensors", ".git/HEAD", ".venv/bin/python", "secret/key.txt")
    gone += ("token", "mine/ssh", "certificate.pem", ".env", ".netrc", ".git-credentials", ".aws/credentials")
    gone += (".kube/config", "client.p12", "id_ed25519.old", "credentials-prod.json", ".pgpass")
    for name in (*gone, "cluster/__pycache__/a.pyc", ".ruff_cache/x", "deep/er/model.pt"):
        write(tmp_path / name, 1000)
    (tmp_path / ".gitignore").write_text("/secret/\n")
    keys = ["cluster.token_path=token", f"cluster.provider.ssh_key={tmp_path}/mine/ssh"]
    package = package_of(tmp_path, load_config(overrides=["data.name=folder", f"data.root={tmp_path}/crops", *keys]))
    assert set(package.sizes) == {"ray_config.yaml", "cluster/__main__.py", "tvilfm/data/note.txt", ".gitignore"}
    package.check(parse(app, ("run",), DEFAULT))
    assert str(package) == "4 files, 0.0 MB"


def test_a_package_above_rays_limit_is_refused_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        write(tmp_path / f"film-{number}.mp4", 100_000 * (number + 1))
    monkeypatch.setattr(submit, "GCS_STORAGE_MAX_SIZE", 3_000_000)
    with pytest.raises(ValueError) as caught:
        package_of(tmp_path, load_config()).check(parse(app, ("run",), DEFAULT))
    message = str(caught.value)
    assert "expected less than Ray's 3.0 MB to send, got 3.6 MB" in message
    assert [f"film-{number}.mp4" in message for number in range(8)] == [False] * 3 + [True] * 5
    assert message.index("film-7") < message.index("film-6")


@pytest.mark.parametrize(("answer", "sent"), [("y\n", True), ("n\n", False), (None, False)])
def test_large_files_that_git_does_not_track_are_sent_only_after_a_question(
    answer: str | None, sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "film.mp4", 3000)
    write(tmp_path / "program.py", 2000)
    for command in (("init", "--quiet"), ("add", "program.py")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert package_of(tmp_path, load_config()).untracked_bytes() == 3000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "UNASKED_BYTES", 2999)
    asked = []

    def connect(section: object) -> None:
        asked.append(section)
        raise ValueError("no cluster")

    monkeypatch.setattr("cluster.machines.jobs.connect", connect)
    CliRunner().invoke(app, ["submit", "--", "run", "--size", "tiny"], input=answer or "")
    assert bool(asked) == sent
    CliRunner().invoke(app, ["submit", "--yes", "--", "run", "--size", "tiny"])
    assert len(asked) == sent + 1


@pytest.mark.parametrize("there", ["runs/old/config.yaml", "none.yaml", "../outside.yaml"])
def test_a_description_that_stays_behind_is_refused_and_one_that_travels_is_not(tmp_path: Path, there: str) -> None:
    for name in ("runs/old/config.yaml", "mine/ray.yaml"):
        write(tmp_path / name, 3)
    package, command = package_of(tmp_path, load_config()), parse(app, ("run",), DEFAULT)
    with pytest.raises(ValueError, match=f"config: expected a file that is sent with {tmp_path}, got {there}"):
        package.check(replace(command, parameters={"config": Path(there)}))
    for name in ("./mine/ray.yaml", "/mnt/shared/ray.yaml"):
        package.check(replace(command, parameters={"config": Path(name)}))
    package.check(replace(command, parameters={"space": "ablations"}))


def test_requirements_and_variables_travel_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTED", "1")
    monkeypatch.setenv("UNLISTED", "2")
    monkeypatch.delenv("UNSET", raising=False)
    package = package_of(REPOSITORY, load_config())
    plain = submit.runtime_env(load_config().cluster, package)
    assert plain == {"working_dir": str(REPOSITORY), "excludes": package.excludes}
    asked = load_config(overrides=["cluster.env=[LISTED, UNSET]", "cluster.install=true"]).cluster
    environment = submit.runtime_env(asked, package)
    assert environment["env_vars"] == {"LISTED": "1"}
    first, *wanted = environment["pip"]["packages"]
    assert first == "--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert any(line.startswith("torch>=") for line in wanted) and not any(line.startswith("ray[") for line in wanted)


def test_requirements_without_a_project_are_refused(tmp_path: Path) -> None:
    config = load_config(overrides=["cluster.install=true"])
    with pytest.raises(ValueError, match=r"cluster\.install: expected pyproject\.toml"):
        submit.runtime_env(config.cluster, package_of(tmp_path, config))


class Refusing:
    """A cluster that knows a job of `ray.init`'s, whose log Ray does not keep."""

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=3, message="")

    def get_address(self) -> str:
        return "http://head:8265"

    def refuse(self, *_: object, **__: object) -> None:
        raise RuntimeError("only of submitted ones")

    get_job_logs = stop_job = submit_job = refuse


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("jobs", "logs", "01000000"), 2, "job 01000000: expected an answer of its cluster, got only of submitted"),
        (("jobs", "stop", "01000000"), 2, "job 01000000: expected an answer of its cluster, got only of submitted"),
        (("jobs", "status", "01000000"), 3, "its log is not available: only of submitted ones"),
        (
            ("submit", "--", "doctor"),
            2,
            "submit: expected the job server at http://head:8265 to accept the job, got only",
        ),
    ],
)
def test_what_ray_refuses_of_a_job_is_one_message(
    arguments: tuple[str, ...],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jobs, "connect", lambda _: Refusing())
    monkeypatch.setattr(submit, "package_of", lambda *_: Package(folder=Path(), excludes=[], sizes={}))
    monkeypatch.setattr(jobs, "on_this_machine", lambda _: True)
    monkeypatch.setattr(sys, "argv", ["tvilfm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status and message in capsys.readouterr().err


def test_addresses_of_this_machine_are_known() -> None:
    assert on_this_machine("http://127.0.0.1:8265") and on_this_machine("http://localhost:1")
    assert not on_this_machine("http://198.51.100.7:8265") and not on_this_machine("http://no.such.host.invalid:1")


@dataclass(frozen=True)
class Head:
    """A Ray head of its own, as `ray start --head` makes it, that asks for a token."""

    address: str
    gcs: str
    token_path: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        return (f"cluster.job_address={self.address}", f"cluster.token_path={self.token_path}")

    def tvilfm(self, *arguments: str, folder: Path = REPOSITORY) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=folder,
            env={**plain_environment(), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, folder: Path = REPOSITORY) -> tuple[int, str, str]:
        process = self.tvilfm(*arguments, folder=folder)
        out, err = process.communicate(timeout=540)
        return process.returncode, out, err


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    gcs, dashboard, agent, client = free_ports(4)
    token_path = tmp_path_factory.mktemp("head") / "token"
    token_path.write_text(TOKEN + "\n")
    # Its sockets' paths have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        options = {
            "port": gcs,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "temp-dir": temporary,
            "num-cpus": 4,
        }
        binaries = Path(sys.executable).parent
        environment = {
            **plain_environment(),
            "PATH": f"{binaries}:{os.environ['PATH']}",
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"},
        }
        process = subprocess.Popen(
            [binaries / "ray", "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(lambda: answers(address, process), "the head does not start")
            yield Head(address=address, gcs=f"127.0.0.1:{gcs}", token_path=token_path)
        finally:
            children = descendants(process.pid)
            process.terminate()
            process.wait(60)
            kill_all(children)


def answers(address: str, process: subprocess.Popen[Any]) -> bool:
    assert process.poll() is None
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code in (200, 401)
    except requests.ConnectionError:
        return False


@pytest.mark.long
def test_a_submitted_run_ends_0_with_the_metrics_of_one_that_was_not(
    head: Head, undisturbed: Path, tiny_benchmark: Path, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "ray_config.yaml").write_text((REPOSITORY / "ray_config.yaml").read_text())
    quick = ("run", "--size", "tiny", f"data.root={tiny_benchmark}", *QUICK)
    # Given in a folder with nothing but a description: its relative run.dir lies there, not in Ray's copy of it.
    status, out, err = head.run("submit", "--follow", "--", *quick, *head.overrides, folder=tmp_path / "here")
    assert status == 0, out + err
    assert "1 files, " in err and f'run.dir="{tmp_path / "here" / "runs"}"' in err
    assert "succeeded, exit status 0" in err and "report: " in out
    submitted = tmp_path / "here" / "runs" / "tiny"
    assert Results.read(submitted / "results.json") == results_of(undisturbed, "joint")
    direct = records_of(undisturbed)["joint"].learning
    records = [json.loads(line) for line in (submitted / "metrics.jsonl").read_text().splitlines()]
    assert timeless(records) == timeless(direct) and len(records) == 1 + 6


def timeless(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


@pytest.mark.slow
def test_a_failing_job_gives_its_log_and_its_own_exit_status(head: Head) -> None:
    arguments = ("run", "data.name=sysu_mm01", "data.root=/nowhere", "run.dir=/tmp/never", *head.overrides)
    status, out, err = head.run("submit", "--follow", "--", *arguments)
    job, log = out.split("\n", 1)
    assert status == 2
    assert "data.root: expected the folder of sysu_mm01" in log and f"{job}: failed, exit status 2" in err

    status, _, err = head.run("jobs", "status", job, *head.overrides)
    assert status == 2
    assert "data.root: expected the folder of sysu_mm01" in err and "exit status 2" in err
    status, out, _ = head.run("jobs", "list", *head.overrides)
    assert status == 0 and "failed" in out and job in out
    status, out, _ = head.run("jobs", "list", "--json", *head.overrides)
    (row,) = (row for row in json.loads(out) if row["job"] == job)
    assert (status, row["status"], row["exit"]) == (0, "failed", 2)
    status, out, _ = head.run("jobs", "logs", job, *head.overrides)
    assert status == 0 and out == log


@pytest.mark.slow
def test_ctrl_c_detaches_and_says_how_to_stop_the_job(head: Head, tmp_path: Path) -> None:
    arguments = ("run", "--size", "tiny", f"run.dir={tmp_path}", *QUICK, "cluster.env=[MARK]", "cluster.driver.cpus=1")
    process = head.tvilfm("submit", "--follow", "--", *arguments, *head.overrides)
    assert process.stdout is not None
    job = process.stdout.readline().strip()
    while "Running entrypoint" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"{job} keeps running." in err and f"tvilfm jobs stop {job}" in err

    client = connect(load_config(overrides=head.overrides).cluster)
    assert client.get_job_status(job) == JobStatus.RUNNING
    status, out, _ = head.run("jobs", "status", job, *head.overrides)
    assert (status, out) == (0, f"{job}: running\n")
    status, out, _ = head.run("jobs", "stop", job, *head.overrides)
    assert (status, out) == (0, f"{job}: stopping\n")
    wait_for(lambda: client.get_job_status(job).is_terminal(), "the job does not stop")
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert exit_status(client.get_job_info(job)) == 1
    assert head.run("jobs", "stop", job, *head.overrides)[1] == f"{job}: has already ended\n"


@pytest.mark.slow
def test_a_cluster_that_is_not_there_asks_for_a_token_or_has_no_such_job_is_told_apart(
    head: Head, tmp_path: Path
) -> None:
    (nobody,) = free_ports(1)
    status, _, err = head.run("jobs", "list", f"cluster.job_address=http://127.0.0.1:{nobody}")
    assert status == 2 and "cluster.job_address: expected Ray's job server" in err
    status, _, err = head.run("jobs", "list", f"cluster.job_address={head.address}")
    assert status == 2 and "cluster.token_path: expected the token of the cluster" in err
    (tmp_path / "wrong").write_text("another-token-than-the-clusters")
    wrong = (f"cluster.job_address={head.address}", f"cluster.token_path={tmp_path / 'wrong'}")
    status, _, err = head.run("jobs", "list", *wrong)
    assert status == 2 and "cluster.token_path: expected the token of the cluster" in err
    status, _, err = head.run("jobs", "status", "raysubmit_nobody", *head.overrides)
    assert status == 2 and "job: expected the id of a job" in err
