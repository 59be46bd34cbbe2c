"""The Python API: `import refdet` is light, every public name can be imported, and all examples run."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_folder import write_demo
from PIL import Image

import refdet

REPOSITORY = Path(__file__).resolve().parents[1]
FUNCTIONS = ("audit", "build_split", "evaluate_on_refer", "extract_features", "load_detector", "open_store", "train")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("api"))


@pytest.fixture
def folder(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary current directory with a link to demo/."""
    (tmp_path / "demo").symlink_to(demo / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_import_refdet_loads_no_large_package() -> None:
    code = "import refdet, sys; dir(refdet); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "refdet" in loaded and not loaded & {"torch", "numpy", "h5py", "PIL", "pandas", "yaml", "refer"}


def test_each_public_name_can_be_imported_and_is_in_dir() -> None:
    names = ", ".join(refdet.__all__)
    code = f"import refdet; before = dir(refdet); from refdet import {names}; assert {{*refdet.__all__}} <= {{*before}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_a_detector_does_not_import_slow_packages() -> None:
    names = ", ".join(refdet.__all__)
    code = f"import sys; from refdet import {names}; from refdet.config import recipe"
    code += "; from refdet.detector.loading import build_on_meta; build_on_meta(recipe.load('demo'), 9)"
    code += "; assert not {'torchvision', 'torch._dynamo'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checking_imports_match_the_lazy_imports() -> None:
    tree = ast.parse(Path(inspect.getfile(refdet)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == refdet._EXPORTS and sorted({*seen, "__version__"}) == sorted(refdet.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'refdet' has no attribute 'detect'"):
        refdet.detect  # noqa: B018
    with pytest.raises(ImportError):
        from refdet import detect  # type: ignore[attr-defined]  # noqa: F401


def test_subpackages_can_be_imported_beside_lazy_names() -> None:
    code = "from refdet import store, training; import refdet.splits; assert refdet.store is store and store.open"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated_and_documented_and_take_options_by_keyword(name: str) -> None:
    function = getattr(refdet, name)
    parameters = inspect.signature(function).parameters.values()
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
    options = [p for p in parameters if p.default is not inspect.Parameter.empty]
    assert options and all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in options)
    for part in ("Examples:", "Args:", "Raises:"):
        assert f"\n    {part}\n" in function.__doc__


@pytest.mark.slow
def test_examples_in_docstrings_run(folder: Path) -> None:
    first = sorted((folder / "demo" / "data" / "train2014").iterdir())[0]
    shutil.copy(first, "image.jpg")
    detector = refdet.load_detector("demo/run", device="cpu")
    names: dict[str, Any] = {
        "refdet": refdet, "torch": torch, "detector": detector, "regions": detector.detect("image.jpg"),
        "image": Image.open("image.jpg"),
    }  # fmt: skip
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    run_examples = set()
    for name in (*FUNCTIONS, "Detector", "Regions", "RegionsDataset"):
        for example in finder.find(getattr(refdet, name), name, globs=names):
            if example.examples:
                runner.run(example)
                run_examples.add(example.name)
    assert runner.summarize().failed == 0
    methods = {"Detector.detect", "Detector.describe", "Regions.to_coco", "Regions.draw"}
    assert run_examples == {*FUNCTIONS, "RegionsDataset", *methods}


def _for_untrained_detector(code: str) -> str:
    """Reduce the training steps in an example, and the score threshold to one that an untrained detector exceeds."""
    code = code.replace('"train.steps=40"', '"train.steps=2", "model.zero_init_residual=true"')
    return code.replace("score_threshold=0.3", "score_threshold=0.01")


@pytest.mark.slow
def test_examples_in_the_docs_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6  # and no fence of another kind:
    assert len(re.findall("```", page)) == 12
    names: dict[str, Any] = {}
    for block in blocks:
        exec(_for_untrained_detector(block), names)
    assert len(names["regions"]) and names["image"].size and (folder / "regions.png").exists()
    assert set(names["metrics"]["splits"]) == {"val"} and capsys.readouterr().out.startswith("Regions(image 0 ")


@pytest.mark.slow
def test_the_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = REPOSITORY / "examples" / "detector.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 20_000 and notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    (folder / "examples").mkdir()
    monkeypatch.chdir(folder / "examples")
    names: dict[str, Any] = {}
    for cell in code:
        exec(_for_untrained_detector("".join(cell["source"])), names)
    assert names["picture"].size == (names["regions"].width, names["regions"].height)
    assert len(names["regions"]) and len(names["found"]) == 4 and len(names["table"])
