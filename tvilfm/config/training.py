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
    wrt_numerics: Numerics = Field("corrected", description="softmax inside WRT; null = as fidelity says")
    center_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the hetero-centre loss, modality means of an identity to its visible mean",
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
    cache_views: int = Field(
        0, ge=0, description="augmented views per image whose frozen features are cached; 0 = none"
    )
    freeze_batch_norm: bool = Field(True, description="frozen visual BN in eval mode; null = as fidelity says")
    freeze_gem: bool = Field(
        True,
        description="keep GeM's p of the base stage; false: without SFF (loss.filter_text: false), fusion trains it; "
        "null = as fidelity says",
    )
    llm_probability: float = Field(0.5, ge=0, le=1, description="share of texts replaced by their rephrase")


class PretrainSection(Section):
    """Pre-training in place of ImageNet weights, used with `model.weights: attributes`."""

    identities: int = Field(600, ge=2, description="identities of the separate synthetic split for pre-training")
    steps: int = Field(600, ge=1, description="optimiser steps")
    batch: int = Field(64, ge=2, description="images per step")
    lr: float = Field(2e-3, gt=0, description="peak of the one-cycle rate")
    seed: int = Field(
        1000003, ge=0, description="seed of that split's people and of the pre-training; independent of run.seed"
    )


class TrainSection(Section):
    p: int = Field(8, ge=2, description="identities per batch (METHOD 4)")
    k: int = Field(4, ge=2, description="visible images per identity, and as many infrared ones (METHOD 4)")
    autocast: Literal["off", "bfloat16", "float16"] = Field(
        "float16", description="mixed precision on CUDA; a CPU always uses float32"
    )
    loader_workers: int = Field(
        0, ge=0, description="processes that read pixels in advance; 0 = the trainer reads them"
    )
    base: ScheduleSection = ScheduleSection()
    text: TextStageSection = TextStageSection()
    pretrain: PretrainSection = PretrainSection()

    @field_validator("autocast", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false
