"""What the server of refdet browse answers, without a browser."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import brute_iou, regions, sentences, write_grefer, write_instances, write_store, xyxy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("httpx2")

from starlette.testclient import TestClient  # noqa: E402

from refdet import store  # noqa: E402
from refdet.errors import InputError  # noqa: E402
from refdet.report.browse.catalog import Catalog, Referent  # noqa: E402
from refdet.report.browse.collection import BrowseInputs, Collection  # noqa: E402
from refdet.report.browse.coverage import Indexer  # noqa: E402
from refdet.report.browse.queries import Filter  # noqa: E402
from refdet.report.browse.server import Handlers  # noqa: E402
from refdet.structures.regions import Regions  # noqa: E402

pytestmark = pytest.mark.usefixtures("check_hdf5_in_process")

OBJECTS: list[dict[str, Any]] = [
    {"image_id": 1, "bbox": [10, 10, 20, 20], "category_id": 1, "split": "val", "sents": ("the red cat", "cat")},
    {"image_id": 1, "bbox": [60, 10, 40, 40], "category_id": 2, "split": "val", "sents": ("a <script>dog</script>",)},
    {"image_id": 2, "bbox": [0, 0, 100, 100], "category_id": 2, "split": "train", "sents": ("left dogs",)},
    {"image_id": 4, "bbox": [0, 0, 50, 50], "category_id": 1, "split": "val", "sents": ("without regions",)},
    {"image_id": 9, "bbox": [0, 0, 50, 50], "category_id": 1, "split": "val", "sents": ("not in the store",)},
]
FOUND = {1: [[10, 10, 30, 31], [60, 10, 80, 50]], 2: [[0, 0, 100, 90], [5, 5, 9, 9], [6, 6, 9, 9]]}
Browse = Callable[..., TestClient]


def example_images() -> list[Regions]:
    known = [regions(i, [[float(v) for v in box] for box in boxes], list(range(1, len(boxes) + 1)))
             for i, boxes in FOUND.items()]  # fmt: skip
    return [*known, Regions.empty(3, "3.jpg", 100, 120, "broken <b>"), Regions.empty(4, "4.jpg", 100, 120)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store, images (none for 4), and refs."""
    write_store(tmp_path / "s.h5", example_images(), masks=False)
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (120, 100), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
    (tmp_path / "images" / "3.jpg").write_bytes(b"not an image")
    (tmp_path / "secret.jpg").write_bytes((tmp_path / "images" / "1.jpg").read_bytes())
    write_instances(tmp_path / "toy", OBJECTS)
    refs = [{"ref_id": i, "ann_id": 100 + i, "image_id": o["image_id"], "category_id": o["category_id"],
             "split": o["split"], **sentences(i, o["sents"]), "file_name": "x.jpg"}
            for i, o in enumerate(OBJECTS)]  # fmt: skip
    (tmp_path / "toy" / "refs(me).p").write_bytes(pickle.dumps(refs, protocol=2))
    return tmp_path


@pytest.fixture
def browse(data: Path) -> Iterator[Browse]:
    opened = []

    def run(**changes: Any) -> TestClient:
        given: dict[str, Any] = {"stores": [data / "s.h5"], "images": data / "images", "refer_root": data,
                                 "dataset": "toy", "split_by": "me"}  # fmt: skip
        collection = Collection(BrowseInputs(**{**given, **changes}))
        opened.append(collection)
        indexer = Indexer(collection)
        indexer.start()
        indexer.wait()
        return TestClient(Handlers(collection, indexer).app(), raise_server_exceptions=False)

    yield run
    for collection in opened:
        collection.close()


def keys(client: TestClient, **given: Any) -> list[int]:
    found = client.get("/api/items", params={"show": "refs", **given}).json()
    listed = [item["referent"]["key"] if "referent" in item else int(item["image_id"]) for item in found["items"]]
    assert found["total"] == len(listed)
    return listed


def test_referents_have_the_iou_of_their_best_region(browse: Browse) -> None:
    items = browse().get("/api/items?show=refs").json()["items"]
    expected = [
        max(brute_iou(xyxy(o["bbox"]), box) for box in FOUND.get(o["image_id"], [[0, 0, 0, 0]]))
        for o in OBJECTS[:4]
    ]  # fmt: skip
    assert [item["referent"]["iou"][0] for item in items] == pytest.approx(expected)
    assert items[0]["best_box"] == [10, 10, 30, 31] and items[3]["best_box"] is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"q": "cat"}, [0]),
        ({"q": "do"}, [1, 2]),
        ({"q": "red cat"}, [0]),
        ({"q": "cat red dog"}, []),
        ({"q": "SCRIPT"}, [1]),
        ({"q": '"unclosed OR NEAR('}, []),
        ({"q": "***"}, []),
        ({"split": "val"}, [0, 1, 3]),
        ({"split": "' OR 1=1 --"}, []),
        ({"category": "2"}, [1, 2]),
        ({"size": "small"}, [0]),
        ({"size": "medium"}, [1, 3]),
        ({"only": "uncovered"}, [3]),
        ({"only": "uncovered", "show": "images"}, [4]),
        ({"only": "failed", "show": "images"}, [3]),
        ({"show": "images", "category": "2", "size": "small"}, [1, 2]),
        ({"show": "images", "q": "cat"}, [1]),
        ({"sort": "iou"}, [3, 1, 2, 0]),
        ({"sort": "iou", "desc": "1"}, [0, 2, 1, 3]),
        ({"sort": "regions", "desc": "1"}, [2, 0, 1, 3]),
        ({"show": "images", "sort": "regions"}, [3, 4, 1, 2]),
        ({"show": "images", "sort": "iou"}, [4, 1, 2, 3]),
    ],
)
def test_filters_and_orders(browse: Browse, given: dict[str, str], expected: list[int]) -> None:
    assert keys(browse(), **given) == expected


def test_pages_of_a_list_are_its_parts(browse: Browse) -> None:
    client = browse()
    parts = [client.get(f"/api/items?show=refs&sort=iou&offset={i}&limit=1").json()["items"] for i in range(5)]
    assert [item["referent"]["key"] for part in parts for item in part] == keys(client, sort="iou")


@given(st.text(max_size=20))
def test_any_text_can_be_searched_for(text: str) -> None:
    catalog = Catalog()
    catalog.add_images([(0, 7, "7.jpg", 9, 9, 0, "")])
    catalog.add_referents([Referent("ref 0", 0, "val", 1, 9.0, [[0, 0, 3, 3]], [(0, text)])])
    catalog.index()
    words = re.findall(r"[A-Za-z0-9]+", text) if text.isascii() else []
    found = Filter.parse({"show": "refs", "q": text}).count(catalog)
    assert found == 1 if words or not text.strip() else found in (0, 1)


def test_a_name_that_no_encoding_holds_is_shown(data: Path, browse: Browse) -> None:
    header = store.Header([{"id": 1, "name": "\ud800 c"}], "", {}, {})
    with store.create(data / "n.h5", header, store.Columns(), [store.ImageRow(1, "1.jpg", 9, 9, "", 0, 0)]) as writer:
        writer.put(Regions.empty(1, "1.jpg", 9, 9))
    client = browse(stores=[data / "n.h5"], refer_root=None, dataset=None, split_by=None)
    assert client.get("/api/about").json()["names"]["stores"] == [[["1", "\ud800 c"]]]


@pytest.mark.parametrize(
    "wrong",
    [
        "show=x",
        "sort=o.key;--",
        "category=x",
        "category=9223372036854775808",
        "offset=-1",
        "limit=100000",
        "size=x",
        "top=x",
        "score=nan",
    ],
)
def test_a_parameter_that_cannot_be_is_named(browse: Browse, wrong: str) -> None:
    answer = browse().get(f"/api/items?{wrong}")
    assert answer.status_code == 400 and wrong.split("=")[0] in answer.json()["error"]


def test_an_image_has_its_regions_sentences_and_reasons(browse: Browse) -> None:
    client = browse()
    one, failed, lost = (client.get(f"/api/image/{i}").json() for i in (1, 3, 4))
    assert [region["box"] for region in one["stores"][0]["regions"]] == FOUND[1]
    assert [s["text"] for o in one["referents"] for s in o["sentences"]] == [s for o in OBJECTS[:2] for s in o["sents"]]
    assert failed["error"] == "broken <b>" and "no file" in lost["missing"]
    assert client.get("/api/image/77").status_code == 400


def test_masks_are_those_of_the_store(tmp_path: Path, browse: Browse) -> None:
    from pycocotools import mask as coco_mask

    counts = coco_mask.encode(np.asfortranarray(np.eye(100, 120, dtype=np.uint8)))["counts"]
    write_store(tmp_path / "m.h5", [regions(1, [[0, 0, 9, 9]], masks=(counts,))], masks=True)
    found = browse(stores=[tmp_path / "m.h5"]).get("/api/image/1").json()["stores"][0]
    assert found["regions"][0]["mask"].encode() == counts and found["masks"]


def test_images_and_thumbnails_are_jpegs_made_here(browse: Browse) -> None:
    client = browse()
    assert client.get("/image/0").headers["content-type"] == "image/jpeg"
    assert client.get("/thumbnail/0").content == client.get("/thumbnail/0").content
    for kind in ("image", "thumbnail"):
        broken = client.get(f"/{kind}/2")
        assert broken.status_code == 422 and "not a readable image" in broken.json()["error"]
        assert client.get(f"/{kind}/99").status_code == 400


def test_images_are_read_from_a_zip(browse: Browse, data: Path) -> None:
    with zipfile.ZipFile(data / "images.zip", "w") as packed:
        packed.write(data / "images" / "1.jpg", "train/1.jpg")
    client = browse(images=data / "images.zip")
    assert client.get("/image/0").content == browse().get("/image/0").content
    assert [item["missing"] == "" for item in client.get("/api/items").json()["items"]] == [True, False, False, False]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "images/../../secret.jpg", "..\\secret.jpg"])
def test_a_file_outside_of_the_folder_is_never_read(browse: Browse, data: Path, name: str) -> None:
    write_store(data / "evil.h5", [Regions.empty(1, name, 100, 120), Regions.empty(2, "x.jpg", 100, 120)], masks=False)
    client = browse(stores=[data / "evil.h5"], refer_root=None, dataset=None, split_by=None)
    answers = [client.get(f"/{kind}/0") for kind in ("image", "thumbnail")]
    assert [answer.status_code for answer in answers] == [422, 422]


@pytest.mark.parametrize("name", ["..%2fserver.py", "%2e%2e%2f__init__.py", "../guard.py", "page.py"])
def test_only_the_files_of_the_page_are_served(browse: Browse, name: str) -> None:
    assert browse().get(f"/static/{name}").status_code == 404


def test_a_wrong_answer_is_found(browse: Browse, data: Path) -> None:
    answers = [{"sent_id": 0, "region": 0}, {"sent_id": 1, "region": 1}, {"sent_id": 10, "box": [60, 10, 40, 40]}]
    (data / "p.json").write_text(json.dumps(answers))
    client = browse(predictions=data / "p.json")
    assert keys(client, only="wrong") == [0, 3]  # 3 has no answer, nor has 2, of a split without any
    first = client.get("/api/image/1").json()["referents"][0]["sentences"]
    assert [s["wrong"] for s in first] == [0, 1] and first[1]["answer"] == [FOUND[1][1]]


def test_answers_are_read_in_their_box_format(browse: Browse, data: Path) -> None:
    (data / "p.json").write_text(json.dumps([{"sent_id": 0, "box": [10, 10, 30, 30]}]))
    for box_format, box in (("xyxy", [10, 10, 30, 30]), ("xywh", [10, 10, 40, 40])):
        one = browse(predictions=data / "p.json", box_format=box_format).get("/api/image/1").json()["referents"][0]
        assert one["sentences"][0]["answer"] == [box] and one["sentences"][0]["wrong"] == (box_format == "xywh")


def test_a_referent_that_no_region_overlaps_has_no_best_one(browse: Browse, data: Path) -> None:
    write_store(data / "far.h5", [regions(1, [[100, 80, 119, 99], [60, 10, 80, 50]])], masks=False)
    first, second = browse(stores=[data / "far.h5"]).get("/api/image/1").json()["referents"]
    assert (first["iou"][0], first["best"][0], second["best"][0]) == (0, None, 1)


def test_masks_of_referents_and_answers(browse: Browse, data: Path) -> None:
    from pycocotools import mask as coco_mask

    y, x = np.mgrid[:100, :120]
    answer = coco_mask.encode(np.asfortranarray(x < 50, np.uint8))["counts"].decode()
    rle = {"size": [100, 120], "counts": answer}
    (data / "p.json").write_text(json.dumps([{"sent_id": 0, "segmentation": rle}, {"sent_id": 1, "region": 0}]))
    client = browse(predictions=data / "p.json")
    assert client.get("/api/about").json()["masks"]  # though the store has none
    one = client.get("/api/image/1").json()["referents"][0]
    left, top, width, height = OBJECTS[0]["bbox"]
    inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    np.testing.assert_array_equal(coco_mask.decode({"size": [100, 120], "counts": one["mask"]}), inside)
    assert [s["answer_masks"] for s in one["sentences"]] == [[answer], []] and one["mask_error"] == ""


def test_a_segmentation_that_cannot_be_drawn_is_said(browse: Browse, data: Path) -> None:
    path = data / "toy" / "instances.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": "01"}
    path.write_text(json.dumps(tree))
    one, other = browse().get("/api/image/1").json()["referents"]
    assert one["mask"] == "" and "size [9, 9]" in one["mask_error"] and other["mask"]


def test_names_are_those_of_the_own_file(browse: Browse, data: Path) -> None:
    write_store(data / "n.h5", example_images(), masks=False, names={1: "hound"})
    about = browse(stores=[data / "n.h5", data / "s.h5"]).get("/api/about").json()
    assert about["names"]["referents"] == [["1", "c1"], ["2", "c2"]] and about["names"]["annotations"] == []
    assert about["names"]["stores"] == [[["2", "c2"], ["1", "hound"]], [["1", "c1"], ["2", "c2"]]]
    assert "the refs of toy and n.h5 name 1 category differently" in " ".join(about["notes"])


def test_ids_are_texts_and_thumbnails_follow_the_sliders(browse: Browse, data: Path) -> None:
    many = Regions(-3, "x.jpg", 9, 9, np.tile(np.float32([0, 0, 5, 5]), (150, 1)),
                   np.linspace(0.7, 0.1, 150, dtype=np.float32), np.full(150, 2**53 + 1))  # fmt: skip
    write_store(data / "m.h5", [many], masks=False)
    client = browse(stores=[data / "m.h5"], refer_root=None, dataset=None, split_by=None)
    assert client.get("/api/about").json()["most_regions"] == 150
    one = client.get("/api/image/-3").json()
    assert one["image_id"] == "-3" and one["stores"][0]["regions"][0]["category"] == "9007199254740993"
    assert one["stores"][0]["regions"][0]["score"] == 0.7
    expected = {"": 100, "top=3": 3, "score=0.7": 1, "score=0.4": 75, "score=0.1": 100, "top=120": 100, "top=0": 0}
    for query, drawn in expected.items():
        item = client.get(f"/api/items?{query}").json()["items"][0]
        assert (len(item["boxes"]), item["regions"]) == (drawn, 150)


def test_bad_answers_are_said_on_the_page(browse: Browse, data: Path) -> None:
    (data / "p.json").write_text(json.dumps([{"sent_id": 0, "region": 2}]))
    status = browse(predictions=data / "p.json").get("/api/status").json()["index"]
    assert "region 2 is of image 2" in status["error"] and status["stage"] == ""


def test_two_stores_are_compared(browse: Browse, data: Path) -> None:
    other = [regions(1, [[10, 10, 30, 30]]), regions(8, [])]
    write_store(data / "t.h5", other, masks=False)
    client = browse(stores=[data / "s.h5", data / "t.h5"])
    about, one, two = (client.get(f"/api/{what}").json() for what in ("about", "image/1", "image/2"))
    assert one["referents"][0]["iou"] == pytest.approx([20 / 21, 1.0]) and one["referents"][0]["best"] == [0, 0]
    assert two["stores"][1]["absent"] and two["referents"][0]["iou"][1] is None
    assert "t.h5 lacks 3 of 4 images" in about["notes"][1] and "1 image of t.h5" in about["notes"][2]
    assert keys(client, sort="gap") == [0, 1, 2, 3]


def test_annotations_are_the_referents_without_refs(browse: Browse, data: Path) -> None:
    client = browse(refer_root=None, dataset=None, split_by=None, instances=data / "toy" / "instances.json")
    assert client.get("/api/about").json()["refs"] == 4
    assert len(client.get("/api/image/1").json()["annotations"]) == 2
    assert keys(client, sort="iou") == [3, 1, 2, 0]


def test_refs_with_any_number_of_objects(browse: Browse, data: Path) -> None:
    root = write_grefer(data / "g", OBJECTS[:2], [(1, [0, 1], "val"), (1, [], "val")])
    answers = [{"sent_id": 0, "regions": [0, 1]}, {"sent_id": 1, "boxes": [[10, 10, 20, 20], [60, 10, 40, 40]]},
               {"sent_id": 10, "regions": []}, {"sent_id": 11, "regions": [0]}]  # fmt: skip
    (data / "p.json").write_text(json.dumps(answers))
    objects = browse(refer_root=root, predictions=data / "p.json").get("/api/image/1").json()["referents"]
    assert objects[0]["iou"][0] == pytest.approx(0.5) and objects[1]["iou"][0] is None
    assert [[s["wrong"] for s in o["sentences"]] for o in objects] == [[0, 0], [0, 1]]


def test_the_list_is_downloaded_whole(browse: Browse) -> None:
    answer = browse().get("/api/list.json?show=refs&split=val&sort=iou")
    assert "attachment" in answer.headers["content-disposition"]
    assert [one["label"] for one in answer.json()] == ["ref 3", "ref 1", "ref 0"]
    assert answer.json()[1]["sentences"][0]["sent"] == "a <script>dog</script>"


def test_a_store_that_changes_is_said(browse: Browse, data: Path) -> None:
    client = browse()
    assert client.get("/api/status").json()["changed"] == []
    (data / "s.h5").rename(data / "old.h5")
    assert client.get("/api/status").json()["changed"] == [str(data / "s.h5")]
    assert client.get("/api/image/1").status_code == 200


def test_a_store_that_is_cut_off_is_said(browse: Browse, data: Path) -> None:
    client = browse()
    with (data / "s.h5").open("r+b") as file:
        file.truncate(2048)
    answers = [client.get(path) for path in ("/api/image/1", "/api/items?show=refs", "/api/items?show=images")]
    assert {answer.status_code for answer in answers} <= {200, 422}
    assert all("damaged" in answer.json()["error"] for answer in answers if answer.status_code == 422)
    assert client.get("/api/status").json()["changed"] == [str(data / "s.h5")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"split_by": None}, "refs need all of"),
        ({**dict.fromkeys(("refer_root", "dataset", "split_by")), "predictions": Path("p")}, "answers to sentences"),
    ],
)
def test_inputs_that_lack_others_are_refused(browse: Browse, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        browse(**changes)


def test_a_page_without_images_or_regions(browse: Browse, data: Path) -> None:
    write_store(data / "none.h5", [], masks=False)
    client = browse(stores=[data / "none.h5"], images=None)
    assert client.get("/api/items?show=refs").json()["total"] == 0
    assert "has no images" in client.get("/api/about").json()["notes"][-1]


@pytest.mark.parametrize("with_refs", [True, False])
def test_images_of_another_size_are_noted(data: Path, with_refs: bool) -> None:
    file = data / "toy" / "instances.json"
    tree = json.loads(file.read_text())
    tree["images"][0] |= {"height": 50, "width": 60}
    file.write_text(json.dumps(tree))
    refs = {"refer_root": data, "dataset": "toy", "split_by": "me"}
    collection = Collection(BrowseInputs([data / "s.h5"], **(refs if with_refs else {"instances": file})))
    what = "the refs of toy" if with_refs else "instances.json"
    assert f"1 image has a different size in {what} than in s.h5, first: 1; " in "".join(collection.notes)
    collection.close()
