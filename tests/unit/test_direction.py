"""Who may import whom: `tvilfm` knows no Ray, formulas know tensors only, and nothing points upwards."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

# Packages of tvilfm from the bottom up; a package may import its own level and those below.
LEVELS = (
    ("__version__", "terms", "place", "versions", "files", "config"),
    ("data", "losses"),
    ("captioning", "datasets", "models", "sweeps"),
    ("training", "evaluation", "retrieval"),
    ("report", "service"),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, module: str = "") -> set[str]:
    """Dotted names that a source imports anywhere in it, inside functions and by name too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def imports_of(package: str) -> list[tuple[str, str]]:
    """(module, imported name) pairs of a package."""
    return [(module, name) for module, path in modules(package).items() for name in imported(path.read_text(), module)]


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_lazy_imports_are_seen() -> None:
    source = "import os\ndef f():\n    import ray.data\n    from tvilfm.report import page\n    __import__('cluster')\n"
    assert imported(source) == {"os", "ray.data", "tvilfm.report.page", "cluster"}


def test_the_packages_are_where_the_test_looks() -> None:
    assert len(modules("tvilfm")) > 30 and len(modules("cluster")) > 5
    assert {name.split(".")[1] for name in modules("tvilfm") if "." in name} <= set(LEVEL_OF)


def test_tvilfm_imports_neither_ray_nor_anything_above_it() -> None:
    above = ("ray", "cluster", "benchmarks", "tests", "tune_spaces", "typer")
    assert [pair for pair in imports_of("tvilfm") if any(is_under(pair[1], name) for name in above)] == []


def test_nothing_in_tvilfm_points_upwards() -> None:
    wrong = []
    for module, name in imports_of("tvilfm"):
        if name.startswith("tvilfm.") and "." in module:
            package, target = module.split(".")[1], name.split(".")[1]
            if LEVEL_OF[target] > LEVEL_OF[package]:
                wrong.append((module, name))
    assert wrong == []


def test_datasets_models_and_losses_do_not_know_each_other() -> None:
    # These folders do not depend on each other.
    wrong = []
    for module, name in imports_of("tvilfm"):
        for one in ("datasets", "models", "losses"):
            for other in ("datasets", "models", "losses"):
                if one != other and is_under(module, f"tvilfm.{one}") and is_under(name, f"tvilfm.{other}"):
                    wrong.append((module, name))
    assert wrong == []


def test_losses_and_metrics_know_tensors_only() -> None:
    pure = ("tvilfm.losses", "tvilfm.evaluation.metrics", "tvilfm.evaluation.counting")
    for module, name in imports_of("tvilfm"):
        if not any(is_under(module, one) for one in pure):
            continue
        top = name.split(".")[0]
        known = top in ("torch", "numpy") or top in sys.stdlib_module_names
        assert known or any(is_under(name, one) for one in ("tvilfm.config", *pure)), (module, name)


def test_only_report_and_cluster_import_report() -> None:
    found = {
        module
        for package in ("tvilfm", "cluster", "tune_spaces")  # benchmarks stand above all of them
        for module, name in imports_of(package)
        if is_under(name, "tvilfm.report")
    }
    assert found and {module for module in found if not module.startswith(("tvilfm.report", "cluster"))} == set()


@pytest.mark.slow
def test_every_module_of_tvilfm_imports_with_ray_blocked() -> None:
    names = [name for name in modules("tvilfm") if not name.endswith("__main__")]
    code = (
        "import sys, importlib\n"
        "sys.modules['ray'] = sys.modules['cluster'] = None\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        "try:\n    import ray.data\nexcept ImportError:\n    print('blocked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked"
