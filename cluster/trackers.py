"""Where a run's numbers are sent while it runs: TensorBoard always, MLflow and Weights & Biases when chosen.

JSON lines are the record (`metrics.jsonl` in the run folder); a tracker is a copy of them for people who look at many
runs at once. All of them are fed by the driver, so a number is logged once, however many workers train.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from tvilfm.config import Config, known_keys, value_at
from tvilfm.evaluation.results import METRICS, Results


class Tracker(Protocol):
    """Receives numbers; `close` is called once."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed, before anything starts.

    Raises:
        ValueError: naming the first.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"run.trackers: expected installed packages, got {name}, which is not. "
                f"Install it with `pip install tvilfm[{name}]`, or leave it out."
            )


@contextmanager
def trackers(config: Config, *, group: str | None = None) -> Iterator[Sequence[Tracker]]:
    """The run's trackers, closed at the end of the block, as failed when it raised.

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
    """Event files in the run folder's `tensorboard/`."""

    def __init__(self, config: Config) -> None:
        from tensorboardX import SummaryWriter

        folder = config.run.path / "tensorboard"
        # A run that goes on sends its first epochs again; two copies would be drawn over each other.
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of the experiment named after the sweep, or after the run."""

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
    """A run of the project `tvilfm`, offline with WANDB_MODE=offline; the package reads its own environment."""

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
    """Send one learning record: `<stage>/<name>` at the run's step."""
    values = {
        f"{record['stage']}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }
    for tracker in opened:
        tracker.log(values, int(record["step"]))


def log_results(opened: Sequence[Tracker], results: Results, step: int) -> None:
    """Send the result table: `test/<query>/<text source>/<protocol>/<metric>`, fractions."""
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
