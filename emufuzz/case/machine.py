"""The rules between the fields that describe the machine around the emulator, and their JSON form.

One field at a time is checked by its declaration (emufuzz/case/fields.py); here is what takes two.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from emufuzz.case.devices import check_device_trace, check_devices
from emufuzz.case.fields import EVENTFD_LENGTHS, EXTRA, KVM, MEMSLOT_FLAGS, OUTCOME_EXTRA
from emufuzz.case.memory import PHYSICAL_BITS, check_physical
from emufuzz.case.model import PAGE_MASK
from emufuzz.case.spec import FieldError
from emufuzz.case.write import to_json

_MAX_GPA: Final = 1 << PHYSICAL_BITS
_PORTS: Final = 1 << 16
_NMI: Final = 2


def extra_of(obj: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any] | None:
    """`Case.extra` of a case: as in `obj`, its JSON, but `kvm` as it was read (`fields`).

    Raises:
        CaseError: memory, devices, memslots, eventfds or events that contradict themselves or each other.
    """
    extra = {name: obj[name] for name in EXTRA if name in fields}
    if "phys" in extra:
        check_physical(fields["phys"])
    if "devices" in extra:
        check_devices(fields["devices"])
    if "kvm" in extra:
        extra["kvm"] = fields["kvm"]
        _check_kvm(fields["kvm"])
    return extra or None


def extra_to_obj(extra: dict[str, Any] | None) -> dict[str, Any]:
    """`Case.extra` as JSON values."""
    if not extra or "kvm" not in extra:
        return extra or {}
    return extra | {"kvm": to_json(KVM, extra["kvm"])}


def outcome_extra_of(obj: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any] | None:
    """`Outcome.extra` of an outcome, as in `obj`, its JSON.

    Raises:
        CaseError: an access in `device_trace` contradicts itself.
    """
    if "device_trace" in fields:
        check_device_trace(fields["device_trace"])
    return {name: obj[name] for name in OUTCOME_EXTRA if name in fields} or None


def _check_kvm(kvm: dict[str, Any]) -> None:
    try:
        _check_memslots(kvm.get("memslots", []))
        _check_events(kvm)
        _check_debug(kvm.get("guest_debug"))
        for index, eventfd in enumerate(kvm.get("ioeventfds", ())):
            _check_eventfd(eventfd, f"ioeventfds[{index}]")
        _check_lapic(kvm.get("lapic", {}))
    except FieldError as error:
        raise error.under("kvm") from None


def _check_memslots(slots: list[dict[str, Any]]) -> None:
    for index, slot in enumerate(slots):
        where = f"memslots[{index}]"
        for name in ("base", "size"):
            if slot[name] & PAGE_MASK:
                raise FieldError(f"{slot[name]:#x} is not a multiple of 0x1000", f"{where}.{name}")
        if not slot["size"]:
            raise FieldError("is 0", f"{where}.size")
        if slot["base"] + slot["size"] > _MAX_GPA:
            raise FieldError(f"reaches beyond address {_MAX_GPA - 1:#x}", f"{where}.size")
        if slot.get("flags", 0) & ~MEMSLOT_FLAGS:
            raise FieldError(f"{slot['flags']:#x} has unknown bits", f"{where}.flags")
    ranges = sorted((slot["base"], slot["base"] + slot["size"], i) for i, slot in enumerate(slots))
    for (_, end, one), (start, _, other) in pairwise(ranges):
        if start < end:
            raise FieldError(f"overlaps memslots[{min(one, other)}]", f"memslots[{max(one, other)}].base")


def _check_events(kvm: dict[str, Any]) -> None:
    """What is being delivered is one event at most, and L1 is only asked about what is pending."""
    pending = kvm.get("pending", {})
    if pending.get("vector") == _NMI:
        raise FieldError("2 is no exception; NMIs are in nmi", "pending.vector")
    if pending.get("injected") and "interrupt" in kvm:
        raise FieldError("is being injected together with the exception in pending", "interrupt")
    if not pending.get("nested"):
        return
    if kvm.get("guest_mode", False) is False:
        raise FieldError("there is no nested guest without guest_mode", "pending.nested")
    if pending.get("injected"):
        raise FieldError("an exception that is being injected does not exit", "pending.nested")


def _check_debug(debug: Any) -> None:
    if type(debug) is dict and len(debug.get("dr", [0] * 8)) != 8:
        raise FieldError(f"{len(debug['dr'])} values, not those of DR0 to DR7", "guest_debug.dr")


def _check_lapic(registers: dict[int, int]) -> None:
    for offset in registers:
        if offset % 16:
            raise FieldError("registers lie at multiples of 0x10", f"lapic.{offset:#x}")


def _check_eventfd(eventfd: dict[str, Any], where: str) -> None:
    """KVM: kvm_assign_ioeventfd."""
    length = eventfd.get("len", 0)
    if length not in EVENTFD_LENGTHS:
        lengths = ", ".join(map(str, EVENTFD_LENGTHS))
        raise FieldError(f"{length} is not one of {lengths}", f"{where}.len")
    if not length and "datamatch" in eventfd:
        raise FieldError("needs a len", f"{where}.datamatch")
    if eventfd["addr"] + length > (_PORTS if eventfd.get("port") else 1 << 64):
        raise FieldError("reaches beyond the address space", f"{where}.addr")
