"""Fine-tuning of captioners: which pairs, which loss, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tests.unit.captioning.test_captioner import FAMILIES, PICTURES
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import find_colors
from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.captioning.finetune import (
    Pairs,
    caption_pairs,
    finetune,
    learning_rate_factor,
    mean_loss,
    training_inputs,
)
from tvilfm.config import CaptionerSection, CaptionTrainSection
from tvilfm.data.manifest import select
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published

TEXTS = ["a man with red coat", "woman", "the picture of a black coat with hair", "a woman with black hair"]


@pytest.mark.parametrize("prompt", ["", "photo of"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_sentences_tokens_alone(family: str, prompt: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FAMILIES[family](tmp_path / family)
    captioner = Captioner.load(CaptionerSection(model=str(tmp_path / family), prompt=prompt, max_new_tokens=6))
    batch_loss = captioner.model(**training_inputs(captioner, PICTURES, TEXTS)).loss
    losses: list[float] = []
    for picture, text in zip(PICTURES, TEXTS, strict=True):
        losses += _token_losses(captioner, picture, text)
    assert float(batch_loss.detach()) == pytest.approx(np.mean(losses), rel=1e-4)


def _token_losses(captioner: Captioner, picture: Any, text: str) -> list[float]:
    """One picture, one token at a time: the model is asked for the next token after what it was given so far."""
    model, tokenizer = captioner.model, captioner.tokenizer
    end = tokenizer.eos_token_id or tokenizer.sep_token_id
    answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    inputs = captioner.prompt_inputs([picture])
    name = "input_ids"
    if model.config.model_type == "florence2":
        answer = [model.generation_config.forced_bos_token_id, *answer]
        name = "decoder_input_ids"
        inputs[name] = torch.tensor([[model.generation_config.decoder_start_token_id]])
    elif model.config.is_encoder_decoder:
        name = "decoder_input_ids"
    elif model.config.model_type == "blip":
        inputs[name] = inputs[name][:, :-1]
    losses = []
    for token in answer[: captioner.section.max_new_tokens]:
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(token))))
        inputs[name] = torch.cat([inputs[name], torch.tensor([[token]])], dim=1)
        for extra, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if extra in inputs and name == "input_ids":
                inputs[extra] = torch.cat([inputs[extra], torch.tensor([[value]])], dim=1)
    return losses


def test_pairs_of_each_modality(tiny_benchmark: Path) -> None:
    manifest = read_dataset("synthetic", tiny_benchmark)
    captions = read_published(tiny_benchmark, manifest)
    pixels = np.random.default_rng(0).integers(0, 255, (manifest.num_rows, 4, 2, 3), dtype=np.uint8)
    written = dict(zip(captions["image"].to_pylist(), captions["caption"].to_pylist(), strict=True))

    def pairs(modality: Any, source: Any = "infrared", split: str = "train") -> Pairs:
        return caption_pairs(manifest, captions, pixels, modality=modality, split=split, infrared_pairs=source)

    images = manifest["image"].to_pylist()
    visible = pairs("visible")
    assert [images[row] for row in visible.rows] == select(manifest, split="train", modality="visible")[
        "image"
    ].to_pylist()
    assert list(visible.texts) == [written[images[row]] for row in visible.rows]
    assert any(find_colors(text) for text in visible.texts)
    assert np.array_equal(visible.images([3])[0], pixels[visible.rows[3]])

    infrared, gray = pairs("infrared"), pairs("infrared", "gray")
    assert set(manifest["modality"].take(pa.array(infrared.rows)).to_pylist()) == {"infrared"}
    assert np.array_equal(gray.rows, visible.rows) and not any(find_colors(text) for text in gray.texts)
    (shown,) = gray.images([3])
    red, green, blue = pixels[gray.rows[3]].astype(float).transpose(2, 0, 1)
    assert np.abs(shown.transpose(2, 0, 1) - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 0.5 + 1e-9

    assert len(visible.thin(5)) == 5 and len(visible.thin(10**6)) == len(visible)
    assert len(pairs("visible", split="val")) == 2 * 4
    alone = select(manifest, modality="visible")
    with pytest.raises(ValueError, match=r"caption\.train: expected infrared images.*infrared_pairs=gray"):
        caption_pairs(alone, captions, pixels, modality="infrared", split="train", infrared_pairs="infrared")


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    factors = [learning_rate_factor(step, warmup_steps=4, num_steps=10) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate_factor(0, warmup_steps=0, num_steps=1) == 1.0
    assert learning_rate_factor(2, warmup_steps=100, num_steps=3) == pytest.approx(0.03)


class _Notes:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self._writes: list[Callable[[Path], None]] = []

    def on_step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def on_epoch(self, record: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        self.epochs.append(record)
        assert write is not None
        self._writes.append(write)

    def keep(self, epoch: int, folder: Path) -> Path:
        """Write the checkpoint of an epoch, after those that followed it."""
        folder.mkdir()
        self._writes[epoch](folder)
        return folder


@pytest.fixture
def lesson(tmp_path: Path) -> tuple[Pairs, CaptionerSection]:
    """Six pictures that say what they show, and an untrained captioner of their size."""
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    pixels = np.zeros((6, 32, 16, 3), dtype=np.uint8)
    texts = []
    for i, (top, bottom) in enumerate([(a, b) for a in colours for b in colours if a != b]):
        pixels[i, :16], pixels[i, 16:] = colours[top], colours[bottom]
        texts.append(f"a {top} coat, {bottom} trousers")
    build_conv_captioner(tmp_path / "new", texts, height=32, width=16, seed=0)
    pairs = Pairs(pixels=pixels, rows=np.arange(6), texts=tuple(texts))
    return pairs, CaptionerSection(model=str(tmp_path / "new"), max_new_tokens=10)


def test_a_conv_captioner_learns_what_is_where(lesson: tuple[Pairs, CaptionerSection], tmp_path: Path) -> None:
    pairs, section = lesson
    captioner, notes = Captioner.load(section), _Notes()
    before = mean_loss(captioner, pairs, batch=4)
    train = CaptionTrainSection(epochs=6, batch=6, lr=3e-3, warmup_steps=5, weight_decay=0.0)
    often = Pairs(pixels=pairs.pixels, rows=np.tile(pairs.rows, 30), texts=pairs.texts * 30)
    finetune(captioner, often, train, seed=0, listener=notes)
    assert mean_loss(captioner, pairs, batch=4) < 0.3 < 2 < before
    assert captioner.caption(pairs.images(range(6))) == list(pairs.texts)
    assert (len(notes.steps), len(notes.epochs)) == (6 * 30, 6) and notes.epochs[-1]["loss"] < notes.epochs[0]["loss"]
    captioner.save(tmp_path / "trained")
    again = Captioner.load(section.model_copy(update={"model": str(tmp_path / "trained")}))
    assert again.caption(pairs.images(range(6))) == list(pairs.texts)


def test_training_that_goes_on_from_a_checkpoint_ends_as_if_undisturbed(
    lesson: tuple[Pairs, CaptionerSection], tmp_path: Path
) -> None:
    pairs, section = lesson
    train = CaptionTrainSection(epochs=4, batch=4, lr=1e-3, warmup_steps=2)
    whole, notes = Captioner.load(section), _Notes()
    finetune(whole, pairs, train, seed=0, listener=notes)
    kept = notes.keep(1, tmp_path / "kept")
    assert {path.name for path in kept.iterdir()} == {"trainer.pt", "progress.json"}
    assert json.loads((kept / "progress.json").read_text()) == {"epochs_done": 2}
    resumed, later = Captioner.load(section), _Notes()
    finetune(resumed, pairs, train, seed=0, listener=later, resume=kept)
    assert [record["loss"] for record in later.steps] == [record["loss"] for record in notes.steps[2:]]
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    other = Captioner.load(section)
    finetune(other, pairs, train, seed=1, listener=_Notes())
    assert any(not torch.equal(value, state[name]) for name, value in other.model.state_dict().items())


def test_a_loss_that_is_not_finite_names_its_batch(lesson: tuple[Pairs, CaptionerSection]) -> None:
    pairs, section = lesson
    captioner = Captioner.load(section)
    with torch.no_grad():
        captioner.model.encoder.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="epoch 0, batch 0"):
        finetune(captioner, pairs, CaptionTrainSection(), seed=0, listener=_Notes())
