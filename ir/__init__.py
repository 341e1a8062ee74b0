"""Mechanism: types, ops, graphs, their text form, verification, interpretation and rewriting. Knows no model."""
