"""Guest paging and the translations that KVM builds from it (arch/x86/kvm/mmu, Linux 6.12)."""
