"""Print the contents of a feature file, read with h5py alone: ``python examples/read_features.py FILE.h5``."""

import json
import sys

import h5py

with h5py.File(sys.argv[1]) as file:
    names = {category["id"]: category["name"] for category in json.loads(file.attrs["classes"])}
    start = file["images/region_start"][:]
    print(f"images: {len(start) - 1}, regions: {start[-1]}, features: {', '.join(file['features'])}")
    for i in range(min(3, len(start) - 1)):
        rows = slice(start[i], start[i + 1])
        print(f"\nimage {file['images/id'][i]} ({file['images/file_name'][i].decode()})")
        for box, score, category, fc7 in zip(
            file["regions/box"][rows],
            file["regions/score"][rows],
            file["regions/category_id"][rows],
            file["features/fc7"][rows],
            strict=True,
        ):
            corners = " ".join(f"{coordinate:6.1f}" for coordinate in box)
            print(f"  {names[category]:10} {score:.2f} {corners}  |fc7| {(fc7**2).sum() ** 0.5:.2f}")
