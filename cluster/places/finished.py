"""The files of a finished run, and the gallery of its model. Nothing here imports torch.

Source of a run on another machine: `cluster.storage`.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from cluster.places.depot import Depot, runs_depot, stages_depot
from tvilfm.config import Config, load_config
from tvilfm.evaluation.features import IMAGES_FILE
from tvilfm.evaluation.results import RESULTS_FILES, Results
from tvilfm.retrieval.database import is_server
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.spaces import ModelSpaces

KEPT = "kept"  # in a run folder: files of a run from another machine, fetched from storage


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The files of a finished run that the service needs.

    Attributes:
        config: config of the run.
        model: folder of `save_pretrained`.
        features: Parquet file with raw features of the test images.
        manifest: Parquet file with the manifest of the dataset.
        validation: results on validation identities; None = a run of an earlier version. The file may be missing.
        captioner: transformers folder of the fine-tuned infrared captioner; None = the run has none.
        stages: folder that contains these files.
        kept: copies of this folder, for machines that lack it; None = there are no copies.
    """

    config: Config
    model: Path
    features: Path
    manifest: Path
    validation: Path | None
    captioner: Path | None
    stages: Path
    kept: Depot | None

    def here(self, part: Path) -> Path:
        """Return the path of a file on this machine, after copying it outside the stages folder if it is missing."""
        if part.exists() or self.kept is None or not part.is_relative_to(self.stages):
            return part
        copy = self.kept.root / part.relative_to(self.stages)
        if not copy.exists():
            self.kept.pull(copy)
        return copy


def finished_run(config: Config) -> FinishedRun:
    """Return the files of a finished run: from its folder or, for a run on another machine, from storage.

    Args:
        config: sections `run` (the run) and `cluster` (`cluster.storage`).

    Raises:
        ValueError: the run is not finished.
    """
    path, runs, stages = config.run.path.absolute(), runs_depot(config), stages_depot(config)
    if runs is not None and stages is not None:
        stages = replace(stages, root=path / KEPT / "stages")
        if not (path / "run.json").is_file():
            with suppress(FileNotFoundError):
                path = _described(path, runs)
    if not (path / "run.json").is_file():
        raise ValueError(f"run.name: expected a finished run in {path}, got none. Run `tvilfm run` first.")
    noted = json.loads((path / "run.json").read_text())["stages"]
    folders = {name: Path(os.path.normpath(config.run.path.absolute() / folder)) for name, folder in noted.items()}
    network = "text" if "text" in folders else "trained"
    run = FinishedRun(
        config=load_config(path / "config.yaml"),
        model=folders[network] / "model",
        features=folders["features"] / IMAGES_FILE,
        manifest=folders["pixels"] / "manifest.parquet",
        validation=folders["results"] / RESULTS_FILES["val"] if "results" in folders else None,
        captioner=folders["captioner_infrared"] / "captioner" if "captioner_infrared" in folders else None,
        stages=folders[network].parent,
        kept=stages,
    )
    for part in (run.model, run.features, run.manifest):
        with suppress(FileNotFoundError):
            part = run.here(part)
        if not part.exists():
            raise ValueError(f"run.name: expected a finished run in {path}, got no {part}. Finish it with tvilfm run.")
    return run


def _described(path: Path, runs: Depot) -> Path:
    """Fetch the description of a run from storage, even if it was fetched before, because the run may have changed."""
    kept = path / KEPT / "run"
    for name in ("config.yaml", "run.json"):
        replace(runs, uri=runs.uri_of(path), root=kept).pull(kept / name)
    return kept


def check_reachable(config: Config) -> None:
    """Check that every machine of the cluster reaches the gallery.

    Raises:
        ValueError: the gallery is embedded, and the cluster has several machines.
    """
    if is_server(config.gallery_url) or not ray.is_initialized():
        return
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1:
        raise ValueError(
            f"gallery.url: expected postgresql://... on a cluster of {len(machines)} machines, got "
            f"{config.gallery_url}, which only this machine reaches. Set it to a PostgreSQL server with pgvector."
        )


def min_scores_of(run: FinishedRun) -> dict[str, float]:
    """Return one of `VOTES` -> the score threshold that a run fitted on validation identities; empty if it has none."""
    if run.validation is None:
        return {}
    with suppress(FileNotFoundError):
        open_set = Results.read(run.here(run.validation)).open_set
        return {name: of_name.fitted for name, of_name in open_set.items() if of_name.fitted is not None}
    return {}


def spaces_of(run: FinishedRun) -> ModelSpaces:
    """Return the vector spaces of a run's model."""
    data = run.config.data
    return ModelSpaces.read(run.here(run.model), height=data.height, width=data.width)


def gallery_of(run: FinishedRun, config: Config) -> Gallery:
    """Open the gallery of a run's model; create an empty one if it is missing."""
    spaces = spaces_of(run)
    return Gallery.prepare(
        config.gallery_url, space_id=spaces.id, heads=spaces.heads, encoder=spaces.encoder, section=config.gallery
    )
