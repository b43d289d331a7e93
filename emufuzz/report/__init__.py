"""What people read: one case with its disagreement, explained in text."""
