"""A case that ran both ways, and what the rules foretell of the emulator from what the handler did."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.regs import GPR_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.model import Case, code_address
from emufuzz.fuzz.handlers.observe import Fields, Observed, differing, observe_exit, run_handler
from emufuzz.kvm.exceptions import DR6_ACTIVE_LOW, DR6_BS
from emufuzz.kvm.interruptibility import KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI
from emufuzz.kvm.options import FEP_CLEAR_RFLAGS_RF, KvmOptions, options_from_knobs
from emufuzz.kvm.rflags import KVM_GUESTDBG_SINGLESTEP
from emufuzz.kvm.run import GUEST_ENTERED, USERSPACE
from emufuzz.kvm.vcpu import KVM_REQ_EVENT
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_MOV_SS, GUEST_INTR_STATE_STI
from emufuzz.subject.kvm.build import kvm_of

_MASK32: Final = 0xFFFFFFFF
_BLOCKING: Final = GUEST_INTR_STATE_STI | GUEST_INTR_STATE_MOV_SS
#: Bits of the VMCS -> those of KVM's API.
_SHADOW_OF: Final = {
    0: 0,
    GUEST_INTR_STATE_STI: KVM_X86_SHADOW_INT_STI,
    GUEST_INTR_STATE_MOV_SS: KVM_X86_SHADOW_INT_MOV_SS,
    _BLOCKING: KVM_X86_SHADOW_INT_STI | KVM_X86_SHADOW_INT_MOV_SS,
}
#: What ends an instruction that does nothing else: the next one, a fault, a step, an exit.
END_FIELDS: Final = ("rip", "interrupt_shadow", "injected", "requests", "exits", "ended")
#: What single-stepping queues.
STEP_TRAP: Final = {"vector": DB_VECTOR, "payload": hex(DR6_BS)}


class Pair:
    """One case, its two runs, and the prediction in progress.

    Attributes:
        case: The case, without prefix.
        handler: What the exit's handler did.
        emulator: What the emulator did.
        predicted: What it should have done, by the rules applied so far; at first the handler's fields.
        concluded: The emulator got to its end, where shadows go, rather than leaving on the way.
        rules: Names of the rules that had something to say.
    """

    __slots__ = (
        "_before",
        "case",
        "concluded",
        "emulator",
        "handler",
        "kvm",
        "options",
        "predicted",
        "rules",
    )

    def __init__(self, case: Case, handler: Observed, emulator: Observed) -> None:
        self.case = case
        self.handler = handler
        self.emulator = emulator
        self.kvm = kvm_of(case)
        self.options: KvmOptions = options_from_knobs(self.kvm.get("knobs"))
        self.predicted: Fields = dict(handler.fields)
        self.concluded = True
        self._before: Fields | None = None
        self.rules: list[str] = []

    # -- the case ------------------------------------------------------------------------------

    @property
    def reason(self) -> int:
        """Basic exit reason."""
        return self.handler.exit_reason

    @property
    def qualification(self) -> int:
        """Exit qualification."""
        return self.handler.qualification

    @property
    def guest_debug(self) -> int:
        """KVM_GUESTDBG_* that are in force."""
        debug = self.kvm.get("guest_debug", 0)
        control: int = debug["control"] if isinstance(debug, dict) else debug
        return control if control & 1 else 0

    @property
    def cpl(self) -> int:
        """Privilege level as KVM sees it."""
        if self.case.mode == "real":
            return 0
        return 3 if self.case.mode == "vm86" else self.case.system.seg[2].dpl

    @property
    def shadow(self) -> int:
        """Interrupt shadow before the instruction: KVM_X86_SHADOW_INT_*."""
        state = int(self.kvm.get("interruptibility", 0))
        return _SHADOW_OF[state & _BLOCKING]

    @property
    def clears_rf(self) -> bool:
        """The prefix clears RF."""
        return bool(self.options.force_emulation_prefix & FEP_CLEAR_RFLAGS_RF)

    @property
    def next_rip(self) -> int:
        """RIP after the instruction: 32 bits outside 64-bit mode."""
        rip = self.case.rip + self.handler.length
        return rip if self.case.mode == "prot64" else rip & _MASK32

    def register(self, number: int) -> int:
        """A GPR as an operand: 32 bits outside 64-bit mode."""
        value = self.case.gpr[number]
        return value if self.case.mode == "prot64" else value & _MASK32

    # -- other runs ----------------------------------------------------------------------------

    def rerun(
        self,
        *,
        gpr: dict[int, int] | None = None,
        kvm: dict[str, Any] | None = None,
        fastpath: bool = True,
    ) -> Fields:
        """What the handler does with other registers or another machine; those registers as in the case.

        The exit is made whatever hardware thinks of it then.
        """
        values = list(self.case.gpr)
        for number, value in (gpr or {}).items():
            values[number] = value
        described = {"exit_reason": self.reason, "exit_qualification": self.qualification}
        extra = {**(self.case.extra or {}), "kvm": {**self.kvm, **described, **(kvm or {})}}
        changed = msgspec.structs.replace(
            self.case, gpr=tuple(values), rflags=self.case.rflags & ~X86_EFLAGS_RF, extra=extra
        )
        fields = run_handler(changed, fastpath=fastpath).fields
        for number in gpr or ():
            fields[GPR_NAMES[number]] = self.case.gpr[number]
        return fields

    def before(self) -> Fields:
        """The state in which hardware made the exit."""
        if self._before is None:
            self._before = observe_exit(self.case, self.handler).fields
        return dict(self._before)

    # -- predictions ---------------------------------------------------------------------------

    def predict_fault(self, vector: int, error_code: int | None = None, payload: int | None = None) -> None:
        """Nothing happens but an exception."""
        fault: dict[str, Any] = {"vector": vector}
        if error_code is not None:
            fault["error_code"] = error_code
        if payload is not None:
            fault["payload"] = hex(payload)
        self.predicted = {
            **self.before(), "injected": [fault], "requests": frozenset({KVM_REQ_EVENT}),
        }  # fmt: skip

    def predict_step(self) -> None:
        """The instruction has ended: single step, the guest's or userspace's."""
        fields = self.predicted
        if self.guest_debug & KVM_GUESTDBG_SINGLESTEP:
            fields["exits"] = [*fields["exits"], self.debug_exit(fields["rip"])]
            fields["ended"] = USERSPACE
        elif self.case.rflags & X86_EFLAGS_TF:
            fields["injected"] = [STEP_TRAP]
            self.request_event()

    def debug_exit(self, rip: int) -> dict[str, Any]:
        """KVM_EXIT_DEBUG for a step that ends at RIP."""
        pc = rip if self.case.mode == "prot64" else code_address(self.case) - self.case.rip + rip & _MASK32
        return debug_exit(DR6_BS, pc)

    def request_event(self) -> None:
        """KVM_REQ_EVENT is pending."""
        self.predicted["requests"] |= {KVM_REQ_EVENT}

    @property
    def faulted(self) -> bool:
        """The prediction so far is an exception other than that of a step."""
        return any(entry != STEP_TRAP for entry in self.predicted["injected"])

    def handler_did_nothing_but(self, *names: str) -> bool:
        """The handler left everything as it was at the exit, these fields apart."""
        return set(differing(self.before(), self.handler.fields)) <= set(names)

    def predicts_nothing_but(self, *names: str) -> bool:
        """The same of the prediction so far."""
        return set(differing(self.before(), self.predicted)) <= set(names)

    def handler_faulted(self, vector: int, error_code: int | None = None) -> bool:
        """The handler queued exactly this exception and did nothing else."""
        return self.handler_queued(vector, error_code) and self.handler_did_nothing_but(
            "injected", "requests"
        )

    def handler_queued(self, vector: int, error_code: int | None = None) -> bool:
        """The handler queued exactly this exception."""
        fault = {"vector": vector} | ({} if error_code is None else {"error_code": error_code})
        return bool(self.handler.fields["injected"] == [fault])

    def unexplained(self) -> list[str]:
        """Fields in which the emulator is not as predicted."""
        return differing(self.predicted, self.emulator.fields)


def debug_exit(dr6: int, pc: int) -> dict[str, Any]:
    """KVM_EXIT_DEBUG for bits of DR6 at a linear address."""
    return {
        "reason": "DEBUG", "dr6": dr6 | DR6_ACTIVE_LOW, "pc": pc if pc < 1 << 32 else hex(pc),
        "exception": DB_VECTOR,
    }  # fmt: skip


def entered(fields: Fields) -> None:
    """KVM_RUN goes on into the guest, with no exit."""
    fields["exits"] = []
    fields["ended"] = GUEST_ENTERED
