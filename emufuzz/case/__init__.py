"""Cases and outcomes: values, exchange format, builders of machine states, a catalogue of tricky ones."""
