"""Whether this machine has the memory that the training stages of a run need, checked before the first stage."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import ray

from cluster.session import address_of
from tvilfm.config import Config
from tvilfm.data.manifest import column, select
from tvilfm.training.memory import step_bytes


def require_memory(config: Config, manifest: pa.Table, stages: Sequence[str]) -> None:
    """Refuse a run whose training workers would not fit into the memory of this machine.

    A cluster may start larger machines when they are needed, and a GPU has its own memory; both are not checked.

    Args:
        config: the run.
        manifest: rows of the dataset.
        stages: stages that will be computed.

    Raises:
        ValueError: the memory is too small; the message names the stage, the need and the keys.
    """
    if address_of(config.cluster) != "local" or config.cluster.gpus_per_worker:
        return
    # Ray counts the memory of its workers, which is less than that of the machine or container.
    free, workers = ray.cluster_resources().get("memory", 0.0), config.cluster.train_workers
    for stage in ("base", "text"):
        if stage not in stages:
            continue
        section = getattr(config.train, stage)
        splits = ("train", "val") if section.use_val else ("train",)
        classes = len(set(column(select(manifest, split=splits), "pid").tolist()))
        need = step_bytes(config, stage, classes, workers=workers)
        if need * workers > free:
            size, each = config.data, f" for each of {workers} workers" if workers > 1 else ""
            raise ValueError(
                f"train.p: expected a batch that fits into memory, got {config.train.p} x {config.train.k} rows of "
                f"{size.height} x {size.width} pixels, for which the stage {stage} needs at least {need / 1e9:.1f} GB"
                f"{each}; this machine has {free / 1e9:.1f} GB for them. Lower train.p, data.height and data.width, "
                "end other programs, or use a larger machine."
            )
