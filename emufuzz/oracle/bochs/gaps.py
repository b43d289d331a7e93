"""The ledger of Bochs 0.3.1 as it is run here: what it does not check, and what it gets wrong.

Every entry has a proof test in tests/unit/oracle/bochs/test_bochs_gaps.py that fails once it is not
so any more. What the oracle meets while a case runs is attached to the outcome.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from iced_x86 import CpuidFeature, Mnemonic

from emufuzz.arch.cr import X86_CR0_PE
from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS, VCPU_SREG_ES, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_IOPL, X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE, Outcome, code_address
from emufuzz.oracle.bochs.state import STATE_MSRS
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.guest_width import beyond_guest_width, reserved_above
from emufuzz.oracle.instruction import CaseInstruction, outside_limit
from emufuzz.oracle.processor import BASELINE, IDENTITY

BOCHS_VERSION: Final = "0.3.1"

_BASELINE: Final = BASELINE | {CpuidFeature.SMM, CpuidFeature.VMX, CpuidFeature.SVM}
_MONITOR: Final = frozenset((Mnemonic.VMCALL, Mnemonic.VMMCALL))
#: What KVM does not emulate, so that no leaf tells which flags are undefined.
_ADJUSTS: Final = frozenset((Mnemonic.DAA, Mnemonic.DAS, Mnemonic.AAA, Mnemonic.AAS))
_POINTER_LOADS: Final = frozenset((Mnemonic.LES, Mnemonic.LDS, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS))
_VENDOR: Final = frozenset((Mnemonic.SYSCALL, Mnemonic.SYSENTER, Mnemonic.SYSEXIT))
_SYSRET: Final = frozenset((Mnemonic.SYSRET, Mnemonic.SYSRETQ, Mnemonic.SYSEXITQ))
_APPROXIMATIONS: Final = frozenset((b"\x0f\x52", b"\x0f\x53"))
_RETF_IMM: Final = 0xCA
_SHORT: Final = 16
_SIGN: Final = 0x80
_FAR_RETURNS: Final = frozenset((b"\xca", b"\xcb", b"\xcf"))
_IMAGES: Final = frozenset((Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.FXRSTOR, Mnemonic.FXRSTOR64))
_STATE_STORES: Final = frozenset((Mnemonic.FNSAVE, Mnemonic.FNSTENV))
_ENVIRONMENTS: Final = frozenset((Mnemonic.FRSTOR, Mnemonic.FLDENV))
_EFER: Final = 0xC0000080
_BASES: Final = range(0xC0000100, 0xC0000102)
_BREAKPOINTS: Final = 0xFF
_END_OF_SEGMENT: Final = 0x10000
_END_OF_OFFSETS: Final = 1 << 32
_IMAGE: Final = 512
_ADDRESS_SIZE: Final = 0x67
_LONGEST: Final = 15
_LIMIT: Final = 2  # bytes of a table register's limit, in front of the base
_FEW_PREFIXES: Final = 4  # behind them opcode, ModRM, SIB, displacement and immediate still fit
_SELECTOR: Final = 2  # bytes
_ADDRESS_BITS: Final = 40
_OPERAND: Final = 16  # bytes of the largest one that is looked at


def _vector(outcome: Outcome) -> int | None:
    return None if outcome.exception is None else outcome.exception[0]


def _real_page_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.case.mode == "real" and _vector(outcome) == PF_VECTOR


def _features(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    strict = instruction.decode(lax=True)
    return bool(set(strict.cpuid_features()) - _BASELINE)


def _of(mnemonics: frozenset[int]) -> Condition:
    return lambda instruction, _outcome: instruction.mnemonic in mnemonics


def _trap_flag(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return bool(instruction.case.rflags & X86_EFLAGS_TF)


def _breakpoint(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return bool(instruction.case.system.dr[7] & _BREAKPOINTS)


def _msr(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An MSR whose value in Bochs is not the case's, or of which nobody says that the guest has it."""
    if instruction.opcode[:2] not in {b"\x0f\x30", b"\x0f\x32"}:
        return False
    case = instruction.case
    index = case.gpr[VCPU_REGS_RCX] & 0xFFFFFFFF
    known = index in dict(case.system.msr)
    if index == _EFER or index in _BASES or (known and index in STATE_MSRS):
        return False
    return not case.system.seg[VCPU_SREG_SS].dpl


def _enter66(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    frame = instruction.mnemonic in {Mnemonic.ENTER, Mnemonic.LEAVE}
    return instruction.long and instruction.operand_bits == 16 and frame


def _rex_r_segment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """MOV of a segment register with REX.R."""
    rex = instruction.prefixes[-1:]
    extended = instruction.long and rex and rex[0] & 0xF4 == 0x44
    return bool(extended) and instruction.opcode[:1] in {b"\x8c", b"\x8e"}


def _pointer_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF of an operand that is a far pointer."""
    opcode = instruction.opcode
    far = (opcode[:1] == b"\xff" and opcode[1] >> 3 & 7 in {3, 5}) or opcode[:1] in _FAR_RETURNS
    return _vector(outcome) == PF_VECTOR and (far or instruction.mnemonic in _POINTER_LOADS)


def _pointer_limit(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF of a far pointer whose offset, or whose selector, is not within the limit of its segment."""
    seg = instruction.case.system.seg
    short = bool(seg[VCPU_SREG_CS].db) == (_ADDRESS_SIZE in instruction.prefixes)
    return _pointer_order(instruction, outcome) and any(
        access.read
        and (
            outside_limit(seg[access.segment], access.offset, access.size - _SELECTOR)
            or (short and access.offset < _END_OF_SEGMENT < access.offset + access.size)
        )
        for access in instruction.accesses
        if not instruction.long
    )


def _table_register_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    loads = instruction.mnemonic in {Mnemonic.LGDT, Mnemonic.LIDT}
    return instruction.long and loads and _vector(outcome) == PF_VECTOR


def _table_store_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """SGDT, SIDT to an absent page in which the segment, or the canonical addresses, end behind the limit."""
    return _vector(outcome) == PF_VECTOR and any(
        instruction.refused(access) and not instruction.refused(replace(access, size=_LIMIT))
        for access in instruction.accesses
        if instruction.mnemonic in {Mnemonic.SGDT, Mnemonic.SIDT}
    )


def _real_code_segment(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A MOV to CR0 that has cleared CR0.PE."""
    cleared = instruction.case.system.cr0 & ~outcome.system.cr0 & X86_CR0_PE
    return bool(cleared) and outcome.exception is None and instruction.opcode[:2] == b"\x0f\x22"


def _alignment_first(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """16 bytes of the stack, not aligned, not within its limits or not canonical: #GP(0), #SS(0) are due."""
    return outcome.exception == (GP_VECTOR, 0, None) and any(
        access.size == _OPERAND
        and access.linear % _OPERAND
        and access.segment == VCPU_SREG_SS
        and instruction.refused(access)
        for access in instruction.accesses
    )


def _return_in_real_mode(instruction: CaseInstruction, outcome: Outcome) -> bool:
    real = instruction.case.mode == "real" and instruction.mnemonic == Mnemonic.IRETD
    return real and outcome.exception is None and not outcome.rflags & X86_EFLAGS_RF


def _signed_release(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A 16-bit RETF imm16 in real or virtual-8086 mode that releases 32 KiB or more of a 32-bit stack."""
    case, opcode = instruction.case, instruction.opcode
    far = opcode[0] == _RETF_IMM and instruction.operand_bits == _SHORT and bool(opcode[2] & _SIGN)
    wide = case.mode in {"real", "vm86"} and bool(case.system.seg[VCPU_SREG_SS].db)
    return outcome.exception is None and far and wide


def _rep_upper(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """A REP string instruction with 32-bit addresses in 64-bit mode."""
    prefixes = instruction.prefixes
    repeats = 0xF2 in prefixes or 0xF3 in prefixes
    return instruction.long and 0x67 in prefixes and repeats and instruction.string_opcode


def _popf_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """POPF in virtual-8086 mode without the right to it that faults on its operand."""
    case = instruction.case
    forbidden = case.mode == "vm86" and case.rflags & X86_EFLAGS_IOPL != X86_EFLAGS_IOPL
    return bool(forbidden) and instruction.opcode[:1] == b"\x9d" and _vector(outcome) is not None


def _ip_wrap(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """Real mode's IP goes, or the instruction itself lies, over the end of the segment."""
    case = instruction.case
    if case.mode != "real" or case.system.seg[1].db:
        return False
    length = instruction.decode(lax=True).len or 1
    return case.rip + length >= _END_OF_SEGMENT or outcome.rip >= _END_OF_SEGMENT


def _movsxd(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """MOVSXD with an operand of 16 bits."""
    return instruction.long and instruction.operand_bits == 16 and instruction.opcode[:1] == b"\x63"


def _call_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A near CALL that faults."""
    opcode = instruction.opcode
    near = opcode[:1] == b"\xe8" or (opcode[:1] == b"\xff" and opcode[1] >> 3 & 7 == 2)
    return near and outcome.exception is not None


def _wrap(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """An access that goes over offset 0xffffffff of a segment, or a #PF right below 4 GiB."""
    if instruction.long:
        return False
    if outcome.exception is not None and (outcome.exception[2] or 0) >= _END_OF_OFFSETS - _OPERAND:
        return True
    return any(
        access.offset < 0 or access.offset + access.size > _END_OF_OFFSETS for access in instruction.accesses
    )


def _compare_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is not None and instruction.opcode[:1] in {b"\xa6", b"\xa7"}


def _fpu_image(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """FXSAVE or FXRSTOR that faults, or whose 512 bytes go over the end of a page."""
    if instruction.mnemonic not in _IMAGES:
        return False
    ends = (access.linear & PAGE_MASK for access in instruction.accesses)
    return outcome.exception is not None or any(end > PAGE_SIZE - _IMAGE for end in ends)


def _state_store(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.mnemonic in _STATE_STORES and _vector(outcome) == PF_VECTOR


def _flags_first(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """FSTP m80 that faults."""
    stores = instruction.mnemonic == Mnemonic.FSTP and instruction.opcode[:1] == b"\xdb"
    return stores and outcome.exception is not None


def _restore(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.mnemonic == Mnemonic.FRSTOR and outcome.exception is not None


def _environment_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF of a load of the x87 environment."""
    return instruction.mnemonic in _ENVIRONMENTS and _vector(outcome) == PF_VECTOR


def _packed_order(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.mnemonic == Mnemonic.FBLD and _vector(outcome) == PF_VECTOR


def _port_string_base(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """INSW with 32-bit addresses in 64-bit mode, and a base of ES, which does not count there."""
    insw = instruction.long and instruction.opcode[:1] == b"\x6d" and instruction.operand_bits == 16
    return insw and 0x67 in instruction.prefixes and bool(instruction.case.system.seg[VCPU_SREG_ES].base)


def _arpl(instruction: CaseInstruction, outcome: Outcome) -> bool:
    arpl = not instruction.long and instruction.opcode[:1] == b"\x63"
    return arpl and _vector(outcome) == PF_VECTOR


def _undefined_early(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """#UD of an instruction that may go over the end of its page, or have more than 15 bytes."""
    left = PAGE_SIZE - (code_address(instruction.case) & PAGE_MASK)
    return _vector(outcome) == UD_VECTOR and (left < _LONGEST or len(instruction.prefixes) > _FEW_PREFIXES)


def _overwritten(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """A REP string instruction that writes over its own bytes."""
    prefixes = instruction.prefixes
    if not (0xF2 in prefixes or 0xF3 in prefixes) or not instruction.string_opcode:
        return False
    code = code_address(instruction.case)
    end = code + (instruction.decode(lax=True).len or 1)
    return any(
        access.write and access.linear < end and code < access.linear + access.size
        for access in instruction.accesses
    )


def _approximation(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is None and instruction.opcode[:2] in _APPROXIMATIONS


def _amd(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.case.vendor == "amd" and instruction.mnemonic in _VENDOR | _SYSRET


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"bochs-{name}", "bochs", BOCHS_VERSION, fields, reason, reference, applies)


# fmt: off
BOCHS_GAPS: Final[tuple[Gap, ...]] = (
    _gap("features", _features,
         "which extensions of the instruction set exist is up to the model, a Tiger Lake",
         "SDM Vol. 2A CPUID"),
    _gap("identity", _of(IDENTITY),
         "identity, time, counters and random numbers are those of the model",
         "SDM Vol. 2A CPUID"),
    _gap("undefined-flags", _of(_ADJUSTS),
         "undefined flags of DAA, DAS, AAA and AAS are those of the model",
         "SDM Vol. 2A DAA", ("rflags",)),
    _gap("real-error-code", _real_page_fault,
         "page faults of real mode, which only the hidden tables make, have error code 0",
         "docs/case-format.md", ("exception.error_code",)),
    _gap("single-step", _trap_flag,
         "the run ends before a single-step trap would be delivered",
         "SDM Vol. 3B 18.3.1.4", ("exception", "dr")),
    _gap("breakpoints", _breakpoint,
         "breakpoints on data are not delivered, those on code are",
         "SDM Vol. 3B 18.3.1", ("exception", "dr")),
    _gap("msr", _msr,
         "only some MSRs have the value that the case gives them; a guest may have others",
         "SDM Vol. 4"),
    _gap("enter-66", _enter66,
         "ENTER and LEAVE with prefix 66 in 64-bit mode push and pop 8 bytes instead of 2",
         "SDM Vol. 2A ENTER, LEAVE"),
    _gap("rex-r-segment", _rex_r_segment,
         "REX.R in a MOV of a segment register is #UD; AMD processors ignore it",
         "APM Vol. 3 1.2.7"),
    _gap("far-pointer-order", _pointer_order,
         "of a far pointer, also that of RETF and IRET, the selector is read before the offset",
         "SDM Vol. 2A LDS", ("exception.address", "exception.error_code")),
    _gap("far-pointer-limit", _pointer_limit,
         "the selector of a far pointer is read before the limit is checked for the offset, and from 0 on if"
         " it is behind FFFFH and addresses have 16 bits",
         "SDM Vol. 3A 6.9", ("exception",)),
    _gap("table-register-order", _table_register_order,
         "LGDT and LIDT in 64-bit mode read the base before the limit",
         "SDM Vol. 2A LGDT", ("exception.address",)),
    _gap("table-store-order", _table_store_order,
         "SGDT and SIDT store the limit before the segment's limit is checked for the base",
         "SDM Vol. 2B SGDT", ("exception",)),
    _gap("real-code-segment", _real_code_segment,
         "clearing CR0.PE makes CS a data segment, where processors keep its hidden part",
         "SDM Vol. 3A 9.9.2", ("seg.cs",)),
    _gap("physical-width", lambda instruction, outcome: reserved_above(instruction, outcome, _ADDRESS_BITS),
         "physical addresses have 40 bits; those above are reserved",
         "SDM Vol. 3A 4.1.4"),
    _gap("guest-width", lambda instruction, _: beyond_guest_width(instruction),
         "MAXPHYADDR is not that of the guest's CPUID",
         "SDM Vol. 3A 4.1.4"),
    _gap("alignment-first", _alignment_first,
         "16 bytes neither aligned nor within the stack segment, or canonical, are #GP(0) instead of #SS(0)",
         "SDM Vol. 3A 6.15, #GP, #SS", ("exception",)),
    _gap("iret-rf", _return_in_real_mode,
         "IRETD in real mode does not load RF",
         "SDM Vol. 2A IRET", ("rflags",)),
    _gap("ret-imm-signed", _signed_release,
         "real mode's RETF imm16 with 16-bit operands sign-extends what it adds to ESP",
         "SDM Vol. 2B RET", ("rsp",)),
    _gap("rep-upper", _rep_upper,
         "REP with 32-bit addresses clears the upper halves of RSI and RDI, even if it does nothing",
         "SDM Vol. 1 3.4.1.1", ("rcx", "rsi", "rdi")),
    _gap("movsxd-66", _movsxd,
         "MOVSXD with prefix 66 reads 2 bytes, as the SDM has it; AMD processors read 4",
         "SDM Vol. 2B MOVSXD", ("exception", "device_trace")),
    _gap("call-order", _call_order,
         "near CALL writes to the stack before it looks at the limit of CS",
         "SDM Vol. 2A CALL", ("mem", "exception")),
    _gap("compare-order", _compare_order,
         "CMPS reads DS:SI first; AMD processors have the fault of ES:DI first",
         "SDM Vol. 2A CMPS", ("exception", "device_trace")),
    _gap("fpu-image", _fpu_image,
         "FXSAVE and FXRSTOR do not look at all of their 512 bytes before they move the first",
         "SDM Vol. 2A FXRSTOR"),
    _gap("fpu-store-partial", _state_store,
         "FNSAVE and FNSTENV that fault on their second page have written to the first",
         "SDM Vol. 3A 6.6", ("mem",)),
    _gap("fstp80-flags", _flags_first,
         "FSTP of 80 bits that faults has set the exception flags of the x87 status word",
         "SDM Vol. 3A 6.6", ("fpu.fsw",)),
    _gap("frstor-partial", _restore,
         "FRSTOR that faults on a register has loaded the environment",
         "SDM Vol. 3A 6.6", ("fpu",)),
    _gap("fpu-environment-order", _environment_order,
         "FRSTOR and FLDENV begin with the last part of the environment",
         "SDM Vol. 1 8.1.10", ("exception.address",)),
    _gap("fbld-order", _packed_order,
         "FBLD reads the sign of its operand, the last two bytes, before the digits",
         "SDM Vol. 2A FBLD", ("exception.address",)),
    _gap("ins-base", _port_string_base,
         "INSW with prefix 67 in 64-bit mode adds the base of ES",
         "SDM Vol. 1 3.4.2.1"),
    _gap("arpl-write", _arpl,
         "ARPL looks for the right to write before it reads; AMD processors read first",
         "SDM Vol. 2A ARPL", ("exception.error_code",)),
    _gap("undefined-early", _undefined_early,
         "an undefined opcode is #UD before the rest of the instruction is fetched, or found too long",
         "SDM Vol. 3A 6.9", ("exception",)),
    _gap("popf-order", _popf_order,
         "POPF in virtual-8086 mode reads the stack before it looks at IOPL",
         "SDM Vol. 2B POPF", ("exception",)),
    _gap("ip-wrap", _ip_wrap,
         "IP does not wrap at the end of a segment in real mode",
         "SDM Vol. 3B 21.1.3"),
    _gap("wrap-4g", _wrap,
         "an access over the end of a segment of 4 GiB goes on at 0 instead of #GP or #SS",
         "SDM Vol. 3A 5.3"),
    _gap("code-overwritten", _overwritten,
         "REP that writes over its own bytes goes on as what it has written",
         "SDM Vol. 3A 8.1.3"),
    _gap("approximation", _approximation,
         "RCPPS, RSQRTPS and their scalar forms approximate; processors do so each in its own way",
         "SDM Vol. 2B RSQRTPS", ("fpu",)),
    _gap("monitor", _of(_MONITOR),
         "VMCALL and VMMCALL are #UD outside of a guest; those of a guest are for its monitor to answer",
         "SDM Vol. 3C 30.3 VMCALL"),
    _gap("vendor", _amd,
         "fast system calls are those of Intel processors",
         "APM Vol. 3 SYSCALL"),
)

#: Gaps that only a run shows: id -> reason. Such an outcome is unchecked as a whole.
ATTACHED: Final = {
    "bochs-no-memory":     "an access met a physical address without memory, for which there is no bus here",
    "bochs-hidden-rights": "the hidden page tables refused an access to a page that exists",
}
# fmt: on
