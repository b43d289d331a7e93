"""An instruction that KVM's userspace has taken over: an ioeventfd without length took its write.

KVM's contract (Documentation/virt/kvm/api.rst, KVM_IOEVENTFD): with length 0 the data of the write are
ignored, and with them the instruction is. Nothing but RIP changes.
"""

from __future__ import annotations

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.oracle.exits.run import Run
from emufuzz.oracle.native_view import eventfd_takes


def skipped(run: Run) -> Outcome:
    """RIP is behind the instruction.

    Raises:
        UnsupportedCaseError: An event is queued, too; or the first access to a device is not exactly where
            an eventfd without length is, so that it is the instruction that tells.
        OpenError: There is no instruction.
    """
    for field in ("pending", "vectoring_info"):
        if run.kvm.get(field):
            raise UnsupportedCaseError(f"kvm.{field}: an event is delivered first")
    if not eventfd_takes(run.case):
        raise UnsupportedCaseError("kvm.ioeventfds: none of them is what the instruction accesses first")
    run.skip()
    return run.outcome()
