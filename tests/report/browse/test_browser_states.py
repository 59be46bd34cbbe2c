"""`refdet browse` in a real browser: during indexing, with missing or changed files, and with unusual ids."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WatchedPage, serve_browse
from evaluate_examples import regions, write_refer, write_store
from PIL import Image
from pycocotools import mask as coco_mask

from refdet.structures.regions import Regions

pytestmark = [pytest.mark.slow, pytest.mark.browser]

OBJECTS: list[dict[str, Any]] = [
    {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val", "sents": ("the cat", "cat")},
    {"image_id": 2, "bbox": [60, 10, 40, 40], "category_id": 2, "split": "val", "sents": ("the dog",)},
]
UNUSUAL_IDS = (-5, 2**60 + 1, 2**60 + 2)
MANY = 150


@contextmanager
def open_browser(browser: Any, *arguments: str | Path, allowed: tuple[str, ...] = ()) -> Iterator[WatchedPage]:
    """A page for `refdet browse` with these arguments; asserts that only console errors with allowed texts occur."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    with serve_browse(*arguments) as address:
        watched = WatchedPage(context.new_page(), address)
        yield watched
        assert [error for error in watched.errors if not any(text in error for text in allowed)] == []
        context.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two stores without masks, of unusual ids and of many regions, with REFER data and images for the second."""
    boxes = [[10.0, 10.0, 30.0, 31.0]]
    names = {-7: "hound", 2**53 + 1: "odd", 2**53 + 2: "even"}
    with_unusual_ids = [regions(i, boxes, [c]) for i, c in zip(UNUSUAL_IDS, names, strict=True)]
    write_store(tmp_path / "unusual_ids.h5", with_unusual_ids, masks=False, names=names)
    scores = np.linspace(0.9, 0.1, MANY, dtype=np.float32)
    assert float(scores[0]) < 0.9  # 0.9 in float32
    corners = np.tile(np.float32(boxes), (MANY, 1))
    many = Regions(1, "1.jpg", 100, 120, corners, scores, np.full(MANY, 1))
    write_store(tmp_path / "many.h5", [many, regions(2, [])], masks=False, names={1: "hound"})
    write_refer(tmp_path, OBJECTS)
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (120, 100), (40, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    return tmp_path


def refer_options(data: Path) -> tuple[str | Path, ...]:
    return ("--refer-root", data, "--dataset", "toy", "--split-by", "me", "--images", data / "images")


def test_the_view_of_an_image_is_completed_when_indexing_ends(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "many.h5", *refer_options(data)) as watched:
        page = watched.page

        def respond_as_if_indexing(route: Any) -> None:
            answer = route.fetch().json()
            if "index" in answer:
                answer["index"]["stage"] = "regions"
            for referent in answer.get("referents", ()):
                referent["iou"], referent["best"] = [None], [None]  # of the store: not computed
            route.fulfill(json=answer)

        page.route("**/api/about", respond_as_if_indexing)
        page.route("**/api/image/1", respond_as_if_indexing, times=1)
        watched.open_with("image=1&ref=0")
        assert "not computed yet" in page.inner_text(".referents")
        page.wait_for_function("() => document.querySelector('.referents').textContent.includes('best region: 0.952')")
        assert page.inner_text("#progress") == ""


def test_a_failed_index_is_shown_until_it_is_dismissed(browser: Any, data: Path) -> None:
    # sentence 10 is about image 2, but region 0 is of image 1
    (data / "p.json").write_text(json.dumps([{"sent_id": 10, "region": 0}]))
    with open_browser(browser, data / "many.h5", *refer_options(data), "--predictions", data / "p.json") as watched:
        page = watched.page
        watched.open(watched.address)
        page.wait_for_selector("#warnings .message")
        watched.act_and_wait(lambda: page.select_option("select[name=show]", "images"))
        watched.act_and_wait(page.locator(".card").first.click)
        assert "region 0 is of image 1" in page.inner_text("#warnings") and "incomplete" in page.inner_text("#progress")
        page.click("text=Dismiss")
        page.wait_for_timeout(700)  # the page polls the status meanwhile
        watched.act_and_wait(lambda: page.keyboard.press("Escape"))
        assert page.inner_text("#warnings") == "" and "incomplete" in page.inner_text("#progress")


def test_a_changed_store_is_shown_in_every_view(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "unusual_ids.h5") as watched:
        page = watched.page
        index = {"stage": "", "part": 1, "error": "", "scores": [0, 1]}
        page.route("**/api/status", lambda route: route.fulfill(json={"index": index, "changed": ["unusual_ids.h5"]}))
        watched.open(watched.address)
        page.wait_for_selector("#warnings .message")
        watched.act_and_wait(page.locator(".card").first.click)
        assert "unusual_ids.h5 changed since it was opened" in page.inner_text("#warnings")


def test_negative_ids_and_ids_beyond_javascripts_safe_integers_work(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "unusual_ids.h5") as watched:
        page = watched.page
        watched.open(watched.address)
        watched.wait_for_index()
        for place, image_id in enumerate(UNUSUAL_IDS):
            watched.act_and_wait(page.locator(".card").nth(place).click)
            assert f"image={image_id}" in page.url and f"image {image_id}," in page.inner_text("h2.name")
            page.goto(page.url)
            page.wait_for_selector("h2.name")
            assert page.inner_text("h2.name").startswith(f"{image_id}.jpg")
            assert page.locator(".regions li").all_inner_texts() == [
                f"{('hound', 'odd', 'even')[place]} 1.00, row {place}"
            ]
            watched.act_and_wait(lambda: page.keyboard.press("Escape"))
        watched.act_and_wait(lambda: page.select_option("select[name=category]", label="even"))
        assert page.locator(".card").count() == 1 and f"{UNUSUAL_IDS[2]}.jpg" in page.inner_text(".card")


def test_objects_and_regions_have_the_category_names_of_their_files(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "many.h5", *refer_options(data)) as watched:
        page = watched.page
        watched.open(watched.address)
        assert "c1" in page.inner_text(".card >> nth=0") and "hound" not in page.inner_text("select[name=category]")
        assert "name 1 category differently, first: 1 is 'c1' and 'hound'" in page.inner_text("#notes")
        watched.act_and_wait(lambda: page.select_option("select[name=show]", "images"))
        assert "hound" in page.inner_text("select[name=category]")
        watched.act_and_wait(page.locator(".card").first.click)
        assert "ref 0 c1" in page.inner_text(".referents") and "hound 0.90" in page.inner_text(".regions")


def test_sliders_cover_all_regions_and_scores(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "many.h5") as watched:
        page = watched.page
        watched.open(watched.address)
        top = page.locator("input[name=top]")
        assert (top.get_attribute("max"), top.input_value(), page.inner_text("#top-value")) == ("150", "150", "all")
        # "all", but on a card at most 100
        assert "150 regions, 50 not drawn" in page.inner_text(".card >> nth=0")
        watched.act_and_wait(lambda: top.fill("7"))
        assert "150 regions, 143 not drawn" in page.inner_text(".card >> nth=0")
        watched.act_and_wait(lambda: top.fill("150"))
        assert "top" not in page.url
        watched.act_and_wait(lambda: page.locator("input[name=score]").fill("0.9"))
        # a score of 0.9 in float32 passes the threshold 0.9
        assert "149 not drawn" in page.inner_text(".card >> nth=0")
        watched.act_and_wait(page.locator(".card").first.click)
        assert "1 region, 149 hidden by the sliders" in page.inner_text("figcaption")


def test_masks_of_referents_are_drawn_if_the_store_has_none(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "many.h5", *refer_options(data), allowed=("willReadFrequently",)) as watched:
        page = watched.page
        watched.open(watched.address)
        watched.act_and_wait(page.locator(".card").nth(1).click)
        has_color = """([minRed, isGreen]) => {
            const canvas = document.querySelector("canvas.picture"), x = canvas.width * 0.7, y = canvas.height * 0.3;
            const [r, g] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
            return r > minRed && (g > 90) === isGreen; }"""
        page.wait_for_function(has_color, arg=[30, False])  # the image is loaded
        page.keyboard.press("m")
        page.wait_for_function(has_color, arg=[0, True])


def test_masks_of_regions_disappear_when_an_uncovered_referent_is_selected(browser: Any, data: Path) -> None:
    box = [5.0, 60.0, 35.0, 90.0]  # far from the referent, so that selecting it draws no best region
    pixels = np.zeros((100, 120), np.uint8, order="F")
    pixels[60:90, 5:35] = 1
    masks = [coco_mask.encode(pixels)["counts"]]
    write_store(data / "masks.h5", [replace(regions(2, [box], [1]), masks=masks)], masks=True, names={1: "hound"})
    with open_browser(browser, data / "masks.h5", *refer_options(data), allowed=("willReadFrequently",)) as watched:
        page = watched.page
        watched.open_with("image=2&masks=1")
        has_mask = """(expected) => {
            const canvas = document.querySelector("canvas.picture"), x = canvas.width / 6, y = canvas.height * 0.75;
            const [r, g] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
            return r > 30 && (g > 60) === expected; }"""
        page.wait_for_function(has_mask, arg=True)
        page.click(".referents a")
        page.wait_for_selector(".referents .selected")
        page.wait_for_function(has_mask, arg=False, timeout=10_000)


def test_pictures_of_two_stores_are_side_by_side_at_the_top(browser: Any, data: Path) -> None:
    write_refer(data / "many", [OBJECTS[0]] * 30)  # a long list of referents, which must not push the pictures down
    refs = ("--refer-root", data / "many", "--dataset", "toy", "--split-by", "me")
    with open_browser(browser, data / "many.h5", data / "unusual_ids.h5", *refs) as watched:
        watched.open_with("image=1")
        boxes = [canvas.bounding_box() for canvas in watched.page.locator("canvas.picture").all()]
        assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] < 400


def test_a_page_number_beyond_the_end_shows_the_last_page(browser: Any, data: Path) -> None:
    with open_browser(browser, data / "unusual_ids.h5") as watched:
        watched.open_with("page=99")
        assert watched.page.locator(".card").count() == 3 and "page 1 of 1" in watched.page.inner_text(".pages")
        # the page has removed the query, with the token, from its address
        watched.page.goto(watched.page.url + "?page=x&at=-1&top=many")
        watched.page.wait_for_selector(".card")


def test_a_missing_image_is_reported_and_not_requested(browser: Any, data: Path) -> None:
    (data / "images" / "2.jpg").unlink()
    # a request for it would be a console error
    with open_browser(browser, data / "many.h5", *refer_options(data)) as watched:
        watched.open(watched.address)
        assert "no image" in watched.page.inner_text(".card >> nth=1") and "2.jpg" in watched.page.inner_text("#notes")
        watched.act_and_wait(watched.page.locator(".card").nth(1).click)
        assert "no file for this image" in watched.page.inner_text("main")


def test_the_cookie_is_not_sent_to_servers_on_other_ports(browser: Any, data: Path) -> None:
    cookies = []

    class RecordCookies(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cookies.append(self.headers["Cookie"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<title>other</title>")

        def log_message(self, *_: Any) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), RecordCookies)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with open_browser(browser, data / "unusual_ids.h5", allowed=("404",)) as watched:
            watched.open(watched.address)
            watched.page.reload()
            watched.page.wait_for_selector("#main[data-ready]")  # the cookie, without the token, gives access
            page = watched.page.context.new_page()
            for path in ("", "api/about", "static/main.js"):
                page.goto(f"http://127.0.0.1:{other.server_port}/{path}")
    finally:
        other.shutdown()
        other.server_close()
    assert cookies and set(cookies) == {None}
