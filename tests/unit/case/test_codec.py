"""The byte codec: where things lie in an encoded case, and that what old files say does not change."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_REGS_RAX
from emufuzz.arch.rflags import X86_EFLAGS_CF
from emufuzz.case.build import build_case
from emufuzz.case.check import check_system
from emufuzz.case.codec import VERSION, decode_case, encode_case
from emufuzz.case.codec.templates import MEMORIES, memory_of, templates
from emufuzz.case.codec.words import WORDS
from emufuzz.kvm.cpuid import FEATURES
from emufuzz.kvm.options import KvmOptions
from emufuzz.subject.flat.scripted import BOOL_OPS, PORT_OPS, RESULT_OPS, STATUS_OPS

ADD = bytes.fromhex("01d8")
#: What VERSION stands for. If this changes, encoded cases of old mean something else: VERSION has to go up.
TEMPLATES = "be6d9aae4d75"
WORD_LISTS = "7203"


def test_a_plain_case_is_its_template_and_what_it_does():
    case = build_case("prot32", ADD, rax=5)
    number = next(t.number for t in templates() if t.system == case.system)
    assert encode_case(case) == bytes((
        VERSION, number, 0,              # no sections
        2, 0x01, 0xD8,                   # code
        0x31, 0x00, 0x60,                # rip 0x6000
        0,                               # rflags as in the template
        0b10001, 0, 5, 0x31, 0x00, 0xC8, # rax, rsp
    ))  # fmt: skip


def test_no_bytes_are_a_case():
    case = decode_case(b"")
    assert (case.mode, case.code) == ("real", b"")
    assert case == decode_case(bytes(100))


@pytest.mark.parametrize("mode", MODES)
def test_one_byte_changes_one_thing(mode):
    data = encode_case(build_case(mode, ADD, rax=5))
    case = decode_case(data)
    assert case.mode == mode
    other_code = decode_case(data[:4] + b"\x29" + data[5:])
    assert other_code == msgspec.structs.replace(case, code=b"\x29\xd8")
    flags = data.index(0, 6)
    while decode_case(data[:flags] + b"\x01" + data[flags + 1 :]).rflags == case.rflags:
        flags += 1
    assert decode_case(data[:flags] + b"\x01" + data[flags + 1 :]).rflags == case.rflags ^ X86_EFLAGS_CF


def test_the_version_byte_is_information():
    data = encode_case(build_case("prot64", ADD, rax=1))
    assert decode_case(b"\xff" + data[1:]) == decode_case(data)
    assert decode_case(data).gpr[VCPU_REGS_RAX] == 1


def test_a_state_that_vm_entry_refuses_is_kept_as_it_is():
    case = build_case("prot32", ADD)
    system = msgspec.structs.replace(case.system, cr8=16)
    refused = msgspec.structs.replace(case, system=system)
    data = encode_case(refused)
    assert decode_case(data) == refused
    mended = decode_case(data[:2] + bytes((data[2] & ~0x40,)) + data[3:])
    assert mended.system == case.system


def test_templates_are_states_that_vm_entry_accepts():
    for template in templates():
        assert check_system(template.system, template.rflags) == []
    assert {template.mode for template in templates()} == set(MODES)
    assert len(templates()) <= 256


def test_templates_are_those_of_the_version():
    found = hashlib.sha256()
    for template in templates():
        found.update(msgspec.msgpack.encode(tuple(template)))
    for mode in MODES:
        for name in MEMORIES:
            found.update(msgspec.msgpack.encode(memory_of(name, 3, mode)))
    assert (VERSION, found.hexdigest()[:12]) == (1, TEMPLATES)


def test_words_are_those_of_the_version():
    found = hashlib.sha256(repr(WORDS).encode()).hexdigest()
    assert (VERSION, found[:4]) == (1, WORD_LISTS)


def test_words_are_those_of_the_model():
    assert set(WORDS["knobs"]) == set(KvmOptions.__dataclass_fields__)
    assert set(WORDS["features"]) == set(FEATURES)
    assert set(WORDS["op"]) == {*RESULT_OPS, *STATUS_OPS, *PORT_OPS, *BOOL_OPS}
