"""Differences of MOV to control and debug registers.

Each function predicts what the emulator does where it is not what the handler did, and says whether it had
anything to predict. What it changes is exact: a value that is neither the handler's nor the one predicted
stays unexplained.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import X86_CR4_DE
from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR, UD_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.model import code_address
from emufuzz.fuzz.handlers.observe import differing
from emufuzz.fuzz.handlers.pair import END_FIELDS, Pair, debug_exit, entered
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.debugregs import DR6_BD, DR6_BUS_LOCK, DR7_GD, kvm_vcpu_check_hw_bp
from emufuzz.kvm.exceptions import DR6_ACTIVE_LOW, DR6_FIXED_1, DR6_RTM, DR6_VOLATILE
from emufuzz.kvm.exit_system import CR_MOV_TO, TYPE_MOV_FROM_DR
from emufuzz.kvm.interruptibility import KVM_X86_SHADOW_INT_MOV_SS
from emufuzz.kvm.rflags import KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP
from emufuzz.kvm.run import USERSPACE

_CR8_INVALID: Final = 0x10
_DEBUG: Final = 1  # KVM_GUESTDBG_ENABLE
_TRAP_BITS: Final = 0xF
_EXECUTE: Final = 0


def code_breakpoint(pair: Pair) -> bool:
    """A breakpoint that hardware passed over: for the debugger RF does not count, nor does who has DR7."""
    address = code_address(pair.case)
    debuggers, guests = _debuggers_hit(pair, address), _guests_hit(pair, address)
    if (not debuggers and not guests) or differing(pair.rerun(), pair.handler.fields):
        return False
    if debuggers:
        pair.predicted = pair.before()
        pair.predicted["exits"] = [debug_exit(debuggers, address)]
        pair.predicted["ended"] = USERSPACE
    else:
        pair.predict_fault(DB_VECTOR, payload=guests)
    pair.concluded = False
    return True


def _debuggers_hit(pair: Pair, address: int) -> int:
    """DR6 bits of the breakpoints that userspace has set."""
    if not pair.guest_debug & KVM_GUESTDBG_USE_HW_BP:
        return 0
    addresses = [
        int(value, 0) if isinstance(value, str) else value for value in pair.kvm["guest_debug"]["dr"][:4]
    ]
    return kvm_vcpu_check_hw_bp(address, _EXECUTE, _hardware_dr7(pair), addresses)


def _guests_hit(pair: Pair, address: int) -> int:
    """DR6 bits of the guest's own, unless RF or, on Intel, the shadow of MOV SS holds them back."""
    case = pair.case
    if case.rflags & X86_EFLAGS_RF and not pair.clears_rf:
        return 0
    if pair.shadow & KVM_X86_SHADOW_INT_MOV_SS and case.vendor == "intel":
        return 0
    return kvm_vcpu_check_hw_bp(address, _EXECUTE, case.system.dr[7], case.system.dr)


def _mov_to_cr(pair: Pair) -> tuple[int, int, int] | None:
    """(control register, GPR, value) of MOV to CR."""
    qualification = pair.qualification
    if pair.reason != er.EXIT_REASON_CR_ACCESS or qualification >> 4 & 3 != CR_MOV_TO:
        return None
    reg = qualification >> 8 & 15
    return qualification & 15, reg, pair.register(reg)


def cr_high_bits(pair: Pair) -> bool:
    """Bits 63:32 for CR0 and CR4."""
    access = _mov_to_cr(pair)
    if access is None or access[0] not in (0, 4) or not access[2] >> 32:
        return False
    if not pair.handler_faulted(GP_VECTOR, 0):
        return False
    pair.predicted = pair.rerun(gpr={access[1]: access[2] & 0xFFFFFFFF})
    return True


def cr8_byte(pair: Pair) -> bool:
    """Bits 63:8 for CR8."""
    access = _mov_to_cr(pair)
    if access is None or access[0] != 8 or not access[2] >> 8 or access[2] & 0xFF > 15:
        return False
    if pair.handler.fields["cr8"] != access[2] & 0xFF or not pair.handler_did_nothing_but("cr8", *END_FIELDS):
        return False
    pair.predicted = pair.rerun(gpr={access[1]: _CR8_INVALID})
    return True


def cr8_set_tpr(pair: Pair) -> bool:
    """The exit that tells userspace of a lower task priority."""
    access = _mov_to_cr(pair)
    fields = pair.predicted
    if access is None or access[0] != 8 or fields["exits"] != [{"reason": "SET_TPR"}]:
        return False
    if pair.case.system.cr8 <= access[2] & 0xFF:
        return False
    entered(fields)
    if pair.guest_debug & KVM_GUESTDBG_SINGLESTEP and not pair.faulted:
        pair.predict_step()
    return True


# -- debug registers -----------------------------------------------------------------------------


def _is_dr(pair: Pair) -> bool:
    return pair.reason == er.EXIT_REASON_DR_ACCESS


def _dr(pair: Pair) -> int:
    return pair.qualification & 7


def _no_such_dr(pair: Pair) -> bool:
    return _dr(pair) in (4, 5) and bool(pair.case.system.cr4 & X86_CR4_DE)


def _written(pair: Pair) -> int | None:
    """What MOV to DR stores; None for MOV from DR."""
    return None if pair.qualification & TYPE_MOV_FROM_DR else pair.register(pair.qualification >> 8 & 15)


def _hardware_dr7(pair: Pair) -> int:
    if pair.guest_debug & KVM_GUESTDBG_USE_HW_BP:
        dr7: int | str = pair.kvm["guest_debug"]["dr"][7]
        return int(dr7, 0) if isinstance(dr7, str) else dr7
    return pair.case.system.dr[7]


def dr_priority(pair: Pair) -> bool:
    """DR4 and DR5 that do not exist, above CPL 0."""
    if not _is_dr(pair) or not _no_such_dr(pair) or not pair.cpl or not pair.handler_faulted(UD_VECTOR):
        return False
    pair.predict_fault(GP_VECTOR, 0)
    return True


def _faults_alike(pair: Pair) -> bool:
    """Both look at the privilege level and at the register's existence before all that follows."""
    return bool(pair.cpl) or _no_such_dr(pair)


def dr_native(pair: Pair) -> bool:
    """Nobody debugs the guest: it gets the registers and tries again."""
    if not _is_dr(pair) or _faults_alike(pair) or pair.guest_debug or _hardware_dr7(pair) & DR7_GD:
        return False
    if pair.handler.fields["dr_exiting"] or not pair.handler_did_nothing_but("dr_exiting"):
        return False
    pair.predicted = pair.rerun(kvm={"guest_debug": _DEBUG})
    return True


def dr_gp_before_gd(pair: Pair) -> bool:
    """Bits 63:32 for DR6 and DR7 while DR7.GD is set."""
    if not _is_dr(pair) or _faults_alike(pair) or not _hardware_dr7(pair) & DR7_GD:
        return False
    if not _high_bits(pair) or not _handler_detected(pair):
        return False
    pair.predict_fault(GP_VECTOR, 0)
    return True


def _handler_detected(pair: Pair) -> bool:
    """The handler raised #DB for general detect, or told the debugger."""
    if pair.guest_debug & KVM_GUESTDBG_USE_HW_BP:
        exits = pair.handler.fields["exits"]
        told = (
            len(exits) == 1 and exits[0]["reason"] == "DEBUG" and exits[0]["dr6"] == DR6_BD | DR6_ACTIVE_LOW
        )
        return told and pair.handler_did_nothing_but("exits", "ended")
    wanted = [{"vector": DB_VECTOR, "payload": hex(DR6_BD)}]
    return pair.handler.fields["injected"] == wanted and pair.handler_did_nothing_but("injected", "requests")


def dr_gd_payload(pair: Pair) -> bool:
    """General detect for the guest: DR6 is written at once, and the exception has no payload."""
    if not _is_dr(pair) or pair.guest_debug & KVM_GUESTDBG_USE_HW_BP or not _detects(pair):
        return False
    if not _handler_detected(pair):
        return False
    _predict_detect(pair)
    return True


def _detects(pair: Pair) -> bool:
    """The emulator comes to DR7.GD of the guest."""
    return not _faults_alike(pair) and not _high_bits(pair) and bool(pair.case.system.dr[7] & DR7_GD)


def _high_bits(pair: Pair) -> bool:
    """MOV to DR6 or DR7 with bits 63:32."""
    return _dr(pair) in (6, 7) and bool((_written(pair) or 0) >> 32)


def _predict_detect(pair: Pair) -> None:
    pair.predict_fault(DB_VECTOR)
    dr6 = pair.case.system.dr[6] & ~_TRAP_BITS | DR6_BD | DR6_ACTIVE_LOW
    pair.predicted["dr6"] = dr6 & DR6_VOLATILE | DR6_FIXED_1 | DR6_RTM | DR6_BUS_LOCK


def dr_gd_debugger(pair: Pair) -> bool:
    """General detect while userspace has the breakpoints: hardware has its DR7, the emulator the guest's."""
    if not _is_dr(pair) or not pair.guest_debug & KVM_GUESTDBG_USE_HW_BP or _faults_alike(pair):
        return False
    told = bool(_hardware_dr7(pair) & DR7_GD)
    if told != _handler_detected(pair) or (told and _high_bits(pair)):
        return False
    if _detects(pair):
        _predict_detect(pair)
        return True
    if not told:
        return False
    debug = pair.kvm["guest_debug"]
    dr = [*debug["dr"][:7], _hardware_dr7(pair) & ~DR7_GD]
    pair.predicted = pair.rerun(kvm={"guest_debug": {**debug, "dr": dr}})
    return True


def dr45_high_bits(pair: Pair) -> bool:
    """Bits 63:32 for DR4 and DR5 that stand for DR6 and DR7."""
    written = _written(pair) if _is_dr(pair) else None
    if written is None or _faults_alike(pair) or _dr(pair) not in (4, 5) or not written >> 32:
        return False
    refused = pair.predicted["injected"] == [{"vector": GP_VECTOR, "error_code": 0}]
    if not refused or not pair.predicts_nothing_but("injected", "requests"):
        return False
    reg = pair.qualification >> 8 & 15
    debug = pair.kvm.get("guest_debug") or _DEBUG
    kvm = {"exit_qualification": pair.qualification | TYPE_MOV_FROM_DR, "guest_debug": debug}
    if isinstance(debug, dict):
        kvm["guest_debug"] = {**debug, "dr": [*debug["dr"][:7], _hardware_dr7(pair) & ~DR7_GD]}
    pair.predicted = pair.rerun(gpr={reg: 0}, kvm=kvm)
    return True
