"""CPUID of the flat machine: an Intel or an AMD processor with few leaves."""

from __future__ import annotations

from typing import Final

_INTEL: Final = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX: "GenuineIntel"
_AMD: Final = (0x68747541, 0x444D4163, 0x69746E65)  # "AuthenticAMD"
_SIGNATURE: Final = {"intel": 0x306C3, "amd": 0xA20F10}

_COMMON: Final = {
    0x7: (0, 8, 0x400000, 0),
    0x80000000: (0x80000008, 0, 0, 0),
    0x80000001: (0, 0, 0x21, 0x2FD3FBFF),
    0x80000008: (0x3034, 0, 0, 0),
}


def leaf(vendor: str, eax: int, ecx: int) -> tuple[bool, int, int, int, int]:
    """(exists, EAX, EBX, ECX, EDX) of a leaf; absent leaves read as zeros."""
    if eax == 0:
        return (True, 0xD, *(_INTEL if vendor == "intel" else _AMD))
    if eax == 1:
        return (True, _SIGNATURE[vendor], 0x10800, 0xC82201, 0x78BFBFF)
    if eax in _COMMON and not (eax == 7 and ecx):
        return (True, *_COMMON[eax])
    return (False, 0, 0, 0, 0)
