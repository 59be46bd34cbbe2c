"""`refdet browse` in a real browser: `make test-browser`."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browse_examples import write_random_store
from browser import WatchedPage, accessibility_violations, serve_browse
from PIL import Image
from pycocotools import mask as coco_mask

from refdet import store

pytestmark = [pytest.mark.slow, pytest.mark.browser]

HOSTILE = "<script>document.title='owned'</script>"
SCREENSHOTS = os.environ.get("REFDET_SCREENSHOTS")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, shapes_root: Path) -> Path:
    """Two stores of the shapes dataset, with script tags in the name of a category and in a sentence, and answers."""
    root = tmp_path_factory.mktemp("browse")
    refer = root / "refer" / "refcoco"
    refer.mkdir(parents=True)
    instances = json.loads((shapes_root / "refer" / "refcoco" / "instances.json").read_text())
    instances["categories"][0]["name"] = HOSTILE
    (refer / "instances.json").write_text(json.dumps(instances))
    refs = pickle.loads((shapes_root / "refer" / "refcoco" / "refs(unc).p").read_bytes())
    refs[0]["sentences"][0]["sent"] = f"{HOSTILE} unheard of"
    (refer / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    failed = refs[-1]["image_id"]
    write_random_store(root / "a.h5", refer / "instances.json", failed=failed)
    write_random_store(root / "b.h5", refer / "instances.json", seed=1, masks=False)
    boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    answers = [{"sent_id": refs[0]["sentences"][0]["sent_id"], "box": [0, 0, 1, 1]}]
    for ref in refs[1:]:
        for sent_id in (sentence["sent_id"] for sentence in ref["sentences"]):
            # every fourth answer is wrong
            answers.append({"sent_id": sent_id, "box": boxes[ref["ann_id"]] if sent_id % 4 else [0, 0, 20, 20]})
    (root / "answers.json").write_text(json.dumps(answers))
    return root


@pytest.fixture(scope="module")
def address(data: Path, shapes_root: Path) -> Iterator[str]:
    refs = ["--refer-root", data / "refer", "--dataset", "refcoco", "--split-by", "unc"]
    with serve_browse(data / "a.h5", data / "b.h5", "--images", shapes_root, *refs,
                 "--predictions", data / "answers.json") as url:  # fmt: skip
        yield url


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[WatchedPage]:
    """A page for the stores; asserts at the end that there was no error and no request to another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    watched = WatchedPage(context.new_page())
    watched.open(address)
    watched.wait_for_index()
    yield watched
    assert watched.errors == []
    host = address.split("/?")[0]
    assert [url for url in watched.requests if not url.startswith((f"{host}/", "blob:"))] == []
    context.close()


def cards(watched: WatchedPage) -> Any:
    return watched.page.locator(".card")


def save_screenshot(watched: WatchedPage, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        watched.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.jpg", type="jpeg", quality=75)


def test_the_token_is_removed_from_the_address_and_required(browser: Any, watched: WatchedPage, address: str) -> None:
    assert "token" not in watched.page.url
    stranger = browser.new_context().new_page()
    for wrong in (address[:-4], address.split("?")[0]):
        assert stranger.goto(wrong).status == 403
        assert "token" in stranger.inner_text("body")


def test_referents_can_be_sorted_by_iou_in_accessible_views(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.select_option("select[name=split]", "val"))
    watched.act_and_wait(lambda: page.select_option("select[name=sort]", "iou"))
    shown = page.locator(".card .facts b").all_inner_texts()
    first = [float(text.split()[1]) for text in shown if "…" not in text]
    assert first == sorted(first) and len(first) > 3
    save_screenshot(watched, "browse-grid")
    assert accessibility_violations(page) == []
    watched.act_and_wait(cards(watched).first.click)
    assert page.locator(".referents .selected").count() == 1
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert accessibility_violations(page) == []


def test_markup_in_files_is_shown_as_text(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.fill("input[name=q]", "unheard"))
    assert page.inner_text("#total") == "1 referent" and HOSTILE in cards(watched).inner_text()
    assert HOSTILE in page.locator("select[name=category]").inner_text()
    watched.act_and_wait(cards(watched).first.click)
    assert HOSTILE in page.inner_text(".referents .selected") and "owned" not in page.title()
    assert page.locator("main script").count() == 0


def test_everything_can_be_done_with_the_keyboard(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.select_option("select[name=split]", "val"))
    page.locator("body").focus()
    page.keyboard.press("/")
    watched.act_and_wait(lambda: page.keyboard.type("the"))
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.press("Escape")
    cards(watched).first.focus()
    watched.act_and_wait(lambda: page.keyboard.press("Enter"))
    first_url = page.url
    watched.act_and_wait(lambda: page.keyboard.press("ArrowRight"))
    assert page.url != first_url and "at=1" in page.url
    watched.act_and_wait(lambda: page.keyboard.press("ArrowLeft"))
    assert page.url == first_url
    page.keyboard.press("m")
    assert page.locator("button[aria-pressed=true]").first.inner_text() == "Masks" and "masks=1" in page.url
    page.locator(".referents .selected a").focus()
    page.keyboard.press("Enter")  # deselects the referent
    assert page.locator(".referents .selected").count() == 0
    save_screenshot(watched, "browse-masks")
    page.keyboard.press("+")
    watched.act_and_wait(lambda: page.keyboard.press("Escape"))
    assert page.locator(".card").count() and "q=the" in page.url
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1


def test_filters_are_kept_in_the_address(browser: Any, watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.select_option("select[name=show]", "images"))
    watched.act_and_wait(lambda: page.select_option("select[name=only]", "failed"))
    assert page.inner_text("#total") == "1 image" and "not a readable <b>image</b>" in cards(watched).inner_text()
    again = WatchedPage(watched.page.context.new_page())
    again.open(page.url)
    assert again.page.inner_text("#total") == "1 image"
    assert again.page.input_value("select[name=only]") == "failed"
    watched.act_and_wait(page.go_back)
    assert page.inner_text("#total") != "1 image"
    again.page.close()


def test_wrong_answers_can_be_filtered(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.fill("input[name=q]", "unheard"))
    watched.act_and_wait(lambda: page.select_option("select[name=only]", "wrong"))
    watched.act_and_wait(cards(watched).first.click)
    assert "incorrect, IoU 0.00" in page.inner_text(".referents .selected")


def test_two_stores_are_side_by_side_and_sliders_hide_regions(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.select_option("select[name=split]", "val"))
    watched.act_and_wait(lambda: page.select_option("select[name=sort]", "gap"))
    watched.act_and_wait(cards(watched).first.click)
    titles = page.locator("figcaption")
    assert titles.count() == 2 and "no masks in this store" in titles.nth(1).inner_text()
    page.locator("input[name=top]").fill("2")
    page.wait_for_function("document.querySelector('figcaption').textContent.startsWith('a.h5: 2 regions')")
    assert page.locator(".regions >> nth=0 >> li").count() == 2 and "top=2" in page.url
    save_screenshot(watched, "browse-two-stores")


def test_the_list_and_the_picture_can_be_downloaded(watched: WatchedPage) -> None:
    page = watched.page
    watched.act_and_wait(lambda: page.select_option("select[name=split]", "val"))
    with page.expect_download() as list_:
        page.click("text=Download list")
    listed = json.loads(Path(list_.value.path()).read_text())
    assert {entry["split"] for entry in listed} == {"val"}
    watched.act_and_wait(cards(watched).first.click)
    page.wait_for_timeout(300)
    with page.expect_download() as png:
        page.click("text=Download PNG")
    picture = Image.open(Path(png.value.path()))
    assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 10


def test_masks_are_decoded_as_by_pycocotools(data: Path, watched: WatchedPage) -> None:
    with store.open(data / "a.h5") as opened:
        regions = opened.read(int(opened.image_ids[0]), features=())
    for rle, counts in zip(regions.rles(), regions.masks or (), strict=True):
        covered = watched.page.evaluate(
            """async ([text, height, width]) => {
                const { paintMask } = await import(new URL("static/rle.js", location.href));
                const pixels = new Uint8ClampedArray(height * width * 4);
                paintMask(pixels, text, height, width, [255, 0, 0], 1);
                return Array.from(pixels.filter((_, i) => i % 4 === 3), (alpha) => Number(alpha > 0));
            }""",
            [counts.decode("ascii"), regions.height, regions.width],
        )
        expected = np.asarray(coco_mask.decode(rle))
        np.testing.assert_array_equal(np.array(covered, np.uint8).reshape(expected.shape), expected)


def test_missing_images_and_unknown_ids_are_reported(browser: Any, data: Path) -> None:
    with serve_browse(data / "b.h5") as address:
        watched = WatchedPage(browser.new_context().new_page())
        watched.open(address)
        watched.act_and_wait(cards(watched).first.click)
        assert "no images were given" in watched.page.inner_text("main")
        assert watched.page.locator("button", has_text="Masks").is_disabled()
        watched.page.goto(f"{watched.page.url.split('?')[0]}?image=77")
        watched.page.wait_for_selector("#banner:not([hidden])")
        assert "no image 77 in b.h5" in watched.page.inner_text("#banner")
        assert "Back to the grid" in watched.page.inner_text("main")
