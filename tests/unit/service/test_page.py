"""The page in a browser, against a service that is made up: what it asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Page, Route, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WEIGHTS = {"infrared": 1 / 3, "text": 7.25, "fusion": 0.05}
STATUS = {"images": 0, "version": 1, "model": "none", "cameras": [], "text": True, "weights": WEIGHTS}
ANSWER = {"hits": [], "version": 1, "modalities": ["text"], "filter_text": "none"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("**/*", lambda route: route.fulfill(body=files("tvilfm.service").joinpath("page.html").read_text()))
        page.route("**/v1/status", lambda route: route.fulfill(json=STATUS))
        yield page
        browser.close()


def test_weights_are_sent_once_one_was_moved_and_the_others_stay_what_they_were(page: Page) -> None:
    asked: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(json=ANSWER)

    def search() -> dict[str, Any]:
        page.get_by_label("Description", exact=True).fill("a coat")
        with page.expect_response("**/v1/search"):
            page.get_by_role("button", name="Search").click()
        return asked[-1]

    page.route("**/v1/search", answer)
    page.goto("http://service.test/")
    page.get_by_text("0 images, model").wait_for()
    assert "weights" not in search()
    page.locator("#infrared").fill("2.5")
    assert search()["weights"] == {**WEIGHTS, "infrared": 2.5}
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Choose an image, enter a description, or both.").wait_for()
    assert "weights" not in search()
