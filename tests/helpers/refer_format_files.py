"""Write a REFER dataset in the formats in which others have published it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import refer

Refs = list[dict[str, Any]]
Instances = dict[str, Any]
HUGGING_FACE_SPLITS = {"train": "train", "val": "validation", "testA": "test", "testB": "testB", "test": "test"}


def load(root: Path, dataset: str, split_by: str) -> tuple[Refs, Instances]:
    refs: Any = refer.files.read_refs(root, dataset, split_by)
    return refs, json.loads((root / dataset / "instances.json").read_text())


def splits_of(refs: Refs) -> list[str]:
    return list(dict.fromkeys(ref["split"] for ref in refs))


def by_id(entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {entry["id"]: entry for entry in entries}


def xyxy(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def write_jxu124(folder: Path, dataset: str, refs: Refs, instances: Instances, rename: bool = False) -> Path:
    """A Parquet file per split; with ``rename``, the column has the names of Hugging Face's splits too."""
    images, annotations = by_id(instances["images"]), by_id(instances["annotations"])
    folder.mkdir(parents=True)
    for split in splits_of(refs):
        name = HUGGING_FACE_SPLITS[split]
        rows = [
            {
                **ref,
                "split": name if rename else split,
                "raw_anns": json.dumps(annotations[ref["ann_id"]]),
                "raw_image_info": json.dumps(images[ref["image_id"]]),
                "raw_sentences": json.dumps(ref["sentences"]),
                "image_path": f"coco/train2014/{images[ref['image_id']]['file_name']}",
                "bbox": xyxy(annotations[ref["ann_id"]]["bbox"]),
                "captions": [sentence["sent"] for sentence in ref["sentences"]],
                "global_image_id": f"coco.{ref['image_id']}",
                "anns_id": f"{dataset}.{ref['ann_id']}",
            }
            for ref in refs
            if ref["split"] == split
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
    return folder


def write_lmms(folder: Path, refs: Refs, instances: Instances) -> Path:
    """A Parquet file per split with the bytes of the images, and boxes in float32."""
    annotations = by_id(instances["annotations"])
    schema = pa.schema(
        [
            ("question_id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("question", pa.string()),
            ("answer", pa.list_(pa.string())),
            ("segmentation", pa.list_(pa.float32())),
            ("bbox", pa.list_(pa.float32())),
            ("iscrowd", pa.int8()),
            ("file_name", pa.string()),
        ]
    )
    folder.mkdir(parents=True)
    for split in splits_of(refs):
        rows = [
            {
                "question_id": str(ref["ann_id"]),
                "image": {"bytes": b"\xff\xd8 not decoded", "path": None},
                "question": "Please carefully observe the area circled in the image.",
                "answer": [sentence["sent"] for sentence in ref["sentences"]],
                "segmentation": [1.0, 2.0],
                "bbox": annotations[ref["ann_id"]]["bbox"],
                "iscrowd": 0,
                "file_name": ref["file_name"],
            }
            for ref in refs
            if ref["split"] == split
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_mdetr(folder: Path, dataset: str, refs: Refs, instances: Instances) -> Path:
    """A COCO file per split with an image and an annotation for each sentence, with ids that are unique over splits."""
    images, annotations = by_id(instances["images"]), by_id(instances["annotations"])
    folder.mkdir(parents=True)
    number = 0
    for split in splits_of(refs):
        file: dict[str, Any] = {"info": instances["info"], "licenses": instances["licenses"], "images": []}
        file |= {"annotations": [], "categories": instances["categories"]}
        for ref in refs:
            if ref["split"] != split:
                continue
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            for sentence in ref["sentences"]:
                file["images"].append(
                    {
                        "file_name": ref["file_name"].rpartition("_")[0] + ".jpg",
                        "height": image["height"],
                        "width": image["width"],
                        "id": number,
                        "original_id": image["id"],
                        "caption": sentence["sent"],
                        "dataset_name": dataset,
                        "tokens_negative": [[0, len(sentence["sent"])]],
                    }
                )
                file["annotations"].append(
                    {
                        "area": annotation["area"],
                        "iscrowd": annotation["iscrowd"],
                        "image_id": number,
                        "category_id": ref["category_id"],
                        "id": number,
                        "bbox": annotation["bbox"],
                        "original_id": annotation["id"],
                        "tokens_positive": [[0, 3]],
                    }
                )
                number += 1
        (folder / f"finetune_{dataset}_{split}.json").write_text(json.dumps(file))
    return folder


def write_manual_download(path: Path, parts: dict[tuple[str, str], tuple[Refs, Instances]]) -> Path:
    """refcoco.json with several datasets, as of TensorFlow Datasets' script."""
    all_refs, coco = [], {}
    for (dataset, split_by), (refs, instances) in parts.items():
        annotations = by_id(instances["annotations"])
        for ref in refs:
            more = {"ann": annotations[ref["ann_id"]], "dataset": dataset, "dataset_partition": split_by}
            all_refs.append({**ref, **more})
        for image in instances["images"]:
            own = [one for one in instances["annotations"] if one["image_id"] == image["id"]]
            coco[str(image["id"])] = {"info": image, "anns": own}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ref": all_refs, "coco_anns": coco}))
    return path


def write_examples(folder: Path, refs: Refs, instances: Instances, columns: bool) -> Path:
    """A list of TensorFlow Datasets' examples per split; with ``columns``, sequences are objects of lists."""
    images, annotations = by_id(instances["images"]), by_id(instances["annotations"])
    folder.mkdir(parents=True)

    def sequence(entries: list[dict[str, Any]]) -> Any:
        return {key: [one[key] for one in entries] for key in entries[0]} if columns else entries

    for split in splits_of(refs):
        examples = []
        for image_id in dict.fromkeys(ref["image_id"] for ref in refs if ref["split"] == split):
            image = images[image_id]
            objects = []
            for ref in refs:
                if (ref["image_id"], ref["split"]) != (image_id, split):
                    continue
                x1, y1, x2, y2 = xyxy(annotations[ref["ann_id"]]["bbox"])
                box = np.array([y1 / image["height"], x1 / image["width"], y2 / image["height"], x2 / image["width"]])
                texts = [{"raw": one["raw"], "refexp_id": one["sent_id"]} for one in ref["sentences"]]
                objects.append(
                    {
                        "id": ref["ann_id"],
                        "bbox": box.astype(np.float32).tolist(),
                        "label": ref["category_id"],
                        "refexp": sequence(texts),
                    }
                )
            examples.append({"image/id": image_id, "objects": sequence(objects)})
        name = "validation" if split == "val" else split
        (folder / f"{name}.json").write_text(json.dumps(examples))
    return folder


def write_lines(folder: Path, dataset: str, refs: Refs, instances: Instances) -> Path:
    """JSON lines with x1 y1 x2 y2 in pixels with two decimals, in another order."""
    images, annotations = by_id(instances["images"]), by_id(instances["annotations"])
    folder.mkdir(parents=True)
    for split in splits_of(refs):
        entries = [
            {
                "image": f"data/coco/train2014/{images[ref['image_id']]['file_name']}",
                "sent": one["sent"],
                "bbox": [round(number, 2) for number in xyxy(annotations[ref["ann_id"]]["bbox"])],
                "height": images[ref["image_id"]]["height"],
                "width": images[ref["image_id"]]["width"],
            }
            for ref in refs
            if ref["split"] == split
            for one in ref["sentences"]
        ]
        entries.sort(key=lambda entry: len(entry["sent"]))
        text = "\n".join(json.dumps(entry) for entry in entries)
        (folder / f"{dataset}_{split}.jsonl").write_text(text + "\n")
    return folder


def write_llava(folder: Path, dataset: str, refs: Refs, instances: Instances, padded: bool, digits: int) -> Path:
    """Conversations with relative boxes, of the image or of the square that it is padded to."""
    images, annotations = by_id(instances["images"]), by_id(instances["annotations"])
    folder.mkdir(parents=True)
    for split in splits_of(refs):
        entries = []
        for number, ref in enumerate(one for one in refs if one["split"] == split):
            image = images[ref["image_id"]]
            width, height = image["width"], image["height"]
            left, top = 0, 0
            if padded:
                left, top = max(0, (height - width) // 2), max(0, (width - height) // 2)
                width = height = max(width, height)
            x1, y1, x2, y2 = xyxy(annotations[ref["ann_id"]]["bbox"])
            numbers = [(x1 + left) / width, (y1 + top) / height, (x2 + left) / width, (y2 + top) / height]
            box = "[" + ", ".join(f"{one:.{digits}f}" for one in numbers) + "]"
            turns = [
                {"from": "human", "value": "<image>\nWhat is in this picture?"},
                {"from": "gpt", "value": "Shapes."},
            ]
            for one in ref["sentences"]:
                if one["sent_id"] % 2:
                    pair = (f"Please provide a short description for this region: {box}", one["sent"])
                else:
                    question = "Please provide the bounding box coordinate of the region this sentence describes: "
                    pair = (question + one["sent"], box)
                turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
            entries.append(
                {"id": str(number), "image": f"coco/train2017/{image['id']:012d}.jpg", "conversations": turns}
            )
        (folder / f"llava_{dataset}_{split}.json").write_text(json.dumps(entries))
    return folder
