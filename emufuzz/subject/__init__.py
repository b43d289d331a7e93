"""Things under test, behind one interface."""
