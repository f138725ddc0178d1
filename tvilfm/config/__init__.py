"""The run description: frozen, typed sections that are read once and stored with the results.

Precedence, lowest first: defaults, fidelity preset, YAML file, size recipe, `section.key=value` overrides. The preset
(`fidelity: published` or `fidelity: corrected`) sets the switches in which the released code and this code differ
(`FIDELITY_SWITCHES`). In the file, `null` for such a switch means that the preset sets it. The resolved configuration
in the run folder contains the value of every key.
"""

from tvilfm.config.caption import CaptionerSection, CaptionSection, CaptionTrainSection, RephraseEngine, RephraseSection
from tvilfm.config.cluster import (
    ClusterSection,
    DriverSection,
    HeadSection,
    PortsSection,
    ProviderSection,
    WorkersSection,
)
from tvilfm.config.data import PROTOCOLS, DataSection, SyntheticSection
from tvilfm.config.evaluate import (
    EnsembleWeights,
    EvaluateSection,
    QueryTextSource,
    RerankSection,
    WitnessDraw,
    noise_level,
)
from tvilfm.config.fidelity import FIDELITY_SWITCHES, Fidelity, Switch, fidelity_table
from tvilfm.config.model import ModelSection, TextModelSection
from tvilfm.config.resolve import (
    Config,
    default_description,
    explain,
    known_keys,
    load_config,
    load_run,
    read_description,
    resolve,
    run_folder,
    set_value,
    to_yaml,
    value_at,
)
from tvilfm.config.run import RunSection
from tvilfm.config.section import Section
from tvilfm.config.serve import MAX_BATCH, GallerySection, ServeSection, is_loopback
from tvilfm.config.training import (
    LossSection,
    Numerics,
    OptimSection,
    PretrainSection,
    ScheduleSection,
    Selection,
    TextStageSection,
    TrainSection,
)

__all__ = [
    "FIDELITY_SWITCHES",
    "MAX_BATCH",
    "PROTOCOLS",
    "CaptionSection",
    "CaptionTrainSection",
    "CaptionerSection",
    "ClusterSection",
    "Config",
    "DataSection",
    "DriverSection",
    "EnsembleWeights",
    "EvaluateSection",
    "Fidelity",
    "GallerySection",
    "HeadSection",
    "LossSection",
    "ModelSection",
    "Numerics",
    "OptimSection",
    "PortsSection",
    "PretrainSection",
    "ProviderSection",
    "QueryTextSource",
    "RephraseEngine",
    "RephraseSection",
    "RerankSection",
    "RunSection",
    "ScheduleSection",
    "Section",
    "Selection",
    "ServeSection",
    "Switch",
    "SyntheticSection",
    "TextModelSection",
    "TextStageSection",
    "TrainSection",
    "WitnessDraw",
    "WorkersSection",
    "default_description",
    "explain",
    "fidelity_table",
    "is_loopback",
    "known_keys",
    "load_config",
    "load_run",
    "noise_level",
    "read_description",
    "resolve",
    "run_folder",
    "set_value",
    "to_yaml",
    "value_at",
]
