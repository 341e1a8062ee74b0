"""Whole packages: compiled, moved, imported, run, altered."""
