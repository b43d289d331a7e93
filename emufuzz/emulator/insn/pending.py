"""Instructions that decode but have no handler here yet.

They end as unhandleable, with a reason that reports count; their checks before execution run.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.opcode import Handler
from emufuzz.emulator.x86emul import X86EMUL_UNHANDLEABLE


def _pending(name: str) -> Handler:
    reason = f"emufuzz has no {name} yet"

    def handler(ctxt: X86EmulateCtxt) -> int:
        ctxt.fail_reason = reason
        return X86EMUL_UNHANDLEABLE

    handler.__name__ = name
    return handler


em_call_far: Final = _pending("em_call_far")
em_clflush: Final = _pending("em_clflush")
em_clflushopt: Final = _pending("em_clflushopt")
em_clts: Final = _pending("em_clts")
em_cmpxchg8b: Final = _pending("em_cmpxchg8b")
em_cpuid: Final = _pending("em_cpuid")
em_cr_write: Final = _pending("em_cr_write")
em_dr_write: Final = _pending("em_dr_write")
em_fninit: Final = _pending("em_fninit")
em_fnstcw: Final = _pending("em_fnstcw")
em_fnstsw: Final = _pending("em_fnstsw")
em_fxrstor: Final = _pending("em_fxrstor")
em_fxsave: Final = _pending("em_fxsave")
em_hypercall: Final = _pending("em_hypercall")
em_in: Final = _pending("em_in")
em_invlpg: Final = _pending("em_invlpg")
em_iret: Final = _pending("em_iret")
em_jmp_far: Final = _pending("em_jmp_far")
em_lgdt: Final = _pending("em_lgdt")
em_lidt: Final = _pending("em_lidt")
em_lldt: Final = _pending("em_lldt")
em_lmsw: Final = _pending("em_lmsw")
em_lseg: Final = _pending("em_lseg")
em_ltr: Final = _pending("em_ltr")
em_mov_sreg_rm: Final = _pending("em_mov_sreg_rm")
em_out: Final = _pending("em_out")
em_pop_sreg: Final = _pending("em_pop_sreg")
em_rdmsr: Final = _pending("em_rdmsr")
em_rdpid: Final = _pending("em_rdpid")
em_rdpmc: Final = _pending("em_rdpmc")
em_rdtsc: Final = _pending("em_rdtsc")
em_ret_far: Final = _pending("em_ret_far")
em_ret_far_imm: Final = _pending("em_ret_far_imm")
em_rsm: Final = _pending("em_rsm")
em_sgdt: Final = _pending("em_sgdt")
em_sidt: Final = _pending("em_sidt")
em_sldt: Final = _pending("em_sldt")
em_smsw: Final = _pending("em_smsw")
em_str: Final = _pending("em_str")
em_syscall: Final = _pending("em_syscall")
em_sysenter: Final = _pending("em_sysenter")
em_sysexit: Final = _pending("em_sysexit")
em_wrmsr: Final = _pending("em_wrmsr")
em_xsetbv: Final = _pending("em_xsetbv")
sw_cr_read: Final = _pending("sw_cr_read")
sw_dr_read: Final = _pending("sw_dr_read")
sw_hlt: Final = _pending("sw_hlt")
sw_int: Final = _pending("sw_int")
sw_int3: Final = _pending("sw_int3")
sw_into: Final = _pending("sw_into")
sw_invd: Final = _pending("sw_invd")
sw_wbinvd: Final = _pending("sw_wbinvd")
check_cr_access: Final = _pending("check_cr_access")
check_dr_read: Final = _pending("check_dr_read")
check_dr_write: Final = _pending("check_dr_write")
check_perm_in: Final = _pending("check_perm_in")
check_perm_out: Final = _pending("check_perm_out")
check_rdpmc: Final = _pending("check_rdpmc")
check_rdtsc: Final = _pending("check_rdtsc")
check_svme: Final = _pending("check_svme")
check_svme_pa: Final = _pending("check_svme_pa")
