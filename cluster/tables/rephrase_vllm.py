"""Rephrase with the vLLM engine of `ray.data.llm`; the driver writes parts as rephrases arrive."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.tables.parts import part_name
from cluster.tables.rephrase_worker import RephraseJob, part_row, part_table
from tvilfm.captioning.rephrase import completion_prompt, judge, messages, seed_of
from tvilfm.config import RephraseSection


def rephrase_with_vllm(job: RephraseJob, rows: pa.Table) -> Iterator[int]:
    """Rephrase with the vLLM engine of `ray.data.llm` and yield numbers of finished captions."""
    for attempt in range(1 + job.section.retries):
        if not rows.num_rows:
            return
        rows = yield from _one_pass(job, rows, _vllm_processor(job, attempt), last=attempt == job.section.retries)


def _one_pass(
    job: RephraseJob, rows: pa.Table, processor: Callable[[ray.data.Dataset], ray.data.Dataset], *, last: bool
) -> Generator[int, None, pa.Table]:
    """Write the valid rephrases of a pass, on the last pass also the unchanged captions; return the rows to retry."""
    batch = job.section.batch
    blocks = [rows.slice(start, batch) for start in range(0, rows.num_rows, batch)]
    again = []
    answers: Iterator[pa.Table] = processor(ray.data.from_arrow(blocks)).iter_batches(  # type: ignore[assignment]
        batch_size=batch, batch_format="pyarrow"
    )
    for answered in answers:
        kept = pa.array([False] * answered.num_rows) if last else pc.is_valid(answered["refused"])
        settled = answered.filter(pc.invert(kept)).to_pylist()
        again += answered["image"].filter(kept).to_pylist()
        if settled:
            job.parts.write(part_name(row["image"] for row in settled), part_table(settled, job))
            yield len(settled)
    return rows.filter(pc.is_in(rows["image"], pa.array(again, type=pa.string())))


def _vllm_processor(job: RephraseJob, attempt: int) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """Return the pipeline from rows to judged rephrases: prompt, vLLM, checks."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from transformers import AutoTokenizer

    section = job.section
    chat = AutoTokenizer.from_pretrained(section.model).chat_template is not None
    return build_processor(
        vLLMEngineProcessorConfig(
            model_source=section.model,
            batch_size=section.batch,
            concurrency=section.workers,
            chat_template_stage=chat,
        ),
        preprocess=partial(_to_vllm, section=section, chat=chat, seed=seed_of(job.seed, attempt)),
        postprocess=partial(_from_vllm, section=section, tries=attempt + 1),
    )


def _to_vllm(row: Mapping[str, Any], *, section: RephraseSection, chat: bool, seed: int) -> dict[str, Any]:
    own_seed = seed_of(seed, zlib.crc32(row["image"].encode()))
    sampling = {"temperature": section.temperature, "max_tokens": section.max_new_tokens, "seed": own_seed}
    ask = {"messages": messages} if chat else {"prompt": completion_prompt}
    asked = {name: write(row["caption"], row["modality"], max_words=section.max_words) for name, write in ask.items()}
    return {**row, **asked, "sampling_params": sampling}


def _from_vllm(row: Mapping[str, Any], *, section: RephraseSection, tries: int) -> dict[str, Any]:
    one = judge(row["caption"], row["generated_text"], row["modality"], max_words=section.max_words, tries=tries)
    return part_row(row["image"], row["caption"], one)
