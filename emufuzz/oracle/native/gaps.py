"""The ledger of the host's processor: what code at CPL 3 in a process of Linux cannot tell.

Every entry has a proof test in tests/unit/oracle/native/test_native_gaps.py that fails once it is not so
any more. Two gaps are met while a case runs, and attached to its outcome.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import CpuidFeature, Mnemonic

from emufuzz.arch.cr import X86_CR0_EM, X86_CR0_NE, X86_CR0_TS, X86_CR4_OSFXSR
from emufuzz.arch.exceptions import PF_VECTOR, SS_VECTOR, UD_VECTOR
from emufuzz.arch.linear import is_canonical
from emufuzz.arch.rflags import (
    X86_EFLAGS_IF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_TF,
    X86_EFLAGS_VIF,
    X86_EFLAGS_VIP,
)
from emufuzz.case.model import PAGE_SHIFT, Outcome, case_pages, code_address
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native.host import Host
from emufuzz.oracle.native.outcomes import GAP_KERNEL_PAGE
from emufuzz.oracle.native.runner import BLOCK, GAP_SYSTEM_CALL
from emufuzz.oracle.native.space import Pages, Setup
from emufuzz.oracle.processor import BASELINE, IDENTITY

_READS_SELECTOR: Final = frozenset((b"\x06", b"\x0e", b"\x16", b"\x1e", b"\x8c", b"\x0f\xa0", b"\x0f\xa8"))
_LOADS_SEGMENT: Final = frozenset(
    (b"\x07", b"\x17", b"\x1f", b"\x8e", b"\x0f\xa1", b"\x0f\xa9", b"\x0f\xb2", b"\x0f\xb4", b"\x0f\xb5",
     b"\x9a", b"\xea", b"\xca", b"\xcb", b"\xcf")
)  # fmt: skip
_PORTS: Final = frozenset((*range(0x6C, 0x70), *range(0xE4, 0xE8), *range(0xEC, 0xF0)))
_SHOWN: Final = X86_EFLAGS_IF | X86_EFLAGS_IOPL | X86_EFLAGS_VIF | X86_EFLAGS_VIP
_PUSH_SEGMENT: Final = frozenset((b"\x06", b"\x0e", b"\x16", b"\x1e", b"\x0f\xa0", b"\x0f\xa8"))
#: What loads or stores a whole state of the x87 FPU, or its environment.
_IMAGES: Final = frozenset(
    (Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64, Mnemonic.FNSAVE,
     Mnemonic.FRSTOR, Mnemonic.FNSTENV, Mnemonic.FLDENV)
)  # fmt: skip
_TABLES: Final = frozenset(
    (Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.STR, Mnemonic.SMSW, Mnemonic.LAR, Mnemonic.LSL,
     Mnemonic.VERR, Mnemonic.VERW)
)  # fmt: skip
#: What KVM does not emulate, so that no leaf tells which flags are undefined.
_ADJUSTS: Final = frozenset((Mnemonic.DAA, Mnemonic.AAA, Mnemonic.AAS))


def _opcode_in(opcodes: frozenset[bytes]) -> Condition:
    return lambda instruction, _: instruction.opcode[:1] in opcodes or instruction.opcode[:2] in opcodes


def _reg(instruction: CaseInstruction) -> int:
    return instruction.opcode[1] >> 3 & 7


def _loads_segment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    if opcode[:1] == b"\xff":
        return _reg(instruction) in {3, 5} and opcode[1] < 0xC0
    if opcode[:1] in {b"\xc4", b"\xc5"}:
        return not instruction.long and opcode[1] < 0xC0
    return opcode[:1] in _LOADS_SEGMENT or opcode[:2] in _LOADS_SEGMENT


def _software_interrupt(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """INT n, INT3, INTO or INT1, but for INTO where it is undefined."""
    fault = outcome.exception
    interrupts = instruction.opcode[:1] in {b"\xcc", b"\xcd", b"\xce", b"\xf1"}
    return interrupts and fault is not None and fault[0] != UD_VECTOR


def _privileged_if(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """CLI, STI and POPF where IOPL is 3; the host's is 0."""
    allowed = instruction.case.rflags & X86_EFLAGS_IOPL == X86_EFLAGS_IOPL
    return allowed and instruction.opcode[:1] in {b"\xfa", b"\xfb", b"\x9d"}


def _shows_flags(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """PUSHF where the case's flags are not those that the process has."""
    case = instruction.case
    if instruction.opcode[:1] != b"\x9c":
        return False
    hidden = Setup(case.system, case.mode).hidden_flags
    return case.rflags & _SHOWN != X86_EFLAGS_IF or bool(case.rflags & hidden)


def _features(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An instruction that not every processor has, or a VEX or EVEX prefix."""
    decoded = instruction.decode(lax=True)
    opcode = instruction.opcode
    vex = opcode[:1] in {b"\xc4", b"\xc5", b"\x62"} and (instruction.long or opcode[1] >= 0xC0)
    broadcast = opcode[:3] in {b"\x0f\x01\xfe", b"\x0f\x01\xff"}  # INVLPGB, TLBSYNC with any prefix
    return vex or broadcast or not BASELINE.issuperset(decoded.cpuid_features())


def _fpu_switched_off(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    system = instruction.case.system
    usual = not system.cr0 & (X86_CR0_EM | X86_CR0_TS) and system.cr0 & X86_CR0_NE
    return not (usual and system.cr4 & X86_CR4_OSFXSR) and _uses_fpu(instruction)


def _uses_fpu(instruction: CaseInstruction) -> bool:
    opcode = instruction.opcode
    if opcode[:1] == b"\x9b" or opcode[0] & 0xF8 == 0xD8:
        return True
    features = set(instruction.decode(lax=True).cpuid_features())
    return bool(features & _FPU_FEATURES)


_FPU_FEATURES: Final = frozenset(
    getattr(CpuidFeature, name)
    for name in ("FPU", "MMX", "SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2", "FXSR")
)


def _fpu_image(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """FXSAVE, FNSAVE and FNSTENV store pointers and masks of the processor."""
    return instruction.mnemonic in {Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FNSAVE, Mnemonic.FNSTENV}


def _kernel_page(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    missing = Pages(instruction.case.mem).missing
    return bool(missing) and any(
        (access.linear + edge & (1 << 64) - 1) >> PAGE_SHIFT in missing
        for access in instruction.accesses
        for edge in (0, max(access.size, 1) - 1)
    )


def _other_code(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """An access that should have been a #PF, to a page that may be there for the code of other cases."""
    case, fault = instruction.case, outcome.exception
    pages = case_pages(case)
    block = code_address(case) >> PAGE_SHIFT & -BLOCK
    absent = {
        page
        for access in instruction.accesses
        for page in (access.linear >> PAGE_SHIFT, access.linear + max(access.size, 1) - 1 >> PAGE_SHIFT)
        if page not in pages and page & -BLOCK == block
    }
    return bool(absent) and not (fault is not None and (fault[2] or 0) >> PAGE_SHIFT in absent)


def _offset_noncanonical(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An offset beyond the 48 bits that a process has, wherever the host has more, while its sum is not."""
    return instruction.long and any(
        not is_canonical(access.offset) and is_canonical(access.linear) for access in instruction.accesses
    )


def _near_branch66(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """A near branch with prefix 66 in 64-bit mode."""
    opcode = instruction.opcode
    if not instruction.long or 0x66 not in instruction.prefixes:
        return False
    near = opcode[0] in {0xC2, 0xC3, 0xE0, 0xE1, 0xE2, 0xE3, 0xE8, 0xE9, 0xEB} or 0x70 <= opcode[0] <= 0x7F
    indirect = opcode[0] == 0xFF and _reg(instruction) in {2, 4}
    return near or indirect or (opcode[0] == 0x0F and 0x80 <= opcode[1] <= 0x8F)


def _single_step(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return bool(instruction.case.rflags & X86_EFLAGS_TF)


def _breakpoints(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """One is on the code, or one is on data or ports."""
    dr, code = instruction.case.system.dr, code_address(instruction.case)
    return any(
        dr[7] >> 2 * number & 3 and (dr[7] >> 16 + 4 * number & 3 or dr[number] == code)
        for number in range(4)
    )


def _push_segment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """PUSH Sreg with a 32-bit operand."""
    pushes = instruction.opcode[:1] in _PUSH_SEGMENT or instruction.opcode[:2] in _PUSH_SEGMENT
    return pushes and instruction.operand_bits == 32


def _call_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A near CALL whose push faults."""
    opcode, fault = instruction.opcode, outcome.exception
    near = opcode[0] == 0xE8 or (opcode[0] == 0xFF and _reg(instruction) == 2)
    return near and fault is not None and fault[0] in {PF_VECTOR, SS_VECTOR}


def _prefetch_register(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.opcode[:2] == b"\x0f\x0d" and instruction.opcode[2] >= 0xC0


def _fpu_image_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.mnemonic in _IMAGES and outcome.exception is not None


def _popa_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.opcode[:1] == b"\x61" and outcome.exception is not None


def native_gaps(host: Host) -> tuple[Gap, ...]:
    """The ledger, for the processor that runs here: its vendor decides what counts as a difference."""

    def gap(
        name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
    ) -> Gap:
        return Gap(f"native-{name}", "native", host.vendor, fields, reason, reference, applies)

    def of_vendor(applies: Condition) -> Condition:
        return lambda i, outcome: i.case.vendor != host.vendor and applies(i, outcome)

    # fmt: off
    return (
        gap("selector", _opcode_in(_READS_SELECTOR),
            "selectors are those of the host's descriptor tables",
            "SDM Vol. 2B PUSH", ("gpr", "mem")),
        gap("segment-load", _loads_segment,
            "segment loads and far transfers use the host's descriptor tables",
            "SDM Vol. 3A 5.8"),
        gap("tables", lambda i, _: i.mnemonic in _TABLES,
            "table registers and descriptors are the host's; Linux emulates some of the reads (UMIP)",
            "SDM Vol. 3A 2.4"),
        gap("int-delivery", _software_interrupt,
            "software interrupts raise #GP with an error code, or are signals, and are not delivered",
            "SDM Vol. 3A 6.12"),
        gap("iopl", _privileged_if,
            "IOPL is 0, whatever the case says",
            "SDM Vol. 1 19.5.1"),
        gap("flags-image", _shows_flags,
            "PUSHF stores IF = 1 and IOPL = 0",
            "SDM Vol. 2B PUSHF", ("mem",)),
        gap("ports", lambda i, _: i.opcode[0] in _PORTS,
            "no port is allowed, whatever the I/O permission bitmap says",
            "SDM Vol. 1 19.5.2"),
        gap("system-return", lambda i, _: i.opcode[:2] in {b"\x0f\x07", b"\x0f\x35"},
            "EFER.SCE and the SYSENTER MSRs are the host's",
            "SDM Vol. 2B SYSRET", ("exception",)),
        gap("rep-loop", lambda i, _: bool(i.opcode[0] & 0xFE == 0xE0 and {0xF2, 0xF3} & set(i.prefixes)),
            "AMD processors let F2 and F3 in front of LOOPE and LOOPNE decide on ZF instead of the opcode",
            "SDM Vol. 2A 2.1.1, REP prefixes of other instructions are reserved", ("rip",)),
        gap("identity", lambda i, _: i.mnemonic in IDENTITY,
            "CPUID, XCR0, time stamps and counters are the host's",
            "SDM Vol. 2A CPUID"),
        gap("features", _features,
            "extensions are there or not as the host has them",
            "SDM Vol. 1 5.1"),
        gap("fpu-off", _fpu_switched_off,
            "CR0.EM, CR0.TS, CR0.NE and CR4.OSFXSR are the host's",
            "SDM Vol. 3A 2.5"),
        gap("fpu-image", _fpu_image,
            "pointers, masks and reserved parts of a stored FPU state are the host's",
            "SDM Vol. 1 10.5.1", ("mem",)),
        gap(GAP_KERNEL_PAGE.removeprefix("native-"), _kernel_page,
            "pages in the upper half of the address space belong to the host's kernel",
            "SDM Vol. 3A 4.6"),
        gap("other-code", _other_code,
            "an absent page next to the code may exist, for the code of other cases",
            "SDM Vol. 3A 4.7"),
        gap("single-step", _single_step,
            "the trap behind an instruction with TF set is not delivered, and DR6 is not seen",
            "SDM Vol. 3B 18.3.1.4", ("exception", "dr")),
        gap("breakpoints", _breakpoints,
            "there are no breakpoints",
            "SDM Vol. 3B 18.2.4", ("exception", "dr")),
        gap("undefined-flags", lambda i, _: i.mnemonic in _ADJUSTS,
            "undefined flags of DAA, AAA and AAS are those of this processor",
            "SDM Vol. 2A DAA", ("rflags",)),
        gap("fpu-image-fault", _fpu_image_fault,
            "the address of a #PF of a load or store of FPU state is that of the last byte, or of any other",
            "SDM Vol. 3A 4.7", ("exception.address",)),
        gap("popa-partial", _popa_fault,
            "POPA that faults has loaded registers, and reads the slot of SP",
            "SDM Vol. 3A 6.6", ("gpr", "exception.address")),
        gap("vendor-push-segment", of_vendor(_push_segment),
            "AMD processors push 4 bytes for a selector, Intel's write the 2 of the selector",
            "SDM Vol. 2B PUSH", ("mem", "exception")),
        gap("vendor-call-order", of_vendor(_call_order),
            "AMD processors push before they look at the target of a CALL",
            "SDM Vol. 2A CALL", ("exception",)),
        gap("vendor-prefetch-register", of_vendor(_prefetch_register),
            "0F 0D of a register is #UD on AMD processors, a NOP on Intel's",
            "SDM Vol. 2D Table A-3", ("exception",)),
        gap("vendor-near-branch", of_vendor(_near_branch66),
            "AMD processors cut RIP to 16 bits at a near branch with prefix 66, Intel's ignore the prefix",
            "APM Vol. 3 JMP (Near)"),
        gap("vendor-canonical", of_vendor(_offset_noncanonical),
            "AMD processors want the offset into FS or GS to be canonical, not only the linear address",
            "SDM Vol. 1 3.3.7.1"),
    )
    # fmt: on


# fmt: off
#: Gaps that only a run shows: id -> reason. Such an outcome is unchecked as a whole.
ATTACHED: Final = {
    GAP_SYSTEM_CALL: "system calls and hypercalls would reach the host, and are not run",
    GAP_KERNEL_PAGE: "pages in the upper half of the address space belong to the host's kernel",
}
# fmt: on
