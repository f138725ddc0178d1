"""Trackers, to which a run sends its metrics: always TensorBoard; MLflow and Weights & Biases if configured.

The file `metrics.jsonl` in the run folder has all metrics; a tracker is a copy for comparing many runs. The driver logs
to all trackers, so each value is logged once, whatever the number of workers.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from tvilfm.config import Config, known_keys, value_at
from tvilfm.evaluation.results import Results
from tvilfm.terms import METRICS


class Tracker(Protocol):
    """Receives metrics; `close` is called once."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ValueError: a package is missing; the first one is named.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"run.trackers: expected installed packages, got {name}, which is not installed. "
                f"Install it with `pip install tvilfm[{name}]`, or remove it from the list."
            )


@contextmanager
def trackers(config: Config, *, group: str | None = None) -> Iterator[Sequence[Tracker]]:
    """Yield the trackers of a run and close them at the end of the block, as failed if it raised.

    Args:
        config: the run; its resolved keys are logged as parameters.
        group: name of the sweep that the run is a trial of.
    """
    opened: list[Tracker] = [TensorBoardTracker(config)]
    kinds: dict[str, Callable[[Config, str | None], Tracker]] = {"mlflow": MLflowTracker, "wandb": WandbTracker}
    opened += [kinds[name](config, group) for name in config.run.trackers]
    with ExitStack() as stack:
        for tracker in opened:
            stack.push(lambda kind, *_, tracker=tracker: tracker.close(failed=kind is not None))
        yield opened


class TensorBoardTracker:
    """Writes event files to `tensorboard/` in the run folder."""

    def __init__(self, config: Config) -> None:
        from tensorboardX import SummaryWriter

        folder = config.run.path / "tensorboard"
        # A resumed run logs its first epochs again; without this, the curves would contain them twice.
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class MLflowTracker:
    """Creates a run in the MLflow experiment that is named after the sweep, or after the run."""

    def __init__(self, config: Config, group: str | None) -> None:
        from mlflow.tracking import MlflowClient

        uri = config.run.mlflow_uri or f"sqlite:///{(config.run.dir / 'mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=uri)
        name = group or config.run.name
        experiment = self._client.get_experiment_by_name(name)
        identifier = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run = self._client.create_run(identifier, run_name=config.run.name).info.run_id
        for key, value in _parameters(config).items():
            self._client.log_param(self._run, key, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandbTracker:
    """Creates a run in the project `tvilfm`. The package reads its own variables, such as WANDB_MODE=offline."""

    def __init__(self, config: Config, group: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project="tvilfm",
            dir=str(config.run.path),
            name=config.run.name,
            group=group,
            config=_parameters(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def log_record(opened: Sequence[Tracker], record: Mapping[str, Any]) -> None:
    """Log a learning record as `<stage>/<name>` at its step."""
    values = {
        f"{record['stage']}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }
    for tracker in opened:
        tracker.log(values, int(record["step"]))


def log_results(opened: Sequence[Tracker], results: Results, step: int) -> None:
    """Log the result table as `test/<query>/<text source>/<protocol>/<metric>`, in fractions."""
    values = {
        f"test/{row.query}/{row.text_source}/{row.protocol}/{metric}": getattr(row, metric)
        for row in results.rows
        for metric in METRICS
    }
    for tracker in opened:
        tracker.log(values, step)


def _parameters(config: Config) -> dict[str, str]:
    values = config.model_dump(mode="json")
    return {key: str(value_at(values, key)) for key in known_keys()}
