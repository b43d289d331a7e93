"""What surrounds the emulator in KVM: vCPU, VMCS, VMX exits, guest paging (Linux 6.12)."""
