"""Invalid values of --part and --ray, and a missing Ray, are one error line."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from click.testing import CliRunner

from refdet.cli.main import main
from refdet.errors import InputError
from refdet.extraction.ray_cluster import connect

EXTRACT = ["extract-features", "--checkpoint", "run", "--images", "images", "--instances", "i.json", "--out", "a.h5"]
EVALUATE = ["evaluate", "--checkpoint", "run", "--images", "images", "--instances", "i.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*EXTRACT, "--part", "9/8"], "--part 9/8: the parts of 8 are 1/8 to 8/8; give the number of this part and of"),
        ([*EXTRACT, "--part", "0/8"], "--part 0/8: the parts of 8 are 1/8 to 8/8; give"),
        ([*EXTRACT, "--part", "3"], "--part 3: not K/N; give the number of this part and of all, such as 3/8"),
        ([*EXTRACT, "--part", "1/0"], "--part 1/0: there can be 1 to 100000 parts"),
        ([*EXTRACT, "--part", "1/2", "--ray", "local"], "--part 1/2: not together with --ray, which divides the work"),
        ([*EXTRACT, "--ray", "here"], "--ray here: must be local, auto or HOST:PORT, as printed by ray start --head"),
        ([*EXTRACT, "--ray", "ray://head:10001"], "--ray ray://head:10001: clients from outside a cluster are not"),
        ([*EVALUATE, "--ray", "head"], "--ray head: must be local, auto or HOST:PORT"),
    ],
)
def test_an_invalid_part_or_ray_address_is_one_error_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_without_ray_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Ray is not installed; install it with pip install 'refdet[ray]'"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find_spec(name, *a))
    done = CliRunner().invoke(main, [*EVALUATE, "--ray", "local"])
    assert done.exit_code == 2 and done.stderr == f"error: --ray: {message}\n"
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    with pytest.raises(InputError, match="`ray`: Ray is not installed"), connect("local", None):
        pass
