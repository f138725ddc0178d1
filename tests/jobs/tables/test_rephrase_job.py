"""The rephrasing job against a real endpoint, with a real model, without vLLM, and after a real kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cluster.tables import rephrase_vllm
from cluster.tables.rephrase_worker import RephraseJob
from cluster.tables.rephrasing import rephrase_table
from tests.paths import REPOSITORY
from tvilfm.captioning.engines import EndpointRephraser, TransformersRephraser
from tvilfm.captioning.rephrase import rephrase_all, seed_of
from tvilfm.config import ClusterSection, RephraseSection

KEY = "TVILFM_TEST_KEY"


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint whose answers follow from the number in the caption and from how often it is asked.

    The first two requests meet a busy endpoint. Then, of caption number n: n % 6 == 1 gets a colour, always; 2 an empty
    answer, then a good one; 3 chatter around a good one; 4 a flood of words, always; 5 is refused outright.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds, self.lock = seconds, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = 2

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def asked(self) -> Counter[int]:
        with self.lock:
            return Counter(number_of(request) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.reply(404, {"error": {"message": "no such page"}})
            return
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
            busy, self.server.busy = self.server.busy > 0, self.server.busy - 1
            if not busy:
                self.server.requests.append(request)
        time.sleep(self.server.seconds)
        number = number_of(request)
        if busy:
            self.reply(429, {"error": {"message": "busy"}})
        elif number % 6 == 5:
            self.reply(400, {"error": {"message": "not that one"}})
        else:
            good = f"Somebody with the number {number} wears a coat."
            answer = {
                1: f"A red coat, number {number}.",
                2: good if self.server.asked()[number] > 1 else "",
                3: f'Sure, here it is:\n\n"{good}"',
                4: good + " And so on" * 40,
            }.get(number % 6, good)
            self.reply(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", **content}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def number_of(request: dict[str, Any]) -> int:
    return int(request["messages"][-1]["content"].rpartition("number ")[2].rstrip("."))


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def table(count: int) -> pa.Table:
    return pa.table(
        {
            "image": [f"cam3/{i:04d}.jpg" for i in range(count)],
            "caption": [f"a man in a coat with number {i}." for i in range(count)],
            "rephrased": pa.nulls(count, pa.string()),
            "captioner": ["blip"] * count,
            "revision": pa.nulls(count, pa.string()),
            "modality": ["infrared"] * count,
        }
    )


def section(**values: object) -> RephraseSection:
    return RephraseSection.model_validate({"engine": "openai", "key_variable": KEY, "batch": 4, "retries": 1, **values})


def test_every_caption_gets_a_valid_rephrase_or_stays_and_is_counted(
    ray_session: None, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a-key")
    captions = table(24)
    given = ["came with it", *[None] * 23]
    captions = captions.set_column(2, "rephrased", pa.array(given, type=pa.string()))
    asked = section(url=endpoint.url, model="m", workers=2)
    summary = rephrase_table(captions, ["infrared"] * 24, str(tmp_path), asked, ClusterSection(), seed=3)

    assert summary.kept == {"new colour": 4, "too long": 4, "empty": 4}
    assert (summary.total, summary.before, summary.rephrased) == (24, 1, 11)
    result = pq.read_table(summary.table)
    assert result.column_names == [*captions.column_names[:5], "modality", "rephraser", "refused"]
    for i, row in enumerate(result.to_pylist()):
        assert row["caption"] == f"a man in a coat with number {i}."
        good = f"Somebody with the number {i} wears a coat."
        assert row["rephrased"] == ("came with it" if i == 0 else good if i % 6 in (0, 2, 3) else None)
        assert row["refused"] == {1: "new colour", 4: "too long", 5: "empty"}.get(i % 6)
    # Once what is good at once, twice what is not; a busy endpoint is asked again.
    assert endpoint.asked() == {i: 1 if i % 6 in (0, 3) else 2 for i in range(1, 24)}
    assert endpoint.busy < 0 and endpoint.keys == {"Bearer a-key"}
    request = endpoint.requests[0]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.7, 80)
    assert len({request["seed"] for request in endpoint.requests}) == len(endpoint.requests)

    again = rephrase_table(captions, ["infrared"] * 24, str(tmp_path), asked, ClusterSection(), seed=3)
    assert (again.before, again.rephrased, again.kept) == (24, 0, summary.kept)
    assert sum(endpoint.asked().values()) == len(endpoint.requests) == 8 - 1 + 2 * 16
    assert pq.read_table(again.table).equals(result)
    assert result["rephraser"].to_pylist() == [None, *["m"] * 23]
    third = rephrase_table(
        result, ["infrared"] * 24, str(tmp_path / "b"), section(engine="rules"), ClusterSection(), seed=3
    )
    assert (third.before, third.rephrased, third.kept) == (12, 12, {})
    assert Counter(pq.read_table(third.table)["rephraser"].to_pylist()) == {None: 1, "m": 11, "rules": 12}

    with pytest.raises(ValueError, match=r"expected rephrases of one engine, got temperature=0\.1 instead of 0\.7"):
        other = asked.model_copy(update={"temperature": 0.1})
        rephrase_table(captions, ["infrared"] * 24, str(tmp_path), other, ClusterSection(), seed=3)
    with pytest.raises(ValueError, match=r"got one of another caption for cam3/0001\.jpg"):
        changed = captions.set_column(1, "caption", pa.array(["other"] * 24))
        rephrase_table(changed, ["infrared"] * 24, str(tmp_path), asked, ClusterSection(), seed=3)


def test_an_endpoint_that_does_not_serve_is_named(
    ray_session: None, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    asked = section(url=endpoint.url.replace("/v1", "/v2"), model="m")
    with pytest.raises(
        ConnectionError, match=rf"caption\.rephrase\.url: .* at {asked.url}, got NotFoundError.*\${KEY}"
    ):
        rephrase_table(table(2), ["infrared"] * 2, str(tmp_path), asked, ClusterSection(), seed=0)
    refused = [f"a man with number {number}." for number in (5, 11)]
    with pytest.raises(ConnectionError, match=r"got BadRequestError .*not that one"):
        EndpointRephraser(section(url=endpoint.url), key=None).rephrase(refused, ["visible"] * 2, seed=0)
    with Endpoint() as closed:
        gone = EndpointRephraser(section(url=closed.url), key=None)
    monkeypatch.setattr(gone, "_client", gone._client.with_options(max_retries=0))
    with pytest.raises(ConnectionError, match="got APIConnectionError"):
        gone.rephrase(["a man."], ["visible"], seed=0)


@pytest.mark.long
def test_after_a_kill_of_the_driver_only_what_is_missing_is_asked_for(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.seconds = 0.2
    captions, out, count = tmp_path / "in.parquet", tmp_path / "out", 96
    rows = table(count)
    numbers = pa.array([f"a man in a coat with number {6 * i}." for i in range(count)])  # good answers all
    pq.write_table(rows.set_column(1, "caption", numbers), captions)
    overrides = [f"{key}={value}" for key, value in section(url=endpoint.url).model_dump().items()]
    command = [sys.executable, "-m", "cluster", "rephrase", "--captions", str(captions), "--out", str(out)]
    command += [f"caption.rephrase.{override}" for override in overrides]
    # A Ray of its own, whatever else runs on this machine.
    options = {"cwd": REPOSITORY, "env": {**os.environ, "RAY_ADDRESS": "local"}, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    parts = out / "parts" / "rephrases"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 5:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    settled = -1
    while settled != (settled := len(endpoint.requests)):  # an orphaned worker needs a moment to die
        time.sleep(1.0)
    written = {row["image"] for path in parts.glob("*.parquet") for row in pq.read_table(path).to_pylist()}
    before = endpoint.asked()
    assert 20 <= len(written) < count and sum(before.values()) - len(written) <= 4

    endpoint.seconds = 0.0
    second = subprocess.run(command, capture_output=True, check=False, **options)
    assert second.returncode == 0, second.stderr
    assert f"rephrased {count - len(written)} of {count} captions" in second.stdout
    assert f"; {len(written)} were finished before" in second.stdout
    images = rows["image"].to_pylist()
    asked_again = endpoint.asked() - before
    assert asked_again == Counter({6 * i: 1 for i in range(count) if images[i] not in written})
    result = pq.read_table(out / "captions.parquet")
    assert result["image"].to_pylist() == images
    assert result["rephrased"].to_pylist() == [f"Somebody with the number {6 * i} wears a coat." for i in range(count)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights that writes a handful of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    words = ["<unk>", "<end>", "man", "woman", "coat", "hat", "with", "a", "in", "red", "number", "description", "new"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=256, eos_token_id=1, bos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_model_on_two_actors_writes_what_the_plain_loop_writes(
    ray_session: None, tiny_model: Path, tmp_path: Path
) -> None:
    asked = section(engine="transformers", model=str(tiny_model), max_new_tokens=6, workers=2)
    captions = table(14)
    modalities = ["visible" if i % 3 else "infrared" for i in range(14)]
    summary = rephrase_table(captions, modalities, str(tmp_path), asked, ClusterSection(), seed=7)

    plain = TransformersRephraser(asked)
    expected = []
    for start in range(0, 14, asked.batch):
        texts = captions["caption"].to_pylist()[start : start + asked.batch]
        expected += rephrase_all(
            plain, texts, modalities[start : start + asked.batch], seed=seed_of(7, start), retries=1, max_words=60
        )
    result = pq.read_table(summary.table)
    assert result["rephrased"].to_pylist() == [one.text for one in expected]
    assert result["refused"].to_pylist() == [one.refused for one in expected]
    assert 0 < summary.rephrased < 14 and summary.kept["new colour"] > 0
    assert set(result["rephraser"].to_pylist()) == {str(tiny_model)}


def test_vllm_asks_for_its_extra_and_none_for_an_engine(tmp_path: Path) -> None:
    for engine, message in (("vllm", r"pip install 'tvilfm\[vllm\]'"), ("none", "caption.rephrase.engine=rules")):
        with pytest.raises(ValueError, match=rf"caption\.rephrase\.engine: expected .*{message}"):
            rephrase_table(
                table(2), ["infrared"] * 2, str(tmp_path / "out"), section(engine=engine), ClusterSection(), seed=0
            )
    assert not (tmp_path / "out").exists()


def test_the_vllm_pipeline_is_built_for_chat_and_for_plain_models(
    ray_session: None, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for folder, first in ((tiny_model, "TokenizeStage"), (tmp_path, "ChatTemplateStage")):
        processor = rephrase_vllm._vllm_processor(job_of(folder, folder), 0)
        assert processor.list_stage_names()[0] == first


def job_of(model: Path, out: Path) -> Any:
    asked = section(engine="vllm", model=str(model), retries=1)
    return RephraseJob(section=asked, out=str(out), seed=0, device="cpu", dtype="float32", key=None)


def test_passes_through_vllm_write_what_is_good_and_ask_again_for_the_rest(ray_session: None, tmp_path: Path) -> None:
    """All of the loop but vLLM itself, which a stand-in for the engine's stage replaces."""
    job = job_of(tmp_path, tmp_path)
    rows = table(10).select(["image", "caption", "modality"])
    seeds = []

    def processor(attempt: int) -> Any:
        def answer(row: dict[str, Any]) -> dict[str, Any]:
            asked = rephrase_vllm._to_vllm(row, section=job.section, chat=True, seed=seed_of(0, attempt))
            number = int(row["image"][5:9])
            good = f"Somebody with the number {number} wears a coat."
            text = "A red coat." if number % 5 == 1 or (number % 5 == 2 and attempt == 0) else good
            answered = {**asked, "generated_text": text, "seed": asked["sampling_params"]["seed"]}
            return rephrase_vllm._from_vllm(answered, section=job.section, tries=attempt + 1)

        return lambda dataset: dataset.map(answer)

    done = []
    for attempt in range(2):
        passes = rephrase_vllm._one_pass(job, rows, processor(attempt), last=attempt == 1)
        try:
            while True:
                done.append(next(passes))
        except StopIteration as end:
            rows = end.value
        seeds.append(rows.num_rows)
    assert sum(done) == 10 and seeds == [4, 0]
    written = {row["image"]: row for row in job.parts.read().to_pylist()}
    assert len(written) == 10
    for i in range(10):
        row = written[f"cam3/{i:04d}.jpg"]
        assert row["refused"] == ("new colour" if i % 5 == 1 else None)
        assert row["tries"] == (2 if i % 5 in (1, 2) else 1)
        assert (row["rephrased"] is None) == (i % 5 == 1)
        assert row["rephraser"] == str(tmp_path)
