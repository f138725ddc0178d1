"""The service under load: requests a second, latencies and errors, with dynamic batching and without.

    make demo && python -m benchmarks.serve_load

Starts `tvilfm serve` on the demo's run as a process of its own, with and without in turn, several times each, as one
start differs from the next by more than a request from another. Asks it over the loopback from this process with 1, 8
and 32 clients that each wait for an answer before they ask again. Every request is an infrared picture, a sentence and
the infrared caption. Writes `benchmarks/results/serve_load.json` and `.md`. On two cores the clients, the
proxy, the ingress, the encoder and the searchers share them. Not part of `make bench`: it takes six minutes.
"""

from __future__ import annotations

import argparse
import datetime
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

from cluster.run import evaluator_of
from tvilfm.config import Config, load_config
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.service.client import Client, ServiceError, as_json
from tvilfm.versions import version_of

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8, 32)
WARM_UP_S = 3.0


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="recipe of the run that is served")
    parser.add_argument("--seconds", type=float, default=10.0, help="that each number of clients is measured for")
    parser.add_argument("--starts", type=int, default=3, help="of the service with batching, and without")
    arguments = parser.parse_args()
    config = load_config(Path("ray_config.yaml"), size=arguments.size)
    bodies = _bodies(config)
    rows = []
    for batch in (config.serve.batch, 1) * arguments.starts:
        with _served(arguments.size, f"serve.batch={batch}") as address:
            with Client(address) as client:
                images = client.status().images
            for clients in CLIENTS:
                row = {"batch": batch, "clients": clients, **_load(address, bodies, clients, arguments.seconds)}
                print(row, flush=True)
                rows.append(row)
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, clients on the same machine",
        "versions": {name: version_of(name) for name in ("ray", "torch", "tvilfm")},
        "gallery": images,
        "seconds": arguments.seconds,
        "rows": rows,
    }
    (RESULTS / "serve_load.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "serve_load.md").write_text(_markdown(record))


def _bodies(config: Config) -> list[dict[str, Any]]:
    """Requests: every query of the first protocol with its witness text."""
    evaluator = evaluator_of(config)
    protocol = get_protocol(config.evaluate.protocols[0])
    asking = evaluator.query(protocol)["image"].to_pylist()
    texts = evaluator.texts(protocol, "witness")
    assert texts is not None
    rows = zip(texts.kept, texts.texts, texts.filter_texts, strict=True)
    return [
        as_json(image=(config.data_root / asking[row]).read_bytes(), sentence=text, infrared_caption=own)
        for row, text, own in rows
    ]


@contextmanager
def _served(size: str, override: str) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "cluster", "serve", "--size", size, override, f"serve.port={port}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(address):
            assert process.poll() is None, "the service ended; run it by hand to see why"
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _is_ready(address: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{address}/readyz", trust_env=False).is_success
    return False


def _load(address: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> dict[str, float | int]:
    latencies: list[float] = []
    errors: list[str] = []
    started = time.perf_counter()
    begin, end = started + WARM_UP_S, started + WARM_UP_S + seconds

    def ask(worker: int) -> None:
        with Client(address, retries=0) as client:
            number = worker
            while (asked := time.perf_counter()) < end:
                body = bodies[number % len(bodies)]
                number += clients
                try:
                    client.search_batch([body])
                except (ServiceError, httpx.TransportError) as error:
                    errors.append(str(error))
                    continue
                if asked > begin:
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


def _markdown(record: dict[str, Any]) -> str:
    lines = [
        f"`python -m benchmarks.serve_load`, {record['date']}, {record['machine']}; {record['gallery']} images in the "
        f"gallery, {record['seconds']:g} s a row. Every request: an infrared picture, a sentence, a caption. Medians "
        "of several starts of the service; in brackets the lowest and the highest.",
        "",
        "| batch at most | clients | requests/s | p50 ms | p99 ms | errors |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    starts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        starts.setdefault((row["batch"], row["clients"]), []).append(row)
    for (batch, clients), rows in starts.items():
        shown = " | ".join(_spread([row[name] for row in rows]) for name in ("requests_s", "p50_ms", "p99_ms"))
        lines.append(f"| {batch} | {clients} | {shown} | {sum(row['errors'] for row in rows)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


if __name__ == "__main__":
    main()
