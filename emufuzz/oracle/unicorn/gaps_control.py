"""The ledger of Unicorn 2.1.4 for control, debug and model-specific registers, and system calls.

Every entry has a proof test in tests/unit/oracle/test_unicorn_control_gaps.py that fails once
Unicorn no longer behaves so. Privilege is checked, and values that a processor takes are judged.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    X86_CR0_CD,
    X86_CR0_NW,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
)
from emufuzz.arch.exceptions import GP_VECTOR, UD_VECTOR
from emufuzz.arch.linear import is_canonical, linear_bits
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.case.model import Case, Outcome, System
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION
from emufuzz.oracle.unicorn.hidden import MSR_EFER, modrm_registers
from emufuzz.oracle.unicorn.image import cpl_of

_MASK32: Final = (1 << 32) - 1
_MSR_SYSENTER_CS: Final = 0x174
_MSR_PAT: Final = 0x277
_MSR_STAR: Final = 0xC0000081
_MSR_FMASK: Final = 0xC0000084
_MSR_FS_BASE: Final = 0xC0000100
_MSR_GS_BASE: Final = 0xC0000101
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_MSR_TSC_AUX: Final = 0xC0000103
#: SYSENTER_ESP and EIP, LSTAR, CSTAR, and the bases of FS and GS: linear addresses.
_ADDRESSES: Final = frozenset(
    (0x175, 0x176, 0xC0000082, 0xC0000083, _MSR_FS_BASE, _MSR_GS_BASE, _MSR_KERNEL_GS_BASE)
)
_ALWAYS_THERE: Final = frozenset((MSR_EFER, _MSR_FS_BASE, _MSR_GS_BASE))
_LISTED: Final = _ADDRESSES | {_MSR_SYSENTER_CS, _MSR_PAT, _MSR_STAR, _MSR_FMASK, _MSR_TSC_AUX}
#: The MSR that an instruction depends on.
_RETURNS_BY: Final[dict[int, int]] = {
    Mnemonic.SYSEXIT: _MSR_SYSENTER_CS,
    Mnemonic.SYSEXITQ: _MSR_SYSENTER_CS,
    Mnemonic.SYSRET: _MSR_STAR,
    Mnemonic.SYSRETQ: _MSR_STAR,
    Mnemonic.SWAPGS: _MSR_KERNEL_GS_BASE,
}
_PAT_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))

#: Defined bits of CR0 (SDM Vol. 3A 2.5); others are ignored, but for those above bit 31.
_CR0_DEFINED: Final = 0xE005003F
#: Bits of CR4 up to PKE that do not depend on VMX or SMX.
_CR4_DEFINED: Final = 0x771FFF
_CR3_ADDRESS_BITS: Final = 52
_CONTROL_REGISTERS: Final = frozenset((0, 2, 3, 4, 8))
_DEBUG_REGISTERS: Final = frozenset(range(8))
_FIRST_FENCE: Final = 0xE8  # ModRM of LFENCE
_REGISTER_FORM: Final = 0xC0  # the lowest ModRM of one
_MXCSR_FORMS: Final = frozenset((2, 3))  # ModRM.reg of LDMXCSR and STMXCSR
_OTHER_OPCODE: Final = frozenset((0x66, 0xF2, 0xF3))
_EFER_DEFINED: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
_DR6_ZERO: Final = 1 << 12
_DR7_ZERO: Final = 1 << 12 | 1 << 14 | 1 << 15
_DR7_GD: Final = 1 << 13
_XCR0_AVX: Final = 4
_XCR0_VECTORS: Final = 6  # SSE and AVX
_XCR0_DEFINED: Final = 7  # x87, SSE, AVX: what does not depend on the processor model


def _moved(instruction: CaseInstruction) -> tuple[int, int]:
    """(number, value) of MOV to or from a control or debug register."""
    case = instruction.case
    number, source = modrm_registers(case)
    return number, case.gpr[source] if instruction.long else case.gpr[source] & _MASK32


def _control_value(instruction: CaseInstruction, outcome: Outcome) -> bool:
    if instruction.opcode[:2] != b"\x0f\x22" or outcome.exception is not None:
        return False
    number, value = _moved(instruction)
    system = instruction.case.system
    if number == 0:
        return _cr0_unchecked(system, value)
    if number == 3:
        return bool(system.efer & EFER_LMA and value >> _CR3_ADDRESS_BITS)
    return number == 4 and _cr4_unchecked(system, value)


def _cr0_unchecked(system: System, value: int) -> bool:
    switched = (value ^ system.cr0) & X86_CR0_PG
    return bool(
        value & ~_CR0_DEFINED
        or (value & X86_CR0_NW and not value & X86_CR0_CD)
        or (value & X86_CR0_PG and not value & X86_CR0_PE)
        or (switched and (system.efer & EFER_LME or system.cr4 & X86_CR4_PCIDE))
    )


def _cr4_unchecked(system: System, value: int) -> bool:
    if value & ~_CR4_DEFINED:
        return True
    long_mode = system.efer & EFER_LMA
    if long_mode and (not value & X86_CR4_PAE or (value ^ system.cr4) & X86_CR4_LA57):
        return True
    return bool(value & X86_CR4_PCIDE and (not long_mode or system.cr3 & 0xFFF))


def _privilege_first(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """MOV of a control or debug register that does not exist, above CPL 0."""
    first, second = instruction.opcode[:2]
    if first != 0x0F or second not in range(0x20, 0x24) or outcome.exception != (GP_VECTOR, 0, None):
        return False
    exist = _DEBUG_REGISTERS if second & 1 else _CONTROL_REGISTERS
    return modrm_registers(instruction.case)[0] not in exist


def _fence(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A fence, LDMXCSR or STMXCSR behind a prefix that makes another opcode of it, or none."""
    opcode = instruction.opcode
    if opcode[:2] != b"\x0f\xae" or _OTHER_OPCODE.isdisjoint(instruction.prefixes):
        return False
    if opcode[2] >= _FIRST_FENCE:
        return outcome.exception is None
    control = opcode[2] < _REGISTER_FORM and opcode[2] >> 3 & 7 in _MXCSR_FORMS
    return control and not (outcome.exception is not None and outcome.exception[0] == UD_VECTOR)


def _task_priority(instruction: CaseInstruction, outcome: Outcome) -> bool:
    moves = instruction.opcode[:2] in {b"\x0f\x20", b"\x0f\x22"}
    return moves and outcome.exception is None and modrm_registers(instruction.case)[0] == 8


def _store_word(instruction: CaseInstruction, outcome: Outcome) -> bool:
    register = instruction.mnemonic == Mnemonic.SMSW and instruction.opcode[2] >= 0xC0
    return register and not instruction.long and instruction.operand_bits == 32 and outcome.exception is None


def _debug_value(instruction: CaseInstruction, outcome: Outcome) -> bool:
    opcode = instruction.opcode[:2]
    if opcode not in {b"\x0f\x21", b"\x0f\x23"} or outcome.exception is not None:
        return False
    number, value = _moved(instruction)
    if instruction.case.system.dr[7] & _DR7_GD:
        return True
    if opcode == b"\x0f\x21" or number < 4:
        return False
    return bool(value >> 32 or value & (_DR7_ZERO if number & 1 else _DR6_ZERO))


def _msr(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An MSR that the case does not list, or a value that a processor does not take as it is."""
    case = instruction.case
    if instruction.mnemonic not in {Mnemonic.RDMSR, Mnemonic.WRMSR} or cpl_of(case.system, case.mode):
        return False
    index = case.gpr[VCPU_REGS_RCX] & _MASK32
    if index not in _ALWAYS_THERE and (index not in _LISTED or index not in dict(case.system.msr)):
        return True
    return instruction.mnemonic == Mnemonic.WRMSR and not _accepted(case, index)


def _accepted(case: Case, index: int) -> bool:
    value = (case.gpr[VCPU_REGS_RDX] & _MASK32) << 32 | case.gpr[VCPU_REGS_RAX] & _MASK32
    if index == MSR_EFER:
        switches = (value ^ case.system.efer) & EFER_LME and case.system.cr0 & X86_CR0_PG
        return not (switches or value & ~_EFER_DEFINED)
    if index in _ADDRESSES:
        return is_canonical(value, linear_bits(case.system.cr4))
    if index == _MSR_PAT:
        return all(byte in _PAT_TYPES for byte in value.to_bytes(8, "little"))
    if index == _MSR_SYSENTER_CS:
        return not value >> 16
    return index == _MSR_STAR or not value >> 32


def _time_stamp(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return outcome.exception is None and instruction.mnemonic in {Mnemonic.RDTSC, Mnemonic.RDTSCP}


def _processor_number(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """RDTSCP without TSC_AUX in the case, and RDPID, which Unicorn's processor model does not have."""
    if instruction.mnemonic == Mnemonic.RDTSCP:
        return _MSR_TSC_AUX not in dict(instruction.case.system.msr)
    return bool(instruction.mnemonic == Mnemonic.RDPID)


def _extended_control(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """XGETBV of another register than XCR0; XSETBV of bits that not every processor has, or AVX alone."""
    gpr = instruction.case.gpr
    if instruction.mnemonic == Mnemonic.XGETBV:
        return bool(gpr[VCPU_REGS_RCX] & _MASK32)
    value = (gpr[VCPU_REGS_RDX] & _MASK32) << 32 | gpr[VCPU_REGS_RAX] & _MASK32
    refused = value & ~_XCR0_DEFINED or value & _XCR0_VECTORS == _XCR0_AVX
    return instruction.mnemonic == Mnemonic.XSETBV and bool(refused)


def _system_call(instruction: CaseInstruction, outcome: Outcome) -> bool:
    calls = instruction.mnemonic in {Mnemonic.SYSCALL, Mnemonic.SYSENTER}
    return calls and outcome.exception is None


def _system_return(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """The case lacks the MSR, or the return is refused: its target cannot be, or this is not 64-bit mode."""
    case, needed = instruction.case, _RETURNS_BY.get(instruction.mnemonic)
    if needed is None:
        return False
    if cpl_of(case.system, case.mode):
        return needed == _MSR_STAR and not instruction.long and outcome.exception == (GP_VECTOR, 0, None)
    if needed not in dict(case.system.msr):
        return True
    if needed == _MSR_KERNEL_GS_BASE or outcome.exception is not None:
        return False
    targets = (case.gpr[VCPU_REGS_RCX], case.gpr[VCPU_REGS_RDX])
    bits = linear_bits(case.system.cr4)
    refused = not all(is_canonical(target, bits) for target in targets)
    return refused or (needed == _MSR_STAR and not instruction.long)


def _sysexit32(instruction: CaseInstruction, outcome: Outcome) -> bool:
    gpr = instruction.case.gpr
    wide = (gpr[VCPU_REGS_RCX] | gpr[VCPU_REGS_RDX]) >> 32
    return bool(wide) and instruction.mnemonic == Mnemonic.SYSEXIT and outcome.exception is None


def _sysexit64(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return bool(instruction.mnemonic == Mnemonic.SYSEXITQ and outcome.exception is None)


def _mnemonics(*names: int) -> Condition:
    return lambda instruction, _outcome: instruction.mnemonic in names


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"unicorn-{name}", "unicorn", UNICORN_VERSION, fields, reason, reference, applies)


# fmt: off
CONTROL_GAPS: Final[tuple[Gap, ...]] = (
    _gap("cr-validity", _control_value,
         "control registers take values that must be #GP, and keep reserved bits; changes of paging that "
         "enter or leave IA-32e mode have no effect behind hidden page tables",
         "SDM Vol. 3A 2.5, 9.8.5"),
    _gap("cr-privilege-first", _privilege_first,
         "above CPL 0 a control or debug register that does not exist is #GP(0), not #UD",
         "SDM Vol. 2B MOV (control registers, debug registers); Vol. 3A 6.9"),
    _gap("fence-prefix", _fence,
         "fences, LDMXCSR and STMXCSR ignore 66, F2 and F3, with which they are other opcodes, or #UD",
         "SDM Vol. 2A LFENCE, LDMXCSR, MFENCE; Vol. 2B SFENCE, STMXCSR"),
    _gap("cr8", _task_priority,
         "CR8 is not part of the state",
         "SDM Vol. 3A 10.8.6"),
    _gap("dr-validity", _debug_value,
         "DR7.GD and the upper halves of DR6 and DR7 are not checked; DR6 and DR7 keep reserved bits",
         "SDM Vol. 3B 18.2"),
    _gap("msr-validity", _msr,
         "an MSR that does not exist reads as 0 or as what an earlier case wrote; any value is accepted, "
         "some bits of EFER and IA32_SYSENTER_CS are ignored",
         "SDM Vol. 2B RDMSR"),
    _gap("smsw32", _store_word,
         "SMSW of a 32-bit register outside 64-bit mode leaves the upper half, which is undefined",
         "SDM Vol. 2B SMSW", ("gpr",)),
    _gap("rdpmc", _mnemonics(Mnemonic.RDPMC),
         "RDPMC is #UD",
         "SDM Vol. 2B RDPMC"),
    _gap("cpuid", _mnemonics(Mnemonic.CPUID),
         "CPUID describes Unicorn's processor model",
         "SDM Vol. 2A CPUID", ("rax", "rbx", "rcx", "rdx")),
    _gap("time-stamp", _time_stamp,
         "time stamps are the host's",
         "SDM Vol. 2B RDTSC", ("rax", "rdx")),
    _gap("processor-number", _processor_number,
         "IA32_TSC_AUX is 0 unless the case has it, and RDPID is #UD",
         "SDM Vol. 2B RDPID, RDTSCP"),
    _gap("random", _mnemonics(Mnemonic.RDRAND, Mnemonic.RDSEED),
         "random numbers are random, and which instructions there are is up to Unicorn's processor model",
         "SDM Vol. 2B RDRAND"),
    _gap("xcr0-features", _extended_control,
         "which bits of XCR0 exist is up to Unicorn's processor model, AVX does not need SSE, and there is "
         "no other register",
         "SDM Vol. 2D XSETBV"),
    _gap("syscall", _system_call,
         "SYSCALL and SYSENTER do nothing",
         "SDM Vol. 2B SYSCALL, SYSENTER"),
    _gap("system-return", _system_return,
         "what MSRs, return addresses and the mode forbid is accepted; SYSRET checks the CPL before the mode",
         "SDM Vol. 2B SYSEXIT, SYSRET, SWAPGS"),
    _gap("sysexit32", _sysexit32,
         "SYSEXIT to compatibility mode takes all of RCX and RDX",
         "SDM Vol. 2B SYSEXIT", ("rip", "rsp")),
    _gap("sysexit64", _sysexit64,
         "SYSEXIT to 64-bit mode sets CS.D",
         "SDM Vol. 2B SYSEXIT", ("seg.cs",)),
)
# fmt: on
