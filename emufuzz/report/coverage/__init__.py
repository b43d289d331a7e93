"""Reports of what was tested: cells of a campaign or corpus, the oracles' share, lines of the emulator."""
