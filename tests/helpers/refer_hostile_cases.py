"""Generated broken and malicious REFER files, each with the expected result."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from refer_examples import GREFS, INSTANCES, REFS, ref

CANARY = "canary"  # file in the working directory that the pickles would create if their code ran
COMMAND = f"touch {CANARY}"


class Case(NamedTuple):
    """Files and their expected result.

    Attributes:
        refs: the refs file: its bytes, or a value to write to it.
        instances: instances.json: its bytes, or a value to write to it.
        refs_good: whether reading the refs must succeed.
        good: whether reading the whole dataset must succeed.
        name: name of the refs file.
        protocol: protocol of the pickle, if ``refs`` is a value.
        says: text that the error must contain.
    """

    refs: Any = REFS
    instances: Any = INSTANCES
    refs_good: bool = False
    good: bool = False
    name: str = "refs(unc).p"
    protocol: int = 2
    says: str = ""


def text(string: str) -> bytes:
    """The pickle opcode SHORT_BINUNICODE, which pushes a short string."""
    return b"\x8c" + bytes([len(string)]) + string.encode()


def pickles_with_code() -> Iterator[tuple[str, Case]]:
    """Pickles that name and call objects in every possible way."""
    argument = b"X" + struct.pack("<I", len(COMMAND)) + COMMAND.encode()
    for module, name in (
        ("posix", "system"), ("os", "system"), ("os", "popen"), ("subprocess", "call"), ("builtins", "exec"),
        ("builtins", "eval"), ("__builtin__", "eval"), ("__builtin__", "execfile"), ("builtins", "getattr"),
        ("builtins", "__import__"), ("importlib", "import_module"), ("operator", "attrgetter"), ("runpy", "run_path"),
        ("functools", "partial"), ("copy_reg", "_reconstructor"), ("copyreg", "__newobj__"), ("webbrowser", "open"),
        ("_codecs", "encode"), ("collections", "OrderedDict"), ("collections", "defaultdict"), ("types", "CodeType"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("pathlib", "PosixPath"),
        ("decimal", "Decimal"), ("datetime", "datetime"), ("builtins", "object"), ("builtins", "bytearray"),
        ("torch._utils", "_rebuild_tensor_v2"), ("refer.api", "REFER"), ("builtins", "set.add"), ("", ""),
    ):  # fmt: skip
        named = f"{module}\n{name}\n".encode()
        says = f"asks for {module}.{name};" if module else "asks for"
        called = text(module) + text(name) + b"\x93" + argument + b"\x85R."
        flavours = {"GLOBAL REDUCE": b"c" + named + argument + b"\x85R."}
        if name in ("system", "eval", "REFER"):
            flavours |= {
                "INST": b"(" + argument + b"i" + named + b".",
                "OBJ": b"(c" + named + argument + b"o.",
                "NEWOBJ": b"c" + named + argument + b"\x85\x81.",
                "NEWOBJ_EX": b"\x80\x04c" + named + argument + b"\x85}\x92.",
                "STACK_GLOBAL": b"\x80\x04" + called,
                "STACK_GLOBAL from the memo": b"\x80\x04" + text(module) + b"\x940" + text(name) + b"\x940"
                + b"h\x00h\x01\x93" + argument + b"\x85R.",
                "STACK_GLOBAL in a frame": b"\x80\x04\x95" + struct.pack("<Q", len(called)) + called,
                "never called": b"c" + named + b"0].",
                "behind a list of refs": pickle.dumps(REFS, 2)[:-1] + b"c" + named + argument + b"\x85Ra.",
                "BUILD": b"c__builtin__\nset\n)Rc" + named + b"b.",
                "in protocol 0": b"(lp0\nc" + named + b"p1\n(S'" + COMMAND.encode() + b"'\np2\ntp3\nRp4\na.",
                "as a key": b"}c" + named + argument + b"\x85RNs.",
                "set of": b"c__builtin__\nset\n]c" + named + argument + b"\x85Ra\x85R.",
            }  # fmt: skip
        for flavour, data in flavours.items():
            yield f"{module}.{name} {flavour}", Case(data, says=says)
    # the fixture `folder` of the test registers os.system as extension 0xf0
    for flavour, data in {
        "EXT1": b"\x82\xf0" + argument + b"\x85R.", "EXT2": b"\x83\xf0\x00" + argument + b"\x85R.",
        "EXT4": b"\x84\xf0\x00\x00\x00" + argument + b"\x85R.", "PERSID": b"P" + COMMAND.encode() + b"\n.",
        "BINPERSID": argument + b"Q.", "NEXT_BUFFER": b"\x97.", "READONLY_BUFFER": b"\x97\x98.",
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 3) + b"abc.", "REDUCE of a string": argument + argument + b"\x85R.",
    }.items():  # fmt: skip
        yield flavour, Case(data, says="asks for an object" if "REDUCE" not in flavour else "not a readable pickle")


def cut_files() -> Iterator[tuple[str, Case]]:
    """The beginnings of good files."""
    for protocol in range(6):
        whole = pickle.dumps(REFS, protocol)
        for tenth in range(10):
            yield f"pickle {protocol} cut at {tenth}0 %", Case(whole[: len(whole) * tenth // 10])
        yield f"pickle {protocol} without its last byte", Case(whole[:-1], says="truncated file")
    for name, whole in (("grefs", json.dumps(GREFS).encode()), ("instances", json.dumps(INSTANCES).encode())):
        for tenth in range(10):
            cut = whole[: len(whole) * tenth // 10]
            yield (
                f"{name} cut at {tenth}0 %",
                (Case(cut, name="grefs(unc).json") if name == "grefs" else Case(instances=cut, refs_good=True)),
            )


# name -> a value that is wrong for most fields; as a signed integer, 2**64 - 1 has 65 bits, and 72 in a pickle's bytes
WRONG = {"nothing": None, "text": "3", "a fraction": 3.0, "true": True, "a list": [3], "an empty list": [],
         "a dictionary": {}, "bytes": b"3", "a tuple": (3,), "a set": {3}, "65 bits": 2**64 - 1}  # fmt: skip


def wrong_types() -> Iterator[tuple[str, Case]]:
    """Fields of refs and sentences, and whole refs and sentences, that have the wrong type or are missing."""
    fields = {"ref_id": int, "ann_id": int, "category_id": int, "image_id": int, "split": str, "sentences": list,
              "file_name": str, "sent_ids": list}  # fmt: skip
    for field, kind in fields.items():
        for name, value in WRONG.items():
            # the text and the empty list are right where text or a list is expected
            right = type(value) is kind and value in ("3", [])
            if not (right or (name, field) == ("a list", "sent_ids")):
                yield f"ref {field} is {name}", Case([REFS[0], REFS[1] | {field: value}], says="ref", protocol=4)
        if field not in ("file_name", "sent_ids"):
            yield f"ref without {field}", Case([{k: v for k, v in REFS[0].items() if k != field}], says="is missing")
    for field, kind in {"sent_id": int, "sent": str, "tokens": list, "raw": str}.items():
        for name, value in WRONG.items():
            if not (type(value) is kind and value in ("3", [])):
                sentence = REFS[0]["sentences"][0] | {field: value}
                says = "has an integer of 72 bits" if name == "65 bits" else "ref 0"
                yield f"sentence {field} is {name}", Case([REFS[0] | {"sentences": [sentence]}], says=says, protocol=4)
    for name, value in WRONG.items():
        yield f"refs are {name}", Case(value, refs_good=value == [], good=value == [], protocol=4)
        says = {"a dictionary": "'ref_id' is missing", "65 bits": "72 bits"}.get(name, "ref number 1 is a")
        yield f"a ref is {name}", Case([REFS[0], value], says=says, protocol=4)
        yield f"a sentence is {name}", Case([REFS[0] | {"sentences": [value]}], protocol=4)
    grefs: dict[str, Any] = {"text": "9", "text in a list": ["9"], "true": [True], "a fraction": [9.0], "nested": [[9]],
                             "null": [None], "none": None, "a dictionary": {"9": 9}, "long": [2**70]}  # fmt: skip
    for name, value in grefs.items():
        for field in ("ann_id", "category_id"):
            refs = [GREFS[0], GREFS[2] | {field: value}]
            yield f"generalized {field} is {name}", Case(refs, name="grefs(unc).json", says=field)


def strange_structures() -> Iterator[tuple[str, Case]]:
    """Recursive, repeated, deep and huge values."""
    itself: list[Any] = []
    itself.append(itself)
    loop = dict(REFS[0])
    loop["sentences"] = [loop]
    extra = dict(REFS[0])
    extra["extra"] = extra
    inside = dict(REFS[0])
    inside["split"] = inside
    laughs: list[Any] = ["ha"]  # small in a pickle, which writes a repeated list once, but 2**60 strings in full
    for _ in range(60):
        laughs = [laughs, laughs]
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"deep": deep}
    yield "a list in itself", Case(itself)
    yield "a ref that is its own sentence", Case([loop], says="sentence of ref 0")
    yield "a ref that holds itself", Case([extra], says="recursive")
    yield "a ref that is its own split", Case([inside], says="'split' is a dict")
    yield "a list that is all of its tokens", Case([REFS[0] | {"sentences": [
        {"sent_id": 1, "sent": "", "tokens": itself}]}], says="ref 0")  # fmt: skip
    yield "the same two lists sixty times over", Case([REFS[0] | {"split": laughs}], says="'split' is a list")
    yield "the same as an extra field", Case([REFS[0] | {"extra": laughs}], says="nested too deeply")
    yield "in a sentence", Case([REFS[0] | {"sentences": [REFS[0]["sentences"][0] | {"extra": laughs}]}], says="nested")
    yield "an extra field nested deeply", Case([REFS[0] | {"extra": deep}], says="nested too deeply")
    yield "an extra field", Case([REFS[0] | {"extra": [{"a": (1, {2})}]}], refs_good=True, good=True)
    yield "the same ref again", Case([REFS[0], REFS[0]], says="ref_id 0 is a duplicate")
    yield "lists 100000 deep", Case(b"(" * 10**5 + b"]" + b"l" * 10**5 + b".")
    yield "tuples 100000 deep as a key", Case(b"})" + b"\x85" * 10**5 + b"Ns.", says="a tuple as dictionary key")
    yield "frozensets deep in a set", Case(b"\x8f(" + b"(" * 10**4 + b"\x91" * 10**4 + b"\x90.", says="set member")
    yield "keys with equal hashes", Case(b"}(" + b"".join(b"\x8a\x10" + ((2**61 - 1) * i).to_bytes(16, "little") + b"N"
                                                          for i in range(1, 20000)) + b"u.", says="bits")  # fmt: skip
    yield "a hundred thousand marks", Case(b"(" * 10**5 + b".")
    yield "a hundred thousand lists", Case(b"]" * 10**5 + b".", refs_good=True, good=True)
    for name, data in {
        "BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**62), "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**40),
        "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**33), "LONG4": b"\x8b\xff\xff\xff\x7f",
        "BINSTRING": b"T\xff\xff\xff\xff", "BINUNICODE": b"X\xff\xff\xff\xff", "FRAME": b"\x80\x04\x95" + b"\xff" * 8,
        "LONG_BINGET": b"j\xff\xff\xff\xff.", "GET": b"g99999999999\n.", "INT": b"I" + b"9" * 10**6 + b"\n.",
        "LONG": b"L" + b"9" * 10**6 + b"L\n.",
        "PUT of digits": b"Np" + b"9" * 10**6 + b"\n.", "GET -1": b"g-1\n.", "PROTO 255": b"\x80\xff(.",
    }.items():  # fmt: skip
        yield f"huge count in {name}", Case(data)
    empty = pickle.dumps([], 2)[:-1]
    yield "huge index in LONG_BINPUT", Case(empty + b"r\xff\xff\xff\xff.", refs_good=True, good=True)
    yield "huge index in PUT", Case(empty + b"p4000000000\n.", refs_good=True, good=True)


def strange_encodings() -> Iterator[tuple[str, Case]]:
    """Files that are compressed, encoded or formatted in other ways than usual."""
    whole = pickle.dumps(REFS, 2)
    yield "gzip", Case(gzip.compress(whole), says="unknown opcode 0x1f")
    yield "a web page", Case(b"<!DOCTYPE html>\n<title>404</title>", says="not a readable pickle")
    yield "JSON called .p", Case(json.dumps(REFS).encode())
    yield "UTF-16 pickle", Case(pickle.dumps(REFS, 0).decode("latin-1").encode("utf-16"))
    yield "byte order mark", Case(b"\xef\xbb\xbf" + whole)
    yield "Windows line ends", Case(pickle.dumps(REFS, 0).replace(b"\n", b"\r\n"))
    yield "text behind the end", Case(whole + b"cos\nsystem\n(S'touch canary'\ntR.", refs_good=True, good=True)
    half = [REFS[0] | {"split": "\ud800"}]
    yield "half a character", Case(half, says="invalid split name")
    yield "half a character in a sentence", Case([REFS[0] | {"file_name": "\udcff"}], says="unpaired surrogate")
    yield "a line end in a split", Case([REFS[0] | {"split": "a\nb"}], says="invalid split name")
    yield "an escape sequence in a split", Case([REFS[0] | {"split": "\x1b[2J"}], says="invalid split name")
    yield (
        "half a character in JSON",
        Case(json.dumps([GREFS[0] | {"split": "\ud800"}]).encode(), name="grefs(unc).json"),
    )
    grefs, instances = json.dumps(GREFS), json.dumps(INSTANCES)
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        yield f"grefs in {encoding}", Case(grefs.encode(encoding), refs_good=True, good=True, name="grefs(unc).json")
        yield f"instances in {encoding}", Case(instances=instances.encode(encoding), refs_good=True, good=True)
    for name, data in {
        "latin-1": '["caf\xe9"]'.encode("latin-1"), "zeros": b"\x00" * 100, "random": bytes(range(256)), "nothing": b"",
        "deep lists": b"[" * 10**5, "deep objects": b'{"a":' * 10**5, "deep and whole": b"[" * 10**5 + b"]" * 10**5,
        "digits": b"9" * 10**5, "NaN": b"NaN", "a number": b"7", "text": b'"images"', "null": b"null",
        "a list": b"[[]]", "a comma too many": b"[{},]", "single quotes": b"{'images': []}", "two values": b"[] []",
        "a comment": b"// x\n[]", "half a character": b'{"images": "\\ud800"}', "pickle": whole,
    }.items():  # fmt: skip
        yield f"grefs of {name}", Case(data, name="grefs(unc).json")
        yield f"instances of {name}", Case(instances=data, refs_good=True)


def ids_and_instances() -> Iterator[tuple[str, Case]]:
    """Broken instances.json, and unusual ids."""

    def case(change: Callable[[dict[str, Any]], Any], good: bool = False, says: str = "") -> Case:
        """Good refs with instances that a function changes in place."""
        instances = json.loads(json.dumps(INSTANCES))
        change(instances)
        return Case(instances=instances, refs_good=True, good=good, says=says)

    lists = {"null": None, "an object": {}, "text": "x", "a list of null": [None], "a list of lists": [[]]}
    wrong = {"text": "3", "true": True, "null": None, "a fraction": 3.5, "a list": [3], "long": 2**70}
    for key in ("images", "annotations", "categories"):
        yield f"no {key}", case(lambda i, k=key: i.pop(k), says=f"no list '{key}'")  # type: ignore[misc]
        for name, value in lists.items():
            yield f"{key} {name}", case(lambda i, k=key, v=value: i.update({k: v}))  # type: ignore[misc]
        for name, value in wrong.items():
            yield f"id of {key} is {name}", case(lambda i, k=key, v=value: i[k][0].update(id=v))  # type: ignore[misc]
        yield f"{key} without id", case(lambda i, k=key: i[k][0].pop("id"))  # type: ignore[misc]
        yield f"{key} twice", case(lambda i, k=key: i[k].append(i[k][0]), says="is a duplicate")  # type: ignore[misc]
    yield "annotation without image", case(lambda i: i["annotations"][0].pop("image_id"))
    yield "category without name", case(lambda i: i["categories"][0].pop("name"))
    yield (
        "annotation of a ref is missing",
        case(lambda i: i["annotations"].pop(0), says="ref 3 has annotation 6, which is not in"),
    )
    yield "image of a ref is missing", case(lambda i: i["images"].pop(0), says="has image 3, which is not in")
    yield (
        "annotation elsewhere",
        case(lambda i: i["annotations"][0].update(image_id=3), says="annotation 6 has image 3"),
    )
    yield "NaN in a box", case(lambda i: i["annotations"][0].update(bbox=[float("nan")] * 4), good=True)
    yield "infinity as area", case(lambda i: i["annotations"][0].update(area=float("inf")), good=True)
    repeated = json.dumps(INSTANCES)[:-1] + ', "images": ' + json.dumps(INSTANCES["images"]) + "}"
    yield "a key twice", Case(instances=repeated.encode(), refs_good=True, good=True)
    yield "negative ids", Case([ref(-1, 7, 3, "val")], refs_good=True, good=True)
    yield "the greatest id", Case([ref(0, 7, 3, "val") | {"ref_id": 2**63 - 1}], refs_good=True, good=True)
    yield (
        "sentence ids twice",
        Case([ref(0, 7, 3, "val"), ref(0, 8, 3, "val") | {"ref_id": 1}], refs_good=True, good=True),
    )
    yield "an annotation for two refs", Case([ref(0, 7, 3, "val"), ref(1, 7, 3, "val")], refs_good=True, good=True)
    yield "no sentences", Case([REFS[3] | {"sentences": [], "sent_ids": []}], refs_good=True, good=True)
    yield "a target and none", Case([GREFS[0] | {"ann_id": [-1, 7]}], name="grefs(unc).json", refs_good=True, good=True)


CASES = {
    name: case
    for group in (pickles_with_code, cut_files, wrong_types, strange_structures, strange_encodings, ids_and_instances)
    for name, case in group()
}
