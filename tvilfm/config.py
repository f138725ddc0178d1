"""The run description: frozen, typed sections that are read once and written beside the results.

Precedence: defaults < fidelity preset < YAML file < `section.key=value` overrides. The preset is how
`fidelity: published` and `fidelity: corrected` choose the switches in which the released code and ours differ
(`FIDELITY_SWITCHES`); in the file, `null` for such a switch means "as fidelity says". The resolved configuration that
is written to the run folder spells every choice out.
"""

from __future__ import annotations

import copy
import difflib
import ipaddress
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tvilfm.place import Place

Fidelity = Literal["published", "corrected"]
Numerics = Literal["published", "corrected"]
WitnessDraw = Literal["released", "seeded"]
Selection = Literal["val", "last", "test"]
QueryTextSource = Literal["witness", "witness-heldout", "own"]
RephraseEngine = Literal["none", "rules", "transformers", "openai", "vllm"]

# What is evaluated when `evaluate.protocols` is null; the first also chooses checkpoints.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "synthetic": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "sysu_mm01": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "regdb": ("regdb/infrared-visible", "regdb/visible-infrared"),
    "llcm": ("llcm/infrared-visible", "llcm/visible-infrared"),
    "folder": ("folder/infrared-visible",),
}


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A choice in which the released code and ours differ.

    Attributes:
        published: value of the released code.
        corrected: ours.
        why: the reason, for docs/method.md.
        regdb: value of the released RegDB script, where it is another.
    """

    published: object
    corrected: object
    why: str
    regdb: object = ...

    def value(self, fidelity: Fidelity, dataset: str) -> object:
        """Return the value of a fidelity for a dataset."""
        if fidelity == "published" and dataset == "regdb" and self.regdb is not ...:
            return self.regdb
        return self.published if fidelity == "published" else self.corrected


_SELECT = "a checkpoint that the test set chose flatters the test result"
_ALL_IDS = "validation identities choose the checkpoint, so they are not trained on"
_SELECT_BY = "mAP counts every match; the released code keeps the highest rank-1, and the later epoch of equal ones"
_EVAL_EVERY = "the released code evaluates every second epoch"
_EVAL_FROM = "the best epoch is often an early one"
FIDELITY_SWITCHES: dict[str, Switch] = {
    "loss.wrt_numerics": Switch(
        published="published", corrected="corrected", why="far negatives underflow and are not pushed away"
    ),
    "optim.lr": Switch(published=3.5e-4, corrected=3.5e-4, regdb=2e-3, why="set by the RegDB script"),
    "optim.text_lr": Switch(published=3.5e-4, corrected=3.5e-4, regdb=1e-5, why="set by the RegDB script"),
    "optim.keep_unused_tokens": Switch(
        published=False, corrected=True, why="decay erases the words that the training captions do not use"
    ),
    "optim.text_weight_decay": Switch(
        published=None, corrected=4e-5, why="the released flag has no effect; null = optim.weight_decay"
    ),
    "optim.text_bias_weight_decay": Switch(
        published=5e-4, corrected=0.0, regdb=0.0, why="biases are usually not decayed; the RegDB script does not"
    ),
    "train.base.select": Switch(published="test", corrected="val", why=_SELECT),
    "train.base.select_by": Switch(published="rank1", corrected="mAP", why=_SELECT_BY),
    "train.base.use_val": Switch(published=True, corrected=False, why=_ALL_IDS),
    "train.base.eval_every": Switch(published=2, corrected=5, why=_EVAL_EVERY),
    "train.base.eval_from": Switch(published=80, corrected=1, why=_EVAL_FROM),
    "train.text.select": Switch(published="test", corrected="val", why=_SELECT),
    "train.text.select_by": Switch(published="rank1", corrected="mAP", why=_SELECT_BY),
    "train.text.use_val": Switch(published=True, corrected=False, why=_ALL_IDS),
    "train.text.eval_every": Switch(published=2, corrected=1, why=_EVAL_EVERY),
    "train.text.eval_from": Switch(published=1, corrected=1, regdb=80, why=_EVAL_FROM),
    "train.text.freeze_batch_norm": Switch(
        published=False, corrected=True, why="the frozen network's statistics drift with the training batches"
    ),
    "train.text.freeze_gem": Switch(
        published=False, corrected=True, why="p trained for fusion alone also moves the features of the gallery"
    ),
    "evaluate.witness_draw": Switch(
        published="released",
        corrected="seeded",
        why="the spread over training seeds includes that of the sentences",
    ),
}


def fidelity_table() -> str:
    """Return the switches as a Markdown table: key, released value, ours, and why."""
    lines = ["| key | published | corrected | why |", "|---|---|---|---|"]
    for key, switch in FIDELITY_SWITCHES.items():
        published = _cell(switch.published) + ("" if switch.regdb is ... else f"; RegDB {_cell(switch.regdb)}")
        lines.append(f"| `{key}` | {published} | {_cell(switch.corrected)} | {switch.why} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"`{yaml.safe_dump(value).splitlines()[0]}`"


MAX_BATCH = 10_000  # that serve.max_batch may be: so much is checked of a body before it is counted


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    name: str = Field("demo", pattern=r"^\w[\w.-]*$", description="folder under run.dir that holds this run")
    dir: Path = Field(Path("runs"), description="where runs live")
    stages_dir: Path | None = Field(
        None, description="where finished stages live, shared between runs; null = inside the run folder"
    )
    seed: int = Field(0, ge=0, description="every random draw of training and evaluation follows from it")
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="also log to mlflow, wandb (JSON lines and TensorBoard always)"
    )
    mlflow_uri: str | None = Field(None, description="MLflow server or database; null = SQLite file in run.dir")

    @property
    def path(self) -> Path:
        return self.dir / self.name


class SyntheticSection(Section):
    size: Literal["tiny", "small", "large"] = Field("small", description="identities of the synthetic benchmark")
    seed: int = Field(0, ge=0, description="seed of the rendered people, apart from run.seed")


class DataSection(Section):
    name: Literal["synthetic", "sysu_mm01", "regdb", "llcm", "folder"] = Field(
        "synthetic", description="synthetic (rendered when absent), sysu_mm01, regdb, llcm, or folder (your own)"
    )
    root: Path | None = Field(None, description="dataset folder; null = run.dir/data/<synthetic size and seed>")
    split: int = Field(1, ge=1, le=10, description="RegDB: which of its ten splits to train and test on")
    captions: Path | None = Field(
        None, description="folder of published caption files or a .parquet caption table; null = data.root/Text"
    )
    height: int = Field(288, ge=16, description="pixels after resizing (METHOD 2)")
    width: int = Field(144, ge=8, description="pixels after resizing (METHOD 2)")
    pad: int = Field(10, ge=0, description="padding before the random crop, pixels (METHOD 4)")
    decode_batch: int = Field(64, ge=1, description="images a Ray Data task decodes at once")
    synthetic: SyntheticSection = SyntheticSection()

    @property
    def reader_options(self) -> dict[str, object]:
        """What `read_dataset` takes for this dataset beside its name and folder."""
        return {"split": self.split} if self.name == "regdb" else {}


class TextModelSection(Section):
    width: int = Field(512, ge=8, description="CLIP RN50 text tower: 512")
    layers: int = Field(12, ge=1, description="CLIP RN50 text tower: 12")
    heads: int = Field(8, ge=1, description="CLIP RN50 text tower: 8")
    weights: str = Field(
        "openai", description="openai (open_clip's CLIP RN50), random, or a local state dict of that tower"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextModelSection:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}.")
        return self


class CaptionerSection(Section):
    """One modality's captioner (METHOD 5) and how it writes."""

    model: str = Field(
        "Salesforce/blip-image-captioning-large",
        description="transformers image-to-text model: name or local folder; conv = what caption-train makes: a small "
        "new one for pictures of data.height x data.width and the words of the training sentences",
    )
    revision: str | None = Field(None, description="revision of a named model; null = its default branch")
    prompt: str = Field("", description="words the captioner starts from, or the question a chat model is asked")
    beams: int = Field(1, ge=1, description="beam search width; 1 = greedy or sampling")
    temperature: float = Field(0.0, ge=0, description="0 = greedy or beams; above 0 = seeded sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    max_new_tokens: int = Field(50, ge=1, description="longest caption, tokens (METHOD 5)")

    @model_validator(mode="after")
    def _beams_or_sampling(self) -> CaptionerSection:
        if self.beams > 1 and self.temperature:
            raise ValueError(
                f"temperature: expected 0 with beams={self.beams}, got {self.temperature}. Search or sample, not both."
            )
        return self


class CaptionTrainSection(Section):
    """Fine-tuning of the captioners."""

    epochs: int = Field(5, ge=1, description="passes over the (image, sentence) pairs")
    batch: int = Field(32, ge=1, description="pairs an optimiser step")
    lr: float = Field(2e-5, gt=0, description="peak rate, after warm-up, falling linearly to 0")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decay")
    warmup_steps: int = Field(100, ge=0, description="optimiser steps of linear warm-up")
    infrared_pairs: Literal["infrared", "gray"] = Field(
        "infrared", description="infrared images with colourless sentences, or visible images turned gray"
    )


class RephraseSection(Section):
    """LLM augmentation of captions (METHOD 5)."""

    engine: RephraseEngine = Field(
        "none", description="none, rules (offline, no language model), transformers, openai (any such endpoint), vllm"
    )
    model: str = Field("lmsys/vicuna-7b-v1.5", description="language model: name, or local folder")
    url: str = Field("http://127.0.0.1:8000/v1", description="base address of an OpenAI-compatible endpoint")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the endpoint's key")
    temperature: float = Field(0.7, ge=0, description="of sampling (METHOD 5)")
    max_new_tokens: int = Field(80, ge=1, description="longest rephrase, tokens")
    retries: int = Field(2, ge=0, description="further tries at a rephrase that is not valid; then the caption stays")
    max_words: int = Field(60, ge=1, description="longest rephrase, words; the text tower reads 77 tokens")
    timeout_s: float = Field(60.0, gt=0, description="seconds that an endpoint has for an answer")
    batch: int = Field(32, ge=1, description="captions a batch, and requests that an actor has under way at once")
    workers: int = Field(1, ge=1, description="rephrasing actors; those with a model take cluster.gpus_per_worker GPUs")


class CaptionSection(Section):
    source: Literal["files", "captioner", "finetuned"] = Field(
        "files",
        description="files (data.captions), captioner (written by the models below), or finetuned (by these models "
        "after fine-tuning on the training images and their captions of files)",
    )
    seed: int = Field(
        0, ge=0, description="of fine-tuning, sampling and rephrasing; apart from run.seed: runs share captions"
    )
    visible: CaptionerSection = CaptionerSection()
    infrared: CaptionerSection = CaptionerSection()
    batch: int = Field(32, ge=1, description="images a batch of a captioning actor")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float16", description="of the captioner on CUDA; CPU always runs float32"
    )
    workers: int = Field(1, ge=1, description="captioning actors, each with cluster.gpus_per_worker GPUs")
    decoders: int = Field(2, ge=1, description="tasks that read and decode images for each captioning actor")
    filter_colors: bool = Field(True, description="remove colour words from infrared captions (METHOD 5)")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images above which the job ends with an error"
    )
    train: CaptionTrainSection = CaptionTrainSection()
    rephrase: RephraseSection = RephraseSection()


class ModelSection(Section):
    backbone: Literal["resnet50", "resnet18_half"] = Field("resnet50", description="resnet50 or resnet18_half (CPU)")
    weights: str = Field(
        "imagenet",
        description="imagenet (torchvision), attributes (pre-train on synthetic attributes), random, or a local file",
    )
    trained: Path | None = Field(
        None,
        description="trained model that is evaluated in place of training one: run folder, model folder or checkpoint",
    )
    text: TextModelSection = TextModelSection()


class LossSection(Section):
    id_weight: float = Field(1.0, ge=0, description="weight of the identity cross-entropy (METHOD 3)")
    wrt_weight: float = Field(1.0, ge=0, description="weight of the weighted regularised triplet (METHOD 3)")
    wrt_numerics: Numerics = Field("corrected", description="softmax inside WRT; null = as fidelity says")
    center_weight: float = Field(
        0.0, ge=0, description="weight of the hetero-centre loss: modalities' means of an identity to its visible one"
    )
    filter_text: bool = Field(True, description="SFF: subtract the infrared caption's feature (ablation: false)")
    joint: bool = Field(True, description="MJL: loss over all modalities, not visible and fusion only")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> LossSection:
        if not self.id_weight and not self.wrt_weight:
            raise ValueError("id_weight: expected > 0 where wrt_weight is 0, got 0. Give one of the losses a weight.")
        return self


class OptimSection(Section):
    lr: float = Field(
        3.5e-4,
        gt=0,
        description="visual rate; also embeddings, ln_final, projection (METHOD 4); null = as fidelity says",
    )
    text_lr: float = Field(3.5e-4, gt=0, description="rate of the text transformer; null = as fidelity says")
    head_lr_factor: float = Field(2.0, gt=0, description="head rate over lr")
    text_bias_lr_factor: float = Field(2.0, gt=0, description="text biases' rate over text_lr")
    weight_decay: float = Field(5e-4, ge=0, description="Adam's coupled L2")
    text_weight_decay: float | None = Field(
        4e-5,
        ge=0,
        description="decay of the text transformer; null = as fidelity says (published ignores the flag)",
    )
    text_bias_weight_decay: float = Field(
        0.0, ge=0, description="decay of the text transformer's biases; null = as fidelity says"
    )
    keep_unused_tokens: bool = Field(
        True, description="no decay, no update for token rows without gradient; null = as fidelity says"
    )


class ScheduleSection(Section):
    epochs: int = Field(120, ge=1, description="epochs of this stage")
    warmup_epochs: int = Field(10, ge=0, description="linear warm-up from 0.01 to 1")
    milestones: tuple[int, ...] = Field((40, 60, 100), description="epochs at which the rate falls tenfold")
    select: Selection = Field("val", description="checkpoint kept: val, last, test (published); null = fidelity")
    select_by: Literal["rank1", "mAP"] = Field(
        "mAP",
        description="score that selects the checkpoint: mAP (the earlier of equal epochs) or rank1 (the later); "
        "null = fidelity",
    )
    use_val: bool = Field(
        False,
        description="train on the validation identities too (needs select: last or test); null = fidelity",
    )
    eval_every: int = Field(5, ge=1, description="epochs between validations; null = fidelity")
    eval_from: int = Field(
        1, ge=1, description="first epoch that is validated, counted from 1; the last always is; null = fidelity"
    )

    @model_validator(mode="after")
    def _no_selection_on_training_ids(self) -> ScheduleSection:
        if self.use_val and self.select == "val":
            raise ValueError(
                "select: expected last or test when use_val is true, got val. "
                "Validation identities that are trained on cannot choose a checkpoint."
            )
        return self


class TextStageSection(ScheduleSection):
    epochs: int = Field(20, ge=1, description="20 in the paper, 120 in the released code")
    eval_every: int = Field(1, ge=1, description="epochs between validations; null = fidelity")
    cache_views: int = Field(0, ge=0, description="frozen features of so many augmented views an image; 0 = none")
    freeze_batch_norm: bool = Field(True, description="frozen visual BN in eval mode; null = as fidelity says")
    freeze_gem: bool = Field(
        True,
        description="keep GeM's p of the base stage; false: without SFF (loss.filter_text: false), fusion trains it; "
        "null = as fidelity says",
    )
    llm_probability: float = Field(0.5, ge=0, le=1, description="share of texts replaced by their rephrase")


class PretrainSection(Section):
    """The stand-in for ImageNet weights, used when `model.weights: attributes`."""

    identities: int = Field(600, ge=2, description="identities of the disjoint synthetic split it learns from")
    steps: int = Field(600, ge=1, description="optimiser steps")
    batch: int = Field(64, ge=2, description="images a step")
    lr: float = Field(2e-3, gt=0, description="peak of the one-cycle rate")
    seed: int = Field(1000003, ge=0, description="of that split's people and of the training; apart from run.seed")


class TrainSection(Section):
    p: int = Field(8, ge=2, description="identities a batch (METHOD 4)")
    k: int = Field(4, ge=2, description="visible and as many infrared images an identity (METHOD 4)")
    autocast: Literal["off", "bfloat16", "float16"] = Field(
        "float16", description="mixed precision on CUDA; CPU always runs float32"
    )
    loader_workers: int = Field(0, ge=0, description="processes that read pixels ahead; 0 = in the trainer")
    base: ScheduleSection = ScheduleSection()
    text: TextStageSection = TextStageSection()
    pretrain: PretrainSection = PretrainSection()

    @field_validator("autocast", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class EnsembleWeights(Section):
    """MER (METHOD 7): weights of the three query vectors."""

    infrared: float = Field(1.0, ge=0, description="weight of the infrared query")
    text: float = Field(1.0, ge=0, description="weight of the text query")
    fusion: float = Field(1.0, ge=0, description="weight of the fusion query")
    temperature: float | None = Field(
        None, gt=0, description="of a softmax over the gallery that makes each vote a share; null = plain similarities"
    )

    @model_validator(mode="after")
    def _somebody_votes(self) -> EnsembleWeights:
        if not (self.infrared or self.text or self.fusion):
            raise ValueError("fusion: expected a weight above 0 for one query at least, got three zeros. Raise one.")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"infrared": self.infrared, "text": self.text, "fusion": self.fusion}


class RerankSection(Section):
    """A second look at each ranking, with the gallery's help."""

    method: Literal["none", "k_reciprocal", "query_expansion"] = Field(
        "none", description="none, k_reciprocal (Zhong et al. 2017) or query_expansion; of every query"
    )
    k1: int = Field(20, ge=1, description="k_reciprocal: neighbourhood size")
    k2: int = Field(6, ge=1, description="k_reciprocal: encodings averaged; 1 = none")
    lambda_value: float = Field(0.3, ge=0, le=1, description="k_reciprocal: share of the original distance")
    k: int = Field(5, ge=1, description="query_expansion: gallery features added")
    alpha: float = Field(3.0, ge=0, description="query_expansion: power of the similarity that weighs them")


class EvaluateSection(Section):
    protocols: tuple[str, ...] = Field(
        PROTOCOLS["synthetic"], description="first one is the default table's; null = the dataset's own"
    )
    text_sources: tuple[QueryTextSource, ...] = Field(
        ("witness", "witness-heldout", "own"), description="query texts to report (METHOD 6)"
    )
    default_text_source: QueryTextSource = Field("witness", description="the default table's text source")
    witness_draw: WitnessDraw = Field(
        "seeded",
        description="who draws witness sentences: run.seed (seeded), or RandomState(1) as released; null = fidelity",
    )
    ensemble: EnsembleWeights = EnsembleWeights()
    rerank: RerankSection = RerankSection()
    batch: int = Field(128, ge=1, description="images or captions an extraction batch")

    @model_validator(mode="after")
    def _default_is_evaluated(self) -> EvaluateSection:
        if self.default_text_source not in self.text_sources:
            raise ValueError(
                f"default_text_source: expected one of {list(self.text_sources)}, got {self.default_text_source}."
            )
        if self.ensemble.temperature is not None and self.rerank.method != "none":
            raise ValueError(
                f"ensemble.temperature: expected null with rerank.method={self.rerank.method}, got "
                f"{self.ensemble.temperature}. A second look takes one query vector, and soft votes have three."
            )
        if not self.protocols:
            raise ValueError("protocols: expected at least one, got none. Set null for the dataset's own.")
        return self


class HeadSection(Section):
    """The machine of a rendered cluster that leads the others."""

    machine: str | None = Field(None, description="type of the head, as the cloud names it, such as m5.2xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of the head")
    memory_gb: int = Field(32, ge=1, description="memory of the head, GB")


class WorkersSection(Section):
    """The machines of a rendered cluster that do the work."""

    machine: str | None = Field(None, description="type of a worker, as the cloud names it, such as g5.4xlarge")
    cpus: int = Field(8, ge=1, description="CPUs of a worker")
    gpus: int = Field(0, ge=0, description="GPUs of a worker")
    accelerator: str | None = Field(
        None, description="type of those GPUs: nvidia-tesla-t4 (GCP; AWS has it in the machine), a100 (Slurm gres)"
    )
    memory_gb: int = Field(32, ge=1, description="memory of a worker, GB")
    min: int = Field(0, ge=0, description="workers that are always there")
    max: int = Field(2, ge=0, description="workers at most")
    idle_minutes: int = Field(5, ge=1, description="minutes without work after which a worker above min goes")
    spot: bool = Field(False, description="cheap workers that may be taken away at any time; the head never is")
    node_selector: tuple[str, ...] = Field(
        (), description="Kubernetes: labels of the nodes for workers, as key=value; those of spot nodes with spot"
    )

    @model_validator(mode="after")
    def _min_below_max(self) -> WorkersSection:
        if self.min > self.max:
            raise ValueError(f"min: expected at most workers.max = {self.max}, got {self.min}. Raise max.")
        wrong = [label for label in self.node_selector if not all(label.partition("=")[::2])]
        if wrong:
            raise ValueError(f"node_selector: expected labels as key=value, got {wrong[0]}. Put an = between the two.")
        return self


class ProviderSection(Section):
    """Where a rendered cluster is made."""

    region: str | None = Field(None, description="AWS or GCP region, such as us-west-2")
    zone: str | None = Field(None, description="GCP zone, such as us-west1-a; AWS: null = any of the region")
    project: str | None = Field(None, description="GCP project id")
    machine_image: str | None = Field(
        None, description="what cloud machines start from: AMI id, or GCP image path; null = Ray's choice without GPUs"
    )
    disk_gb: int = Field(256, ge=10, description="disk of a cloud machine, GB")
    hosts: tuple[str, ...] = Field((), description="own machines (ray-up-onprem): addresses, the head's first")
    ssh_user: str = Field("ubuntu", description="user that ray up logs in as")
    ssh_key: Path | None = Field(None, description="private key that ray up logs in with; null = as ssh finds it")


class PortsSection(Section):
    """Ports of a rendered cluster's head."""

    gcs: int = Field(6379, ge=1, le=65535, description="where workers join")
    dashboard: int = Field(8265, ge=1, le=65535, description="dashboard and job server")
    metrics: int = Field(8080, ge=1, le=65535, description="Prometheus figures, on every machine")


class DriverSection(Section):
    """What the process of a submitted job reserves for itself, beside the workers it starts."""

    cpus: float = Field(0, ge=0, description="CPUs; with 0 of everything it runs on the head")
    gpus: float = Field(0, ge=0, description="GPUs")
    memory_gb: float = Field(0, ge=0, description="memory, GB")


class ClusterSection(Section):
    address: str | None = Field(None, description="Ray address; null = RAY_ADDRESS, or start Ray on this machine")
    train_workers: int = Field(1, ge=1, description="Ray Train workers; each sees p/workers identities a batch")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each train and extraction worker and encoder; 0 = CPU")
    cpus_per_train_worker: float = Field(2, gt=0, description="CPUs (and torch threads) of each train worker")
    extract_workers: int = Field(2, ge=1, description="actors that decode or extract in parallel")
    max_failures: int = Field(
        3, ge=-1, description="restarts of a stage or trial, from its last checkpoint; -1 = always"
    )
    storage: str | None = Field(
        None,
        description="folder that every machine sees (relative paths of a submitted job lie in it), or URI of an object "
        "store, where machines that share no folder keep stages, checkpoints and results; null = this machine alone",
    )
    job_address: str | None = Field(
        None,
        description="Ray's job server; null = RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265",
    )
    token_path: Path | None = Field(
        None,
        description="file with the cluster's token; null = as RAY_AUTH_MODE and RAY_AUTH_TOKEN say. Rendered clusters "
        "ask for a token when it is set",
    )
    python: str = Field("python", description="Python of the cluster's machines that runs a submitted job")
    install: bool = Field(
        False, description="a submitted job first installs pyproject.toml's requirements; our images have them"
    )
    env: tuple[str, ...] = Field((), description="environment variables that a submitted job takes along, where set")
    driver: DriverSection = DriverSection()
    name: str = Field("tvilfm", pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$", description="of a rendered cluster")
    image: str | None = Field(
        None, description="container image of a rendered cluster; null = own machines install this folder"
    )
    redis: str | None = Field(
        None, description="host:port of a Redis that keeps the cluster's state, for a head that may be lost"
    )
    head: HeadSection = HeadSection()
    workers: WorkersSection = WorkersSection()
    provider: ProviderSection = ProviderSection()
    ports: PortsSection = PortsSection()

    @model_validator(mode="after")
    def _storage_is_the_same_everywhere(self) -> ClusterSection:
        if self.storage is not None and Place(self.storage).is_relative:
            raise ValueError(f"storage: expected an absolute path or a URI, got {self.storage}. Begin it with a /.")
        _check_no_keys("storage", self.storage)
        return self


class GallerySection(Section):
    """The people that a service searches, and how."""

    uri: str | None = Field(
        None, description="where the gallery lies: folder or object store prefix; null = gallery/ in the run folder"
    )
    exact_limit: int = Field(100_000, ge=0, description="rows up to which search is exact and in memory; above, IVF_PQ")
    partitions: int | None = Field(None, ge=1, description="lists of the index (IVF); null = square root of the rows")
    sub_vectors: int = Field(128, ge=1, description="bytes a vector in the index (PQ); has to divide its dimension")
    probes: int = Field(32, ge=1, description="lists of the index that a search reads; more if their rows are too few")
    refine: int = Field(10, ge=1, description="candidates a hit that are compared by their own vectors")
    thumbnail_height: int = Field(192, ge=16, description="pixels of the pictures that are kept with the vectors")

    @model_validator(mode="after")
    def _names_no_keys(self) -> GallerySection:
        _check_no_keys("uri", self.uri)
        return self


def _check_no_keys(name: str, uri: str | None) -> None:
    """The description is written into run folders, reports and rendered files."""
    user = "" if uri is None else uri.partition("://")[2].partition("?")[0].rpartition("@")[0]
    if user not in ("", "anonymous"):
        raise ValueError(
            f"{name}: expected a URI without keys, got one with. Set them in the environment of every machine "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)."
        )


class ServeSection(Section):
    """The retrieval service: where it listens, how far it scales, what it refuses and what it keeps."""

    host: str = Field("127.0.0.1", description="address to listen at; any but loopback needs serve.keys")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    keys: Path | None = Field(None, description="file of API keys (`tvilfm keys add`); null = none, on loopback alone")
    tls_cert: Path | None = Field(None, description="certificate (PEM) to speak HTTPS with; null = HTTP")
    tls_key: Path | None = Field(None, description="private key (PEM) of serve.tls_cert")
    captioner: str | None = Field(
        None,
        description="who says what an infrared image shows if the client does not: null = nobody, run = the run's "
        "fine-tuned captioner, or a transformers model",
    )
    encoders: int = Field(1, ge=1, description="encoder replicas at rest")
    max_encoders: int = Field(1, ge=1, description="encoder replicas under load")
    searchers: int = Field(2, ge=1, description="searcher replicas; each holds the gallery in memory")
    searcher_gpus: float = Field(0, ge=0, description="GPUs of each searcher; 0.2 lets it share one, 0 = CPU")
    batch: int = Field(16, ge=1, description="questions that are encoded or searched together, at most")
    batch_wait_ms: float = Field(2.0, ge=0, description="how long a batch waits for more, milliseconds")
    follow_s: float = Field(1.0, gt=0, description="how often searchers look for a new gallery version, seconds")
    max_body_mb: float = Field(16.0, gt=0, description="largest request body, megabytes (413)")
    max_pixels: int = Field(
        16_000_000, ge=1, description="pixels of a picture, and of all of a request together, at most (422)"
    )
    max_batch: int = Field(
        64, ge=1, le=MAX_BATCH, description="queries of a batch search, and rows of a bulk write (422)"
    )
    max_queued: int = Field(128, ge=1, description="requests that wait for a part of the service (429)")
    audit: Path | None = Field(None, description="folder of the audit trail; null = audit/ in the run folder")
    audit_days: int | None = Field(None, ge=1, description="days that the audit trail is kept; null = for ever")
    retention_days: int | None = Field(
        None, ge=1, description="days after which people leave the gallery, and its files; null = they stay"
    )

    @model_validator(mode="after")
    def _agree(self) -> ServeSection:
        if self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"keys: expected a file of API keys with host {self.host}, got null. Make one with `tvilfm keys add`, "
                "or listen at 127.0.0.1."
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_key: expected both tls_cert and tls_key or none of them, got one.")
        if self.max_encoders < self.encoders:
            raise ValueError(f"max_encoders: expected at least encoders = {self.encoders}, got {self.max_encoders}.")
        return self


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Config(Section):
    fidelity: Fidelity = Field("corrected", description="published = the released code's choices, corrected = ours")
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    caption: CaptionSection = CaptionSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    gallery: GallerySection = GallerySection()
    serve: ServeSection = ServeSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.train.p % self.cluster.train_workers:
            raise ValueError(
                f"cluster.train_workers: expected a divisor of train.p = {self.train.p}, got "
                f"{self.cluster.train_workers}. Every worker takes the same number of identities."
            )
        if self.data.name != "synthetic" and self.data.root is None:
            raise ValueError(
                f"data.root: expected the folder of {self.data.name}, got null. Set data.root=/path/to/it."
            )
        own = PROTOCOLS[self.data.name][0].split("/")[0]
        foreign = [name for name in self.evaluate.protocols if name.split("/")[0] != own]
        if foreign:
            raise ValueError(
                f"evaluate.protocols: expected protocols of {own} for data.name={self.data.name}, got {foreign[0]}. "
                f"Set evaluate.protocols=null for {list(PROTOCOLS[self.data.name])}."
            )
        if self.train.text.cache_views and not self.freezes_features:
            changing = "freeze_gem" if self.train.text.freeze_batch_norm else "freeze_batch_norm"
            raise ValueError(
                f"train.text.cache_views: expected 0 while train.text.{changing} is false, got "
                f"{self.train.text.cache_views}. Features of a network that still changes cannot be cached."
            )
        if self.fidelity == "published" and self.train.base.use_val != self.train.text.use_val:
            raise ValueError("train.text.use_val: expected the same as train.base.use_val with published fidelity.")
        return self

    @property
    def trains_gem(self) -> bool:
        """Whether the text stage trains p of the GeM."""
        return not (self.train.text.freeze_gem or self.loss.filter_text)

    @property
    def freezes_features(self) -> bool:
        """Whether the text stage leaves raw image features as they are."""
        return self.train.text.freeze_batch_norm and not self.trains_gem

    @property
    def data_root(self) -> Path:
        if self.data.root is not None:
            return self.data.root
        return self.run.dir / "data" / f"synthetic-{self.data.synthetic.size}-{self.data.synthetic.seed}"

    @property
    def gallery_uri(self) -> str:
        return self.gallery.uri or str(self.run.path / "gallery")

    @property
    def audit_path(self) -> Path:
        return self.serve.audit or self.run.path / "audit"

    @property
    def stages_path(self) -> Path:
        return self.run.stages_dir or self.run.path / "stages"


def load_config(path: Path | None = None, overrides: Iterable[str] = (), *, size: str | None = None) -> Config:
    """Resolve a run description.

    Args:
        path: YAML file whose nesting is the sections' nesting; None = defaults alone.
        overrides: `section.key=value` strings, the value read as YAML.
        size: name of a recipe of the file's `sizes` mapping, applied between the file and the overrides.

    Raises:
        ValueError: unreadable YAML, an unknown key (its nearest neighbour is named), or a value out of bounds.
    """
    return resolve(read_description(path), overrides, size=size)


def default_description() -> Path:
    """Return ./ray_config.yaml or, in a folder without one, the description that the package contains."""
    own = Path("ray_config.yaml")
    return own if own.is_file() else Path(__file__).with_name("ray_config.yaml")


def run_folder(arguments: Sequence[str]) -> Path | None:
    """Return the run folder that is the first of a command's arguments, before its overrides; None without one.

    Raises:
        ValueError: the first argument is neither an override nor the folder of a run.
    """
    if not arguments or "=" in arguments[0]:
        return None
    folder = Path(arguments[0])
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{arguments[0]}: expected section.key=value or the folder of a run, such as runs/demo, got neither "
            "(no config.yaml there). Check the path, or make the run with `tvilfm run`."
        )
    return folder


def load_run(folder: Path, overrides: Iterable[str] = ()) -> Config:
    """Return the resolved description of a run, as its folder holds it.

    Args:
        folder: of the run, where it is now.
        overrides: what is to differ.
    """
    folder = Path(os.path.normpath(folder))
    if folder.name in ("", ".."):
        folder = folder.resolve()
    where = {"run.dir": str(folder.parent), "run.name": folder.name}
    written = [f"{key}={json.dumps(value)}" for key, value in where.items()]
    return load_config(folder / "config.yaml", [*written, *overrides])


def read_description(path: Path | None) -> dict[str, Any]:
    """The sections of a run description as its file has them, unchecked; arguments and errors as of `load_config`."""
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--config: expected a YAML file, got {path}. Check the path, or use `tvilfm init`.")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected YAML, got {error}. Mend the file.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected sections, got {type(values).__name__}. Begin as ray_config.yaml does.")
    return values


def resolve(description: Mapping[str, Any], overrides: Iterable[str] = (), *, size: str | None = None) -> Config:
    """`load_config` of a description that is read already; it is left as it is."""
    values: dict[str, Any] = copy.deepcopy(dict(description))
    sizes = values.pop("sizes", None) or {}
    if size is not None:
        if size not in sizes:
            raise ValueError(f"--size: expected one of {sorted(sizes)}, got {size}.")
        _merge(values, sizes[size])
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not all(key.split(".")):
            raise ValueError(f"override: expected section.key=value, got {override!r}.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{key}: expected a YAML value, got {text!r}. Close its quotes and brackets.") from None
        node: dict[str, Any] = {}
        set_value(node, key, value)
        _merge(values, node)
    fidelity, dataset = values.get("fidelity", "corrected"), str(value_at(values, "data.name"))
    if fidelity in get_args(Fidelity):  # else validation refuses it by name
        for key, switch in FIDELITY_SWITCHES.items():
            if value_at(values, key) is None:
                set_value(values, key, switch.value(fidelity, dataset))
    if value_at(values, "evaluate.protocols") is None:
        name = value_at(values, "data.name") or "synthetic"
        if name in PROTOCOLS:
            set_value(values, "evaluate.protocols", PROTOCOLS[name])
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def explain(
    error: ValidationError, known: Collection[str] | None = None, *, see: str = "`tvilfm config schema`"
) -> str:
    """One line a fault in the house form: dotted key, what was expected, what was found, what to do.

    Args:
        error: of pydantic.
        known: dotted keys that there are; None = those of the run description.
        see: where they are described.
    """
    known = known_keys() if known is None else known
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            sections = {one.rpartition(".")[0] for one in known} - {""}
            near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.0)
            lines.append(f"{key}: expected a known key, got this one. Did you mean {near[0]}?")
        elif fault["type"] == "value_error":
            # A section's own check names the key within the section.
            lines.append(f"{key}.{fault['ctx']['error']}" if key else str(fault["ctx"]["error"]))
        else:
            lines.append(f"{key}: {fault['msg'].lower()}, got {fault['input']!r}. See {see}.")
    return "\n".join(lines)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key and its one-line description."""
    keys: dict[str, str] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys |= known_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = info.description or ""
    return keys


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def set_value(values: dict[str, Any], dotted: str, value: object) -> None:
    """Set the value at a dotted key of nested mappings, and make the mappings that are missing."""
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):  # left for the validation to refuse by name
            return
    values[key] = value


def value_at(values: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted key of nested mappings, None where there is none."""
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node
