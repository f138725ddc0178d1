"""Captioners of every family, tiny and random: what a sentence depends on, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.conv_captioner import build_conv_captioner, word_tokenizer
from tvilfm.config import CaptionerSection

WORDS = "a man woman with black red hair coat photo of describe the picture"
PROMPT = "a photo of the woman"
SIZES = ((40, 20), (64, 32), (33, 57), (50, 50))
PICTURES = [np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8) for i, size in enumerate(SIZES)]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 16}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 128}  # fmt: skip
SQUARE = {"height": 32, "width": 32}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def _random(model: PreTrainedModel, scale: float = 0.3) -> PreTrainedModel:
    """Weights so large that sentences differ from picture to picture."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _bert_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS.split()]))
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


def _blip(folder: Path) -> None:
    tokenizer = _bert_tokenizer(folder)
    ids = {"bos_token_id": 5, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    text = TEXT | ids | {"vocab_size": len(tokenizer), "encoder_hidden_size": 16}
    _random(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)


def _git(folder: Path) -> None:
    tokenizer = _bert_tokenizer(folder)
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GitConfig(**TEXT, **ids, vocab_size=len(tokenizer), vision_config=VISION)
    _random(GitForCausalLM(config)).save_pretrained(folder)
    cut = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    GitProcessor(cut, tokenizer).save_pretrained(folder)


def _encoder_decoder(folder: Path) -> None:
    tokenizer = _bert_tokenizer(folder)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION),
        BertConfig(**TEXT, vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    _random(VisionEncoderDecoderModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size=SQUARE).save_pretrained(folder)


def _conv(folder: Path) -> None:
    build_conv_captioner(folder, [WORDS], height=32, width=32, seed=0)
    _random(VisionEncoderDecoderModel.from_pretrained(folder)).save_pretrained(folder)


def _florence(folder: Path) -> None:
    words = word_tokenizer([WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token=words.pad_token,
        bos_token=words.bos_token,
        eos_token=words.eos_token,
        extra_special_tokens={"image_token": "<image>"},
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 128}  # fmt: skip
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
              "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
              "window_size": 4, "projection_dim": 16}  # fmt: skip
    config = Florence2Config(
        text_config=text | ids,
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
        **ids,
    )
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 1  # as the published ones
    # Random weights would end at once, or write pictures.
    model.generation_config.forced_eos_token_id = None
    model.generation_config.suppress_tokens = [0, 2, 3, tokenizer.image_token_id]
    _random(model, 0.5).save_pretrained(folder)
    squash = CLIPImageProcessor(size=SQUARE, do_center_crop=False)
    squash.image_seq_length = 4 * 4 + 1
    Florence2Processor(squash, tokenizer).save_pretrained(folder)


def _qwen(folder: Path) -> None:
    tokenizer = word_tokenizer([f"{WORDS} user assistant"])
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", *marks.values()]}
    )
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = TEXT | ids | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        **ids,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in marks.items()},
    )
    _random(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    images = Qwen2VLImageProcessor(patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096})
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(patch_size=8), chat_template=CHAT)
    processor.save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "blip": _blip,
    "git": _git,
    "encoder_decoder": _encoder_decoder,
    "conv": _conv,
    "florence": _florence,
    "qwen": _qwen,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved captioner of each family."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("captioners") / str(request.param)
    FAMILIES[request.param](path)
    return path


def _load(folder: Path, **settings: object) -> Captioner:
    return Captioner.load(CaptionerSection(model=str(folder), **({"max_new_tokens": 7} | settings)))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_gives_the_sentences_of_one_picture_at_a_time(folder: Path, beams: int) -> None:
    captioner = _load(folder, beams=beams)
    together = captioner.caption(PICTURES)
    assert together == [captioner.caption([picture])[0] for picture in PICTURES]
    assert len(set(together)) > 1 and all(sentence == sentence.strip() for sentence in together)


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(folder: Path) -> None:
    captioner = _load(folder, temperature=1.5)
    before = torch.random.get_rng_state()
    first = captioner.caption(PICTURES, seed=1)
    assert captioner.caption(PICTURES, seed=1) == first
    assert any(captioner.caption(PICTURES, seed=seed) != first for seed in (2, 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sentences_stop_at_max_new_tokens(folder: Path) -> None:
    long, short = (_load(folder, max_new_tokens=tokens).caption(PICTURES) for tokens in (7, 2))
    assert max(len(sentence.split()) for sentence in long) > 2 >= max(len(sentence.split()) for sentence in short)
    assert all(whole.startswith(start) for whole, start in zip(long, short, strict=True))


def test_the_prompt_is_used_and_not_repeated(folder: Path) -> None:
    plain, prompted = _load(folder), _load(folder, prompt=PROMPT)
    sentences = prompted.caption(PICTURES)
    assert sentences != plain.caption(PICTURES)
    assert not any(PROMPT in sentence for sentence in sentences)
    assert plain.provenance["prompt_hash"] != prompted.provenance["prompt_hash"]


def test_provenance_names_weights_and_settings(folder: Path, tmp_path: Path) -> None:
    captioner = _load(folder, beams=2)
    provenance = captioner.provenance
    assert provenance["model"] == str(folder)
    assert json.loads(provenance["settings"]) == {
        "beams": 2, "dtype": "float32", "max_new_tokens": 7, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    captioner.save(tmp_path / "copy")
    copy = _load(tmp_path / "copy", beams=2)
    assert copy.provenance["revision"] == provenance["revision"]
    assert copy.caption(PICTURES) == captioner.caption(PICTURES)
    with torch.no_grad():
        next(copy.model.parameters()).add_(1)
    copy.save(tmp_path / "other")
    assert _load(tmp_path / "other").provenance["revision"] != provenance["revision"]


def test_only_a_processor_that_squashes_names_its_size(folder: Path) -> None:
    keeps_proportions = folder.name in ("git", "qwen")
    assert _load(folder).input_size == (None if keeps_proportions else (32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such/model"}, "model: expected a transformers image-to-text model"),
        ({"model": "conv"}, "expected a trained captioner, got conv"),
        ({"max_new_tokens": 128}, "max_new_tokens: expected fewer than the 128 positions"),
    ],
)
def test_a_captioner_that_cannot_be_had_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    build_conv_captioner(tmp_path, [WORDS], height=32, width=16, seed=0)
    with pytest.raises(ValueError, match=message):
        Captioner.load(CaptionerSection(**({"model": str(tmp_path)} | settings)))


def test_a_new_conv_captioner_follows_its_seed_and_knows_its_words(tmp_path: Path) -> None:
    texts = ["a man in a t-shirt, carrying a bag.", "A Woman with knee-length skirt; she walks!"]
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        build_conv_captioner(tmp_path / name, texts, height=48, width=24, seed=seed)
    one, same, other = (_load(tmp_path / name) for name in ("one", "same", "other"))
    assert one.provenance["revision"] == same.provenance["revision"] != other.provenance["revision"]
    assert one.input_size == (48, 24)
    for text in texts:
        assert one.tokenizer.decode(one.tokenizer(text)["input_ids"]) == text.lower()
    with pytest.raises(ValueError, match="texts: expected sentences"):
        build_conv_captioner(tmp_path / "none", [], height=48, width=24, seed=0)


@pytest.mark.gpu
def test_half_precision_on_cuda_writes_like_full_precision(folder: Path) -> None:
    section = CaptionerSection(model=str(folder), max_new_tokens=4)
    full = Captioner.load(section, device="cuda")
    half = Captioner.load(section, device="cuda", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and '"bfloat16"' in half.provenance["settings"]
    same = [one == other for one, other in zip(full.caption(PICTURES), half.caption(PICTURES), strict=True)]
    assert sum(same) >= len(PICTURES) // 2
