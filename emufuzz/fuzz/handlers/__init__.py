"""Exit handlers against the emulator: the same instruction through both, and why they differ."""
