"""The unpickler of plain values: every plain opcode, Python 2's pickles, and what it refuses."""

from __future__ import annotations

import pickle
import pickletools
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refer import ReferDataError
from refer.plain_unpickler import PlainUnpickler
from refer.safe_pickle import _is_simple, loads

pytestmark = pytest.mark.slow

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
)  # fmt: skip
KEYS = SCALARS | st.binary(max_size=20)
PLAIN = st.recursive(
    KEYS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=5)
        | st.sets(KEYS, max_size=5)
        | st.frozensets(KEYS, max_size=5)
    ),
    max_leaves=30,
)
JSON_LIKE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(SCALARS, inner, max_size=5), max_leaves=30
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=PLAIN, protocol=st.integers(3, 5))
def test_plain_values_round_trip(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert loads(data) == value and PlainUnpickler(data).load() == value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=JSON_LIKE, protocol=st.integers(0, 5), shared=st.booleans())
def test_lists_and_dictionaries_round_trip_in_every_protocol(value: Any, protocol: int, shared: bool) -> None:
    value = [value, value] if shared else value
    data = pickle.dumps(value, protocol)
    assert loads(data) == value == PlainUnpickler(data).load()
    assert type(loads(data)) is type(value)


def test_pickles_of_refs_are_read_by_the_fast_path() -> None:
    refs = [{"a": [1, 2.5, None, True, -(2**31), 2**40], "b": "x" * 300, "caf\xe9": {"d": ""}}] * 3
    for protocol in range(6):
        assert _is_simple(pickle.dumps(refs, protocol)), protocol
        assert not _is_simple(pickle.dumps([*refs, (1,)], protocol)), protocol


# Pickles as Python 2 writes them, where '...' is a byte string and u'...' text.
PYTHON2 = [
    (b"S'caf\\xc3\\xa9'\np1\n.", "caf\xe9"),  # UTF-8
    (b"S'caf\\xe9'\np1\n.", "caf\xe9"),  # latin-1
    (b"S\"it's \\\\ \\n\"\np1\n.", "it's \\ \n"),
    (b"S'plain'\n.", "plain"),
    (b"Vcaf\\u00e9 \\u4e2d\np1\n.", "caf\xe9 \u4e2d"),
    (b"Vcaf\xe9\np1\n.", "caf\xe9"),
    (b"V\\ud83d\\ude00\np1\n.", "\U0001f600"),  # a surrogate pair, as written by narrow builds
    (b"V\\U0001f600\np1\n.", "\U0001f600"),
    (b"\x80\x02U\x05caf\xc3\xa9q\x01.", "caf\xe9"),
    (b"\x80\x02U\x04caf\xe9q\x01.", "caf\xe9"),
    (b"\x80\x02T\x05\x00\x00\x00caf\xc3\xa9q\x01.", "caf\xe9"),
    (b"\x80\x02X\x05\x00\x00\x00caf\xc3\xa9q\x01.", "caf\xe9"),
    (b"T\x03\x00\x00\x00abc.", "abc"),
    (b"I42\n.", 42), (b"I-7\n.", -7), (b"I01\n.", True), (b"I00\n.", False), (b"L42L\n.", 42), (b"L-42L\n.", -42),
    (b"L9223372036854775807L\n.", 2**63 - 1), (b"F1.5\n.", 1.5), (b"F1e-05\n.", 1e-05), (b"F-2\n.", -2.0),
    (b"\x80\x02\x8a\x08" + struct.pack("<q", -5) + b".", -5), (b"\x80\x02\x8a\x00.", 0), (b"\x80\x02\x8a\x01\xff.", -1),
    (b"\x8b\x01\x00\x00\x00\x05.", 5),
    (b"G?\xf8\x00\x00\x00\x00\x00\x00.", 1.5),
    (b"(lp0\nI1\naI2\na.", [1, 2]), (b"(I1\nI2\nl.", [1, 2]), (b"(dp0\nS'a'\nI1\ns.", {"a": 1}),
    (b"(S'a'\nI1\nd.", {"a": 1}), (b"(t.", ()), (b"(I1\nt.", (1,)), (b").", ()), (b"](K\x01K\x02e.", [1, 2]),
    (b"}(U\x01aK\x01u.", {"a": 1}), (b"K\x01\x85.", (1,)), (b"K\x01K\x02\x86.", (1, 2)),
    (b"K\x01K\x02K\x03\x87.", (1, 2, 3)),
    (b"c__builtin__\nset\np0\n((lp1\nI1\natp2\nRp3\n.", {1}),
    (b"\x80\x02c__builtin__\nset\nq\x01]q\x02(K\x01K\x02e\x85q\x03Rq\x04.", {1, 2}),
    (b"\x80\x02c__builtin__\nfrozenset\n]K\x01a\x85R.", frozenset([1])),
    (b"\x80\x02c__builtin__\nset\n)R.", set()),
    (b"(lp0\nS'twice'\np1\nag1\na.", ["twice", "twice"]),
    (b"\x80\x02]q\x00(U\x01ar\x05\x01\x00\x00j\x05\x01\x00\x00h\x00e0I5\n.", 5),
    (b"(I1\nI2\n1K\x03.", 3), (b"K\x032\x86.", (3, 3)), (b"N.", None), (b"\x88.", True), (b"K\x010\x89.", False),
    (b"M\x00\x01.", 256), (b"J\xff\xff\xff\xff.", -1), (b"K\x07.bytes after STOP are not read", 7),
]  # fmt: skip


@pytest.mark.parametrize(("data", "value"), PYTHON2, ids=[ascii(data[:30]) for data, _ in PYTHON2])
def test_opcodes_of_python_2(data: bytes, value: Any) -> None:
    for found in (loads(data), PlainUnpickler(data).load()):
        assert found == value and type(found) is type(value)


# Opcodes that Python 2 does not write.
PYTHON3 = [
    (b"B\x01\x00\x00\x00a.", b"a"), (b"\x8d" + struct.pack("<Q", 1) + b"a.", "a"), (b"C\x01a.", b"a"),
    (b"\x8e" + struct.pack("<Q", 1) + b"a.", b"a"), (b"\x80\x04\x8c\x08builtins\x8c\x03set\x93]\x85R.", set()),
    (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.", "a"), (b"\x8f(K\x01\x90.", {1}),
    (b"(K\x01\x91.", frozenset([1])), (b"(]K\x01ai__builtin__\nset\n.", {1}),
]  # fmt: skip
REFUSED = ("PERSID", "BINPERSID", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4",
           "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")  # fmt: skip


def test_every_opcode_is_either_read_or_refused() -> None:
    assert all(loads(data) == value for data, value in PYTHON3)
    read = {op for data, _ in PYTHON2 + PYTHON3 for op, _, _ in pickletools.genops(_ascii_strings(data))}
    assert {opcode.name for opcode in pickletools.opcodes} - {opcode.name for opcode in read} == set(REFUSED)
    for code in (o.code.encode("latin-1") for o in pickletools.opcodes if o.name in REFUSED):
        with pytest.raises(ReferDataError, match=r"asks for|truncated"):
            loads(b"](N" + code + b"\x00\x00\x00\x00\x00\x00\x00\x00")


def _ascii_strings(data: bytes) -> bytes:
    """Remove escapes beyond ASCII, which pickletools cannot decode."""
    return data.replace(b"\\xc3\\xa9", b"").replace(b"\\xe9", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "not a readable pickle"),
        (b"\x1f\x8b\x08\x00", "unknown opcode 0x1f at byte 0"),
        (b"PK\x03\x04", "asks for an object by the opcode PERSID at byte 0"),
        (b"cos\nsystem\n(S'x'\ntR.", r"asks for os\.system; only lists"),
        (b"(ios\nsystem\n.", r"asks for os\.system"),
        (b"c\x1b[2J\nevil\nx\n.", r"asks for '\\x1b\[2J\.evil'"),
        (b"cbuiltins\n" + b"a" * 10**6 + b"\n.", r"asks for 'builtins\.a{71}'"),
        (b"c__builtin__\nset\n.", "contains a type as a value"),
        (b"]c__builtin__\nset\na.", "contains a type as a value"),
        (b"c__builtin__\nset\nb.", "asks for an object by the opcode BUILD"),
        (b"c__builtin__\nset\n)\x81.", "opcode NEWOBJ"),
        (b"(c__builtin__\nset\no.", "opcode OBJ"),
        (b"K\x01)R.", "not a readable pickle"),
        (b"c__builtin__\nset\nK\x01\x85R.", "not a readable pickle"),
        (b"c__builtin__\nset\n](\x85a\x85R.", "not a readable pickle"),
        (b"}]K\x01s.", "a list as dictionary key"),
        (b"}K\x01\x85K\x01s.", "a tuple as dictionary key"),
        (b"}(K\x01\x85K\x01u.", "a tuple as dictionary key"),
        (b"(K\x01\x85K\x01d.", "a tuple as dictionary key"),
        (b"\x8f(K\x01\x85\x90.", "set member"),
        (b"(K\x01\x85\x91.", "set member"),
        (b"c__builtin__\nset\n]K\x01\x85a\x85R.", "set member"),
        (
            b"(c__builtin__\nset\nq\x01](" + b"N" * 999 + b"eq\x00" + b"h\x01h\x00\x85R" * 999 + b"l.",
            "more members of sets",
        ),
        (b"(K\x01d.", "not a readable pickle"),
        (b"}(K\x01u.", "not a readable pickle"),
        (b"K\x01K\x02a.", "AttributeError at byte 4, APPEND"),
        (b"(a.", "not a readable pickle"),
        (b".", "IndexError at byte 0, STOP"),
        (b"(.", "not a readable pickle"),
        (b"N" + b"p%d\n" % (9 * (2**61 - 1)) + b".", "more than 64 bits"),
        (b"h\x05.", "UnpicklingError at byte 0, BINGET"),
        (b"g5\n.", "KeyError"),
        (b"q\x00.", "IndexError"),
        (b"I12x\n.", "an invalid integer"),
        (b"I99999999999999999999\n.", "more than 64 bits"),
        (b"L" + b"9" * 10**5 + b"L\n.", "more than 64 bits"),
        (b"\x8b" + struct.pack("<I", 100) + b"\x01" * 100 + b".", "800 bits"),
        (b"\x80\x02\x8a\x09" + b"\xff" * 8 + b"\x00.", "72 bits"),
        (b"F1.5.5\n.", "ValueError"),
        (b"Sno quotes\n.", "UnpicklingError at byte 0, STRING"),
        (b"S'\n.", "UnpicklingError at byte 0, STRING"),
        (b"V\\ud83d\n.", "unpaired surrogate"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80(t\x86.", "unpaired surrogate"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "UnicodeDecodeError"),
    ],
)
def test_errors_give_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(ReferDataError, match=message) as caught:
        loads(data)
    text = str(caught.value)
    assert len(text) < 300 and text.isprintable()


HUGE = {
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**35) + b"abc",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**32) + b"abc",
    "BINUNICODE": b"X\xff\xff\xff\xff",
    "BINBYTES": b"B\xff\xff\xff\x7f",
    "BINSTRING": b"T\xff\xff\xff\x7f",
    "LONG4": b"\x8b\xff\xff\xff\x7f",
    "FRAME": b"\x80\x04\x95" + b"\xff" * 8 + b"N",
    "LONG_BINPUT": b"Nr\xff\xff\xff\xff",
    "LONG_BINPUT, valid": b"Nr\xff\xff\xff\x7f.",
    "PUT": b"Np99999999\n",
    "PUT, valid": b"Np999999999999\n.",
    "LONG_BINGET": b"j\xff\xff\xff\xff.",
    "GET": b"g999999999999\n.",
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_counts_allocate_no_memory(name: str) -> None:
    data = HUGE[name]
    tracemalloc.start()
    try:
        if name.endswith("valid"):
            assert loads(data) is None
        else:
            with pytest.raises(ReferDataError):
                loads(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("make", [list, tuple, dict])
def test_deep_nesting_neither_crashes_nor_hangs(make: type, protocol: int) -> None:
    depth = 100_000
    data = {
        list: b"(" * depth + b"]" + b"l" * depth,
        tuple: b")" + b"\x85" * depth,
        dict: b"(K\x01" * depth + b"}" + b"d" * depth,
    }[make]
    value = loads((b"\x80%c" % protocol if protocol else b"") + data + b".")
    levels = 0
    while value:
        assert type(value) is make
        value, levels = value[1 if make is dict else 0], levels + 1
    assert levels == depth
    with pytest.raises(ReferDataError):  # hashing such a tuple as a key would recurse as deeply
        loads(b"}" + b")" + b"\x85" * depth + b"Ns.")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.binary(max_size=60))
def test_any_bytes_give_a_value_or_an_error(data: bytes) -> None:
    for end in (b"", b"."):
        try:
            loads(data + end)
        except ReferDataError as error:
            assert str(error).isprintable()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=JSON_LIKE, protocol=st.sampled_from([0, 1, 2, 4]), at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_the_fast_path_agrees_with_the_plain_unpickler(value: Any, protocol: int, at: int, byte: int) -> None:
    data = bytearray(pickle.dumps([value, "padding", 3], protocol))
    data[at % len(data)] = byte
    if _is_simple(bytes(data)):
        try:
            expected = PlainUnpickler(bytes(data)).load()
        except ReferDataError:
            expected = ReferDataError
        try:
            assert repr(loads(bytes(data))) == repr(expected)
        except ReferDataError:
            assert expected is ReferDataError
