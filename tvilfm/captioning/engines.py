"""Rephrasing engines: a transformers language model, an OpenAI-compatible endpoint, or rules.

All engines implement `Rephraser`. `tvilfm.captioning.rephrase` cleans and checks their answers. A batch has the same
result with and without Ray. Each engine imports its library when it is created, so a worker that uses an endpoint needs
neither torch nor transformers.

Shapes: B texts, P tokens of a prompt, L tokens of prompt and answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from tvilfm.captioning.colors import find_colors, indefinite_article
from tvilfm.captioning.rephrase import completion_prompt, messages, seed_of
from tvilfm.config import RephraseSection, is_loopback
from tvilfm.datasets.synthetic.sentences import SYNONYMS

if TYPE_CHECKING:
    import openai

ENDPOINT_RETRIES = 5  # with waits from 0.5 s, doubled up to 8 s, unless the endpoint sets the wait


class TransformersRephraser:
    """A causal language model from a transformers folder or, by name, from the model hub.

    Args:
        section: model and generation settings.
        device: device to run on.
        dtype: type of the weights on CUDA; a CPU always computes in float32.

    Raises:
        ValueError: the model is neither a folder nor available on the hub, or is not a language model.
    """

    def __init__(self, section: RephraseSection, *, device: str = "cpu", dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._section = section
        try:
            # With left padding, all answers of a batch begin in the same column.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(section.model, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(
                section.model, dtype=torch.float32 if device == "cpu" else getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"caption.rephrase.model: expected a transformers language model, by name or folder, got "
                f"{section.model} ({str(error).splitlines()[0]}). Without internet access, download its files "
                "elsewhere and use their folder."
            ) from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = model.to(device).eval()

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        """Return one answer per text; see `Rephraser`."""
        import torch

        section, tokenizer = self._section, self._tokenizer
        chat = tokenizer.chat_template is not None
        prompts = [
            tokenizer.apply_chat_template(
                messages(text, modality, max_words=section.max_words), tokenize=False, add_generation_prompt=True
            )
            if chat
            else completion_prompt(text, modality, max_words=section.max_words)
            for text, modality in zip(texts, modalities, strict=True)
        ]
        # A chat template already contains the special tokens.
        inputs_BP = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        inputs_BP = inputs_BP.to(self._model.device)
        sampling = section.temperature > 0
        choice: dict[str, object] = {"do_sample": sampling, "num_beams": 1, "pad_token_id": tokenizer.pad_token_id}
        if sampling:
            choice |= {"temperature": section.temperature, "top_p": 1.0, "top_k": 0}
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            answer_BL = self._model.generate(**inputs_BP, max_new_tokens=section.max_new_tokens, **choice)
        answers: list[str] = tokenizer.batch_decode(
            answer_BL[:, inputs_BP["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers


class EndpointRephraser:
    """An OpenAI-compatible endpoint: a vLLM server, Ollama or a hosted service.

    The requests of a batch are concurrent. The client retries with growing pauses if the endpoint is busy (429), fails
    (5xx) or does not answer.

    Args:
        section: address, model and generation settings.
        key: API key of the endpoint; None if it requires none.
    """

    def __init__(self, section: RephraseSection, *, key: SecretStr | None) -> None:
        import openai

        self._section, self._serves = section, False
        host = urlsplit(section.url).hostname or ""
        self._client = openai.OpenAI(
            # A proxy cannot reach an endpoint on this machine.
            http_client=openai.DefaultHttpxClient(trust_env=not is_loopback(host)),
            base_url=section.url,
            # The client requires a key; an endpoint without keys ignores it.
            api_key=key.get_secret_value() if key else "none",
            timeout=section.timeout_s,
            max_retries=ENDPOINT_RETRIES,
        )

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        """Return one answer per text; a text that the endpoint rejects (400, 422) has an empty answer.

        Raises:
            ConnectionError: the endpoint cannot be reached, rejects the key or model, keeps failing, or has rejected
                every text so far, which means that the request itself is wrong.
        """
        import openai

        seeds = [seed_of(seed, i) for i in range(len(texts))]  # equal captions get different rephrases
        try:
            with ThreadPoolExecutor(self._section.batch) as pool:
                answers = list(pool.map(self._ask, texts, modalities, seeds))
        except openai.APIError as error:
            raise self._broken(error) from None
        refusals = [answer for answer in answers if isinstance(answer, openai.APIError)]
        self._serves = self._serves or len(refusals) < len(texts)
        if not self._serves and len(texts) > 1:
            raise self._broken(refusals[0])
        return [answer if isinstance(answer, str) else "" for answer in answers]

    def _ask(self, text: str, modality: str, seed: int) -> str | openai.APIError:
        import openai

        section = self._section
        try:
            completion = self._client.chat.completions.create(
                model=section.model,
                messages=messages(text, modality, max_words=section.max_words),  # type: ignore[arg-type]
                temperature=section.temperature,
                max_tokens=section.max_new_tokens,
                seed=seed,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as refusal:
            return refusal
        return (completion.choices[0].message.content or "") if completion.choices else ""

    def _broken(self, error: openai.APIError) -> ConnectionError:
        section = self._section
        return ConnectionError(
            f"caption.rephrase.url: expected an OpenAI-compatible endpoint with model {section.model} at "
            f"{section.url}, got {type(error).__name__} ({error}). Check the address, the model and the key in "
            f"${section.key_variable}. Finished rephrases are kept; the next run continues from there."
        )


# Words that can replace each other in any context: those of the benchmark and of the published captions.
_SYNONYMS = [
    [word for word in words if " " not in word]
    for name, words in SYNONYMS.items()
    if name not in ("short", "long") and not find_colors(name)
]
_SYNONYMS += [
    ["wearing", "sporting"],
    ["paired with", "matched with", "along with", "together with"],
    ["carrying", "holding"],
    ["has worn", "has on"],
    ["mobile phone", "phone", "cellphone"],
    ["shoes", "footwear"],
    ["sneakers", "trainers"],
    ["spectacles", "glasses"],
]
_OTHERS = {word: [other for other in group if other != word] for group in _SYNONYMS for word in group if len(group) > 1}
_OTHERS["dressed in"] = ["wearing"]
# Words that are part of a compound ("t-shirt", "t - shirt", "female individual") are not replaced.
_REPLACEABLE = re.compile(
    rf"(?<![\w-])(?<!- )(?P<article>an?\s+)?\b(?P<word>{'|'.join(sorted(_OTHERS, key=len, reverse=True))})"
    r"(?!\s*-|\s+(?:individual|person|shirt))\b"
)
_CLAUSE = re.compile(r",\s+(?=(?:wearing|sporting|carrying|holding|paired with|matched with|with|dressed in)\b)")
_SHARE = 0.6  # share of the words with a synonym that are replaced


class RuleParaphraser:
    """Rules instead of a language model: synonyms, and clauses in another order.

    The rules know the words of the benchmark and of the published captions. They never add or remove content. A caption
    that the rules do not change gets an introduction ("There is ...").
    """

    def rephrase(self, texts: Sequence[str], modalities: Sequence[str], *, seed: int) -> list[str]:
        """Return one rephrase per text; see `Rephraser`. The modality has no effect, because rules add no content."""
        return [self._rephrase(text, random.Random(f"{seed}/{i}/{text}")) for i, text in enumerate(texts)]

    def _rephrase(self, text: str, rng: random.Random) -> str:
        sentences = re.split(r"(?<=\.)\s+", text)
        rephrased = " ".join(_reorder(sentence, rng) for sentence in sentences)
        rephrased = _REPLACEABLE.sub(lambda match: _replace(match, rng, _SHARE), rephrased)
        if rephrased == text:
            rephrased = _REPLACEABLE.sub(lambda match: _replace(match, rng, 1.0), text)
        if rephrased == text:
            return f"{rng.choice(('The picture shows', 'There is', 'One can see'))} {text[:1].lower()}{text[1:]}"
        return rephrased


def _reorder(sentence: str, rng: random.Random) -> str:
    """Shuffle the clauses after the first one."""
    body = sentence.removesuffix(".")
    first, *clauses = _CLAUSE.split(body)
    rng.shuffle(clauses)
    return ", ".join([first, *clauses]) + sentence[len(body) :]


def _replace(match: re.Match[str], rng: random.Random, share: float) -> str:
    article, word = match["article"], match["word"]
    if rng.random() >= share:
        return match[0]
    other = rng.choice(_OTHERS[word])
    return f"{indefinite_article(other)} {other}" if article else other
