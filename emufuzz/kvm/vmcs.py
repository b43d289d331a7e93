"""The virtual-machine control structure: typed fields (SDM Vol. 3C 24, Vol. 3D Appendix B).

A field's encoding says its width and its type, so nothing else describes a field.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.kvm.vmcs_fields import FIELD_NAMES, FIELDS, VM_INSTRUCTION_ERROR, VMCS_LINK_POINTER

WIDTH_16: Final = 0
WIDTH_64: Final = 1
WIDTH_32: Final = 2
WIDTH_NATURAL: Final = 3

TYPE_CONTROL: Final = 0
TYPE_READ_ONLY: Final = 1  # exit information
TYPE_GUEST: Final = 2
TYPE_HOST: Final = 3

#: VM-instruction errors (SDM Vol. 3C 30.4).
VMXERR_UNSUPPORTED_VMCS_COMPONENT: Final = 12
VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT: Final = 13

#: Bits of a field by its width; natural width is 64, as the processor supports Intel 64.
_BITS: Final = {WIDTH_16: 16, WIDTH_64: 64, WIDTH_32: 32, WIDTH_NATURAL: 64}
_MASK32: Final = 0xFFFFFFFF
_HIGH: Final = 1


class VmcsError(Exception):
    """VMREAD or VMWRITE failed; `number` is the VM-instruction error of SDM Vol. 3C 30.4."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class FieldInfo(NamedTuple):
    """A field encoding taken apart: number, type, width (WIDTH_*), access to the upper half."""

    number: int
    type: int
    width: int
    high: bool

    @property
    def bits(self) -> int:
        """Bits that an access through this encoding transfers."""
        return 32 if self.high else _BITS[self.width]


def decode_field(encoding: int) -> FieldInfo:
    """Take an encoding apart; VmcsError if a reserved bit is set or a half is asked of a narrow field."""
    info = FieldInfo(encoding >> 1 & 0x1FF, encoding >> 10 & 3, encoding >> 13 & 3, bool(encoding & _HIGH))
    if encoding & ~0x6FFF or (info.high and info.width != WIDTH_64):
        raise VmcsError(VMXERR_UNSUPPORTED_VMCS_COMPONENT, f"VMCS field {encoding:#x} is malformed")
    return info


_MASKS: Final = {encoding: (1 << decode_field(encoding).bits) - 1 for encoding in FIELDS.values()}
_READ_ONLY: Final = frozenset(code for code in FIELDS.values() if decode_field(code).type == TYPE_READ_ONLY)
_WRITABLE: Final = {code: mask for code, mask in _MASKS.items() if code not in _READ_ONLY}
_CLEAR: Final = {**dict.fromkeys(_MASKS, 0), VMCS_LINK_POINTER: (1 << 64) - 1}


class Vmcs:
    """One VMCS. `read` and `write` are VMREAD and VMWRITE; `hw_write` is the processor's own store.

    A value is cut to its field's width. KVM's processor does not offer VMWRITE to exit-information
    fields (IA32_VMX_MISC bit 29 clear), so only `hw_write` changes those.
    """

    __slots__ = ("values",)

    def __init__(self, values: dict[int, int] | None = None) -> None:
        self.values: dict[int, int] = (values or _CLEAR).copy()

    def read(self, field: int) -> int:
        """The value of a field; VmcsError for an encoding without a field."""
        value = self.values.get(field)
        if value is not None:
            return value
        return self.values[_whole(field)] >> 32

    def write(self, field: int, value: int) -> None:
        """Store a value; VmcsError for an encoding without a field or for exit information."""
        mask = _WRITABLE.get(field)
        if mask is not None:
            self.values[field] = value & mask
        elif field in _READ_ONLY:
            raise VmcsError(
                VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT, f"VMCS field {field_name(field)} is read-only"
            )
        else:
            self.hw_write(field, value)

    def hw_write(self, field: int, value: int) -> None:
        """Store a value into any field, as VM exits do."""
        mask = _MASKS.get(field)
        if mask is not None:
            self.values[field] = value & mask
            return
        whole = _whole(field)
        if whole in _READ_ONLY:
            raise VmcsError(
                VMXERR_VMWRITE_READ_ONLY_VMCS_COMPONENT, f"half of {field_name(whole)} is read-only"
            )
        self.values[whole] = self.values[whole] & _MASK32 | (value & _MASK32) << 32

    def set_bits(self, field: int, bits: int) -> None:
        """KVM: vmcs_set_bits."""
        self.write(field, self.read(field) | bits)

    def clear_bits(self, field: int, bits: int) -> None:
        """KVM: vmcs_clear_bits."""
        self.write(field, self.read(field) & ~bits)

    def fail(self, error: VmcsError) -> None:
        """VMfailValid: record why the last VMX instruction failed."""
        self.values[VM_INSTRUCTION_ERROR] = error.number


def _whole(field: int) -> int:
    """The 64-bit field whose upper half an encoding names."""
    if decode_field(field).high and field - _HIGH in _MASKS:
        return field - _HIGH
    raise VmcsError(VMXERR_UNSUPPORTED_VMCS_COMPONENT, f"there is no VMCS field {field:#x}")


def field_name(field: int) -> str:
    """KVM's name of a field, `..._HIGH` for the upper half; the number if there is none."""
    name = FIELD_NAMES.get(field)
    if name is None and field - _HIGH in FIELD_NAMES:
        return FIELD_NAMES[field - _HIGH] + "_HIGH"
    return name or f"{field:#x}"
