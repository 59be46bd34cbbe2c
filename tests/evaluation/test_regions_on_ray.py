"""Errors of refdet evaluate on a Ray cluster, which uses a temporary store, so that nothing can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from detector_folder import DetectorFolder

from refdet.errors import InputError, Interrupted, RefdetError, RuntimeFailure, UnusableImageError
from refdet.evaluation import regions_on_ray

# the fix in errors of an extraction
FIX = "finished shards are kept in /tmp/refdet-1/regions.h5.parts, continue with `resume=True`"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeFailure("no worker is left (disk full)", fix=FIX), 1, "no worker is left (disk full); run it again"),
        (InputError("1.jpg: too wide", fix=FIX), 2, "1.jpg: too wide; run it again"),
        (UnusableImageError("1.jpg: not a readable image", fix=FIX), 2, "1.jpg: not a readable image\n"),
        (InputError("`ray` a:1: does not answer"), 2, "--ray a:1: does not answer\n"),
        (Interrupted("stopped: 3 of 4 images are finished and kept in /tmp/refdet-1"), 130, "interrupted\n"),
    ],
)
def test_errors_do_not_suggest_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RefdetError, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(regions_on_ray, "extract_features", fail)
    done = DetectorFolder(tmp_path, 1).command("evaluate", "--ray", "local")
    assert done.exit_code == code and f"error: {message}" in done.stderr
    assert "kept" not in done.stderr and "resume" not in done.stderr
