"""Training stages on Ray Train: workers, checkpoints, restarts."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from pyarrow import fs
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from cluster.machines.room import awaited, worker_resources
from cluster.places.depot import Depot, fetched
from cluster.progress import PROGRESS_FILE, ProgressFile, noted
from cluster.stages.learning import METRICS_FILE, read_records, write_records
from cluster.stages.store import STATE
from tvilfm.config import ClusterSection, Config
from tvilfm.data.pixels import open_pixels
from tvilfm.place import is_full_disk
from tvilfm.terms import Record
from tvilfm.training.checkpoint import NETWORK, PROGRESS

# A restart would meet these again, as it would meet a full disk: bad input, and losses that are not finite.
INPUT_ERRORS = (ValueError, FloatingPointError)


class WorkerInputError(ValueError):
    """A training worker raised one of `INPUT_ERRORS` or met a full disk; the message is the worker's."""


def fit_network(
    worker: Callable[[dict[str, Any]], list[Record]],
    folder: Path,
    config: Config,
    inputs: dict[str, str],
    depot: Depot | None = None,
) -> None:
    """Train a network on Ray Train and leave the selected one in `folder/model`.

    The run is stored in `folder/train` or its copy. A run that an interrupted attempt left there continues from its
    last checkpoint.

    Args:
        worker: what every worker runs; returns the records of all epochs.
        folder: the stage's working folder; without a depot, on storage that every node sees.
        config: the run, or a stage's view of it.
        inputs: name -> path of what the stage reads.
        depot: where workers find the inputs that are not on their machine, and keep checkpoints; None = in folders.

    Raises:
        ValueError: a worker met bad input or numbers that are not finite; it is not restarted.
        ray.train.TrainingFailedError: a worker failed more often than `cluster.max_failures`.
    """
    job = {"folder": str(folder), "config": config, "inputs": inputs, "depot": depot}
    workers = config.cluster.train_workers
    records, last = fit(worker, job, folder, config.cluster, workers=workers, depot=depot)
    write_records(folder / METRICS_FILE, records)
    bring(last, NETWORK, folder / "model")
    bring(last, PROGRESS, folder / "selection.json")


def fit(
    worker: Callable[[dict[str, Any]], Any],
    job: dict[str, Any],
    folder: Path,
    section: ClusterSection,
    *,
    workers: int,
    depot: Depot | None,
) -> tuple[Any, Checkpoint | None]:
    """Train on Ray Train; return what the worker of rank 0 returned, and the last checkpoint.

    The run is stored in `folder/train`, keeps its last checkpoint and restarts from it. Reported epochs are written to
    `folder/metrics.jsonl`. While workers wait for a machine, the progress line of the folder says so.

    Args:
        worker: what every worker runs.
        job: what it is told.
        folder: of the driver; without a depot, on storage that every node sees.
        section: CPUs and GPUs of a worker, and how often it may fail.
        workers: how many.
        depot: whose copy of the folder the run lives in; None = in the folder itself.

    Raises:
        KeyboardInterrupt: on Ctrl-C, in place of Train's exit.
        WorkerInputError: a worker raised one of `INPUT_ERRORS` or met a full disk.
    """
    place = None if depot is None else depot.place(folder)
    filesystem, path = (None, str(folder)) if place is None else (place.filesystem, place.path)
    trainer = _Trainer(
        worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=section.gpus_per_worker > 0,
            resources_per_worker=worker_resources(section),
        ),
        run_config=RunConfig(
            name=STATE,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[_Epochs(folder / METRICS_FILE)],  # type: ignore[list-item]  # of Train V2
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=section.max_failures),
        ),
    )
    try:
        with noted(folder / PROGRESS_FILE, lambda: awaited(section, workers)):
            result = trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    except ControllerError as error:
        if isinstance(error.controller_failure, WorkerInputError):
            raise WorkerInputError(str(error.controller_failure)) from None
        raise
    return result.return_value, result.checkpoint  # type: ignore[attr-defined]  # of Train V2


def bring(checkpoint: Checkpoint | None, name: str, target: Path) -> None:
    """Copy a file or folder of the last checkpoint, and nothing else of it."""
    assert checkpoint is not None
    source = f"{checkpoint.path}/{name}"
    filesystem: fs.FileSystem = checkpoint.filesystem
    if filesystem.get_file_info(source).type == fs.FileType.Directory:
        target.mkdir(exist_ok=True)
    fs.copy_files(source, str(target), filesystem, fs.LocalFileSystem())


def read_job(job: dict[str, Any]) -> tuple[Config, Path, dict[str, Path]]:
    """Return config, stage folder and inputs of a worker's job; inputs are fetched where they are missing."""
    config: Config = job["config"]
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_train_worker)))
    inputs = {name: fetched(Path(path), job["depot"]) for name, path in job["inputs"].items()}
    return config, Path(job["folder"]), inputs


def read_pixels(folder: Path) -> tuple[pa.Table, npt.NDArray[np.uint8]]:
    """Return the manifest and the memory-mapped pixels, (N, H, W, 3), of a folder of `decode_dataset`."""
    return pq.read_table(folder / "manifest.parquet"), open_pixels(folder / "pixels.npy")


class _Trainer(TorchTrainer):
    """A trainer that starts fewer helper processes, each of which takes about three seconds of CPU to start.

    There are no Ray datasets to manage. A placement group that outlives its controller matters on a cluster only: Ray
    on this machine ends with the command.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)
        if len(ray.nodes()) == 1:
            unused += (PlacementGroupCleanerCallback,)
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, unused)]


class _Epochs(UserCallback):
    """Callback on the driver's machine: it writes the epochs of rank 0, and ends a run that cannot succeed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        write_records(self._path, metrics[0]["records"])

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            error = worker_exceptions[rank]
            error = getattr(error, "_base_exc", error)  # Train wraps it together with its traceback
            if isinstance(error, INPUT_ERRORS) or is_full_disk(error):
                raise WorkerInputError(str(error))  # an error of the controller is not retried


@contextmanager
def last_checkpoint() -> Iterator[Path | None]:
    """Yield the checkpoint that a worker continues from; None at the start."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tvilfm-resume-") as folder:
        yield Path(checkpoint.to_directory(folder))


class Reporter:
    """A worker's listener: it reports epochs to Ray Train, and rank 0 writes its progress beside the run.

    Every report and checkpoint holds all epochs so far, so that a kill cannot leave one without the other.

    Args:
        folder: of the driver.
        epochs: in all.
        resume: checkpoint that the training continues from.
    """

    def __init__(self, folder: Path, epochs: int, resume: Path | None) -> None:
        self._rank = ray.train.get_context().get_world_rank()
        self._progress = ProgressFile(folder / PROGRESS_FILE)
        self._epochs = epochs
        self._written = threading.Event()
        self._written.set()
        self.records: list[Record] = []
        if resume is not None:
            self.records = read_records(resume / METRICS_FILE)

    def on_step(self, record: Mapping[str, float | int | str]) -> None:
        if self._rank == 0:
            steps = int(record["num_steps"])
            done = int(record["epoch"]) * steps + int(record["step"])
            terms = {key: value for key, value in record.items() if key in ("id", "wrt", "loss")}
            note = "  ".join(f"{key} {value:.3f}" for key, value in terms.items())
            self._progress.update(done, self._epochs * steps, note)

    def on_epoch(self, record: Mapping[str, float | int | str], write: Callable[[Path], None] | None) -> None:
        """Report an epoch. Its checkpoint is written while the next epoch runs; at most one waits until it is written.

        Ray Train counts a checkpoint only when it is whole in storage, and counts them in their order.
        """
        self.records.append(dict(record))
        records = list(self.records)
        if write is None:
            ray.train.report({"records": records}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self.wait()

        def upload(here: Checkpoint, name: str) -> Checkpoint:
            storage = ray.train.get_context().get_storage()
            shared = isinstance(storage.storage_filesystem, fs.LocalFileSystem)
            folder = Path(storage.build_checkpoint_path_from_name(name) if shared else here.path)
            try:
                folder.mkdir(exist_ok=not shared)  # the folder of the run exists, or the storage is not shared
                write(folder)
                write_records(folder / METRICS_FILE, records)
                if shared:
                    return Checkpoint.from_directory(str(folder))
                stored: Checkpoint = storage.persist_current_checkpoint(here, name)
                return stored
            finally:
                self._written.set()

        self._written.clear()
        ray.train.report(
            {"records": records},
            checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="tvilfm-checkpoint-")),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )

    def wait(self) -> None:
        """Wait until the checkpoint of the last reported epoch is written."""
        self._written.wait()
