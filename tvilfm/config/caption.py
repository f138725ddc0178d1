"""The section `caption`: captioners, their training, and rephrasing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_secret

RephraseEngine = Literal["none", "rules", "transformers", "openai", "vllm"]


class CaptionerSection(Section):
    """The captioner of one modality (METHOD 5) and its decoding.

    `model: conv` is a small new network. Fine-tuning creates it for images of data.height x data.width and for the
    words of the training captions.
    """

    model: str = Field(
        "Salesforce/blip-image-captioning-large",
        description="transformers model (name or folder); conv = small, from scratch",
    )
    revision: str | None = Field(None, description="revision of a named model; null = its default branch")
    prompt: str = Field("", description="first words of every caption, or the question for a chat model")
    beams: int = Field(1, ge=1, description="beam search width; 1 = greedy or sampling")
    temperature: float = Field(0.0, ge=0, description="0 = greedy or beam search; above 0 = seeded sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass of nucleus sampling")
    max_new_tokens: int = Field(50, ge=1, description="maximum length of a caption, tokens (METHOD 5)")

    @model_validator(mode="after")
    def _beams_or_sampling(self) -> CaptionerSection:
        if self.beams > 1 and self.temperature:
            raise ValueError(
                f"temperature: expected 0 with beams={self.beams}, got {self.temperature}. Use beam search or sampling."
            )
        return self


class CaptionTrainSection(Section):
    """Fine-tuning of the captioners."""

    epochs: int = Field(5, ge=1, description="passes over the (image, sentence) pairs")
    batch: int = Field(32, ge=1, description="pairs per optimizer step")
    lr: float = Field(2e-5, gt=0, description="peak learning rate, after warm-up; falls linearly to 0")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of linear warm-up")
    infrared_pairs: Literal["infrared", "gray"] = Field(
        "infrared",
        description="images for the infrared captioner: infrared, or gray (visible images turned gray)",
    )


class RephraseSection(Section):
    """LLM augmentation of captions (METHOD 5)."""

    engine: RephraseEngine = Field(
        "none",
        description="none, rules (no language model), transformers, openai (any compatible endpoint), vllm",
    )
    model: str = Field("lmsys/vicuna-7b-v1.5", description="language model: name or local folder")
    url: str = Field("http://127.0.0.1:8000/v1", description="base URL of an OpenAI-compatible endpoint")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable with the API key of the endpoint")
    temperature: float = Field(0.7, ge=0, description="sampling temperature (METHOD 5)")
    max_new_tokens: int = Field(80, ge=1, description="maximum length of a rephrase, tokens")
    retries: int = Field(2, ge=0, description="retries of an invalid rephrase; then the caption is kept")
    max_words: int = Field(60, ge=1, description="maximum length of a rephrase, words; the text tower reads 77 tokens")
    timeout_s: float = Field(60.0, gt=0, description="timeout of a request to the endpoint, seconds")
    batch: int = Field(32, ge=1, description="captions per batch, and concurrent requests per actor")
    workers: int = Field(
        1, ge=1, description="rephrasing actors; each one with a model uses cluster.gpus_per_worker GPUs"
    )

    @model_validator(mode="after")
    def _without_secret(self) -> RephraseSection:
        check_no_secret("url", self.url, "Set the environment variable that key_variable names.")
        return self


class CaptionSection(Section):
    """Source of the captions.

    `source: finetuned` first fine-tunes the models on the training images and their captions of `files`.
    """

    source: Literal["files", "captioner", "finetuned"] = Field(
        "files",
        description="files (data.captions), captioner (models below), finetuned (models below, fine-tuned)",
    )
    seed: int = Field(
        0, ge=0, description="seed of fine-tuning, sampling and rephrasing; not run.seed, because runs share captions"
    )
    visible: CaptionerSection = CaptionerSection()
    infrared: CaptionerSection = CaptionerSection()
    batch: int = Field(32, ge=1, description="images per batch of a captioning actor")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float16", description="precision on CUDA: float32, bfloat16, float16; a CPU always uses float32"
    )
    workers: int = Field(1, ge=1, description="captioning actors, each with cluster.gpus_per_worker GPUs")
    decoders: int = Field(2, ge=1, description="tasks per captioning actor that read and decode images")
    filter_colors: bool = Field(True, description="remove colour words from infrared captions (METHOD 5)")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of unreadable images above which the job fails")
    train: CaptionTrainSection = CaptionTrainSection()
    rephrase: RephraseSection = RephraseSection()
