"""The page in a browser, against a service that is made up: what it asks."""

from __future__ import annotations

import base64
import csv
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WEIGHTS = {"infrared": 1 / 3, "text": 7.25, "fusion": 0.05}
STATUS = {"images": 960, "version": 1, "model": "none", "cameras": ["1", "2"], "text": True, "weights": WEIGHTS}
STATUS["captioner"] = True
FACTS = {"pid": None, "camid": "2", "time": None, "image": None}
HITS = [{"id": f"cam2/{n}.jpg", "score": 0.9 - n / 10, "shares": {"text": 0.9 - n / 10}, **FACTS} for n in range(3)]
ANSWER = {"hits": HITS, "version": 1, "modalities": ["text"], "filter_text": "none"}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.route("**/*", lambda route: route.fulfill(body=files("tvilfm.service").joinpath("page.html").read_text()))
        page.route("**/v1/status", lambda route: route.fulfill(json=STATUS))
        yield page
        browser.close()


@pytest.fixture
def asked(page: Page) -> list[dict[str, Any]]:
    """What the page has asked the service for; it is open and gets `ANSWER`."""
    asked: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(json=ANSWER)

    page.route("**/v1/search", answer)
    page.route("**/v1/gallery/**", lambda route: route.fulfill(body=PIXEL, content_type="image/png"))
    page.route("**/v1/caption", lambda route: route.fulfill(json={"caption": "a person in shorts"}))
    page.goto("http://service.test/")
    page.get_by_text("960 images, model").wait_for()
    return asked


def search(page: Page, sentence: str = "a coat") -> None:
    page.get_by_label("Description", exact=True).fill(sentence)
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def test_weights_are_sent_once_one_was_moved_and_the_others_stay_what_they_were(
    page: Page, asked: list[dict[str, Any]]
) -> None:
    search(page)
    assert "weights" not in asked[-1]
    page.get_by_text("More options").click()
    page.locator("#infrared").fill("2.5")
    search(page)
    assert asked[-1]["weights"] == {**WEIGHTS, "infrared": 2.5}
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Choose an image, enter a description, or both.").wait_for()
    search(page)
    assert "weights" not in asked[-1]


def test_a_pasted_image_is_read_at_once_and_its_link_names_it(page: Page, asked: list[dict[str, Any]]) -> None:
    paste = """bytes => {
        const data = new DataTransfer(), file = new File([new Uint8Array(bytes)], "query.png", {type: "image/png"});
        data.items.add(file);
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, cancelable: true}));
    }"""
    page.evaluate(paste, list(PIXEL))
    expect(page.locator("#seen")).to_have_text("The program sees: a person in shorts")
    search(page, "")
    assert base64.b64decode(asked[-1]["image"]) == PIXEL and "sentence" not in asked[-1]
    page.reload()
    expect(page.locator("#told")).to_contain_text("a search with the image query.png. Choose that image")


def test_a_link_repeats_the_search_with_its_cameras_and_times(page: Page, asked: list[dict[str, Any]]) -> None:
    page.locator("#cameras").get_by_label("1", exact=True).uncheck()
    page.locator("#since").fill("2026-05-01T10:00")
    page.locator("#people").check()
    search(page)
    first = asked[-1]
    assert (first["cameras"], first["by_identity"]) == (["2"], True) and first["since"].startswith("2026-05-01T")
    page.reload()
    expect(page.locator("#hits li")).to_have_count(3)
    assert asked[-1] == first and len(asked) == 2
    expect(page.locator("#told")).to_contain_text("3 people from camera 2 in the chosen time, searched with")


def test_marks_are_kept_with_the_search_and_saved_as_a_table(page: Page, asked: list[dict[str, Any]]) -> None:
    search(page, '=cmd "red" coat')
    page.get_by_role("button", name="hit 1 is right").click()
    page.get_by_role("button", name="hit 2 is wrong").click()
    page.get_by_role("button", name="hit 3 is wrong").click()
    page.get_by_role("button", name="hit 3 is wrong").click()  # taken back
    page.reload()
    expect(page.locator("#hits li.right")).to_have_count(1)
    expect(page.locator("#hits li.wrong")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("button", name="save all marks").click()
    rows = list(csv.DictReader(download.value.path().read_text().splitlines()))
    assert [(row["hit"], row["camera"], row["verdict"]) for row in rows] == [
        ("cam2/0.jpg", "2", "right"),
        ("cam2/1.jpg", "2", "wrong"),
    ]
    assert rows[0]["sentence"] == '\'=cmd "red" coat'  # no formula in a spreadsheet
    page.get_by_role("button", name="delete all marks").click()
    expect(page.locator("#hits li.right")).to_have_count(0)


def test_more_like_a_hit_asks_by_its_id_and_a_new_description_ends_it(page: Page, asked: list[dict[str, Any]]) -> None:
    search(page)
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="more like hit 2").click()
    assert asked[-1]["like"] == "cam2/1.jpg" and "sentence" not in asked[-1]
    search(page, "a blue coat")
    assert "like" not in asked[-1] and asked[-1]["sentence"] == "a blue coat"


def test_no_match_and_an_error_say_what_to_do_and_keep_the_search(page: Page, asked: list[dict[str, Any]]) -> None:
    page.route("**/v1/search", lambda route: route.fulfill(json=ANSWER | {"hits": []}))
    search(page)
    expect(page.locator("#told")).to_contain_text("No match")
    expect(page.locator("#told")).to_contain_text("Choose more cameras or a longer time.")
    page.route("**/v1/search", lambda route: route.fulfill(status=503, json={"error": "the database is away."}))
    search(page)
    expect(page.get_by_role("alert").filter(has_text="the database is away.")).to_contain_text(
        "press Search to try again"
    )
    expect(page.get_by_label("Description", exact=True)).to_have_value("a coat")


def test_low_scores_are_left_out_if_the_run_has_fitted_scores(page: Page, asked: list[dict[str, Any]]) -> None:
    search(page)
    expect(page.get_by_label("leave out hits with a low score")).to_be_hidden()
    assert "min_score" not in asked[-1]
    page.route("**/v1/status", lambda route: route.fulfill(json=STATUS | {"min_scores": {"text": 0.4}}))
    page.reload()
    page.get_by_label("leave out hits with a low score").check()
    answer = ANSWER | {"hits": [], "min_score": 0.4, "left_out": 24}
    page.route("**/v1/search", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json=answer)))
    search(page)
    assert asked[-1]["min_score"] == "fitted"
    expect(page.locator("#told")).to_contain_text("24 hits with a score below 0.400 were left out. Perhaps this person")
    page.reload()  # the link repeats the search
    expect(page.get_by_label("leave out hits with a low score")).to_be_checked()
    page.get_by_label("leave out hits with a low score").uncheck()
    search(page)
    assert "min_score" not in asked[-1]
    status = STATUS | {"min_scores": {"text": 0.4}, "min_score": "fitted"}
    page.route("**/v1/status", lambda route: route.fulfill(json=status))
    page.reload()
    expect(page.get_by_label("leave out hits with a low score")).to_be_checked()
    search(page)
    assert "min_score" not in asked[-1]
    page.get_by_label("leave out hits with a low score").uncheck()
    search(page)
    assert asked[-1]["min_score"] == "none"


def test_on_a_phone_the_hits_come_into_view_and_nothing_is_wider_than_the_screen(
    page: Page, asked: list[dict[str, Any]]
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    search(page)
    expect(page.locator("#told")).to_be_in_viewport()
    expect(page.locator("#hits li").first.locator(".frame")).to_be_in_viewport(ratio=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = "[...document.querySelectorAll('button')].filter(one => one.offsetHeight && one.offsetHeight < 40).length"
    assert page.evaluate(small) == 0  # fingers hit them


def test_a_search_works_with_the_keyboard_alone(page: Page, asked: list[dict[str, Any]]) -> None:
    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))

    order = []
    while "sentence" not in order:
        page.keyboard.press("Tab")
        order.append(focused())
        assert len(order) < 5
    assert "image" in order  # the file dialog opens from here with Enter
    page.keyboard.type("a coat")
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    expect(page.locator("#told")).to_be_focused()
    while focused() != "hit 1 is right":
        page.keyboard.press("Tab")
        order.append(focused())
        assert len(order) < 12
    page.keyboard.press("Space")
    expect(page.locator("#hits li.right")).to_have_count(1)
