"""`python -m benchmarks [CLAIM]`: measure all claims or one, print a line each, keep a record in `results/`."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.claim import Claim
from tvilfm.versions import version_of

RESULTS = Path(__file__).parent / "results"


def all_claims() -> dict[str, Callable[[], Claim]]:
    """The `CLAIMS` of every module in this folder."""
    claims: dict[str, Callable[[], Claim]] = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            claims.update(getattr(importlib.import_module(f"benchmarks.{module.name}"), "CLAIMS", {}))
    return claims


def record(claim: Claim) -> None:
    """Append what was measured, where, and with which versions."""
    RESULTS.mkdir(exist_ok=True)
    entry = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "name": claim.name,
        "ratio": round(claim.ratio, 3),
        "goal": claim.goal,
        "holds": claim.holds,
        "ours": claim.ours,
        "baseline": claim.baseline,
        "fault": claim.fault,
    }
    with (RESULTS / f"{claim.name}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def main(arguments: list[str]) -> int:
    """Run; 0 if every claim holds, 1 if one misses its goal, 2 for an unknown name."""
    claims = all_claims()
    unknown = [name for name in arguments if name not in claims]
    if unknown:
        known = ", ".join(sorted(claims))
        print(f"claim: expected one of {known}, got {', '.join(unknown)}. Pick a known one.", file=sys.stderr)
        return 2
    missed = False
    for name in arguments or sorted(claims):
        claim = claims[name]()
        print(claim.line(), flush=True)
        record(claim)
        missed = missed or not claim.holds
    return int(missed)


def machine() -> dict[str, Any]:
    """Return the processor and the number of cores."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, Any]:
    """Return the versions that figures depend on."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in ("torch", "numpy", "ray")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
