"""`tvilfm serve` as a process: a browser signs in and searches; everything is killed while clients write."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from cluster.run import evaluator_of
from cluster.tables.indexing import index
from tests.jobs.serve.test_serve import assert_ranks_as_evaluated
from tests.paths import REPOSITORY
from tests.processes import descendants, free_ports, kill_all, kill_tree, until
from tests.untrained_run import UntrainedRun, evaluated_rankings
from tvilfm.config import Config, load_config
from tvilfm.data.manifest import select
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.gallery import Gallery
from tvilfm.service.client import Client, ServiceError
from tvilfm.service.keys import KeyTable, add_key
from tvilfm.service.messages import HEADER

# Twenty take ten minutes: TVILFM_LIVES=20 pytest tests/jobs/serve/test_serve_command.py -k killed
LIVES = int(os.environ.get("TVILFM_LIVES", "2"))
DEMO = REPOSITORY / "runs" / "demo" / "results.json"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def served(
    config: Config, folder: Path, *overrides: str, size: str = "tiny"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, ready to answer, and its address."""
    (port,) = free_ports(1)
    where = [f"run.dir={config.run.dir}", f"run.name={config.run.name}", f"gallery.url={folder / 'gallery'}"]
    where += [f"serve.port={port}", "cluster.extract_workers=1", *overrides]
    command = [sys.executable, "-m", "cluster", "serve", "--size", size, *where]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
        try:
            return httpx.get(f"{address}/readyz", trust_env=False).is_success
        except httpx.TransportError:
            return False

    try:
        until(ready, 180)
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                kill_tree(process)


def make_gallery(config: Config, folder: Path) -> None:
    gallery = config.gallery.model_copy(update={"url": str(folder / "gallery")})
    index(config.model_copy(update={"gallery": gallery}))


@pytest.mark.long
@pytest.mark.skipif(not DEMO.exists(), reason="needs the run of `make demo`")
def test_every_query_of_the_demo_ranks_over_http_as_its_evaluation_ranks_it(ray_session: None, tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "ray_config.yaml", size="small")
    make_gallery(config, tmp_path)
    rankings = list(evaluated_rankings(config, evaluator_of(config)))
    with served(config, tmp_path, size="small") as (_, address), Client(address, timeout_s=120) as client:
        # A network computes a row with others than in the evaluation, and rounds it otherwise.
        assert_ranks_as_evaluated(client, rankings, rounding=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_signs_in_and_searches(untrained_run: UntrainedRun, ray_session: None, tmp_path: Path) -> None:
    make_gallery(untrained_run.config, tmp_path)
    store = KeyTable(Database.open(str(tmp_path / "gallery")))
    token = add_key(store, "desk", ["read"], expires=datetime.now(UTC) + timedelta(days=1), per_minute=100)
    (name, *_) = select(untrained_run.manifest, split="query", modality="infrared")["image"].to_pylist()
    with (
        served(untrained_run.config, tmp_path, "serve.keys=database") as (process, address),
        sync_playwright() as playwright,
    ):
        with pytest.raises(ServiceError, match="401"), Client(address) as stranger:
            stranger.status()
        assert not ray_lets_in(process)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if not _own(request.url, address) else None)
        page.goto(address)
        _sign_in_and_search(page, token, untrained_run.root / name)
        page.set_viewport_size({"width": 390, "height": 844})
        page.get_by_role("button", name="Search", exact=True).click()
        expect(page.locator("#hits li").first.locator("img")).to_be_in_viewport(ratio=1)
        with page.expect_response("**/v1/search") as similar:
            page.get_by_role("button", name="more like hit 2").click()
        assert similar.value.json()["modalities"] == ["visible"]
        assert faults == []
        browser.close()
        store.remove("desk")
        until(lambda: _status(address, token) == 401, 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None and process.stdout.read() == ""


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.skipif(not DEMO.exists(), reason="needs the run of `make demo`")
def test_the_page_of_the_demo_shows_hits_at_both_widths(ray_session: None, tmp_path: Path) -> None:
    """Also makes the images in docs/img; see `make screenshots`."""
    config = load_config(REPOSITORY / "ray_config.yaml", size="small")
    make_gallery(config, tmp_path)
    image = config.data_root / "cam3" / "0418" / "0001.jpg"
    folder = Path(os.environ.get("TVILFM_SCREENSHOTS", tmp_path))
    with served(config, tmp_path, size="small") as (_, address), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, height in ((1280, 900), (390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(address)
            page.locator("#image").set_input_files(image)
            page.get_by_label("Description", exact=True).fill(
                "a woman with long black hair, wearing a yellow checked coat and a brown skirt"
            )
            page.get_by_role("button", name="Search", exact=True).click()
            first = page.locator("#hits li").first.locator("img")
            expect(first).to_be_in_viewport(ratio=1)
            expect(first).to_have_js_property("complete", True)
            shot = folder / f"page-{width}.png"
            content = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
            content.convert("RGB").quantize(256).save(shot, optimize=True)
            assert shot.stat().st_size < 300_000
        browser.close()


def ray_lets_in(process: subprocess.Popen[str]) -> bool:
    """Whether a stranger may run something on the Ray of a command."""
    words = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in descendants(process.pid)]
    (address,) = {word.partition("=")[2] for line in words for word in line if word.startswith("--gcs-address=")}
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.get(ray.remote(lambda: 'in').remote()))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_NUM_REDIS_GET_RETRIES"] = "3"  # 20 by default, a second each, and no other answer
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout or "ConnectionError" in done.stderr or "Auth" in done.stderr
    return "in" in done.stdout


def _status(address: str, token: str) -> int:
    return httpx.get(f"{address}/v1/status", headers={HEADER: token}, trust_env=False).status_code


def _own(url: str, address: str) -> bool:
    return url.startswith((address, "blob:", "data:"))


def _sign_in_and_search(page: Page, token: str, picture: Path) -> None:
    for key in ("tvi_wrong", token):
        expect(page.get_by_role("dialog")).to_be_visible()
        page.get_by_label("API key").fill(key)
        page.get_by_role("dialog").get_by_role("button", name="Sign in").click()
        if key != token:
            expect(page.get_by_role("alert")).to_contain_text("got a wrong or an expired one")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("16 images")

    page.locator("#image").set_input_files(picture)
    page.get_by_label("Description", exact=True).fill("a woman in a red coat with a backpack")
    page.get_by_text("More options").click()
    page.get_by_label("What the infrared image already shows").fill("a woman in a coat with a backpack")
    page.get_by_role("button", name="Search", exact=True).click()
    hits = page.locator("#hits li")
    expect(hits).to_have_count(16)
    expect(page.locator("#told")).to_contain_text("16 images from all cameras, searched with")
    expect(page.locator("#told")).to_contain_text("not searched for twice: “a woman in a coat with a backpack”")
    expect(page.locator("#hits img")).to_have_count(16)
    first = hits.first
    assert first.locator(".bar i").count() == 3
    before = [one.get_attribute("title") for one in hits.all()]

    page.locator("#infrared").fill("0")
    page.locator("#fusion").fill("0")
    page.locator("#fusion").dispatch_event("change")
    expect(page.locator("#told .legend")).to_have_count(1)
    assert [one.get_attribute("title") for one in hits.all()] != before
    page.locator("#cameras").get_by_label("1", exact=True).uncheck()
    expect(hits).to_have_count(12)
    assert "camera 1" not in page.locator("#hits").inner_text()
    expect(page.locator("#hits img")).to_have_count(12)


@pytest.mark.long
@pytest.mark.timeout(180 + 60 * LIVES)
def test_everything_is_killed_while_clients_write_and_no_acknowledged_write_is_lost_or_doubled(
    untrained_run: UntrainedRun, ray_session: None, tmp_path: Path
) -> None:
    make_gallery(untrained_run.config, tmp_path)
    names = select(untrained_run.manifest, split="gallery", modality="visible")["image"].to_pylist()
    picture = (untrained_run.root / names[0]).read_bytes()
    acknowledged: list[str] = []
    for life in range(LIVES):
        with served(untrained_run.config, tmp_path) as (process, address):

            def write(worker: int, life: int = life, address: str = address) -> None:
                with Client(address, retries=0) as client:
                    for number in range(10_000):
                        try:
                            client.put(f"{life}-{worker}-{number}", image=picture, camid=1)
                        except (httpx.TransportError, ServiceError):
                            return
                        acknowledged.append(f"{life}-{worker}-{number}")

            writers = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
            before = len(acknowledged)
            for writer in writers:
                writer.start()
            until(lambda before=before: len(acknowledged) > before + 20)
            time.sleep(0.05 * life)
            server = int((tmp_path / "gallery" / "postmaster.pid").read_text().split()[0])
            kill_all([server, *descendants(server)])
            kill_tree(process)
            for writer in writers:
                writer.join(60)
        gallery = Gallery.open(str(tmp_path / "gallery"))
        assert gallery.contains([*acknowledged, *names]).all()
        # A write that was under way may be there too, and nothing else.
        assert len(gallery) <= len(acknowledged) + len(names) + 3 * (life + 1)
        gallery.close()
