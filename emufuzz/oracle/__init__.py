"""Judges of outcomes: what each case should do, and what they do not vouch for."""
