"""What a faulting instruction must leave as it was (SDM Vol. 3A 6.5, 6.6)."""

from __future__ import annotations

from typing import Final

from iced_x86 import Mnemonic

from emufuzz.arch.exceptions import DB_VECTOR, PF_VECTOR
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RCX, VCPU_REGS_RDI, VCPU_REGS_RSI
from emufuzz.arch.rflags import X86_EFLAGS_RF, flag_names
from emufuzz.case.model import Outcome
from emufuzz.oracle.operands import changed_bytes
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.rule import FAULTED, Check, Encoding, Found, Rule
from emufuzz.oracle.rules.segments import loaded_segment
from emufuzz.oracle.rules.state import LOAD_SYSTEM, same_fpu, same_system
from emufuzz.oracle.rules.view import View

_STRING_REGISTERS: Final = 1 << VCPU_REGS_RCX | 1 << VCPU_REGS_RSI | 1 << VCPU_REGS_RDI
#: What may write to memory more than once before it faults: SDM Vol. 2 says nothing of taking it back.
_SEVERAL_WRITES: Final = frozenset(
    (Mnemonic.PUSHA, Mnemonic.PUSHAD, Mnemonic.ENTER, Mnemonic.CALL, Mnemonic.INT, Mnemonic.INT3,
     Mnemonic.INTO, Mnemonic.INT1, Mnemonic.FXSAVE, Mnemonic.FXSAVE64, Mnemonic.SGDT, Mnemonic.SIDT)
)  # fmt: skip


def traps(outcome: Outcome) -> bool:
    """The exception is one that is reported behind the instruction, or by delivering it."""
    return outcome.exception is not None and outcome.exception[0] in {1, 3, 4}


def _kept_registers(view: View, outcome: Outcome) -> Found | None:
    if outcome.gpr == view.case.gpr or traps(outcome):
        return None
    free = _STRING_REGISTERS | view.insn.written if view.insn.repeats else 0
    for number, name in enumerate(GPR_NAMES):
        if outcome.gpr[number] != view.case.gpr[number] and not free >> number & 1:
            return Found(name, hex(outcome.gpr[number]), f"{name} stays {view.case.gpr[number]:#x}")
    return None


def _kept_rip(view: View, outcome: Outcome) -> Found | None:
    if outcome.rip == view.case.rip or traps(outcome):
        return None
    return Found("rip", hex(outcome.rip), f"rip stays {view.case.rip:#x}")


def _kept_flags(view: View, outcome: Outcome) -> Found | None:
    """RF of the image that is pushed is a matter of the delivery."""
    ran = view.insn.repeats and outcome.gpr != view.case.gpr
    free = X86_EFLAGS_RF | (view.insn.flags if ran else 0)
    changed = (outcome.rflags ^ view.case.rflags) & ~free
    if not changed or traps(outcome):
        return None
    return Found("rflags", f"{' '.join(flag_names(changed)) or hex(changed)} changed")


def _single_write(insn: Decoded) -> bool:
    if insn.repeats or insn.mnemonic in _SEVERAL_WRITES or not insn.known:
        return False
    return insn.opcode[0] != 0x9A and not (insn.opcode[0] == 0xFF and insn.reg == 3)


def _kept_memory(view: View, outcome: Outcome) -> Found | None:
    """Accessed bits, of descriptors and page tables, may be set."""
    if not outcome.pages or traps(outcome):
        return None
    changed = changed_bytes(view.case, outcome)
    if loaded_segment(view.insn) is not None or view.insn.mnemonic in LOAD_SYSTEM:
        changed = {at: byte for at, byte in changed.items() if not _marks(view, at, byte)}
    return Found("mem", f"{len(changed)} bytes at {min(changed):#x}") if changed else None


def _marks(view: View, at: int, byte: int) -> bool:
    """Only the accessed or busy bit of what may be a descriptor's type was set."""
    page = view.pages.get(at >> 12, bytes(4096))
    return (at & 7) == 5 and byte ^ page[at & 0xFFF] in {1, 2}


def _kept_system(view: View, outcome: Outcome) -> Found | None:
    if outcome.exception is None or traps(outcome) or outcome.exception[0] == DB_VECTOR:
        return None
    found = same_system(view, outcome)
    if found is None and outcome.system.cr2 != view.system.cr2 and outcome.exception[0] != PF_VECTOR:
        return Found("cr2", hex(outcome.system.cr2))
    return found


def _kept_fpu(view: View, outcome: Outcome) -> Found | None:
    if view.insn.mnemonic == Mnemonic.MASKMOVQ:
        return None  # processors may enter MMX state before they look at memory
    return None if traps(outcome) else same_fpu(view, outcome)


def _asked_devices(view: View, outcome: Outcome) -> Found | None:
    """A device was asked, though the exception is due whatever an operand is."""
    from emufuzz.oracle.rules.review import early_faults  # noqa: PLC0415 - which knows all rules

    trace = (outcome.extra or {}).get("device_trace")
    if not trace or traps(outcome) or outcome.exception not in early_faults(view):
        return None
    first = trace[0]
    return Found("device_trace", f"{first['direction']} of {first.get('addr', first.get('port'))}")


def _no_shadow(_view: View, outcome: Outcome) -> Found | None:
    return Found("interruptibility", str(outcome.interruptibility)) if outcome.interruptibility else None


def _fails(name: str, citation: str, demand: str, finds: Check, encoding: Encoding | None = None) -> Rule:
    return Rule(name, FAULTED, citation, demand, None, encoding, finds=finds)


# fmt: off
RULES: Final = (
    _fails("fault-registers", "SDM Vol. 3A 6.5", "a fault leaves general-purpose registers as they were",
           _kept_registers),
    _fails("fault-rip", "SDM Vol. 3A 6.5", "a fault points at the instruction", _kept_rip),
    _fails("fault-flags", "SDM Vol. 3A 6.5", "a fault leaves RFLAGS as it was", _kept_flags),
    _fails("fault-memory", "SDM Vol. 3A 6.6", "a fault comes before the write", _kept_memory, _single_write),
    _fails("fault-system", "SDM Vol. 3A 6.6", "a fault leaves system registers and segments as they were",
           _kept_system),
    _fails("fault-fpu", "SDM Vol. 3A 6.6", "a fault leaves FPU state as it was", _kept_fpu),
    _fails("fault-devices", "SDM Vol. 3A 6.9",
           "an exception of the opcode or of privilege comes before any device is asked", _asked_devices),
    _fails("fault-shadow", "SDM Vol. 3A 6.8.3", "an instruction that faults blocks no interrupts",
           _no_shadow),
)
# fmt: on
