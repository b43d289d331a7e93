"""Guided generation: what cases reached decides what later ones are made from (docs/guidance.md)."""
