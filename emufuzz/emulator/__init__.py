"""The port of KVM's instruction emulator (Linux 6.12, arch/x86/kvm/emulate.c)."""
