"""Checks before a sweep starts or resumes: its space against the run description, and against an earlier start."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvilfm.config import Config, known_keys, read_description, resolve, value_at
from tvilfm.sweeps.space import Overrides, Space, word, written


def check_space(
    space: Space, path: Path | None = None, overrides: Sequence[str] = (), *, size: str | None = None
) -> Config:
    """Check that a space fits the run description, before the first trial starts.

    Every row, every choice and both bounds of every range must result in a valid config. Rules across sections concern
    two keys at a time, so values are checked alone and combined with every value of every other parameter.

    Args:
        space: space from `load_space`.
        path: run description, as for `load_config`.
        overrides: user's overrides; they must not set keys that the space varies.
        size: recipe, as for `load_config`.

    Returns:
        The base config of all trials.

    Raises:
        ValueError: a key is unknown (the message names the nearest one) or not allowed in a space, a value is out of
            bounds, two keys contradict each other, or the scheduler cannot compare the trials.
    """
    description = read_description(path)

    def config_of(where: str, keys: Overrides) -> Config:
        try:
            return resolve(description, [*written(space.base), *overrides, *written(keys)], size=size)
        except ValueError as error:
            raise ValueError(f"{space.name}, {where}: {error}") from None

    varied = {key for row in space.rows.values() for key in row.overrides}
    for name, parameter in space.parameters.items():
        settings = parameter.settings
        varied |= {name} if settings is None else {key for keys in settings.values() for key in keys}
    _refuse(space, varied, overrides)

    config = config_of("base", {})
    configs = [config, *(config_of(f"row {name}", row.overrides) for name, row in space.rows.items())]
    values = {
        name: [(f"{name}={word(value)}", space.overrides_of({name: value})) for value in parameter.tested]
        for name, parameter in space.parameters.items()
    }
    configs += [config_of(where, keys) for of_parameter in values.values() for where, keys in of_parameter]
    for one, other in itertools.combinations(values.values(), 2):
        for (where, keys), (beside, more) in itertools.product(one, other):
            configs.append(config_of(f"{where} with {beside}", keys | more))
    if space.scheduler.name == "asha":
        _check_asha(space, config, configs)
    return config


def check_same(space: Space, base: Config, *, began: Mapping[str, Any], noted: Config) -> None:
    """Check that a sweep is resumed with its original settings. Keys of `run` and `cluster` may change.

    Args:
        space: space given now.
        base: base config of now.
        began: values of the space that the sweep was started with.
        noted: its base config.

    Raises:
        ValueError: a value of the space other than its budget, or a key that affects the results, is different.
    """
    for name, value in space.model_dump(mode="json").items():
        if name != "budget" and began[name] != value:
            raise ValueError(
                f"--resume: expected the space that the sweep was started with, got another {name}: {value}, not "
                f"{began[name]}. Give the same space and --seeds, or start a new sweep with --name."
            )
    before, values = noted.model_dump(mode="json"), base.model_dump(mode="json")
    for key in known_keys():
        old, new = value_at(before, key), value_at(values, key)
        if old != new and not key.startswith(("run.", "cluster.")):
            raise ValueError(
                f"--resume: expected the settings that the sweep was started with, got {key}={new}, not {old}. "
                "Give the same --size and overrides, or start a new sweep with --name."
            )


def _refuse(space: Space, varied: Iterable[str], overrides: Sequence[str]) -> None:
    given = {override.partition("=")[0] for override in overrides}
    for key in sorted(varied):
        if key in space.base or key in given:
            raise ValueError(
                f"{key}: expected a key that {space.name} does not vary, got an override of a varied key, which would "
                "be lost. Remove the override, or change the space."
            )
    for key in sorted({*varied, *space.base}):
        if key.startswith(("run.", "cluster.")) and key in known_keys():
            raise ValueError(
                f"{space.name}, {key}: expected a key that affects the results, got a key of the run or the cluster. "
                "Set seeds under `seeds`, and other such keys on the command line."
            )


def _check_asha(space: Space, config: Config, configs: Iterable[Config]) -> None:
    stage = space.scheduler.stage
    epochs = space.scheduler.epochs(config)
    for other in configs:
        schedule = other.train.base if stage == "base" else other.train.text
        if schedule.select != "val":
            raise ValueError(
                f"train.{stage}.select: expected val with scheduler asha, got {schedule.select}. asha compares trials "
                "by their validation scores; set select=val or use scheduler none."
            )
        if schedule.epochs != epochs:
            raise ValueError(
                f"train.{stage}.epochs: expected {epochs} in every trial with scheduler asha, got {schedule.epochs}. "
                "asha cannot compare trials of different length; use scheduler none."
            )
