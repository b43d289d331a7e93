"""Instruction handlers, one family a module."""
