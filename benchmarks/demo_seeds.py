"""The demo over several seeds: is infrared < fusion < ensemble more than luck, and does caching cost accuracy?

    python -m benchmarks.demo_seeds --seeds 0 1 2 --uncached 0

Runs `tvilfm run --size small` once a seed (and, for the seeds of --uncached, the text stage once more on recomputed
pixels, from the same base model) and writes `benchmarks/results/demo_seeds.json` and `.md`. Not part of `make bench`:
a seed takes about as long as the demo, unless `tvilfm tune ablations --size small` has made its stages: its row "all"
is the demo.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.run import run
from tvilfm.config import load_config
from tvilfm.evaluation.results import Results
from tvilfm.versions import version_of

RESULTS = Path(__file__).parent / "results"
METRICS = ("rank1", "mAP", "mINP")


def main() -> None:
    """Run the seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--uncached", type=int, nargs="+", default=[], help="seeds to train without cached views too")
    arguments = parser.parse_args()
    runs = {"cached views": _runs(arguments.seeds, "seed", [])}
    if arguments.uncached:
        runs["pixels in every step"] = _runs(arguments.uncached, "uncached", ["train.text.cache_views=0"])
    summary = {name: _summary(results) for name, results in runs.items()}
    chance = next(iter(runs["cached views"])).chance
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version_of(name) for name in ("ray", "torch", "tvilfm")},
        "seeds": {"cached views": arguments.seeds, "pixels in every step": arguments.uncached},
        "chance": chance,
        "text_stage": summary,
    }
    (RESULTS / "demo_seeds.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "demo_seeds.md").write_text(_markdown(summary, chance))


def _runs(seeds: list[int], name: str, overrides: list[str]) -> list[Results]:
    found = []
    for seed in seeds:
        shared = [f"run.seed={seed}", f"run.name={name}-{seed}", "run.stages_dir=runs/ablations/stages"]
        outcome = run(load_config(Path("ray_config.yaml"), [*shared, *overrides], size="small"))
        assert outcome.results is not None
        found.append(outcome.results)
    return found


def _summary(results: list[Results]) -> dict[str, dict[str, dict[str, float | list[float]]]]:
    """`query / text source / protocol` -> metric -> mean and deviation over seeds, and the single values."""
    summary: dict[str, dict[str, dict[str, float | list[float]]]] = {}
    for index, row in enumerate(results[0].rows):
        values = {metric: [getattr(result.rows[index], metric) for result in results] for metric in METRICS}
        summary[f"{row.query} / {row.text_source} / {row.protocol}"] = {
            metric: {
                "mean": statistics.mean(of_seeds),
                "std": statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0,
                "seeds": of_seeds,
            }
            for metric, of_seeds in values.items()
        }
    return summary


def _markdown(summary: dict[str, dict[str, dict[str, dict[str, Any]]]], chance: Mapping[str, float]) -> str:
    chances = ", ".join(f"{protocol} {100 * value:.2f}" for protocol, value in chance.items())
    lines = [
        "`python -m benchmarks.demo_seeds`: mean ± standard deviation over training seeds, percent.",
        f"Chance (rank-1 of a random ranking): {chances}.",
    ]
    for name, cases in summary.items():
        seeds = len(next(iter(cases.values()))["rank1"]["seeds"])
        lines += ["", f"## Text stage on {name} ({seeds} {'seed' if seeds == 1 else 'seeds'})", ""]
        lines += ["| query / text source / protocol | rank-1 | mAP | mINP |", "|---|---:|---:|---:|"]
        for case, metrics in cases.items():
            spread = {m: f" ± {100 * metrics[m]['std']:.2f}" if seeds > 1 else "" for m in METRICS}
            cells = (f"{100 * metrics[m]['mean']:.2f}{spread[m]}" for m in METRICS)
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
