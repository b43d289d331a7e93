"""The ledger of Unicorn 2.1.4: what it does not check, and what it gets wrong.

Every entry has a proof test in tests/unit/oracle/test_unicorn_gaps.py that fails once Unicorn no
longer behaves so. Gaps that the oracle meets while it runs a case (writes to the code page, an
instruction that would end the process) are attached to the outcome by the oracle itself.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Code, Mnemonic

from emufuzz.arch.cr import X86_CR0_AM, X86_CR4_UMIP
from emufuzz.arch.descriptors import DESC_ACCESSED
from emufuzz.arch.exceptions import PF_VECTOR, PFERR_WRITE
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.model import Outcome
from emufuzz.oracle.gaps import Condition, Gap
from emufuzz.oracle.instruction import Access, CaseInstruction, outside_limit
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION
from emufuzz.oracle.unicorn.gaps_corner import is_far_transfer
from emufuzz.oracle.unicorn.gaps_machine import ports_unchecked
from emufuzz.oracle.unicorn.image import cpl_of
from emufuzz.oracle.unicorn.short_movbe import as_move, is_short

_LOCK: Final = 0xF0
_UNALIGNED: Final = frozenset((Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQU, Mnemonic.LDDQU))
#: What waits for no exception and shows or sets control and status words only.
_X87_CONTROL: Final = frozenset((Mnemonic.FNINIT, Mnemonic.FNSTCW, Mnemonic.FNSTSW))
_STMXCSR: Final = 3  # ModRM.reg of 0F AE
_CLWB: Final = 6
_CLFLUSH: Final = 7
_DESCRIPTOR_STORES: Final = frozenset(
    (Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.STR, Mnemonic.SMSW)
)


def _mnemonics(*names: int) -> Condition:
    wanted = frozenset(names)
    return lambda instruction, _outcome: instruction.mnemonic in wanted


def _segment_limit(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A data access, the fetch or the branch target is outside of what its segment allows."""
    case = instruction.case
    if instruction.long:
        return False
    cs = case.system.seg[VCPU_SREG_CS]
    length = instruction.decode(lax=True).len or 1
    if outside_limit(cs, case.rip, length) or not cs.p:
        return True
    if outcome.exception is None and outcome.rip > outcome.system.seg[VCPU_SREG_CS].limit:
        return True
    return any(instruction.violates_segment(access) for access in instruction.accesses)


def _noncanonical_stack(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.long and any(
        access.segment == VCPU_SREG_SS and not instruction.canonical(access.linear + edge)
        for access in instruction.accesses
        for edge in (0, max(access.size, 1) - 1)
    )


def _noncanonical_branch(instruction: CaseInstruction, outcome: Outcome) -> bool:
    return instruction.long and outcome.exception is None and not instruction.canonical(outcome.rip)


def _lock_invalid(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return (
        _LOCK in instruction.prefixes
        and instruction.strict.code == Code.INVALID
        and instruction.mnemonic != Mnemonic.INVALID
    )


def _modrm_reg(opcode: bytes, place: int) -> int:
    return opcode[place] >> 3 & 7 if len(opcode) > place else -1


def _pop_group(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.opcode[:1] == b"\x8f" and _modrm_reg(instruction.opcode, 1) > 0


def _test_alias(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.opcode[:1] in {b"\xf6", b"\xf7"} and _modrm_reg(instruction.opcode, 1) == 1


def _lock_neg(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return _LOCK in instruction.prefixes and instruction.mnemonic == Mnemonic.NEG


def _rmw_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF that is not marked as a write, at an operand that is read and written."""
    if outcome.exception is None or outcome.exception[0] != PF_VECTOR:
        return False
    _, code, address = outcome.exception
    return not (code or 0) & PFERR_WRITE and any(
        access.read and access.write and access.linear <= (address or 0) < access.linear + max(access.size, 1)
        for access in instruction.accesses
    )


def _segment_prefix_pair(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """In 64-bit mode ES, CS, SS and DS overrides behind one of FS or GS do not cancel it."""
    last = -1
    for place, byte in enumerate(instruction.prefixes):
        if byte in {0x64, 0x65}:
            last = place
    return (
        instruction.long
        and last >= 0
        and any(byte in {0x26, 0x2E, 0x36, 0x3E} for byte in instruction.prefixes[last:])
    )


def _vex(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    if opcode[:1] not in {b"\xc4", b"\xc5", b"\x62"}:
        return False
    return instruction.long or (len(opcode) > 1 and opcode[1] >= 0xC0)


def _far_transfer(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """One that has loaded CS from a descriptor that was not accessed yet."""
    if instruction.case.mode in {"real", "vm86"} or outcome.exception is not None:
        return False
    loaded = outcome.system.seg[VCPU_SREG_CS]
    return not loaded.type & DESC_ACCESSED and is_far_transfer(instruction)


def _umip(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    system = instruction.case.system
    protected = system.cr4 & X86_CR4_UMIP and cpl_of(system, instruction.case.mode)
    return bool(protected) and instruction.mnemonic in _DESCRIPTOR_STORES


def _alignment(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """An unaligned access that must fault: #AC at CPL 3, or 16 bytes that must be aligned."""
    case = instruction.case
    checked = (
        case.system.cr0 & X86_CR0_AM and case.rflags & X86_EFLAGS_AC and cpl_of(case.system, case.mode) == 3
    )
    return any(
        size > 1
        and not (size >= 16 and instruction.mnemonic in _UNALIGNED)
        and access.linear & (size & -size) - 1
        and (checked or size >= 16)
        for access, size in ((access, _element(instruction, access)) for access in instruction.accesses)
    )


def _element(instruction: CaseInstruction, access: Access) -> int:
    """Bytes that are accessed at once: of a repeated string instruction those of one iteration."""
    if not instruction.string_opcode:
        return access.size
    return instruction.operand_bits // 8 if instruction.opcode[0] & 1 else 1


def _immediate_group(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    return opcode[:1] in {b"\xc6", b"\xc7"} and len(opcode) > 1 and opcode[1] >= 0xF8


def _group5_undefined(instruction: CaseInstruction, outcome: Outcome) -> bool:
    undefined = instruction.opcode[:1] == b"\xff" and _modrm_reg(instruction.opcode, 1) == 7
    return undefined and outcome.exception is not None


def _both_fault(instruction: CaseInstruction, outcome: Outcome) -> bool:
    """A #PF of CMPS or PUSHA, whose accesses Unicorn makes in another order."""
    page_fault = outcome.exception is not None and outcome.exception[0] == PF_VECTOR
    return page_fault and (
        instruction.opcode[:1] == b"\x60" or (instruction.opcode[:1] in {b"\xa6", b"\xa7"})
    )


def _near_branch66(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    if not instruction.long or 0x66 not in instruction.prefixes or not opcode:
        return False
    return (
        opcode[0] in {0xC2, 0xC3, 0xE0, 0xE1, 0xE2, 0xE3, 0xE8, 0xE9, 0xEB}
        or 0x70 <= opcode[0] <= 0x7F
        or (opcode[0] == 0x0F and 0x80 <= opcode[1] <= 0x8F)
        or (opcode[0] == 0xFF and _modrm_reg(opcode, 1) in {2, 4})
    )


def _return_immediate(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    return opcode[:1] in {b"\xc2", b"\xca"} and len(opcode) > 2 and opcode[2] >= 0x80


def _double_shift16(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    if instruction.mnemonic not in {Mnemonic.SHLD, Mnemonic.SHRD} or instruction.operand_bits != 16:
        return False
    by_cl = instruction.opcode[1] & 1
    count = instruction.case.gpr[VCPU_REGS_RCX] if by_cl else instruction.strict.immediate8
    return count & 31 > 16


def _bit_scan32(instruction: CaseInstruction, outcome: Outcome) -> bool:
    zero = bool(outcome.rflags & 0x40)
    return (
        instruction.long
        and zero
        and instruction.operand_bits == 32
        and instruction.mnemonic in {Mnemonic.BSF, Mnemonic.BSR}
    )


def _cmpxchg32(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    return instruction.long and instruction.mnemonic == Mnemonic.CMPXCHG and instruction.operand_bits == 32


def _movbe16(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    case = instruction.case
    return is_short(case) and instruction.mnemonic == Mnemonic.MOVBE and as_move(case) is None


def _cache_flush(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    opcode = instruction.opcode
    return opcode[:2] == b"\x0f\xae" and opcode[2] < 0xC0 and _modrm_reg(opcode, 2) in {_CLWB, _CLFLUSH}


def _x87(instruction: CaseInstruction, _outcome: Outcome) -> bool:
    """x87 and FXSAVE, and what must raise #MF for a pending exception (FSW.ES)."""
    opcode = instruction.opcode
    if opcode[:2] == b"\x0f\xae":
        return opcode[2] < 0xC0 and _modrm_reg(opcode, 2) not in {_STMXCSR, _CLFLUSH}
    if opcode[0] & 0xF8 == 0xD8:
        return instruction.mnemonic not in _X87_CONTROL
    waits = opcode[:1] == b"\x9b" or opcode[:2] in {b"\x0f\x6f", b"\x0f\x7f"}
    return waits and bool(instruction.case.system.fpu.fsw & 0x80)


def _gap(
    name: str, applies: Condition, reason: str, reference: str, fields: tuple[str, ...] = ("all",)
) -> Gap:
    return Gap(f"unicorn-{name}", "unicorn", UNICORN_VERSION, fields, reason, reference, applies)


# fmt: off
UNICORN_GAPS: Final[tuple[Gap, ...]] = (
    _gap("segment-limit", _segment_limit,
         "limit, type and presence of segments are not checked: the access or branch goes ahead",
         "SDM Vol. 3A 5.3 to 5.5"),
    _gap("noncanonical-stack", _noncanonical_stack,
         "a non-canonical stack address gives #GP instead of #SS",
         "SDM Vol. 3A 6.15, #SS", ("exception",)),
    _gap("noncanonical-branch", _noncanonical_branch,
         "a branch to a non-canonical address completes; the fault comes with the next fetch",
         "SDM Vol. 2A JMP"),
    _gap("lock-invalid", _lock_invalid,
         "LOCK is accepted on instructions that do not allow it",
         "SDM Vol. 2A LOCK"),
    _gap("pop-8f-reg", _pop_group,
         "8F /1 to /7 run as POP instead of #UD",
         "SDM Vol. 2D Table A-6"),
    _gap("int1", lambda i, _: i.opcode[:1] == b"\xf1",
         "INT1 is #UD instead of #DB",
         "SDM Vol. 2A INT n"),
    _gap("rmw-pf-error-code", _rmw_fault,
         "a #PF on an operand that is read and written is reported as that of the read",
         "SDM Vol. 3A 4.7", ("exception.error_code",)),
    _gap("f6-1-ud", _test_alias,
         "F6 /1 and F7 /1 are #UD; processors run them as TEST",
         "APM Vol. 3 Table A-6"),
    _gap("lock-neg-flags", _lock_neg,
         "SF and PF are wrong after LOCK NEG of memory, which is read twice",
         "SDM Vol. 2B NEG", ("rflags", "device_trace")),
    _gap("seg-prefix-pair", _segment_prefix_pair,
         "an ignored segment override behind FS or GS cancels it",
         "SDM Vol. 1 3.4.2.1"),
    _gap("vex", _vex,
         "VEX and EVEX encodings run as legacy SSE or are #UD",
         "SDM Vol. 2A 2.3"),
    _gap("far-transfer", _far_transfer,
         "a far transfer does not set the accessed bit of the code segment's descriptor",
         "SDM Vol. 3A 3.4.5.1", ("mem", "seg.cs")),
    _gap("iopl", ports_unchecked,
         "IOPL and the I/O permission bitmap are not checked",
         "SDM Vol. 1 19.5"),
    _gap("virtualization", _mnemonics(
             Mnemonic.VMCALL, Mnemonic.VMMCALL, Mnemonic.VMRUN, Mnemonic.VMLOAD, Mnemonic.VMSAVE,
             Mnemonic.STGI, Mnemonic.CLGI, Mnemonic.SKINIT, Mnemonic.INVLPGA, Mnemonic.MONITOR,
             Mnemonic.MWAIT, Mnemonic.RSM),
         "hypervisor calls and SMM belong to the virtual machine monitor",
         "SDM Vol. 3C 24"),
    _gap("umip", _umip,
         "CR4.UMIP is not enforced",
         "SDM Vol. 3A 2.5"),
    _gap("alignment", _alignment,
         "alignment is checked neither for #AC nor for 16-byte operands",
         "SDM Vol. 3A 6.15, #AC; Vol. 2A MOVAPS"),
    _gap("c6-reg", _immediate_group,
         "C6 and C7 /7 of a register, XABORT and XBEGIN, run as MOV",
         "SDM Vol. 2D Table A-6"),
    _gap("ff-7-read", _group5_undefined,
         "FF /7 reads its operand before it is #UD",
         "SDM Vol. 2D Table A-6", ("exception", "device_trace")),
    _gap("access-order", _both_fault,
         "CMPS reads ES:DI first, PUSHA writes upwards: another page may be the one that faults",
         "SDM Vol. 2A CMPS", ("exception.address", "mem")),
    _gap("66-near-branch", _near_branch66,
         "a near branch with prefix 66 in 64-bit mode truncates RIP; Intel processors ignore the prefix",
         "SDM Vol. 2A JMP"),
    _gap("ret-imm-signed", _return_immediate,
         "the operand of RET imm16 is sign-extended",
         "SDM Vol. 2B RET", ("gpr",)),
    _gap("shld16-count", _double_shift16,
         "SHLD and SHRD of 16 bits by more than 16 have another undefined result",
         "SDM Vol. 2B SHLD", ("gpr", "rflags", "mem", "device_trace")),
    _gap("bsf32-upper", _bit_scan32,
         "BSF and BSR of a zero 32-bit source clear the upper half of the destination",
         "APM Vol. 3 BSF", ("gpr",)),
    _gap("cmpxchg32-upper", _cmpxchg32,
         "CMPXCHG of 32 bits treats the upper half of the register that is not written differently",
         "SDM Vol. 2A CMPXCHG", ("gpr",)),
    _gap("movbe16", _movbe16,
         "MOVBE in 16-bit code takes the operand size of 32-bit code, and no MOV can stand in",
         "SDM Vol. 2B MOVBE"),
    _gap("cache-flush", _cache_flush,
         "CLFLUSH, CLFLUSHOPT and CLWB do not look at their operand",
         "SDM Vol. 2A CLFLUSH"),
    _gap("x87", _x87,
         "pending x87 exceptions raise no #MF; pointers and reserved fields differ from processors'",
         "SDM Vol. 1 8.7"),
)
# fmt: on
