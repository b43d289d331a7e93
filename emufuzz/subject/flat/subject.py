"""FlatSubject: decode and emulate each case as x86.c would, apart from everything around it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from emufuzz import __version__
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Fault, Fpu, Outcome
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.decode import init_decode_cache, x86_decode_insn
from emufuzz.emulator.execute import x86_emulate_insn
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_OK,
    EMULATION_RESTART,
    EMULTYPE_TRAP_UD,
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_NAMES,
)
from emufuzz.subject.crash import crashed
from emufuzz.subject.flat.ops import FlatOps, load_fpu, read_fpu
from emufuzz.subject.flat.scripted import ScriptedOps, read_script


class FlatSubject:
    """The port of emulate.c on flat memory."""

    name: str = "emulator"

    def __init__(self, events: bool = True) -> None:
        """With `events` the outcomes list every callback."""
        self._events = events
        self._reset()

    def _reset(self) -> None:
        """Start from nothing, also after a crash: a context is else used again."""
        self._ops = FlatOps()
        self._ctxt = X86EmulateCtxt(self._ops)
        self._fpu: Fpu | None = None
        self._asks_intercepts = False

    def fingerprint(self) -> dict[str, str]:
        """Name and version of what ran."""
        return {"subject": self.name, "emufuzz": __version__}

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError for cases that need the KVM model."""
        if case.path is not None:
            raise UnsupportedCaseError("path: the emulator alone has no exit paths")
        for field, value in (case.extra or {}).items():
            if field != "callbacks":
                raise UnsupportedCaseError(f"{field}: the emulator alone cannot take it")
            read_script(value)

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases in order; a Python exception becomes the outcome's `crash`."""
        outcomes = []
        for case in batch:
            try:
                outcomes.append(self._run_scripted(case) if case.extra else self._run(case))
            except Exception as error:  # noqa: BLE001 - any crash of the thing under test is a result
                outcomes.append(crashed(case, error))
                self._reset()
        return outcomes

    def _run_scripted(self, case: Case) -> Outcome:
        """Run a case with callback results of its own."""
        usual = self._ops
        scripted = ScriptedOps((case.extra or {}).get("callbacks", ()))
        self._ops = self._ctxt.ops = scripted
        self._asks_intercepts = scripted.asks_intercepts
        try:
            return self._run(case)
        finally:
            self._ops = self._ctxt.ops = usual
            self._asks_intercepts = False

    def _run(self, case: Case) -> Outcome:
        ops, ctxt = self._ops, self._ctxt
        ops.load(case)
        ops.log = [] if self._events else None
        if case.system.fpu is not self._fpu or ctxt.fpu.dirty:
            load_fpu(ctxt.fpu, case.system.fpu)
            self._fpu = case.system.fpu
        ctxt.mode = ops.mode
        ctxt.eip = case.rip
        ctxt.eflags = case.rflags
        outcome = self._instruction(case)
        for _ in range(case.count - 1):
            if outcome.rc != "continue":
                break
            restarts = outcome.restarts
            outcome = self._instruction(case)
            outcome.restarts += restarts
        outcome.pages = ops.changed_pages()
        if ctxt.fpu.dirty:
            outcome.system = msgspec.structs.replace(outcome.system, fpu=read_fpu(ctxt.fpu))
        return outcome

    def _instruction(self, case: Case) -> Outcome:
        """One instruction from ctxt.eip on, all its REP iterations included."""
        ops, ctxt = self._ops, self._ctxt
        rip, rflags = ctxt.eip, ctxt.eflags
        ctxt.tf = rflags & X86_EFLAGS_TF != 0
        ctxt.ud = case.emul_type & EMULTYPE_TRAP_UD != 0
        ctxt.interruptibility = 0
        ctxt.have_exception = False
        ctxt.perm_ok = False
        ctxt.fail_reason = ""
        ctxt.exception.vector = 0xFF
        init_decode_cache(ctxt)
        ctxt.regs[:] = ops.gpr
        ctxt.regs_valid = 0xFFFF
        decoded = x86_decode_insn(ctxt, emulation_type=case.emul_type)
        restarts = 0
        result = decoded
        if decoded == EMULATION_OK:
            result = x86_emulate_insn(ctxt, self._asks_intercepts)
            while result == EMULATION_RESTART:
                restarts += 1
                if case.single:
                    break
                ctxt.exception.address = 0
                result = x86_emulate_insn(ctxt, self._asks_intercepts)
        opcode = ctxt.opcode
        outcome = Outcome(
            case.id,
            tuple(ops.gpr),
            rip,
            rflags,
            ops.system,
            decode_rc="ok" if decoded == EMULATION_OK else "failed",
            length=ctxt.fetch_pos if decoded == EMULATION_OK else None,
            interruptibility=ctxt.interruptibility,
            restarts=restarts,
            events=ops.log or (),
            leaf=opcode.leaf if opcode is not None else "",
            reason=ctxt.fail_reason,
        )
        if ctxt.have_exception:
            outcome.rc = "propagate_fault"
            outcome.exception = self._fault()
        elif result == EMULATION_FAILED:
            outcome.rc = "unhandleable"
        else:
            outcome.rc = X86EMUL_NAMES[ctxt.rc]
            # After other results emulate.c hands out nothing. That x86.c takes RFLAGS over all the
            # same after some of them is a matter of the KVM model.
            if ctxt.rc == X86EMUL_CONTINUE:
                outcome.rip = ctxt.eip & MASK64
                outcome.rflags = ctxt.eflags
        return outcome

    def _fault(self) -> Fault:
        exception = self._ctxt.exception
        return (
            exception.vector,
            exception.error_code if exception.error_code_valid else None,
            exception.address if exception.vector == PF_VECTOR else None,
        )
