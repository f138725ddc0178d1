"""The list of all stages in order, the selection for a config, and the fingerprints of stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from cluster.stages.base import Base
from cluster.stages.captioner import Captioner
from cluster.stages.captions import Captions
from cluster.stages.features import Features
from cluster.stages.pixels import Pixels
from cluster.stages.pretrain import Pretrain
from cluster.stages.report import Report
from cluster.stages.results import EvaluateResults
from cluster.stages.stage import Stage, without_placement
from cluster.stages.text import Text
from cluster.stages.trained import Trained
from cluster.stages.views import Views
from tvilfm.config import Config, value_at

FORMAT = 5  # increase when the files of a stage or their meaning change, so that older folders are not reused

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        *(Pixels(), Captioner("visible"), Captioner("infrared"), Captions(), Pretrain(), Base(), Views(), Text()),
        *(Trained(), Features(), EvaluateResults(), Report()),
    )
}


def stages_of(config: Config) -> list[str]:
    """Return the names of the stages that a run has, in order."""
    return [name for name, stage in STAGES.items() if stage.applies(config)]


def stage_fingerprints(config: Config, sources: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprint of every stage.

    Args:
        config: the run.
        sources: fingerprints of the inputs from users: `DATASET` (rows and files), `CAPTION_FILES` if caption files are
            read, and `MODEL` if `model.trained` is set.

    Returns:
        Stage name -> 12 hexadecimal digits, for the stages of the run.
    """
    values = without_placement(config.model_dump(mode="json"))
    fingerprints = dict(sources)
    names = stages_of(config)
    for name in names:
        stage = STAGES[name]
        decided_by = {
            "format": FORMAT,
            "stage": name,
            "keys": {key: value_at(values, key) for key in stage.keys},
            "inputs": {one: fingerprints[one] for one in stage.inputs(config)},
        }
        text = json.dumps(decided_by, sort_keys=True)
        fingerprints[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {name: fingerprints[name] for name in names}
