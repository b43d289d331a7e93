"""Corpora: directories of cases, what each case covers, and subsets that cover as much as the whole."""
