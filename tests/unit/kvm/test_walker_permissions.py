"""Access rights against a plain reading of SDM Vol. 3A 4.6, and the error code of 4.7."""

from __future__ import annotations

from itertools import product

import pytest
from support.page_tables import ALL, NX, A, Chain, D, P, U, W

from emufuzz.arch.cr import EFER_NX, X86_CR0_WP, X86_CR4_SMAP, X86_CR4_SMEP
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.kvm.mmu.paging import X86_CR4_PKE
from emufuzz.kvm.mmu.pferr import (
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_PK_MASK,
    PFERR_PRESENT_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)

READ, WRITE, FETCH = 0, PFERR_WRITE_MASK, PFERR_FETCH_MASK
BOOLS = (False, True)


def _allowed(
    user_page: bool,
    writable: bool,
    nx: bool,
    kind: int,
    user: bool,
    wp: bool,
    nxe: bool,
    smep: bool,
    smap_off: bool,
) -> bool:
    """SDM Vol. 3A 4.6.1 "Determination of Access Rights", sentence by sentence."""
    if user:
        if not user_page:
            return False
        if kind == WRITE:
            return writable
        return kind == READ or not (nxe and nx)
    if kind == FETCH:
        if user_page and smep:
            return False
        return not (nxe and nx)
    if user_page and not smap_off:
        return False
    return kind == READ or writable or not wp


@pytest.mark.parametrize("mode", ["2-level", "pae", "4-level", "5-level"])
@pytest.mark.parametrize("kind", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("user", BOOLS, ids=["supervisor", "user"])
def test_every_combination(mode, kind, user):
    for page_user, writable, nx, wp, nxe, smep, smap, ac, implicit in product(BOOLS, repeat=9):
        if nx and (mode == "2-level" or not nxe):
            continue  # no such bit, or reserved
        flags = P | A | D | U * page_user | W * writable | NX * nx
        chain = Chain(
            mode,
            {1: flags},
            cr0=X86_CR0_WP * wp,
            cr4=X86_CR4_SMEP * smep | X86_CR4_SMAP * smap,
            efer=EFER_NX * nxe,
            rflags=2 | X86_EFLAGS_AC * ac,
        )
        access = kind | PFERR_USER_MASK * user | PFERR_IMPLICIT_ACCESS * implicit
        smap_off = not smap or (ac and not implicit)
        allowed = _allowed(page_user, writable, nx, kind, user, wp, nxe, smep, smap_off)
        expected = None
        if not allowed:
            reports_fetch = kind == FETCH and (nxe or smep)
            expected = PFERR_PRESENT_MASK | kind & ~FETCH | FETCH * reports_fetch | PFERR_USER_MASK * user
        assert chain.error(access) == expected, (flags, wp, nxe, smep, smap, ac, implicit)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_right_must_be_given_at_every_level(level):
    user = PFERR_USER_MASK
    assert Chain("4-level", {level: ALL & ~U}).error(user) == PFERR_PRESENT_MASK | user
    assert Chain("4-level", {level: ALL & ~W}).error(user | WRITE) == PFERR_PRESENT_MASK | user | WRITE
    chain = Chain("4-level", {level: ALL | NX}, efer=EFER_NX)
    assert chain.error(user | FETCH) == PFERR_PRESENT_MASK | user | FETCH


def test_pae_pdptes_give_no_rights_and_take_none():
    assert Chain("pae", {3: P}).error(PFERR_USER_MASK | WRITE) is None


@pytest.mark.parametrize(
    ("kind", "user", "page_user", "wp", "pkru_bits"),
    list(product((READ, WRITE, FETCH), BOOLS, BOOLS, BOOLS, range(4))),
)
def test_protection_keys(kind, user, page_user, wp, pkru_bits):
    """SDM Vol. 3A 4.6.2: AD stops data accesses, WD writes (of the supervisor only with WP)."""
    key = 11
    chain = Chain(
        "4-level",
        {1: P | W | A | D | U * page_user | key << 59},
        cr0=X86_CR0_WP * wp,
        cr4=X86_CR4_PKE,
        efer=EFER_NX,
        pkru=pkru_bits << key * 2,
    )
    access_disabled, write_disabled = pkru_bits & 1, pkru_bits & 2
    denied = (
        page_user
        and kind != FETCH
        and (access_disabled or (write_disabled and kind == WRITE and (user or wp)))
    )
    error = chain.error(kind | PFERR_USER_MASK * user)
    if denied:
        assert error == PFERR_PRESENT_MASK | PFERR_PK_MASK | kind | PFERR_USER_MASK * user
    elif user and not page_user:
        assert error == PFERR_PRESENT_MASK | PFERR_USER_MASK | kind
    else:
        assert error is None


def test_a_key_violation_shows_beside_another_one():
    chain = Chain("4-level", {1: P | U | A | D | 1 << 59}, cr4=X86_CR4_PKE, pkru=0xC)
    code = PFERR_PRESENT_MASK | PFERR_PK_MASK | PFERR_USER_MASK | WRITE
    assert chain.error(PFERR_USER_MASK | WRITE) == code


def test_only_the_key_of_the_page_counts():
    chain = Chain("4-level", {1: ALL | 3 << 59}, cr4=X86_CR4_PKE, pkru=0xFFFFFFFF & ~(3 << 6))
    assert chain.error(PFERR_USER_MASK | WRITE) is None


@pytest.mark.parametrize("mode", ["pae", "2-level"])
def test_keys_need_long_mode(mode):
    chain = Chain(mode, cr4=X86_CR4_PKE, pkru=0xFFFFFFFF)
    assert chain.error(PFERR_USER_MASK | WRITE) is None


def test_keys_work_in_5_level_paging():
    assert Chain("5-level", cr4=X86_CR4_PKE, pkru=1).error() == PFERR_PRESENT_MASK | PFERR_PK_MASK


def test_fetch_is_reported_with_nxe_alone_in_32_bit_paging():
    # KVM deviation: the SDM (Vol. 3A 4.7) wants CR4.PAE as well.
    assert Chain("2-level", {1: 0}, efer=EFER_NX).error(FETCH) == FETCH
    assert Chain("2-level", {1: 0}).error(FETCH) == 0
    assert Chain("2-level", {1: 0}, cr4=X86_CR4_SMEP).error(FETCH) == FETCH
