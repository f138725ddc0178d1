"""The section `caption`: captioners, their training, and rephrasing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.section import Section

RephraseEngine = Literal["none", "rules", "transformers", "openai", "vllm"]


class CaptionerSection(Section):
    """One modality's captioner (METHOD 5) and how it writes."""

    model: str = Field(
        "Salesforce/blip-image-captioning-large",
        description="transformers image-to-text model: name or local folder; conv = what caption-train makes: a small "
        "new one for pictures of data.height x data.width and the words of the training sentences",
    )
    revision: str | None = Field(None, description="revision of a named model; null = its default branch")
    prompt: str = Field("", description="words that a caption starts with, or the question for a chat model")
    beams: int = Field(1, ge=1, description="beam search width; 1 = greedy or sampling")
    temperature: float = Field(0.0, ge=0, description="0 = greedy or beams; above 0 = seeded sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass of nucleus sampling")
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
    batch: int = Field(32, ge=1, description="pairs per optimizer step")
    lr: float = Field(2e-5, gt=0, description="peak rate, after warm-up, falling linearly to 0")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decay")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of linear warm-up")
    infrared_pairs: Literal["infrared", "gray"] = Field(
        "infrared", description="infrared images with colourless sentences, or visible images turned gray"
    )


class RephraseSection(Section):
    """LLM augmentation of captions (METHOD 5)."""

    engine: RephraseEngine = Field(
        "none",
        description="none, rules (offline, no language model), transformers, openai (any compatible endpoint), vllm",
    )
    model: str = Field("lmsys/vicuna-7b-v1.5", description="language model: name, or local folder")
    url: str = Field("http://127.0.0.1:8000/v1", description="base address of an OpenAI-compatible endpoint")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the endpoint's key")
    temperature: float = Field(0.7, ge=0, description="sampling temperature (METHOD 5)")
    max_new_tokens: int = Field(80, ge=1, description="longest rephrase, tokens")
    retries: int = Field(2, ge=0, description="retries of an invalid rephrase; after them the caption is kept")
    max_words: int = Field(60, ge=1, description="longest rephrase, words; the text tower reads 77 tokens")
    timeout_s: float = Field(60.0, gt=0, description="seconds to wait for an answer of the endpoint")
    batch: int = Field(32, ge=1, description="captions per batch, and concurrent requests per actor")
    workers: int = Field(1, ge=1, description="rephrasing actors; each with a model uses cluster.gpus_per_worker GPUs")


class CaptionSection(Section):
    source: Literal["files", "captioner", "finetuned"] = Field(
        "files",
        description="files (data.captions), captioner (written by the models below), or finetuned (by these models "
        "after fine-tuning on the training images and their captions of files)",
    )
    seed: int = Field(
        0, ge=0, description="seed of fine-tuning, sampling and rephrasing; not run.seed, because runs share captions"
    )
    visible: CaptionerSection = CaptionerSection()
    infrared: CaptionerSection = CaptionerSection()
    batch: int = Field(32, ge=1, description="images per batch of a captioning actor")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float16", description="precision of the captioner on CUDA; a CPU always uses float32"
    )
    workers: int = Field(1, ge=1, description="captioning actors, each with cluster.gpus_per_worker GPUs")
    decoders: int = Field(2, ge=1, description="tasks that read and decode images for each captioning actor")
    filter_colors: bool = Field(True, description="remove colour words from infrared captions (METHOD 5)")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images above which the job ends with an error"
    )
    train: CaptionTrainSection = CaptionTrainSection()
    rephrase: RephraseSection = RephraseSection()
