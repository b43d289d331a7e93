"""The reader of MOO files: what it takes, and the one line it says about what it does not."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from emufuzz.case import moo as module
from emufuzz.case.errors import CaseError
from emufuzz.case.moo import REGISTERS_16, MooTest, is_moo, open_moo
from tests.support.moo import (
    START_16,
    START_32,
    chunk,
    counted,
    cycles,
    header,
    moo,
    one_test,
    ram,
    registers,
    state,
)

ADD = bytes.fromhex("01d8f4")
AFTER = {"rax": 3, "rip": 0x103, "rflags": 6}


def write(folder: Path, data: bytes, name: str = "01.MOO") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def read_all(folder: Path, data: bytes, name: str = "01.MOO") -> list[MooTest]:
    return list(open_moo(write(folder, data, name)).tests())


def parts(**changes: bytes) -> list[bytes]:
    """The chunks of a valid TEST by type, some of them replaced; empty bytes leave one out."""
    given = {
        "BYTS": counted("BYTS", ADD),
        "INIT": state("INIT", START_16, {0x10100: 1}),
        "FINA": state("FINA", AFTER, {}),
    } | changes
    return [struct.pack("<I", 7), *given.values()]


def a_test(**changes: bytes) -> bytes:
    return chunk("TEST", *parts(**changes))


def test_a_test_is_read_with_all_its_parts(tmp_path: Path) -> None:
    more = [cycles([0x10100, 0x20000, 0x20000]), chunk("HASH", bytes(range(20))), chunk("GMET", bytes(10))]
    code = one_test(ADD, AFTER, written={0x20000: 9}, exception=(13, 0x307FE), number=7, more=more)
    (test,) = read_all(tmp_path, moo(chunk("META", bytes(31)), code, count=1))
    assert (test.number, test.name, test.code) == (7, "test", ADD)
    assert tuple(test.initial.registers) == REGISTERS_16
    assert test.initial.registers == START_16
    assert test.initial.ram == {0x10100: 0x01, 0x10101: 0xD8, 0x10102: 0xF4}
    assert test.final.registers == AFTER
    assert test.final.ram == {0x20000: 9}
    assert test.exception == (13, 0x307FE)
    assert test.latched == {0x10100, 0x20000}
    assert test.hash == bytes(range(20)).hex()


def test_registers_of_32_bits_and_the_memory_operand(tmp_path: Path) -> None:
    place = chunk("EA32", struct.pack("<BHIIIII", 1, 0x3000, 0x30000, 0xFFFF, 0x61, 0x30061, 0x30061))
    code = one_test(ADD, {"rip": 0x103}, wide=True, init=[place, chunk("DC32", b"")])
    (test,) = read_all(tmp_path, moo(code, cpu="386E"))
    assert test.initial.wide
    assert test.initial.registers == START_32
    assert test.initial.address == (0x3000, 0x30000, 0xFFFF, 0x61)
    assert test.initial.unknown == ("DC32",)


def test_masks_of_undefined_bits_are_read_and_do_not_count(tmp_path: Path) -> None:
    final = state("FINA", AFTER, {}, registers("RMSK", {"rflags": 0xFFEF}))
    (test,) = read_all(tmp_path, moo(registers("RMSK", {"rflags": 0}), a_test(FINA=final), count=1))
    assert test.final.registers == AFTER


def test_of_two_entries_for_a_byte_the_later_one_counts(tmp_path: Path) -> None:
    doubled = counted("RAM ", struct.pack("<IBIB", 5, 1, 5, 2), 2)
    final = chunk("FINA", registers("REGS", AFTER), doubled)
    (test,) = read_all(tmp_path, moo(a_test(FINA=final)))
    assert test.final.ram == {5: 2}


def test_both_versions_and_longer_headers_are_read(tmp_path: Path) -> None:
    longer = bytearray(header(1) + bytes(4))
    longer[4:8] = struct.pack("<I", 16)
    assert len(read_all(tmp_path, moo(a_test(), version=(1, 0)))) == 1
    assert len(read_all(tmp_path, bytes(longer) + a_test())) == 1


def test_gzip_is_known_by_its_contents_and_moo_by_its_name(tmp_path: Path) -> None:
    assert len(read_all(tmp_path, gzip.compress(moo(a_test())), "01.MOO.gz")) == 1
    assert len(read_all(tmp_path, gzip.compress(moo(a_test())), "01.moo")) == 1
    assert [is_moo(name) for name in ("a.MOO", "a.moo.gz", Path("b.Moo.GZ"), "moo", "a.jsonl.zst")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_an_empty_file_of_no_tests_is_a_file(tmp_path: Path) -> None:
    assert read_all(tmp_path, moo()) == []


FILES = {
    "nothing at all": (b"", "the first chunk is not MOO"),
    "another format": (b"RIFF" + bytes(12), "the first chunk is not MOO"),
    "a cut header": (b"MOO \x0c", "5 bytes at the end are too few for a chunk"),
    "a short header": (chunk("MOO ", bytes(11)), "MOO : 11 bytes, at least 12 are needed"),
    "a new version": (header(0, version=(2, 0)), "MOO : version 2.0 is not known"),
    "too many tests": (header(0xFFFFFFFF), "MOO : 4294967295 tests are too many"),
    "a binary name": (header(0, cpu="\x01"), "MOO : processor: b'.x01   ' is not printable ASCII"),
    "fewer tests": (moo(a_test(), count=2), "MOO : 2 tests announced, 1 found"),
    "more tests": (moo(a_test(), a_test(), count=1), "MOO : 1 tests announced, 2 found"),
    "a truncated test": (moo(a_test())[:-1], r"TEST: length \d+, but only \d+ bytes are left"),
    "a huge length": (header(1) + struct.pack("<4sI", b"TEST", 0xFFFFFFFF), "length 4294967295, but only 0 "),
    "a binary type": (header(1) + bytes(8), "chunk type: .* is not printable ASCII"),
    "a bad mask": (
        header(0) + chunk("RMSK", b"\xff\xff"),
        "RMSK: mask 0xffff has bits for which there is no",
    ),
    "a broken gzip": (gzip.compress(moo(a_test()))[:-9], "not readable as gzip: "),
    "a gzip with a bad checksum": (gzip.compress(moo())[:-8] + bytes(8), "not readable as gzip: "),
    "a gzip of nonsense": (gzip.compress(moo())[:10] + b"\xff" * 40, "not readable as gzip: "),
}


@pytest.mark.parametrize(("data", "reason"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_one_line(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(CaseError, match=reason) as caught:
        read_all(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path / '01.MOO'}: ")
    assert "\n" not in str(caught.value)


def _init(*chunks: bytes) -> bytes:
    return chunk("INIT", *chunks)


REGS = registers("REGS", START_16)
TESTS = {
    "no code": ({"BYTS": b""}, "BYTS: missing"),
    "empty code": ({"BYTS": counted("BYTS", b"")}, "BYTS: empty"),
    "long code": ({"BYTS": counted("BYTS", bytes(65))}, "BYTS: count 65 is too large"),
    "a huge count": ({"BYTS": counted("BYTS", b"", 0xFFFFFFFF)}, "BYTS: count 4294967295 is too large"),
    "no count": ({"BYTS": chunk("BYTS", b"\x01")}, "BYTS: 1 bytes are too few for a count"),
    "a wrong count": ({"NAME": counted("NAME", b"abc", 2)}, "NAME: 3 bytes, 2 entries of 1 need 2"),
    "a binary name": ({"NAME": counted("NAME", b"a\nb")}, "NAME: .* is not printable ASCII"),
    "no initial state": ({"INIT": b""}, "INIT: missing"),
    "no final state": ({"FINA": b""}, "FINA: missing"),
    "no registers": ({"INIT": _init(ram({}))}, "INIT: exactly one of REGS and RG32 is needed, got 0"),
    "two sizes": ({"INIT": _init(REGS, registers("RG32", {}))}, "INIT: exactly one of REGS .* got 2"),
    "twice": ({"INIT": _init(REGS, REGS)}, "INIT: REGS: given twice"),
    "a missing register": ({"INIT": _init(registers("REGS", AFTER))}, "INIT: registers: rbx is missing"),
    "another size": ({"FINA": state("FINA", {}, {}, wide=True)}, "FINA: registers of another size than in"),
    "an empty mask": ({"INIT": _init(chunk("REGS", b"\x01"))}, "INIT: REGS: 1 bytes are too few for a mask"),
    "a wide mask": ({"INIT": _init(chunk("RG32", b"\0\0\x10\0"))}, "INIT: RG32: mask 0x100000 has bits for"),
    "few values": (
        {"INIT": _init(REGS[:4] + b"\x1c" + REGS[5:-2])},
        "INIT: REGS: 28 bytes, mask 0x3fff needs",
    ),
    "much memory": (
        {"INIT": _init(REGS, counted("RAM ", b"", 65537))},
        "INIT: RAM : count 65537 is too large",
    ),
    "short memory": (
        {"INIT": _init(REGS, counted("RAM ", bytes(9), 2))},
        "INIT: RAM : 9 bytes, 2 entries of 5 ",
    ),
    "a long queue": ({"INIT": _init(REGS, counted("QUEU", bytes(65)))}, "INIT: QUEU: count 65 is too large"),
    "a short operand": ({"INIT": _init(REGS, chunk("EA32", b"\0"))}, "INIT: EA32: 1 bytes, 23 are needed"),
    "a short exception": ({"EXCP": chunk("EXCP", b"\x0d")}, "EXCP: 1 bytes, 5 are needed"),
    "a short hash": ({"HASH": chunk("HASH", bytes(19))}, "HASH: 19 bytes, 20 are needed"),
    "cut cycles": ({"CYCL": counted("CYCL", bytes(16), 1)}, "CYCL: 16 bytes, 1 entries of 15 need 15"),
    "a cut chunk": ({"JUNK": b"NAME\x01"}, "5 bytes at the end are too few for a chunk"),
}


@pytest.mark.parametrize(("changes", "reason"), TESTS.values(), ids=TESTS.keys())
def test_a_bad_test_is_named(tmp_path: Path, changes: dict[str, bytes], reason: str) -> None:
    with pytest.raises(CaseError, match=f"01.MOO: TEST 1: {reason}") as caught:
        read_all(tmp_path, moo(a_test(), a_test(**changes)))
    assert "\n" not in str(caught.value)


def test_a_test_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="TEST 0: 3 bytes are too few"):
        read_all(tmp_path, moo(chunk("TEST", bytes(3))))


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE", 1 << 20)
    with pytest.raises(CaseError, match="more than 1 MiB"):
        open_moo(write(tmp_path, gzip.compress(moo() + bytes(2 << 20))))
    assert open_moo(write(tmp_path, gzip.compress(moo()))).announced == 0


def test_every_truncation_of_a_file_is_an_error_or_a_shorter_file(tmp_path: Path) -> None:
    whole = moo(one_test(ADD, AFTER, written={1: 2}, exception=(13, 5), more=[cycles([1])]))
    for size in range(len(whole)):
        with pytest.raises(CaseError):
            read_all(tmp_path, whole[:size])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"00\.MOO: No such file"):
        open_moo(tmp_path / "00.MOO")
