"""The kinds of differences between exit handlers and the emulator, in the order in which they are applied.

docs/kvm-handlers.md says the same at greater length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from emufuzz.fuzz.handlers import rules_end as end
from emufuzz.fuzz.handlers import rules_instructions as insn
from emufuzz.fuzz.handlers import rules_registers as reg
from emufuzz.fuzz.handlers.pair import Pair


class Rule(NamedTuple):
    """One kind of difference.

    Attributes:
        name: Its name, as in the documentation.
        apply: Predicts the emulator; whether there was anything to predict.
        why: The reason, in a line.
        source: KVM's functions, and the section of the SDM that says what the processor does.
    """

    name: str
    apply: Callable[[Pair], bool]
    why: str
    source: str


# fmt: off
#: What keeps the emulator from the instruction; the next ones are then not asked.
STOPPING: Final = (
    Rule("code-breakpoint", reg.code_breakpoint,
         "the emulator looks for breakpoints again, in the guest's DR7 and the debugger's",
         "kvm_vcpu_check_code_breakpoint; SDM Vol. 3B 17.3.1.1"),
)
#: What instructions do.
INSTRUCTIONS: Final = (
    Rule("cr-high-bits", reg.cr_high_bits,
         "the emulator drops bits 63:32 of a value for CR0 or CR4, the handler raises #GP",
         "emulator_set_cr, handle_cr; SDM Vol. 2B MOV CRn"),
    Rule("cr8-byte", reg.cr8_byte,
         "the handler takes the low byte of a value for CR8, the emulator raises #GP",
         "handle_cr, kvm_set_cr8; SDM Vol. 2B MOV CRn"),
    Rule("cr8-set-tpr", reg.cr8_set_tpr,
         "only the handler tells userspace's APIC that the task priority sank",
         "handle_cr; SDM Vol. 3A 10.8.3"),
    Rule("dr-priority", reg.dr_priority,
         "DR4 and DR5 with CR4.DE above CPL 0: the handler raises #UD, the emulator #GP",
         "handle_dr, x86_emulate_insn; SDM Vol. 3C 25.1.3"),
    Rule("dr-gp-before-gd", reg.dr_gp_before_gd,
         "bits 63:32 for DR6 or DR7 are #GP in the emulator before DR7.GD is looked at",
         "check_dr_write, handle_dr; SDM Vol. 2B MOV DRn"),
    Rule("dr-gd-payload", reg.dr_gd_payload,
         "general detect: the emulator writes DR6 at once, the handler with the delivery of #DB",
         "check_dr_read, handle_dr; SDM Vol. 3B 17.2.3"),
    Rule("dr-gd-debugger", reg.dr_gd_debugger,
         "a debugger's DR7.GD stops the handler, the guest's DR7.GD the emulator",
         "handle_dr, check_dr_read; SDM Vol. 3B 17.2.4"),
    Rule("dr-native", reg.dr_native,
         "the handler gives the guest the debug registers and lets it try again",
         "handle_dr; SDM Vol. 3C 24.6.2"),
    Rule("dr45-high-bits", reg.dr45_high_bits,
         "bits 63:32 for DR4 or DR5 are #GP in the handler, the emulator drops the whole value",
         "em_dr_write, kvm_set_dr; SDM Vol. 2B MOV DRn"),
    Rule("hlt-request", insn.hlt_request,
         "the handler puts the vCPU to sleep, the emulator only notes a request that this path ignores",
         "kvm_emulate_halt, emulator_halt; SDM Vol. 2A HLT"),
    Rule("hypercall-privilege", insn.hypercall_privilege,
         "above CPL 0 the emulator raises #GP, the handler answers (Hyper-V's: #UD)",
         "em_hypercall, kvm_emulate_hypercall; SDM Vol. 3C VMCALL"),
    Rule("hypercall-patch", insn.hypercall_patch,
         "the emulator writes VMCALL over the instruction and does not go on, the handler calls",
         "emulator_fix_hypercall, kvm_emulate_hypercall; SDM Vol. 3C VMCALL"),
    Rule("monitor-unknown", insn.monitor_unknown,
         "the handler makes MONITOR and MWAIT NOPs, the emulator has no code for them",
         "kvm_emulate_monitor_mwait, handle_emulation_failure; SDM Vol. 2B MONITOR"),
    Rule("invlpg-segment", insn.invlpg_segment,
         "the emulator ignores INVLPG whose segment refuses the operand, hardware exits with its address",
         "em_invlpg, handle_invlpg; SDM Vol. 3C 27.2.1"),
    Rule("invlpg-width", insn.invlpg_width,
         "the emulator takes the guest's linear-address width, the handler the host's",
         "__linearize, kvm_mmu_invalidate_addr; SDM Vol. 2A INVLPG"),
    Rule("fastpath-filter", insn.fastpath_filter,
         "the fastpath of IA32_TSC_DEADLINE does not ask userspace's filter",
         "handle_fastpath_set_msr_irqoff, kvm_set_msr_with_filter; SDM Vol. 3A 10.5.4.1"),
    Rule("in-read-ahead", insn.in_read_ahead,
         "IN with a REP prefix reads ahead in the emulator, as INS does",
         "pio_in_emulated, kvm_fast_pio; SDM Vol. 2A IN"),
    Rule("out-7e-step", insn.out_7e_step,
         "a debugger's step overwrites the exit of OUT to port 0x7e: the access is lost in the handler",
         "kvm_fast_pio_out; SDM Vol. 1 19.6"),
    Rule("out-step", insn.out_step,
         "the emulator does not single-step an OUT that userspace does",
         "x86_emulate_instruction, complete_fast_pio_out; SDM Vol. 3B 17.3.1.4"),
)
#: How they end.
ENDINGS: Final = (
    Rule("shadow-after-fault", end.shadow_after_fault,
         "the emulator drops the interrupt shadow even if the instruction faults",
         "x86_emulate_instruction; SDM Vol. 3A 6.8.3"),
    Rule("shadow-event", end.shadow_event,
         "the emulator has events looked at again when a shadow ends, skipping an instruction does not",
         "toggle_interruptibility, skip_emulated_instruction; SDM Vol. 3A 6.8.1"),
    Rule("prefix-event", end.prefix_event,
         "the prefix with RF cleared stores RFLAGS, which has events looked at again",
         "handle_ud, kvm_set_rflags; none, as the prefix is KVM's"),
    Rule("rf-after-fault", end.rf_after_fault,
         "hardware saves RF as 0 when an instruction exits, the emulator clears it only at its end",
         "x86_emulate_instruction; SDM Vol. 3C 27.3.3"),
    Rule("debugger-tf", end.debugger_tf,
         "the emulator stores RFLAGS without the debugger's TF, skipping an instruction leaves them alone",
         "__kvm_set_rflags, kvm_skip_emulated_instruction; SDM Vol. 3B 17.3.1.4"),
)
# fmt: on
RULES: Final = (*STOPPING, *INSTRUCTIONS, *ENDINGS)


def explain(pair: Pair) -> list[str]:
    """Apply all rules: the fields that then still differ; `pair.rules` names what was needed."""
    if not _apply(STOPPING, pair):
        _apply(INSTRUCTIONS, pair)
    _apply(ENDINGS, pair)
    return pair.unexplained()


def _apply(rules: tuple[Rule, ...], pair: Pair) -> bool:
    names = [rule.name for rule in rules if rule.apply(pair)]
    pair.rules += names
    return bool(names)
