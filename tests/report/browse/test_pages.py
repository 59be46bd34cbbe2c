"""Responses of the `refdet browse` server, without a browser."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_examples import regions, scalar_iou, sentences, write_grefer, write_instances, write_store, xyxy
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
# boxes of the regions of images 1 and 2 in the store; 3 is unreadable, and 4 has none
BOXES = {1: [[10, 10, 30, 31], [60, 10, 80, 50]], 2: [[0, 0, 100, 90], [5, 5, 9, 9], [6, 6, 9, 9]]}
Browse = Callable[..., TestClient]


def example_images() -> list[Regions]:
    with_regions = [regions(i, [[float(v) for v in box] for box in boxes], list(range(1, len(boxes) + 1)))
             for i, boxes in BOXES.items()]  # fmt: skip
    return [*with_regions, Regions.empty(3, "3.jpg", 100, 120, "broken <b>"), Regions.empty(4, "4.jpg", 100, 120)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store, images except for 4, and refs."""
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
    """A function that opens the files, with changes of its inputs, and returns a client of their server."""
    opened = []

    def run(**changes: Any) -> TestClient:
        inputs: dict[str, Any] = {"stores": [data / "s.h5"], "images": data / "images", "refer_root": data,
                                 "dataset": "toy", "split_by": "me"}  # fmt: skip
        collection = Collection(BrowseInputs(**{**inputs, **changes}))
        opened.append(collection)
        indexer = Indexer(collection)
        indexer.start()
        indexer.wait()
        return TestClient(Handlers(collection, indexer).app(), raise_server_exceptions=False)

    yield run
    for collection in opened:
        collection.close()


def item_keys(client: TestClient, **parameters: Any) -> list[int]:
    """The keys of the referents, or the ids of the images, in the response for a query."""
    response = client.get("/api/items", params={"show": "refs", **parameters}).json()
    listed = [item["referent"]["key"] if "referent" in item else int(item["image_id"]) for item in response["items"]]
    assert response["total"] == len(listed)
    return listed


def test_referents_have_the_iou_of_their_best_region(browse: Browse) -> None:
    items = browse().get("/api/items?show=refs").json()["items"]
    expected = [
        max(scalar_iou(xyxy(o["bbox"]), box) for box in BOXES.get(o["image_id"], [[0, 0, 0, 0]]))
        for o in OBJECTS[:4]
    ]  # fmt: skip
    assert [item["referent"]["iou"][0] for item in items] == pytest.approx(expected)
    assert items[0]["best_box"] == [10, 10, 30, 31] and items[3]["best_box"] is None


@pytest.mark.parametrize(
    ("query", "expected"),
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
def test_filters_and_sort_orders(browse: Browse, query: dict[str, str], expected: list[int]) -> None:
    assert item_keys(browse(), **query) == expected


def test_pages_together_are_the_whole_list(browse: Browse) -> None:
    client = browse()
    pages = [client.get(f"/api/items?show=refs&sort=iou&offset={i}&limit=1").json()["items"] for i in range(5)]
    assert [item["referent"]["key"] for page in pages for item in page] == item_keys(client, sort="iou")


@given(st.text(max_size=20))
def test_any_text_can_be_searched_for(text: str) -> None:
    catalog = Catalog()
    catalog.add_images([(0, 7, "7.jpg", 9, 9, 0, "")])
    catalog.add_referents([Referent("ref 0", 0, "val", 1, 9.0, [[0, 0, 3, 3]], [(0, text)])])
    catalog.build_indices()
    words = re.findall(r"[A-Za-z0-9]+", text) if text.isascii() else []
    count = Filter.parse({"show": "refs", "q": text}).count(catalog)
    if words or not text.strip():
        assert count == 1
    else:  # the search index may not treat its characters as words
        assert count in (0, 1)


def test_a_category_name_with_a_lone_surrogate_is_shown(data: Path, browse: Browse) -> None:
    header = store.Header([{"id": 1, "name": "\ud800 c"}], "", {}, {})
    with store.create(data / "n.h5", header, store.Columns(), [store.ImageRow(1, "1.jpg", 9, 9, "", 0, 0)]) as writer:
        writer.put(Regions.empty(1, "1.jpg", 9, 9))
    client = browse(stores=[data / "n.h5"], refer_root=None, dataset=None, split_by=None)
    assert client.get("/api/about").json()["names"]["stores"] == [[["1", "\ud800 c"]]]


@pytest.mark.parametrize("wrong", [
    "show=x", "sort=o.key;--", "category=x", "category=9223372036854775808", "offset=-1", "limit=100000", "size=x",
    "top=x", "score=nan",
])  # fmt: skip
def test_an_invalid_parameter_is_an_error_with_its_name(browse: Browse, wrong: str) -> None:
    answer = browse().get(f"/api/items?{wrong}")
    assert answer.status_code == 400 and wrong.split("=")[0] in answer.json()["error"]


def test_an_image_has_its_regions_sentences_and_errors(browse: Browse) -> None:
    client = browse()
    readable, failed, missing = (client.get(f"/api/image/{i}").json() for i in (1, 3, 4))
    assert [region["box"] for region in readable["stores"][0]["regions"]] == BOXES[1]
    texts = [sentence["text"] for referent in readable["referents"] for sentence in referent["sentences"]]
    assert texts == [*OBJECTS[0]["sents"], *OBJECTS[1]["sents"]]
    assert failed["error"] == "broken <b>" and "no file" in missing["missing"]
    assert client.get("/api/image/77").status_code == 400


def test_masks_are_those_of_the_store(tmp_path: Path, browse: Browse) -> None:
    from pycocotools import mask as coco_mask

    counts = coco_mask.encode(np.asfortranarray(np.eye(100, 120, dtype=np.uint8)))["counts"]
    write_store(tmp_path / "m.h5", [regions(1, [[0, 0, 9, 9]], masks=(counts,))], masks=True)
    response = browse(stores=[tmp_path / "m.h5"]).get("/api/image/1").json()["stores"][0]
    assert response["regions"][0]["mask"].encode() == counts and response["masks"]


def test_images_and_thumbnails_are_decoded_and_sent_as_jpeg(browse: Browse) -> None:
    client = browse()
    for kind in ("image", "thumbnail"):
        response = client.get(f"/{kind}/0")
        assert response.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(response.content)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (120, 100))
    for kind in ("image", "thumbnail"):
        broken = client.get(f"/{kind}/2")
        assert broken.status_code == 422 and "not a readable image" in broken.json()["error"]
        assert client.get(f"/{kind}/99").status_code == 400


def test_images_are_read_from_a_zip(browse: Browse, data: Path) -> None:
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        archive.write(data / "images" / "1.jpg", "train/1.jpg")
    client = browse(images=data / "images.zip")
    assert client.get("/image/0").content == browse().get("/image/0").content
    assert [item["missing"] == "" for item in client.get("/api/items").json()["items"]] == [True, False, False, False]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "images/../../secret.jpg", "..\\secret.jpg"])
def test_files_outside_of_the_image_folder_are_never_read(browse: Browse, data: Path, name: str) -> None:
    write_store(data / "evil.h5", [Regions.empty(1, name, 100, 120), Regions.empty(2, "x.jpg", 100, 120)], masks=False)
    client = browse(stores=[data / "evil.h5"], refer_root=None, dataset=None, split_by=None)
    responses = [client.get(f"/{kind}/0") for kind in ("image", "thumbnail")]
    assert [response.status_code for response in responses] == [422, 422]


@pytest.mark.parametrize("name", ["..%2fserver.py", "%2e%2e%2f__init__.py", "../guard.py", "page.py"])
def test_only_static_files_of_the_page_are_served(browse: Browse, name: str) -> None:
    assert browse().get(f"/static/{name}").status_code == 404


def test_wrong_answers_can_be_filtered(browse: Browse, data: Path) -> None:
    answers = [{"sent_id": 0, "region": 0}, {"sent_id": 1, "region": 1}, {"sent_id": 10, "box": [60, 10, 40, 40]}]
    (data / "p.json").write_text(json.dumps(answers))
    client = browse(predictions=data / "p.json")
    assert item_keys(client, only="wrong") == [0, 3]  # 3 has no answer; 2 is of a split without answers
    first = client.get("/api/image/1").json()["referents"][0]["sentences"]
    assert [s["wrong"] for s in first] == [0, 1] and first[1]["answer"] == [BOXES[1][1]]


def test_answers_are_read_in_their_box_format(browse: Browse, data: Path) -> None:
    (data / "p.json").write_text(json.dumps([{"sent_id": 0, "box": [10, 10, 30, 30]}]))
    for box_format, box in (("xyxy", [10, 10, 30, 30]), ("xywh", [10, 10, 40, 40])):
        one = browse(predictions=data / "p.json", box_format=box_format).get("/api/image/1").json()["referents"][0]
        assert one["sentences"][0]["answer"] == [box] and one["sentences"][0]["wrong"] == (box_format == "xywh")


def test_a_referent_that_no_region_overlaps_has_no_best_region(browse: Browse, data: Path) -> None:
    write_store(data / "far.h5", [regions(1, [[100, 80, 119, 99], [60, 10, 80, 50]])], masks=False)
    first, second = browse(stores=[data / "far.h5"]).get("/api/image/1").json()["referents"]
    assert (first["iou"][0], first["best"][0], second["best"][0]) == (0, None, 1)


def test_masks_of_referents_and_answers_are_sent_without_masks_in_the_store(browse: Browse, data: Path) -> None:
    from pycocotools import mask as coco_mask

    y, x = np.mgrid[:100, :120]
    answer = coco_mask.encode(np.asfortranarray(x < 50, np.uint8))["counts"].decode()
    rle = {"size": [100, 120], "counts": answer}
    (data / "p.json").write_text(json.dumps([{"sent_id": 0, "segmentation": rle}, {"sent_id": 1, "region": 0}]))
    client = browse(predictions=data / "p.json")
    assert client.get("/api/about").json()["masks"]  # the store has none
    one = client.get("/api/image/1").json()["referents"][0]
    left, top, width, height = OBJECTS[0]["bbox"]
    inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    np.testing.assert_array_equal(coco_mask.decode({"size": [100, 120], "counts": one["mask"]}), inside)
    assert [s["answer_masks"] for s in one["sentences"]] == [[answer], []] and one["mask_error"] == ""


def test_an_invalid_segmentation_is_reported_with_its_referent(browse: Browse, data: Path) -> None:
    path = data / "toy" / "instances.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": "01"}
    path.write_text(json.dumps(tree))
    one, other = browse().get("/api/image/1").json()["referents"]
    assert one["mask"] == "" and "size [9, 9]" in one["mask_error"] and other["mask"]


def test_category_names_are_those_of_each_file(browse: Browse, data: Path) -> None:
    write_store(data / "n.h5", example_images(), masks=False, names={1: "hound"})
    about = browse(stores=[data / "n.h5", data / "s.h5"]).get("/api/about").json()
    assert about["names"]["referents"] == [["1", "c1"], ["2", "c2"]] and about["names"]["annotations"] == []
    assert about["names"]["stores"] == [[["2", "c2"], ["1", "hound"]], [["1", "c1"], ["2", "c2"]]]
    assert "the refs of toy and n.h5 name 1 category differently" in " ".join(about["notes"])


def test_ids_are_strings_and_thumbnails_have_the_boxes_within_the_sliders(browse: Browse, data: Path) -> None:
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


def test_invalid_answers_are_reported_in_the_status(browse: Browse, data: Path) -> None:
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
    assert item_keys(client, sort="gap") == [0, 1, 2, 3]


def test_without_refs_annotations_are_the_referents(browse: Browse, data: Path) -> None:
    client = browse(refer_root=None, dataset=None, split_by=None, instances=data / "toy" / "instances.json")
    assert client.get("/api/about").json()["refs"] == 4
    assert len(client.get("/api/image/1").json()["annotations"]) == 2
    assert item_keys(client, sort="iou") == [3, 1, 2, 0]


def test_refs_with_any_number_of_objects(browse: Browse, data: Path) -> None:
    root = write_grefer(data / "g", OBJECTS[:2], [(1, [0, 1], "val"), (1, [], "val")])
    answers = [{"sent_id": 0, "regions": [0, 1]}, {"sent_id": 1, "boxes": [[10, 10, 20, 20], [60, 10, 40, 40]]},
               {"sent_id": 10, "regions": []}, {"sent_id": 11, "regions": [0]}]  # fmt: skip
    (data / "p.json").write_text(json.dumps(answers))
    objects = browse(refer_root=root, predictions=data / "p.json").get("/api/image/1").json()["referents"]
    assert objects[0]["iou"][0] == pytest.approx(0.5) and objects[1]["iou"][0] is None
    assert [[s["wrong"] for s in o["sentences"]] for o in objects] == [[0, 0], [0, 1]]


def test_the_downloaded_list_has_all_filtered_referents(browse: Browse) -> None:
    answer = browse().get("/api/list.json?show=refs&split=val&sort=iou")
    assert "attachment" in answer.headers["content-disposition"]
    assert [entry["label"] for entry in answer.json()] == ["ref 3", "ref 1", "ref 0"]
    assert answer.json()[1]["sentences"][0]["sent"] == "a <script>dog</script>"


def test_a_replaced_store_is_reported_and_still_served(browse: Browse, data: Path) -> None:
    client = browse()
    assert client.get("/api/status").json()["changed"] == []
    (data / "s.h5").rename(data / "old.h5")
    assert client.get("/api/status").json()["changed"] == [str(data / "s.h5")]
    assert client.get("/api/image/1").status_code == 200


def test_a_truncated_store_is_reported(browse: Browse, data: Path) -> None:
    random = np.random.default_rng(0)
    masks = tuple(random.bytes(10_000).hex().encode() for _ in range(100))  # not decoded by the server
    image = regions(1, [[0, 0, 9, 9]] * len(masks), masks=masks)
    write_store(data / "large.h5", [image, regions(2, [], masks=())], masks=True)
    client = browse(stores=[data / "large.h5"])
    with (data / "large.h5").open("r+b") as file:
        file.truncate(2048)
    image_response, *list_responses = (
        client.get(path) for path in ("/api/image/1", "/api/items?show=refs", "/api/items?show=images")
    )
    assert image_response.status_code == 422 and "damaged" in image_response.json()["error"]
    for response in list_responses:
        if response.status_code != 200:  # unless HDF5 has cached what these need
            assert response.status_code == 422 and "damaged" in response.json()["error"]
    assert client.get("/api/status").json()["changed"] == [str(data / "large.h5")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"split_by": None}, "refs need all of"),
        ({**dict.fromkeys(("refer_root", "dataset", "split_by")), "predictions": Path("p")}, "answers to sentences"),
    ],
)
def test_inputs_that_require_other_inputs_are_an_error(browse: Browse, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        browse(**changes)


def test_an_empty_store_can_be_browsed(browse: Browse, data: Path) -> None:
    write_store(data / "none.h5", [], masks=False)
    client = browse(stores=[data / "none.h5"], images=None)
    assert client.get("/api/items?show=refs").json()["total"] == 0
    assert "has no images" in client.get("/api/about").json()["notes"][-1]


@pytest.mark.parametrize("with_refs", [True, False])
def test_images_of_another_size_than_in_the_store_are_noted(data: Path, with_refs: bool) -> None:
    file = data / "toy" / "instances.json"
    tree = json.loads(file.read_text())
    tree["images"][0] |= {"height": 50, "width": 60}
    file.write_text(json.dumps(tree))
    refs = {"refer_root": data, "dataset": "toy", "split_by": "me"}
    collection = Collection(BrowseInputs([data / "s.h5"], **(refs if with_refs else {"instances": file})))
    what = "the refs of toy" if with_refs else "instances.json"
    assert f"1 image has a different size in {what} than in s.h5, first: 1; " in "".join(collection.notes)
    collection.close()
