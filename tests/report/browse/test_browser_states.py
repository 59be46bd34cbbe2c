"""refdet browse in a real browser while files are read, where they are damaged, and with unusual ids and numbers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Watched, serving
from evaluate_examples import regions, write_refer, write_store
from PIL import Image

from refdet.structures.regions import Regions

pytestmark = [pytest.mark.slow, pytest.mark.browser]

OBJECTS: list[dict[str, Any]] = [
    {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val", "sents": ("the cat", "cat")},
    {"image_id": 2, "bbox": [60, 10, 40, 40], "category_id": 2, "split": "val", "sents": ("the dog",)},
]
ODD_IDS = (-5, 2**60 + 1, 2**60 + 2)
MANY = 150


@contextmanager
def opened(browser: Any, *arguments: str | Path, allowed: tuple[str, ...] = ()) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    with serving(*arguments) as address:
        found = Watched(context.new_page(), address)
        yield found
        assert [one for one in found.errors if not any(text in one for text in allowed)] == []
        context.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store with unusual ids, one with many regions and without masks, refs and images of the latter."""
    boxes = [[10.0, 10.0, 30.0, 31.0]]
    names = {-7: "hound", 2**53 + 1: "odd", 2**53 + 2: "even"}
    odd = [regions(i, boxes, [c]) for i, c in zip(ODD_IDS, names, strict=True)]
    write_store(tmp_path / "odd.h5", odd, masks=False, names=names)
    scores = np.linspace(0.9, 0.1, MANY, dtype=np.float32)
    scores[0] = np.float32(0.7) + np.float32(0.2)  # 0.9 in float32, less than the Python float
    corners = np.tile(np.float32(boxes), (MANY, 1))
    many = Regions(1, "1.jpg", 100, 120, corners, scores, np.full(MANY, 1))
    write_store(tmp_path / "many.h5", [many, regions(2, [])], masks=False, names={1: "hound"})
    write_refer(tmp_path, OBJECTS)
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (120, 100), (40, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    return tmp_path


def refs_of(data: Path) -> tuple[str | Path, ...]:
    return ("--refer-root", data, "--dataset", "toy", "--split-by", "me", "--images", data / "images")


def test_the_single_view_is_completed_when_the_index_is(browser: Any, data: Path) -> None:
    with opened(browser, data / "many.h5", *refs_of(data)) as found:
        page = found.page

        def unfinished(route: Any) -> None:
            answer = route.fetch().json()
            if "index" in answer:
                answer["index"]["stage"] = "regions"
            for one in answer.get("referents", ()):
                one["iou"], one["best"] = [None, None], [None, None]
            route.fulfill(json=answer)

        page.route("**/api/about", unfinished)
        page.route("**/api/image/1", unfinished, times=1)
        found.open(found.address.replace("?", "?image=1&ref=0&"))
        assert "not computed yet" in page.inner_text(".referents")
        page.wait_for_function("() => document.querySelector('.referents').textContent.includes('best region: 0.952')")
        assert page.inner_text("#progress") == ""


def test_a_failed_index_is_said_until_it_is_dismissed(browser: Any, data: Path) -> None:
    (data / "p.json").write_text(json.dumps([{"sent_id": 10, "region": 0}]))
    with opened(browser, data / "many.h5", *refs_of(data), "--predictions", data / "p.json") as found:
        page = found.page
        found.open(found.address)
        page.wait_for_selector("#warnings .message")
        found.ready(lambda: page.select_option("select[name=show]", "images"))
        found.ready(page.locator(".card").first.click)
        assert "region 0 is of image 1" in page.inner_text("#warnings") and "incomplete" in page.inner_text("#progress")
        page.click("text=Dismiss")
        page.wait_for_timeout(700)  # the status is asked for again meanwhile
        found.ready(lambda: page.keyboard.press("Escape"))
        assert page.inner_text("#warnings") == "" and "incomplete" in page.inner_text("#progress")


def test_a_changed_store_is_said_until_it_is_dismissed(browser: Any, data: Path) -> None:
    with opened(browser, data / "odd.h5") as found:
        page = found.page
        index = {"stage": "", "part": 1, "error": "", "scores": [0, 1]}
        page.route("**/api/status", lambda route: route.fulfill(json={"index": index, "changed": ["odd.h5"]}))
        found.open(found.address)
        page.wait_for_selector("#warnings .message")
        found.ready(page.locator(".card").first.click)
        assert "odd.h5 changed since it was opened" in page.inner_text("#warnings")


def test_ids_are_negative_or_beyond_the_integers_of_a_browser(browser: Any, data: Path) -> None:
    with opened(browser, data / "odd.h5") as found:
        page = found.page
        found.open(found.address)
        found.indexed()
        for place, image_id in enumerate(ODD_IDS):
            found.ready(page.locator(".card").nth(place).click)
            assert f"image={image_id}" in page.url and f"image {image_id}," in page.inner_text("h2.name")
            page.goto(page.url)
            page.wait_for_selector("h2.name")
            assert page.inner_text("h2.name").startswith(f"{image_id}.jpg")
            assert [page.inner_text(".regions li")] == [f"{('hound', 'odd', 'even')[place]} 1.00, row {place}"]
            found.ready(lambda: page.keyboard.press("Escape"))
        found.ready(lambda: page.select_option("select[name=category]", label="even"))
        assert page.locator(".card").count() == 1 and f"{ODD_IDS[2]}.jpg" in page.inner_text(".card")


def test_objects_and_regions_have_the_names_of_their_own_files(browser: Any, data: Path) -> None:
    with opened(browser, data / "many.h5", *refs_of(data)) as found:
        page = found.page
        found.open(found.address)
        assert "c1" in page.inner_text(".card >> nth=0") and "hound" not in page.inner_text("select[name=category]")
        assert "name 1 category differently, first: 1 is 'c1' and 'hound'" in page.inner_text("#notes")
        found.ready(lambda: page.select_option("select[name=show]", "images"))
        assert "hound" in page.inner_text("select[name=category]")
        found.ready(page.locator(".card").first.click)
        assert "ref 0 c1" in page.inner_text(".referents") and "hound 0.90" in page.inner_text(".regions")


def test_the_sliders_go_as_far_as_the_store(browser: Any, data: Path) -> None:
    with opened(browser, data / "many.h5") as found:
        page = found.page
        found.open(found.address)
        top = page.locator("input[name=top]")
        assert (top.get_attribute("max"), top.input_value(), page.inner_text("#top-value")) == ("150", "150", "all")
        assert "150 regions, 50 not drawn" in page.inner_text(".card >> nth=0")
        found.ready(lambda: top.fill("7"))
        assert "150 regions, 143 not drawn" in page.inner_text(".card >> nth=0")
        found.ready(lambda: top.fill("150"))
        assert "top" not in page.url
        found.ready(lambda: page.locator("input[name=score]").fill("0.9"))
        assert "149 not drawn" in page.inner_text(".card >> nth=0")  # a score of 0.9 is one from 0.9
        found.ready(page.locator(".card").first.click)
        assert "1 region, 149 hidden by the sliders" in page.inner_text("figcaption")


def test_masks_of_a_referent_are_drawn_where_the_store_has_none(browser: Any, data: Path) -> None:
    with opened(browser, data / "many.h5", *refs_of(data), allowed=("willReadFrequently",)) as found:
        page = found.page
        found.open(found.address)
        found.ready(page.locator(".card").nth(1).click)
        inside = """([red, green]) => {
            const canvas = document.querySelector("canvas.picture"), x = canvas.width * 0.7, y = canvas.height * 0.3;
            const [r, g] = canvas.getContext("2d").getImageData(x, y, 1, 1).data;
            return r > red && (g > 90) === green; }"""
        page.wait_for_function(inside, arg=[30, False])  # the image is there
        page.keyboard.press("m")
        page.wait_for_function(inside, arg=[0, True])


def test_the_pictures_of_two_stores_are_at_the_top(browser: Any, data: Path) -> None:
    write_refer(data / "many", [OBJECTS[0]] * 30)
    refs = ("--refer-root", data / "many", "--dataset", "toy", "--split-by", "me")
    with opened(browser, data / "many.h5", data / "odd.h5", *refs) as found:
        found.open(found.address.replace("?", "?image=1&"))
        boxes = [canvas.bounding_box() for canvas in found.page.locator("canvas.picture").all()]
        assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] < 400


def test_a_page_beyond_the_end_is_the_last(browser: Any, data: Path) -> None:
    with opened(browser, data / "odd.h5") as found:
        found.open(found.address.replace("?", "?page=99&"))
        assert found.page.locator(".card").count() == 3 and "page 1 of 1" in found.page.inner_text(".pages")
        found.page.goto(found.page.url + "?page=x&at=-1&top=many")
        found.page.wait_for_selector(".card")


def test_a_missing_image_is_said_and_not_asked_for(browser: Any, data: Path) -> None:
    (data / "images" / "2.jpg").unlink()
    with opened(browser, data / "many.h5", *refs_of(data)) as found:  # no error in the console
        found.open(found.address)
        assert "no image" in found.page.inner_text(".card >> nth=1") and "2.jpg" in found.page.inner_text("#notes")
        found.ready(found.page.locator(".card").nth(1).click)
        assert "no file for this image" in found.page.inner_text("main")


def test_servers_at_other_ports_do_not_get_the_cookie(browser: Any, data: Path) -> None:
    cookies = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cookies.append(self.headers["Cookie"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<title>other</title>")

        def log_message(self, *_: Any) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with opened(browser, data / "odd.h5", allowed=("404",)) as found:
            found.open(found.address)
            found.page.reload()
            found.page.wait_for_selector("#main[data-ready]")  # with the cookie alone
            page = found.page.context.new_page()
            for path in ("", "api/about", "static/main.js"):
                page.goto(f"http://127.0.0.1:{other.server_port}/{path}")
    finally:
        other.shutdown()
        other.server_close()
    assert cookies and set(cookies) == {None}
