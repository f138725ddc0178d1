"""Search spaces: the varied parameters, the search method, and the compared metric of a sweep.

A space is a YAML file. It either lists named `rows` of an ablation table, each with overrides of the run description,
or it combines `parameters`. A parameter is a dotted key of the run description with a list of choices or a range, or a
label with named `settings`, each of which sets several keys:

    optim.text_lr: {loguniform: [1.0e-4, 1.0e-2]}        # float
    train.text.cache_views: {randint: [1, 4]}            # including both ends
    loss.joint: [true, false]
    views: {settings: {none: {train.text.cache_views: 0}, two: {train.text.cache_views: 2}}}

The whole space is checked against the run description before the first trial starts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from tvilfm.config import Config, Section, explain, known_keys

Metric = Literal["val_rank1", "val_mAP", "rank1", "mAP", "mINP"]
SweptQuery = Literal["text", "fusion", "ensemble"]
Range = Literal["uniform", "loguniform", "randint"]
Overrides = dict[str, Any]
RANGES: tuple[Range, ...] = ("uniform", "loguniform", "randint")


class Parameter(Section):
    """The values of one parameter; exactly one field is set.

    Attributes:
        choices: values of a config key.
        uniform, loguniform: lowest and highest value of a float key.
        randint: lowest and highest value of an integer key, both inclusive.
        settings: name -> overrides that are set together.
    """

    choices: tuple[Any, ...] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None
    settings: dict[str, Overrides] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_choices(cls, value: object) -> object:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_kind_in_order(self) -> Parameter:
        given = [name for name in (*RANGES, "choices", "settings") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"choices: expected a list, settings or one of {', '.join(RANGES)}, got {given}. Set exactly one."
            )
        if self.range is not None:
            kind, low, high = self.range
            if not low < high or (kind == "loguniform" and low <= 0):
                order = "0 < lowest < highest" if kind == "loguniform" else "lowest < highest"
                raise ValueError(f"{kind}: expected {order}, got [{low}, {high}]. Fix the bounds.")
        return self

    @property
    def range(self) -> tuple[Range, float, float] | None:
        """Kind, lowest and highest value; None for choices and settings."""
        for kind in RANGES:
            bounds = getattr(self, kind)
            if bounds is not None:
                return kind, bounds[0], bounds[1]
        return None

    @property
    def options(self) -> tuple[Any, ...]:
        """The choices, or the names of the settings; empty for a range."""
        return self.choices or tuple(self.settings or ())

    @property
    def tested(self) -> tuple[Any, ...]:
        """The values to validate: all options, or both ends of the range."""
        return self.options if self.range is None else self.range[1:]

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value at random."""
        if self.range is None:
            return self.options[int(rng.integers(len(self.options)))]
        kind, low, high = self.range
        if kind == "randint":
            return int(rng.integers(int(low), int(high) + 1))
        if kind == "loguniform":
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return float(rng.uniform(low, high))


class Row(Section):
    """A named row of an ablation table."""

    overrides: Overrides = Field(default_factory=dict, description="overrides of the run description")
    query: SweptQuery = Field("fusion", description="query of the results that the row shows")
    published: str | None = Field(None, description="`method` of the published row to show beside it")


class Scheduler(Section):
    """Early stopping of bad trials."""

    name: Literal["none", "asha"] = Field("none", description="none, or asha (asynchronous successive halving)")
    stage: Literal["base", "text"] = Field("text", description="training stage whose epochs asha counts")
    grace: float = Field(0.25, gt=0, lt=1, description="share of the stage's epochs before a trial can be stopped")
    reduction_factor: int = Field(3, ge=2, description="at each halving, asha keeps the best 1 / reduction_factor")

    @model_validator(mode="before")
    @classmethod
    def _no_population_based_training(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("name") == "pbt":
            raise ValueError(
                "name: expected none or asha, got pbt. pbt copies checkpoints between trials, but trials here store "
                "checkpoints in their own training runs, where pbt cannot access them. Choose asha."
            )
        return values

    def epochs(self, config: Config) -> int:
        """Return the number of epochs of the stage that asha counts."""
        return config.train.base.epochs if self.stage == "base" else config.train.text.epochs

    def grace_epochs(self, config: Config) -> int:
        """Return the number of epochs before the first stop."""
        return max(1, math.ceil(self.grace * self.epochs(config)))


class Budget(Section):
    """The budget of a sweep."""

    num_samples: int | None = Field(None, ge=1, description="number of settings; null for rows and grids")
    max_concurrent: int | None = Field(
        None, ge=1, description="maximum number of concurrent trials; null = as many as fit the cluster"
    )
    time_limit_s: float | None = Field(
        None, gt=0, description="seconds until the sweep ends and drops running trials; null = no limit"
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting with one seed.

    Attributes:
        name: unique in the sweep and valid as a folder name.
        setting: row name or parameter values as text; trials of one setting differ only in their seed.
        values: parameter -> value; empty for rows.
        seed: seed of the run.
        query: query of the results to read.
        overrides: overrides of the run description, in order. Trials with the same overrides are the same run.
    """

    name: str
    setting: str
    values: Mapping[str, Any]
    seed: int
    query: SweptQuery
    overrides: tuple[str, ...]


class Space(Section):
    """A sweep, as described in its YAML file."""

    name: str = Field(pattern=r"^\w[\w-]*$", description="name of the file without its suffix")
    description: str = Field(description="question that the sweep answers")
    metric: Metric = Field("val_mAP", description="metric to compare trials by; val_* are on validation identities")
    mode: Literal["max"] = Field("max", description="higher is better for every metric")
    query: SweptQuery = Field("fusion", description="query of the results that the metric uses (rows set their own)")
    searcher: Literal["grid", "random", "optuna"] = Field("grid", description="method to choose settings")
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="seeds; every setting runs once with each")
    free_steps: int | None = Field(
        None, ge=1, description="steps per side of the grid of MER weights that every trial sweeps; null = no sweep"
    )
    base: Overrides = Field(default_factory=dict, description="overrides of the run description for every trial")
    rows: dict[str, Row] = Field(default_factory=dict, description="named rows of an ablation")
    reference: str | None = Field(None, description="row to compare the others with")
    parameters: dict[str, Parameter] = Field(default_factory=dict, description="searched parameters")

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        if bool(self.rows) == bool(self.parameters):
            raise ValueError("parameters: expected either parameters or rows, got both or none. Set one of them.")
        if self.rows and (self.searcher != "grid" or self.reference not in self.rows):
            raise ValueError(
                f"rows: expected searcher grid and a reference among {list(self.rows)}, got {self.searcher} and "
                f"{self.reference}. Name the row to compare with."
            )
        if self.parameters and self.reference is not None:
            raise ValueError(f"reference: expected null without rows, got {self.reference}. Leave it out.")
        if (self.searcher == "grid") != (self.budget.num_samples is None):
            raise ValueError(
                f"budget.num_samples: expected {'null with' if self.searcher == 'grid' else 'a number with'} searcher "
                f"{self.searcher}, got {self.budget.num_samples}. A grid runs all its settings; a search needs a limit."
            )
        ranges = [key for key, parameter in self.parameters.items() if parameter.range is not None]
        if self.searcher == "grid" and ranges:
            raise ValueError(
                f"parameters.{ranges[0]}: expected a list or settings with searcher grid, got a range. "
                "List the values, or use searcher random."
            )
        if self.searcher == "optuna" and len(self.seeds) > 1:
            raise ValueError(
                f"seeds: expected one with searcher optuna, got {len(self.seeds)}. optuna learns from one number per "
                "setting; run the best settings again as a grid with several seeds."
            )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected different numbers >= 0, got {list(self.seeds)}. Fix the list.")
        if self.scheduler.name == "asha" and (not self.metric.startswith("val_") or self.query != "fusion"):
            raise ValueError(
                f"scheduler.name: expected none with metric {self.metric} of query {self.query}, got asha. Only "
                "val_rank1 and val_mAP of the fusion query are known while a trial trains."
            )
        if self.free_steps is not None and self.query != "ensemble":
            raise ValueError(f"free_steps: expected null with query {self.query}, got {self.free_steps}. Leave it out.")
        return self

    def overrides_of(self, values: Mapping[str, Any]) -> Overrides:
        """Return the overrides of parameter values; a setting's name is replaced by all its keys."""
        overrides: Overrides = {}
        for key, value in values.items():
            settings = self.parameters[key].settings
            overrides |= {key: value} if settings is None else settings[value]
        return overrides

    def settings(self) -> list[dict[str, Any]]:
        """Return the parameter values of every setting of a grid or a random search; every call returns the same."""
        if self.searcher == "grid":
            combined = itertools.product(*(parameter.options for parameter in self.parameters.values()))
            return [dict(zip(self.parameters, values, strict=True)) for values in combined]
        rng = np.random.default_rng(min(self.seeds))
        return [
            {key: parameter.draw(rng) for key, parameter in self.parameters.items()}
            for _ in range(self.budget.num_samples or 0)
        ]

    def trial(self, number: int, values: Mapping[str, Any], seed: int, overrides: Sequence[str] = ()) -> Trial:
        """Return the trial of parameter values that a searcher proposes; `overrides` are as in `trials`."""
        return self._trial(number, words(values), values, self.overrides_of(values), self.query, seed, overrides)

    def trials(self, overrides: Sequence[str] = ()) -> list[Trial]:
        """Return all trials known in advance, ordered by seed; with optuna, there are none.

        Args:
            overrides: user's overrides, `section.key=value`; applied after the space's base, before its parameters.
        """
        if self.searcher == "optuna":
            return []
        if self.rows:
            cases: list[tuple[str, dict[str, Any], Overrides, SweptQuery]] = [
                (name, {}, row.overrides, row.query) for name, row in self.rows.items()
            ]
        else:
            cases = [(words(v), v, self.overrides_of(v), self.query) for v in self.settings()]
        return [
            self._trial(number, setting, values, keys, query, seed, overrides)
            for seed in self.seeds
            for number, (setting, values, keys, query) in enumerate(cases)
        ]

    def _trial(
        self,
        number: int,
        setting: str,
        values: Mapping[str, Any],
        keys: Overrides,
        query: SweptQuery,
        seed: int,
        overrides: Sequence[str],
    ) -> Trial:
        return Trial(
            name=f"{number:04d}-seed{seed}",
            setting=setting,
            values=values,
            seed=seed,
            query=query,
            overrides=(*written(self.base), *overrides, *written(keys), f"run.seed={seed}"),
        )


def words(values: Mapping[str, Any]) -> str:
    """Return parameter values as one line, with the last part of each key."""
    return ", ".join(f"{key.rpartition('.')[2]}={word(value)}" for key, value in values.items())


def written(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as `section.key=value` strings with YAML values, for `load_config`."""
    return [f"{key}={_yaml(value)}" for key, value in overrides.items()]


def load_space(path: Path) -> Space:
    """Read a search space.

    Args:
        path: YAML file; its stem is the space's name.

    Raises:
        ValueError: the file does not exist or is not YAML, a key is unknown, or a value is invalid.
    """
    if not path.is_file():
        raise ValueError(f"space: expected a YAML file, got {path}. Use a name from tune_spaces or the path of a file.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}. Fix the file.") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected a mapping, got {type(values).__name__}. See tune_spaces/losses.yaml for an example."
        )
    try:
        return Space.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        fields = {"rows": Row.model_fields, "parameters": Parameter.model_fields}
        named = [
            f"{part}.{name}.{field}" for part in fields for name in values.get(part) or () for field in fields[part]
        ]
        raise ValueError(
            f"{path}: {explain(error, [*known_keys(Space), *named], see='tvilfm/sweeps/space.py')}"
        ) from None


def with_seeds(space: Space, seeds: str) -> Space:
    """Return the space with other seeds.

    Args:
        space: space from `load_space`.
        seeds: comma-separated numbers.

    Raises:
        ValueError: the seeds are not such numbers, or the searcher cannot use them.
    """
    try:
        return Space.model_validate({**space.model_dump(), "seeds": [int(seed) for seed in seeds.split(",")]})
    except ValidationError as error:
        raise ValueError(f"--seeds: {explain(error)}") from None
    except ValueError:
        raise ValueError(f"--seeds: expected comma-separated numbers, got {seeds}. Use for example 0,1,2.") from None


def word(value: Any) -> str:
    """Return a parameter's value for display: floats with three significant digits, other values as YAML."""
    return f"{value:.3g}" if isinstance(value, float) else _yaml(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
