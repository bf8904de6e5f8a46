"""Arithmetic: a plain reference for every operation, and the fast paths that must equal it."""
