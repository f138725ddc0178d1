"""The sections `loss`, `optim` and `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tvilfm.config.section import Section

Numerics = Literal["published", "corrected"]
Selection = Literal["val", "last", "test"]


class LossSection(Section):
    id_weight: float = Field(1.0, ge=0, description="weight of the identity cross-entropy (METHOD 3)")
    wrt_weight: float = Field(1.0, ge=0, description="weight of the weighted regularised triplet (METHOD 3)")
    wrt_numerics: Numerics = Field(
        "corrected", description="softmax inside WRT: published, corrected; null = set by fidelity"
    )
    center_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the hetero-centre loss, which pulls modality means to the visible mean",
    )
    filter_text: bool = Field(True, description="SFF: subtract the feature of the infrared caption (ablation: false)")
    joint: bool = Field(True, description="MJL: loss over all modalities; false = visible and fusion only")

    @model_validator(mode="after")
    def _something_to_minimise(self) -> LossSection:
        if not self.id_weight and not self.wrt_weight:
            raise ValueError("id_weight: expected > 0 when wrt_weight is 0, got 0. Raise one of the two.")
        return self


class OptimSection(Section):
    lr: float = Field(
        3.5e-4,
        gt=0,
        description="learning rate of all but text transformer and heads; null = set by fidelity (3.5e-4)",
    )
    text_lr: float = Field(
        3.5e-4, gt=0, description="learning rate of the text transformer; null = set by fidelity (3.5e-4)"
    )
    head_lr_factor: float = Field(2.0, gt=0, description="learning rate of the heads, relative to optim.lr")
    text_bias_lr_factor: float = Field(
        2.0, gt=0, description="learning rate of the text transformer's biases, relative to text_lr"
    )
    weight_decay: float = Field(5e-4, ge=0, description="weight decay (coupled L2 of Adam)")
    text_weight_decay: float | None = Field(
        4e-5,
        ge=0,
        description="weight decay of the text transformer; null = set by fidelity",
    )
    text_bias_weight_decay: float = Field(
        0.0, ge=0, description="weight decay of the text transformer's biases; null = set by fidelity"
    )
    keep_unused_tokens: bool = Field(
        True, description="do not update embeddings of unused tokens; null = set by fidelity"
    )


class ScheduleSection(Section):
    """Schedule and checkpoint selection of a stage.

    If several epochs have the same score, `select_by: mAP` keeps the earliest, `rank1` the latest.
    """

    epochs: int = Field(120, ge=1, description="epochs of this stage")
    warmup_epochs: int = Field(10, ge=0, description="epochs of linear warm-up from 0.01 to 1 times the learning rate")
    milestones: tuple[int, ...] = Field((40, 60, 100), description="epochs at which the learning rate is divided by 10")
    select: Selection = Field(
        "val", description="checkpoint to keep: val, last, test; null = set by fidelity (published: test)"
    )
    select_by: Literal["rank1", "mAP"] = Field(
        "mAP",
        description="score for this selection: mAP, rank1; null = set by fidelity (published: rank1)",
    )
    use_val: bool = Field(
        False,
        description="also train on validation identities (requires select last/test); null = set by fidelity",
    )
    eval_every: int = Field(5, ge=1, description="epochs between validations; null = set by fidelity")
    eval_from: int = Field(
        1, ge=1, description="first epoch with a validation, from 1; the last epoch has one; null = set by fidelity"
    )

    @model_validator(mode="after")
    def _no_selection_on_training_ids(self) -> ScheduleSection:
        if self.use_val and self.select == "val":
            raise ValueError(
                "select: expected last or test when use_val is true, got val. "
                "Validation identities that are trained on cannot select a checkpoint."
            )
        return self


class TextStageSection(ScheduleSection):
    epochs: int = Field(20, ge=1, description="epochs of this stage; 20 in the paper, 120 in the released code")
    eval_every: int = Field(1, ge=1, description="epochs between validations; null = set by fidelity")
    cache_views: int = Field(0, ge=0, description="augmented views per image with cached frozen features; 0 = no cache")
    freeze_batch_norm: bool = Field(True, description="visual batch norm in eval mode; null = set by fidelity")
    freeze_gem: bool = Field(
        True,
        description="freeze p of GeM; false = train it if loss.filter_text is false; null = set by fidelity",
    )
    llm_probability: float = Field(0.5, ge=0, le=1, description="probability of replacing a caption by its rephrase")


class PretrainSection(Section):
    """Pre-training instead of ImageNet weights, used with `model.weights: attributes`."""

    identities: int = Field(
        600, ge=2, description="identities of the separate synthetic split (model.weights: attributes)"
    )
    steps: int = Field(600, ge=1, description="optimizer steps")
    batch: int = Field(64, ge=2, description="images per step")
    lr: float = Field(2e-3, gt=0, description="peak of the one-cycle learning rate")
    seed: int = Field(
        1000003, ge=0, description="seed of the split's people and of pre-training; independent of run.seed"
    )


class TrainSection(Section):
    p: int = Field(8, ge=2, description="identities per batch (METHOD 4)")
    k: int = Field(
        4, ge=2, description="visible images per identity, and the same number of infrared images (METHOD 4)"
    )
    autocast: Literal["off", "bfloat16", "float16"] = Field(
        "float16", description="mixed precision on CUDA: off, bfloat16, float16; a CPU always uses float32"
    )
    loader_workers: int = Field(
        0, ge=0, description="processes that prefetch pixels; 0 = the training process reads them"
    )
    base: ScheduleSection = ScheduleSection()
    text: TextStageSection = TextStageSection()
    pretrain: PretrainSection = PretrainSection()

    @field_validator("autocast", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
