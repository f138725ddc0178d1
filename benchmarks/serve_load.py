"""The service under load, beside the same work in one process.

    make demo && python -m benchmarks.serve_load

Starts `tvilfm serve` on the demo's run as a process of its own: as it is by default, with one replica, and with one
replica and an encoder in a process of its own, which costs each request one call between processes of Serve. Sends an
infrared image, a sentence and the infrared caption per request, over the loopback, from 1, 8 and 32 clients that wait
for an answer before they ask again. Writes `benchmarks/results/serve_load.json` and `.md`. Clients, proxy, replicas and
database share the cores. Not part of `make bench`: it takes six minutes.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from cluster.places.finished import finished_run, gallery_of
from cluster.run import evaluator_of
from cluster.tables.indexing import index
from tvilfm.config import Config, load_config
from tvilfm.data.pixels import decode
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.models import TVILFM
from tvilfm.retrieval.query import QueryEncoder, Question
from tvilfm.retrieval.search import Request, Searcher
from tvilfm.service.client import as_json
from tvilfm.versions import version_of

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8, 32)
WARM_UP_S = 3.0
Row = dict[str, Any]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="recipe of the run that is served")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration per number of clients")
    parser.add_argument("--starts", type=int, default=2, help="starts of each variant of the service")
    arguments = parser.parse_args()
    config = load_config(Path("ray_config.yaml"), size=arguments.size)
    queries = _queries(config)
    alone_ms, images = _alone(config, queries)
    bodies = [json.dumps(as_json(**query)).encode() for query in queries]
    variants: dict[str, list[str]] = {
        "default": [],
        "one replica": ["serve.replicas=1", "serve.max_replicas=1"],
        "one replica, shared encoder": ["serve.replicas=1", "serve.max_replicas=1", "serve.shared_encoders=1"],
    }
    rows: list[Row] = []
    for _ in range(arguments.starts):
        for name, overrides in variants.items():
            with _served(config, overrides) as (port, facts):
                for clients in CLIENTS:
                    load = _load(port, bodies, clients, arguments.seconds)
                    rows.append({"variant": name, "clients": clients, **facts, **load})
                    print(rows[-1], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, clients on the same machine",
        "versions": {name: version_of(name) for name in ("ray", "torch", "tvilfm")},
        "gallery": images,
        "seconds": arguments.seconds,
        "one_process_ms": alone_ms,
        "rows": rows,
    }
    (RESULTS / "serve_load.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "serve_load.md").write_text(_markdown(record))


def _queries(config: Config) -> list[dict[str, Any]]:
    """Return every query of the first protocol with its witness text."""
    evaluator = evaluator_of(config)
    protocol = get_protocol(config.evaluate.protocols[0])
    names = evaluator.query(protocol)["image"].to_pylist()
    texts = evaluator.texts(protocol, "witness")
    assert texts is not None
    rows = zip(texts.kept, texts.texts, texts.filter_texts, strict=True)
    return [
        {"image": (config.data_root / names[row]).read_bytes(), "sentence": text, "infrared_caption": caption}
        for row, text, caption in rows
    ]


def _alone(config: Config, queries: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Return the median time (ms) of decode, encode and search in this process, and the size of the gallery."""
    run = finished_run(config)
    index(config)
    data, gallery = run.config.data, gallery_of(run, config)
    torch.set_num_threads(1)
    model = TVILFM.from_pretrained(run.here(run.model)).eval()
    encoder = QueryEncoder(model, height=data.height, width=data.width, filter_text=run.config.loss.filter_text)
    searcher = Searcher(gallery, config.gallery)
    request = Request(weights=run.config.evaluate.ensemble.weights)
    times = []
    for query in [*queries[:20], *queries[:200]]:
        started = time.perf_counter()
        image = decode(query["image"], height=None, width=None, name="")
        question = Question(infrared=image, sentence=query["sentence"], infrared_caption=query["infrared_caption"])
        searcher.search(encoder.encode([question]), [request])
        times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times[20:]), 2), gallery.count()


@contextmanager
def _served(config: Config, overrides: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """Run the service; yield its port, and its start-up time and memory."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "cluster", "serve", str(config.run.path.absolute()), *overrides]
    started = time.perf_counter()
    process = subprocess.Popen([*command, f"serve.port={port}"], stderr=subprocess.DEVNULL)
    try:
        while not _is_ready(port):
            assert process.poll() is None, "the service ended; run it by hand to see why"
            time.sleep(0.2)
        ready_s = time.perf_counter() - started
        memory = _memory(process.pid)
        yield port, {"ready_s": round(ready_s, 1), "memory_gb": round(memory / 1e9, 2)}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _with_children(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _memory(pid: int) -> int:
    """Return the bytes that a process and its children use; shared ones count once."""
    total = 0
    for process in _with_children(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def _is_ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success
    return False


def _load(port: int, bodies: Sequence[bytes], clients: int, seconds: float) -> Row:
    latencies: list[float] = []
    errors: list[int] = []
    started = time.perf_counter()
    begin, end = started + WARM_UP_S, started + WARM_UP_S + seconds

    def ask(worker: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        number = worker
        while (asked := time.perf_counter()) < end:
            connection.request("POST", "/v1/search", bodies[number % len(bodies)], {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            number += clients
            if answer.status != 200:
                errors.append(answer.status)
            elif asked > begin:
                latencies.append(time.perf_counter() - asked)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = (1000 * float(value) for value in np.percentile(latencies, [50, 99]))
    return {
        "requests_s": round(len(latencies) / seconds, 1),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "errors": len(errors),
    }


def _markdown(record: Row) -> str:
    alone = record["one_process_ms"]
    lines = [
        f"`python -m benchmarks.serve_load`, {record['date']}, {record['machine']}; {record['gallery']} images in the "
        f"gallery, {record['seconds']:g} s per row. Every request: an infrared image, a sentence, a caption. Decoding, "
        f"encoding and search of one request take {alone} ms in one process with one thread. Medians of all starts.",
        "",
        "| service | clients | requests/s | p50 ms | p50 / one process | p99 ms | errors | ready s | memory GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault((row["variant"], row["clients"]), []).append(row)
    for (variant, clients), rows in groups.items():
        middle = {
            name: statistics.median(row[name] for row in rows)
            for name in ("requests_s", "p50_ms", "p99_ms", "ready_s", "memory_gb")
        }
        lines.append(
            f"| {variant} | {clients} | {middle['requests_s']:.0f} | {middle['p50_ms']:.1f} "
            f"| {middle['p50_ms'] / alone:.1f} | {middle['p99_ms']:.0f} | {sum(row['errors'] for row in rows)} "
            f"| {middle['ready_s']:.0f} | {middle['memory_gb']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
