"""What a language model's answer has to pass, and the engines that answer without an endpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.paths import REGDB_CAPTIONS, needs_regdb_captions
from tvilfm.captioning.colors import find_colors
from tvilfm.captioning.engines import RuleParaphraser, TransformersRephraser
from tvilfm.captioning.rephrase import (
    PROMPTS,
    Rephrase,
    Rephraser,
    clean,
    completion_prompt,
    messages,
    rephrase_all,
    seed_of,
    validate,
)
from tvilfm.config import RephraseSection
from tvilfm.datasets.synthetic.people import ATTRIBUTES, COLOUR_ATTRIBUTES
from tvilfm.datasets.synthetic.sentences import write_sentence

MODALITY = {"RGB": "visible", "IR": "infrared"}


def real(sensor: str) -> list[tuple[str, str]]:
    entries = json.loads((REGDB_CAPTIONS / f"caption_llm_dict_Blip_{sensor}.json").read_text()).values()
    return [(entry["description"], entry["aug_description"]) for entry in entries]


def benchmark_sentences(count: int, *, infrared: bool) -> list[str]:
    rng = np.random.default_rng(0)
    people = [
        {
            name: values[rng.integers(len(values))]
            for name, values in ATTRIBUTES.items()
            if name == "sex" or (rng.random() < 0.8 and not (infrared and name in COLOUR_ATTRIBUTES))
        }
        for _ in range(count)
    ]
    return [write_sentence(person, rng) for person in people]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("A man in a coat.", "A man in a coat."),
        ('Sure, here is the rephrased description:\n\n"A man in a coat."', "A man in a coat."),
        ("Sure! Here's a new version: A man in a coat.", "A man in a coat."),
        ("Rephrased description: **A man in a coat.**", "A man in a coat."),
        ("1. A man in a coat.\n2. A man wearing a coat.", "A man in a coat."),
        ("- A  man\tin a full-length - or long - coat.", "A man in a full-length - or long - coat."),
        ("<think>\nA coat: fine.\n</think>\n\u201cA man in a coat.\u201d\n(I kept the coat.)", "A man in a coat."),
        ("A coat: fine.\n</think>\n\nA man in a coat.", "A man in a coat."),
        ("<think>\nThe user wants a coat, so", ""),
        ("Sure, I have done so, and this is it:\nA man in a coat.", "A man in a coat."),
        ("Here is a man in a coat. He is tall.", "Here is a man in a coat. He is tall."),
        ("Certainly:\n", ""),
        ("", ""),
    ],
)
def test_the_sentence_is_taken_out_of_an_answer(answer: str, sentence: str) -> None:
    assert clean(answer) == sentence


@pytest.mark.parametrize(
    ("modality", "text", "rephrase", "reason"),
    [
        ("infrared", "a man in a coat.", "A coat is worn by a man.", None),
        ("infrared", "a man in a coat.", "A coat of some color is worn by a man.", "new colour"),
        ("infrared", "a man in a coat.", "A man in a greyish coat.", "new colour"),
        ("infrared", "a man in a dark coat.", "A man wears a light coat, redressed by a tanner.", None),
        ("visible", "a man in a grey coat.", "A gray coat is worn by a man.", None),
        ("visible", "a man in a multicolor coat.", "A colorful coat is worn by a man.", None),
        ("visible", "a man in a red coat.", "A man in a crimson coat.", "new colour"),
        ("visible", "a man in a red coat.", "A man wears a coat.", None),
        ("visible", "a man in a coat.", "", "empty"),
        ("visible", "a man in a coat.", " ... ", "empty"),
        ("visible", "a man in a coat.", "A man in a coat", "same words"),
        ("visible", "a man in a coat.", "a man wears a coat " + "and a hat " * 9, "too long"),
    ],
)
def test_a_rephrase_is_refused_for_a_reason(modality: str, text: str, rephrase: str, reason: str | None) -> None:
    assert validate(text, rephrase, modality=modality, max_words=30) == reason


@needs_regdb_captions
def test_most_published_rephrases_pass_and_those_that_invent_a_colour_do_not() -> None:
    refused = {
        sensor: Counter(
            validate(text, rephrase, modality=MODALITY[sensor], max_words=60) for text, rephrase in real(sensor)
        )
        for sensor in MODALITY
    }
    assert refused["RGB"]["new colour"] == 68 and refused["IR"]["new colour"] == 0
    assert all(counts[None] > 0.97 * 4120 for counts in refused.values()), refused


class Scripted:
    """Answers from a list a text, one a try, and keeps what it was asked."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.asked = answers, []

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        self.asked.append((list(texts), list(modalities), seed))
        return [self.answers[text].pop(0) for text in texts]


def test_refused_answers_are_asked_for_again_with_another_seed_and_then_given_up() -> None:
    scripted = Scripted(
        {
            "a man.": ["One man."],
            "a woman.": ["A red woman.", "", "a woman"],
            "a boy.": ["A blue boy.", "One boy."],
        }
    )
    found = rephrase_all(
        scripted, list(scripted.answers), ["visible", "infrared", "infrared"], seed=5, retries=2, max_words=9
    )
    assert found == [
        Rephrase(text="One man.", refused=None, tries=1),
        Rephrase(text=None, refused="same words", tries=3),
        Rephrase(text="One boy.", refused=None, tries=2),
    ]
    assert [texts for texts, _, _ in scripted.asked] == [list(scripted.answers), ["a woman.", "a boy."], ["a woman."]]
    assert [modalities for _, modalities, _ in scripted.asked][1:] == [["infrared"] * 2, ["infrared"]]
    assert len({seed for _, _, seed in scripted.asked}) == 3


def test_prompts_name_the_task_of_their_modality() -> None:
    assert set(PROMPTS) == {"visible", "infrared"}
    (message,) = messages("a man in a coat.", "infrared", max_words=33)
    assert message["role"] == "user" and "at most 33 words" in message["content"]
    assert message["content"].endswith("Description: a man in a coat.") and "never name a colour" in message["content"]
    prompt = completion_prompt("a man in a red coat.", "visible", max_words=33)
    assert "every colour" in prompt and "a man in a red coat.\n" in prompt and prompt.endswith(":")


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_rules_pass_every_check_and_lose_no_colour(modality: str) -> None:
    texts = benchmark_sentences(200, infrared=modality == "infrared")
    if REGDB_CAPTIONS.is_dir():
        texts += [text for text, _ in real({"visible": "RGB", "infrared": "IR"}[modality])[::20]]
    texts += ["a tall person.", "Somebody", "a white t - shirt, a baseball cap and a female individual"]
    rules: Rephraser = RuleParaphraser()
    found = rephrase_all(rules, texts, [modality] * len(texts), seed=1, retries=0, max_words=60)
    assert Counter(one.refused for one in found) == {None: len(texts)}
    for text, one in zip(texts, found, strict=True):
        assert one.text is not None
        assert sorted(find_colors(one.text)) == sorted(find_colors(text)), (text, one.text)
        assert abs(len(one.text.split()) - len(text.split())) <= 6, (text, one.text)
    again = rules.rephrase(texts, [modality] * len(texts), seed=seed_of(1, 0))
    assert again == [one.text for one in found]
    other = rules.rephrase(texts, [modality] * len(texts), seed=2)
    assert sum(a != b for a, b in zip(again, other, strict=True)) > 0.6 * len(texts)


def test_rules_keep_articles_right_and_clauses_whole() -> None:
    text = "a woman with long hair, wearing a coat with jeans, carrying a red bag, with white shoes."
    seen = set(RuleParaphraser().rephrase([text] * 60, ["visible"] * 60, seed=0))
    assert len(seen) > 30
    assert any(" an overcoat " in one for one in seen) and not any(" a overcoat" in one for one in seen)
    assert {one.rstrip(".").split(", ")[-1].split()[-1] for one in seen} >= {"jeans", "bag", "shoes"}
    assert all(one.count(",") == 3 and one.endswith(".") for one in seen)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_embd=32, n_layer=2, n_head=2, n_positions=1024, eos_token_id=256, bos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


TEXTS = ["a man in a red coat.", "a woman with long hair and a bag, wearing a hat.", "a boy."]
MODALITIES = ["visible", "infrared", "infrared"]


def section_of(folder: Path, **values: object) -> RephraseSection:
    return RephraseSection(engine="transformers", model=str(folder), max_new_tokens=12, **values)  # type: ignore[arg-type]


def greedy(folder: Path, prompt: str) -> str:
    """Word by word, one prompt alone, without `generate`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt)["input_ids"]
    for _ in range(12):
        with torch.inference_mode():
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[len(tokenizer(prompt)["input_ids"]) :])


def test_a_batch_is_answered_as_each_text_alone(tiny_model: Path) -> None:
    answers = TransformersRephraser(section_of(tiny_model, temperature=0)).rephrase(TEXTS, MODALITIES, seed=0)
    prompts = [
        completion_prompt(text, modality, max_words=60) for text, modality in zip(TEXTS, MODALITIES, strict=True)
    ]
    assert answers == [greedy(tiny_model, prompt) for prompt in prompts]
    assert all(answers)


def test_sampling_follows_the_seed_and_leaves_other_draws_alone(tiny_model: Path) -> None:
    rephraser = TransformersRephraser(section_of(tiny_model, temperature=0.7))
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = rephraser.rephrase(TEXTS, MODALITIES, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert rephraser.rephrase(TEXTS, MODALITIES, seed=1) == first
    assert rephraser.rephrase(TEXTS, MODALITIES, seed=2) != first


def test_a_chat_template_is_used_where_there_is_one(tiny_model: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}[me] "
    tokenizer.save_pretrained(tmp_path)
    answers = TransformersRephraser(section_of(tmp_path, temperature=0)).rephrase(TEXTS, MODALITIES, seed=0)
    contents = [
        messages(text, modality, max_words=60)[0]["content"] for text, modality in zip(TEXTS, MODALITIES, strict=True)
    ]
    assert answers == [greedy(tmp_path, f"[user] {content}[me] ") for content in contents]


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caption\.rephrase\.model: expected a transformers language model.*nowhere"):
        TransformersRephraser(section_of(tmp_path / "nowhere"))
