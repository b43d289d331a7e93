"""Guest physical memory: slots, holes, read-only slots, dirty logging, generations."""

from __future__ import annotations

import pytest

from emufuzz.kvm.memslots import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    EFAULT,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    GuestMemory,
    MemslotError,
    memory_from_pages,
    memory_from_regions,
)


def _memory(*slots, pages=None):
    memory = GuestMemory(pages or {})
    for number, (base, npages, flags) in enumerate(slots):
        memory.set_memory_region(number, base, npages, flags)
    return memory


class _Listener:
    def __init__(self):
        self.calls = []

    def memslots_updated(self, generation):
        self.calls.append(("updated", generation))

    def flush_shadow_memslot(self, slot):
        self.calls.append(("flush", slot.id))

    def enable_log_dirty(self, slot, gfns):
        self.calls.append(("log", slot.id, tuple(gfns)))


def test_frames_find_their_slot_and_holes_none():
    space = _memory((0x10, 4, 0), (0x20, 1, 0), (0, 2, 0)).spaces[0]
    found = {gfn: slot.id if (slot := space.gfn_to_memslot(gfn)) else None for gfn in range(0x22)}
    expected = dict.fromkeys(range(0x22)) | {0: 2, 1: 2, 0x20: 1} | dict.fromkeys(range(0x10, 0x14), 0)
    assert found == expected
    assert [space.gfn_to_memslot(gfn) for gfn in (0x13, 0x14, 0x13)][1] is None


def test_reads_cross_slots_and_stop_at_holes():
    memory = _memory((1, 1, 0), (2, 1, 0), pages={1: b"a" * 4096, 2: b"b" * 4096})
    space = memory.spaces[0]
    assert space.read_guest(0x1FFE, 4) == b"aabb"
    assert space.read_guest(0x2FFE, 4) is None
    assert space.read_guest(0x5000, 0) == b""
    assert space.read_guest_page(1, 8, 2) == b"aa"


def test_frames_without_contents_are_zero():
    assert _memory((5, 1, 0)).spaces[0].read_guest(0x5000, 8) == bytes(8)


def test_a_write_that_runs_into_a_hole_leaves_its_first_part():
    memory = _memory((1, 1, 0))
    assert memory.spaces[0].write_guest(0x1FFE, b"abcd") == -EFAULT
    assert memory.spaces[0].read_guest(0x1FFE, 2) == b"ab"


def test_read_only_slots_are_read_not_written():
    space = _memory((1, 1, KVM_MEM_READONLY)).spaces[0]
    assert space.write_guest(0x1000, b"x") == -EFAULT
    assert space.read_guest(0x1000, 1) == b"\0"
    assert space.writable_slot(1) is None


def test_the_initial_pages_are_shared_and_never_changed():
    pages = {1: b"a" * 4096}
    memory = _memory((1, 1, 0), pages=pages)
    memory.spaces[0].write_guest(0x1001, b"xy")
    assert pages == {1: b"a" * 4096}
    assert memory.changed_pages() == {1: b"axy" + b"a" * 4093}
    memory.spaces[0].write_guest(0x1001, b"aa")
    assert memory.changed_pages() == {}


def test_dirty_logging_sees_writes_to_its_slots_only():
    memory = _memory((1, 2, KVM_MEM_LOG_DIRTY_PAGES), (8, 1, 0))
    space = memory.spaces[0]
    for gpa in (0x1000, 0x2000, 0x8000):
        assert space.write_guest(gpa, b"x") == 0
    space.mark_page_dirty(8)
    space.mark_page_dirty(1)
    listener = _Listener()
    memory.listeners.append(listener)
    slot = space.gfn_to_memslot(1)
    assert memory.get_dirty_log(slot) == [1, 2]
    assert listener.calls == [("log", 0, (1, 2))]
    assert memory.get_dirty_log(slot) == []


def test_compare_and_exchange():
    memory = _memory((1, 1, 0))
    space = memory.spaces[0]
    slot = space.gfn_to_memslot(1)
    assert not space.cmpxchg(slot, 0x1010, b"\1\0", b"\2\0")
    assert space.cmpxchg(slot, 0x1010, b"\0\0", b"\2\0")
    assert space.read_guest(0x1010, 2) == b"\2\0"


def test_every_change_has_a_generation_and_spaces_never_share_one():
    memory = GuestMemory({})
    seen = {space.generation for space in memory.spaces}
    assert len(seen) == 2
    memory.set_memory_region(0, 1, 1)
    memory.set_memory_region(0, 1, 1, as_id=1)
    for space in memory.spaces:
        assert space.generation not in seen
        seen.add(space.generation)
    assert len(seen) == 4


def test_deleting_goes_through_an_invalid_slot():
    memory = _memory((1, 1, 0))
    space = memory.spaces[0]
    before = space.generation
    states = []

    class Watcher(_Listener):
        def flush_shadow_memslot(self, slot):
            current = space.gfn_to_memslot(1)
            states.append((current.flags, space.is_visible_gfn(1), space.read_guest(0x1000, 1)))
            states.append(space.write_guest(0x1000, b"x"))

    memory.listeners.append(Watcher())
    memory.set_memory_region(0, 1, 0)
    assert states == [(KVM_MEMSLOT_INVALID, False, None), -EFAULT]
    assert space.gfn_to_memslot(1) is None
    assert space.generation == before + 4


def test_moving_keeps_the_host_memory():
    memory = _memory((1, 1, 0), pages={1: b"a" * 4096})
    memory.set_memory_region(0, 9, 1)
    assert memory.spaces[0].read_guest(0x9000, 1) == b"a"
    assert memory.spaces[0].read_guest(0x1000, 1) is None


def test_slots_may_share_host_memory():
    memory = _memory((1, 1, 0))
    memory.set_memory_region(7, 0x100, 1, userspace_pfn=1)
    memory.set_memory_region(0, 0x30, 1, as_id=1, userspace_pfn=1)
    memory.spaces[0].write_guest(0x100000, b"z")
    assert memory.spaces[0].read_guest(0x1000, 1) == b"z"
    assert memory.spaces[1].read_guest(0x30000, 1) == b"z"


def test_turning_dirty_logging_on_is_announced():
    memory = _memory((1, 2, 0))
    listener = _Listener()
    memory.listeners.append(listener)
    memory.set_memory_region(0, 1, 2, KVM_MEM_LOG_DIRTY_PAGES)
    assert listener.calls == [("updated", memory.spaces[0].generation), ("log", 0, (1, 2))]


@pytest.mark.parametrize(
    ("slot_id", "base", "npages", "flags", "message"),
    [
        (1, 1, 1, 0, "overlaps slot 0"),
        (1, 0, 2, 0, "overlaps slot 0"),
        (0, 1, 3, 0, "cannot change"),
        (0, 1, 2, KVM_MEM_READONLY, "cannot change"),
        (1, 9, 1, KVM_MEM_GUEST_MEMFD, "unknown flags"),
        (1, 9, -1, 0, "out of range"),
        (1, 1 << 40, 1, 0, "out of range"),
        (5, 9, 0, 0, "does not exist"),
    ],
)
def test_bad_regions_are_refused(slot_id, base, npages, flags, message):
    memory = _memory((1, 2, 0))
    with pytest.raises(MemslotError, match=message):
        memory.set_memory_region(slot_id, base, npages, flags)


def test_kvms_own_page_is_there_but_not_visible():
    memory = GuestMemory({})
    memory.set_private_page(APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, 0xFEE00)
    for space in memory.spaces:
        assert not space.is_visible_gfn(0xFEE00)
        assert space.read_guest(0xFEE00000, 4) == bytes(4)


def test_memory_of_a_case_has_a_slot_per_run_of_pages():
    page = bytes(4096)
    memory = memory_from_pages({0: page, 1: page, 5: page, 7: page, 8: page})
    assert [(slot.base_gfn, slot.npages) for slot in memory.spaces[0].slots] == [(0, 2), (5, 1), (7, 2)]
    assert memory_from_pages({}).spaces[0].slots == []


def test_smm_may_have_the_same_memory():
    memory = memory_from_regions({1: b"\x11" * 0x1000}, [(0x1000, 0x2000, KVM_MEM_LOG_DIRTY_PAGES)])
    assert memory.spaces[1].read_guest(0x1000, 1) is None
    memory.share_with_smm()
    assert memory.spaces[1].read_guest(0x1000, 1) == b"\x11"
    assert memory.spaces[1].write_guest(0x2000, b"\x22") == 0
    assert memory.spaces[0].read_guest(0x2000, 1) == b"\x22"
    assert memory.dirty == {(1, 2)}


def test_memory_from_regions_checks_alignment():
    memory = memory_from_regions({}, [(0x1000, 0x2000, 0), (0x8000, 0x1000, KVM_MEM_READONLY)])
    assert [slot.flags for slot in memory.spaces[0].slots] == [0, KVM_MEM_READONLY]
    for bad in ((0x1001, 0x1000, 0), (0x1000, 0x800, 0), (0x1000, 0, 0)):
        with pytest.raises(MemslotError, match="multiples of 4096"):
            memory_from_regions({}, [bad])


def test_memory_from_regions_refuses_overlaps_and_unknown_flags():
    with pytest.raises(MemslotError, match="slot 2 overlaps slot 0"):
        memory_from_regions({}, [(0x4000, 0x2000, 0), (0, 0x1000, 0), (0x5000, 0x1000, 0)])
    with pytest.raises(MemslotError, match="slot 0: unknown flags"):
        memory_from_regions({}, [(0, 0x1000, 1 << 10)])
    with pytest.raises(MemslotError, match="out of range"):
        memory_from_regions({}, [(1 << 52, 0x1000, 0)])


def test_as_many_regions_as_a_case_may_have_are_installed_at_once():
    """One by one they took 20 seconds."""
    memory = memory_from_regions({}, [(index * 0x2000, 0x1000, 0) for index in reversed(range(4096))])
    space = memory.spaces[0]
    assert len(space.slots) == 4096
    assert space.generation == memory_from_regions({}, [(0, 0x1000, 0)]).spaces[0].generation
    assert [space.slots[index].base_gfn for index in (0, 1, 4095)] == [0, 2, 8190]
