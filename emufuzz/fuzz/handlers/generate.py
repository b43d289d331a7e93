"""Instructions that exit, with operands and machines that make their handlers do all they can."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple

from emufuzz.arch import cr
from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDX,
    VCPU_SREG_DS,
)
from emufuzz.case.model import Case
from emufuzz.case.values import boundary
from emufuzz.fuzz.handlers import operands as op
from emufuzz.fuzz.handlers.draft import Draft, new_draft, use_physical, use_shadow_paging

_SEGMENT_PREFIXES: Final = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_DATA: Final = 0x8000
_LONG_ONLY: Final = ("prot64",)


class Kind(NamedTuple):
    """One kind of instruction: how often it is generated, whether it is privileged, and its maker."""

    weight: int
    privileged: bool
    make: Callable[[Draft], None]
    modes: tuple[str, ...] = ()


# -- encoding ------------------------------------------------------------------------------------


def _prefixed(draft: Draft, opcode: bytes, *, rex: int = 0) -> bytes:
    """The opcode with prefixes that change nothing, sometimes."""
    rng = draft.rng
    prefixes = b""
    if rng.random() < 0.15:
        prefixes += bytes([rng.choice(_SEGMENT_PREFIXES)])
    if rng.random() < 0.1:
        prefixes += b"\x66"
    if rng.random() < 0.02:
        prefixes += b"\xf0"
    if draft.long and (rex or rng.random() < 0.1):
        prefixes += bytes([0x40 | rex | (rng.getrandbits(1) << 3)])
    return prefixes + opcode


def _register_form(draft: Draft, opcode: bytes, number: int, register: int) -> bytes:
    """MOV with a control or debug register: `number` in ModRM.reg, any ModRM.mod."""
    modrm = draft.rng.choice((0xC0, 0xC0, 0x00, 0x80)) | (number & 7) << 3 | register & 7
    return _prefixed(draft, opcode + bytes([modrm]), rex=number >> 3 << 2 | register >> 3)


def _any_register(draft: Draft) -> int:
    """A GPR that the mode can name; not RSP, whose value the layout fixes."""
    return draft.rng.choice([reg for reg in range(16 if draft.long else 8) if reg != 4])


def _memory_operand(draft: Draft, opcode: bytes, reg: int, address: int) -> bytes:
    """ModRM with an absolute address of the mode's default size."""
    if draft.mode in ("real", "vm86", "prot16", "compat16"):
        return opcode + bytes([reg << 3 | 6]) + (address & 0xFFFF).to_bytes(2, "little")
    low = (address & 0xFFFFFFFF).to_bytes(4, "little")
    if draft.long:
        return opcode + bytes([reg << 3 | 4, 0x25]) + low
    return opcode + bytes([reg << 3 | 5]) + low


# -- control and debug registers -----------------------------------------------------------------


def _mov_to_cr(draft: Draft) -> None:
    rng = draft.rng
    number = rng.choice((0, 0, 0, 4, 4, 4, 3, 3, 8, 2, rng.randrange(16)) if draft.long else (0, 0, 4, 4, 3))
    register = _any_register(draft)
    op.vary_paging(draft)
    draft.gpr[register] = op.control_value(draft, number)
    draft.code = _register_form(draft, b"\x0f\x22", number, register)


def _mov_from_cr(draft: Draft) -> None:
    number = draft.rng.choice((3, 3, 8, 8, 0, 2, 4) if draft.long else (3, 3, 0))
    op.vary_paging(draft)
    draft.changes["cr8"] = draft.rng.randrange(16)
    draft.code = _register_form(draft, b"\x0f\x20", number, _any_register(draft))


def _lmsw(draft: Draft) -> None:
    rng = draft.rng
    op.vary_paging(draft)
    if rng.getrandbits(1):
        register = _any_register(draft)
        draft.code = _prefixed(draft, bytes([0x0F, 0x01, 0xF0 | register & 7]), rex=register >> 3)
    else:
        draft.code = _memory_operand(draft, b"\x0f\x01", 6, _DATA + rng.randrange(0x200))


def _clts(draft: Draft) -> None:
    draft.code = b"\x0f\x06"


def _mov_dr(draft: Draft) -> None:
    rng = draft.rng
    number = rng.choice((*range(8), 4, 5, 6, 6, 7, 7, *((12,) if draft.long else ())))
    register = _any_register(draft)
    draft.gpr[register] = op.debug_value(draft)
    op.vary_debug_registers(draft)
    if "guest_debug" not in draft.kvm and rng.getrandbits(1):
        draft.kvm["guest_debug"] = 1
    draft.code = _register_form(draft, rng.choice((b"\x0f\x21", b"\x0f\x23")), number, register)


# -- CPUID, MSRs, counters, XCR0 -----------------------------------------------------------------


def _cpuid(draft: Draft) -> None:
    rng = draft.rng
    draft.gpr[VCPU_REGS_RAX] = op.cpuid_leaf(rng)
    if rng.getrandbits(1):
        draft.gpr[VCPU_REGS_RCX] = rng.randrange(8)
    if rng.random() < 0.3:
        draft.changes["msr"] = ((0x140, 1),)
    draft.code = _prefixed(draft, b"\x0f\xa2")


def _rdmsr(draft: Draft) -> None:
    op.choose_msr(draft)
    draft.code = _prefixed(draft, b"\x0f\x32")


def _wrmsr(draft: Draft) -> None:
    op.choose_msr(draft)
    op.choose_msr_value(draft)
    draft.code = _prefixed(draft, b"\x0f\x30")


def _rdpmc(draft: Draft) -> None:
    rng = draft.rng
    draft.gpr[VCPU_REGS_RCX] = rng.choice(
        (rng.randrange(8), 1 << 30 | rng.randrange(5), 0x10000 + rng.randrange(4), boundary(rng, 32))
    )
    draft.knobs["enable_pmu"] = rng.random() < 0.7
    if rng.getrandbits(1):
        draft.changes["cr4"] = draft.system.cr4 | cr.X86_CR4_PCE
    if rng.random() < 0.3:
        draft.knobs["enable_vmware_backdoor"] = True
    draft.code = _prefixed(draft, b"\x0f\x33")


def _xsetbv(draft: Draft) -> None:
    rng = draft.rng
    draft.gpr[VCPU_REGS_RCX] = rng.choice((0, 0, 0, 1 << 32, 1, boundary(rng, 32)))
    draft.gpr[VCPU_REGS_RAX] = rng.choice((1, 3, 7, 0xE7, 0x1B, 0x1F, 0x63, 2, 0, boundary(rng, 64)))
    draft.gpr[VCPU_REGS_RDX] = rng.choice((0, 0, 0, 1 << 32, boundary(rng, 32)))
    if rng.random() < 0.9:
        draft.changes["cr4"] = draft.system.cr4 | cr.X86_CR4_OSXSAVE
    if rng.getrandbits(1):
        draft.kvm["cpuid"] = {"leaves": [{"function": 0xD, "eax": rng.choice((0xFF, 0x7, 0x1F)), "edx": 0}]}
    draft.code = b"\x0f\x01\xd1"


# -- ports, halting, hypercalls, the rest --------------------------------------------------------


def _port(draft: Draft) -> None:
    rng = draft.rng
    opcode = rng.choice((0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF))
    port = rng.choice((0x7E, 0x7E, 0x60, 0x80, 0x3F8, 0x3FF, 0x5658, boundary(rng, 16)))
    draft.gpr[VCPU_REGS_RDX] = port | rng.getrandbits(16) << 16
    tail = bytes([port & 0xFF]) if opcode < 0xE8 else b""
    repeat = rng.choice((b"", b"", b"", b"", b"\xf3", b"\xf2"))
    draft.code = repeat + _prefixed(draft, bytes([opcode]) + tail)
    draft.port_in = rng.randbytes(8)
    if rng.random() < 0.3:
        draft.extra["devices"] = [
            {"kind": "pio", "port": 0x60, "size": 64, "behaviour": "ram", "reads": rng.randbytes(32).hex()}
        ]
    if rng.random() < 0.2:
        draft.kvm["ioeventfds"] = [{"addr": hex(rng.choice((0x7E, 0x80, port))), "port": True}]
    if rng.random() < 0.2:
        draft.knobs["disabled_quirks"] = "out_7e_inc_rip"


def _hlt(draft: Draft) -> None:
    op.maybe_apic(draft)
    if draft.rng.random() < 0.05:
        draft.knobs["hlt_in_guest"] = True
    draft.code = _prefixed(draft, b"\xf4")


def _invlpg(draft: Draft) -> None:
    rng = draft.rng
    use_shadow_paging(draft)
    if rng.random() < 0.4:
        draft.knobs["host_la57"] = True
    op.vary_data_segment(draft, VCPU_SREG_DS)
    if rng.getrandbits(1):
        draft.code = _memory_operand(draft, b"\x0f\x01", 7, rng.choice((_DATA, 0xFFF, boundary(rng, 32))))
        return
    draft.gpr[VCPU_REGS_RBX] = op.linear_address(draft)
    segment = bytes([rng.choice(_SEGMENT_PREFIXES)]) if rng.random() < 0.4 else b""
    modrm = 7 if draft.mode in ("real", "vm86", "prot16", "compat16") else 3  # [bx] or [ebx], [rbx]
    draft.code = segment + bytes([0x0F, 0x01, 7 << 3 | modrm])


def _vmcall(draft: Draft) -> None:
    op.choose_hypercall(draft)
    if draft.rng.random() < 0.2:
        draft.knobs["disabled_quirks"] = "fix_hypercall_insn"
    draft.code = b"\x0f\x01\xd9" if draft.rng.random() < 0.1 else b"\x0f\x01\xc1"


def _cache(draft: Draft) -> None:
    draft.code = _prefixed(draft, draft.rng.choice((b"\x0f\x08", b"\x0f\x09")))


def _monitor(draft: Draft) -> None:
    rng = draft.rng
    if rng.random() < 0.3:
        draft.knobs["disabled_quirks"] = "mwait_never_ud_faults"
    if rng.random() < 0.3:
        draft.kvm["cpuid"] = {"features": {"mwait": True}}
    if rng.random() < 0.05:
        draft.knobs["mwait_in_guest"] = True
    if rng.random() < 0.2:
        draft.knobs["exit_on_emulation_error"] = True
    draft.code = rng.choice((b"\x0f\x01\xc8", b"\x0f\x01\xc9"))


def _pause(draft: Draft) -> None:
    draft.code = b"\xf3\x90"


# fmt: off
KINDS: Final = {
    "mov-to-cr":   Kind(24, True,  _mov_to_cr),
    "mov-to-cr64": Kind( 8, True,  _mov_to_cr, _LONG_ONLY),
    "mov-from-cr": Kind( 6, True,  _mov_from_cr),
    "lmsw":        Kind( 6, True,  _lmsw),
    "clts":        Kind( 1, True,  _clts),
    "mov-dr":      Kind(18, True,  _mov_dr),
    "cpuid":       Kind( 8, False, _cpuid),
    "rdmsr":       Kind(12, True,  _rdmsr),
    "wrmsr":       Kind(20, True,  _wrmsr),
    "rdpmc":       Kind( 4, False, _rdpmc),
    "xsetbv":      Kind( 6, True,  _xsetbv),
    "port":        Kind(16, False, _port),
    "hlt":         Kind( 6, True,  _hlt),
    "invlpg":      Kind( 6, True,  _invlpg),
    "vmcall":      Kind( 8, False, _vmcall),
    "invd-wbinvd": Kind( 2, True,  _cache),
    "monitor":     Kind( 3, True,  _monitor),
    "pause":       Kind( 1, True,  _pause),
}
# fmt: on
_NAMES: Final = tuple(KINDS)
_WEIGHTS: Final = tuple(kind.weight for kind in KINDS.values())


def generate(seed: int, number: int) -> tuple[str, Case]:
    """Case `number` of a seed, and the kind of its instruction; the path is `exit`."""
    rng = Random(seed << 32 | number)
    name = rng.choices(_NAMES, _WEIGHTS)[0]
    kind = KINDS[name]
    draft = new_draft(rng, privileged=kind.privileged, **({"modes": kind.modes} if kind.modes else {}))
    kind.make(draft)
    if name in ("mov-to-cr", "mov-to-cr64", "mov-from-cr"):
        _choose_memory(draft)
    return name, draft.finish(f"handlers-{seed}-{number}")


def _choose_memory(draft: Draft) -> None:
    """CR3 exits without EPT, or without unrestricted guest where paging is off."""
    roll = draft.rng.random()
    if roll < 0.3:
        use_shadow_paging(draft)
    elif roll < 0.5:
        use_physical(draft)
    elif roll < 0.65:
        draft.knobs["unrestricted_guest"] = False
