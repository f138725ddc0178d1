"""The documentation's commands: every one parses, with the options and keys that there are."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.cli.app import app
from cluster.machines.render import render
from cluster.machines.submit import parse
from tests.paths import REPOSITORY
from tvilfm.config import fidelity_table
from tvilfm.sweeps.space import Space, load_space

DOCS = (
    "service",
    "operations",
    "cluster",
    "runs",
    "reproduce",
    "cameras",
    "extend",
    "method",
    "architecture",
    "writing",
)
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}.md" for name in DOCS))
RUN_COMMANDS = ("run", "train", "evaluate", "index", "serve")  # take the folder of a run, which no fresh clone has
# Programs of others that the pages name; everything else has to be ours.
OTHERS = ("ray", "docker", "make", "curl", "printf", "-d")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


def test_the_page_of_the_method_has_the_table_of_switches_as_the_code_has_it() -> None:
    assert fidelity_table() in (REPOSITORY / "docs" / "method.md").read_text()


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in commands(page)])
def test_a_command_of_the_documentation_can_be_given(page: str, line: str) -> None:
    # An ellipsis stands for what the reader has to fill in.
    program, *arguments = (word for word in shlex.split(line, comments=True) if not word.endswith("..."))
    program = program.removeprefix(".venv/bin/")
    if program != "tvilfm":
        assert program in OTHERS
        return
    if arguments[0] == "submit":
        arguments = arguments[arguments.index("--") + 1 :]
    if arguments[0] == "jobs":
        assert arguments[1] in ("list", "logs", "status", "stop")
        return
    if arguments[0] in RUN_COMMANDS:
        arguments = [word for word in arguments if not word.startswith("runs/")]
    command = parse(app, arguments, REPOSITORY / "ray_config.yaml")
    if arguments[:2] == ["cluster", "render"]:
        assert render(command.parameters["target"], command.config)


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page) if "base64" in line])
def test_a_picture_of_any_size_reaches_curl(tmp_path: Path, line: str) -> None:
    picture = bytes(range(256)) * 1000  # one argument of a command has room for 96 KB in base64
    (tmp_path / "query.jpg").write_bytes(picture)
    (tmp_path / "seen.jpg").write_bytes(picture)
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\ncat\n")
    curl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env={"PATH": path}, capture_output=True, check=True)
    assert base64.b64decode(json.loads(done.stdout)["image"]) == picture and "--json @-" in line


def test_the_page_of_the_service_fits_on_three_printed_pages() -> None:
    assert len((REPOSITORY / "docs" / "service.md").read_text().split()) < 1400
    for width in (1280, 390):
        assert (REPOSITORY / "docs" / "img" / f"page-{width}.png").stat().st_size < 300_000


def headings(file: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    named = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w ]", "", heading).strip().lower().replace(" ", "-") for heading in named}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_documentation_lead_somewhere(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, heading = link.partition("#")
        file = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert file.exists() and (not heading or heading in headings(file)), link
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((REPOSITORY / "tests").rglob(name)), name
    for path in re.findall(r"`((?:cluster|tvilfm|benchmarks|tune_spaces)/[\w./]+)`", text):
        assert (REPOSITORY / path).exists(), path


def test_the_tree_of_the_architecture_is_the_tree() -> None:
    (tree,) = re.findall(r"```\n(cluster/.*?)```", (REPOSITORY / "docs/architecture.md").read_text(), re.DOTALL)
    named: dict[str, set[str]] = {}
    folder = ""
    for line in tree.splitlines():
        names = line.split("  ")[0].split() if not line.startswith(" ") else line[2:].split("   ")[0].split()
        if not line.startswith(" "):
            folder = names[0].rstrip("/")
            named[folder] = set()
        else:
            named[folder] |= {name.rstrip("/") for name in names}
    for package in ("cluster", "tvilfm"):
        held = {path.name for path in (REPOSITORY / package).iterdir() if not path.name.startswith("__")}
        assert held - {"ray_config.yaml", "versions.py", "files.py"} == named[package]
    assert all((REPOSITORY / name).is_dir() for name in named)


def test_the_space_of_the_documentation_is_one(tmp_path: Path) -> None:
    (text,) = blocks("docs/extend.md", "yaml")
    (tmp_path / "my_space.yaml").write_text(text)
    space = load_space(tmp_path / "my_space.yaml")
    assert isinstance(space, Space) and len(space.trials(())) == 3 * 3
    assert yaml.safe_load(text)["metric"] == space.metric


@pytest.mark.parametrize(("page", "code"), [(page, code) for page in PAGES for code in blocks(page, "python")])
def test_the_python_of_the_documentation_imports_what_there_is(page: str, code: str) -> None:
    imports = "\n".join(line for line in code.splitlines() if line.startswith(("import ", "from ")))
    compile(code, page, "exec")
    exec(imports, {})
