"""The `tvilfm` command as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.cli.app import main
from cluster.cli.options import complete_key, complete_size, complete_space, complete_target
from cluster.progress import ProgressFile, watch
from tests.processes import until
from tvilfm import __version__
from tvilfm.config import known_keys, load_config


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tvilfm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_config_show_prints_what_a_run_resolves_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, "config", "show", "--size", "small", "train.p=4") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == load_config(Path("ray_config.yaml"), ["train.p=4"], size="small").model_dump(mode="json")


def test_config_schema_names_every_key_and_is_json_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, "config", "schema") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(known_keys())
    assert all(line.split("  # ")[1] for line in lines)
    assert _call(monkeypatch, "config", "schema", "--json") == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"run", "train", "cluster"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "train.epoch=3"), "Did you mean train"),
        (("run", "data.name=sysu_mm01"), "data.root: expected the folder of sysu_mm01"),
        (("run", "data.name=sysu_mm01", "data.root=/nowhere"), "data.root: expected the folder of sysu_mm01"),
        (("run", "--size", "huge"), "--size: expected one of ['large', 'llcm', 'regdb', 'small', 'sysu_mm01', 'tiny']"),
        (("run", "--config", "nowhere.yaml"), "--config: expected a YAML file"),
        (("data", "synth", "tests", "--identities", "tiny"), "expected a folder that does not exist"),
    ],
)
def test_bad_input_ends_in_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if arguments[0] == "run":
        arguments = (*arguments, f"run.dir={tmp_path}")
    assert _call(monkeypatch, *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"tvilfm {__version__}\n"


def test_sizes_keys_spaces_and_targets_are_completed() -> None:
    assert complete_size("t") == ["tiny"]
    assert complete_key("train.base.ep") == ["train.base.epochs="]
    assert "ablations" in complete_space("ab")
    assert complete_target("kuberay-j") == ["kuberay-job"]


def test_init_writes_the_annotated_description_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Path("ray_config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    assert _call(monkeypatch, "init") == 0
    assert (tmp_path / "ray_config.yaml").read_text() == expected
    assert _call(monkeypatch, "init") == 2
    assert "existing file" in capsys.readouterr().err


def test_a_command_takes_the_folder_of_a_run_and_refuses_a_recipe_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "site"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {p: 12}")
    assert _call(monkeypatch, "config", "show", str(folder), "train.k=3") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["run"]["name"], shown["train"]["p"], shown["train"]["k"]) == ("site", 12, 3)
    assert _call(monkeypatch, "config", "show", "--size", "tiny", str(folder)) == 2
    assert "neither --config nor --size" in capsys.readouterr().err


def test_progress_without_a_terminal_is_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "progress.json"
    with watch(path, "base", "steps"):
        ProgressFile(path).update(3, 3, "loss 0.1")
    assert json.loads(path.read_text()) == {"done": 3, "total": 3, "note": "loss 0.1", "unit": None}
    assert capsys.readouterr().err.startswith("base: done in ")


def test_a_progress_line_names_what_the_worker_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.progress.INTERVAL_S", 0.05)
    monkeypatch.setattr("cluster.progress.PLAIN_INTERVAL_S", 0)
    path = tmp_path / "progress.json"
    with watch(path, "pretrain", "steps"):
        ProgressFile(path, unit="images").update(1, 4)
        until(lambda: "1/4 images" in capsys.readouterr().err)
        ProgressFile(path).update(2, 3)
        until(lambda: "2/3 steps" in capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_says_so_in_one_sentence(
    number: signal.Signals, tiny_benchmark: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cluster", "train", "--size", "tiny", "--stage", "base", "caption.source=files"]
    settings = [f"run.dir={tmp_path}", f"data.root={tiny_benchmark}", "model.weights=random", "train.base.epochs=500"]
    log = tmp_path / "stderr"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *settings], stderr=file, stdout=file)
        until(lambda: any(tmp_path.glob("*/stages/base-*.partial/metrics.jsonl")), 120)
        process.send_signal(number)
        assert process.wait(60) == 130
    lines = log.read_text().splitlines()
    assert lines[-1] == "stopped: finished work is kept; run the same command again to continue", lines[-30:]
    assert [line for line in lines if " @ " in line or "Traceback" in line or "SIGTERM" in line] == []


def test_the_command_starts_without_the_libraries_that_take_seconds() -> None:
    script = "import sys, cluster.cli.app; print(*{'torch', 'ray', 'matplotlib', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []
