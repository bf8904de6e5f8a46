"""Rows to token ids and supervised masks; packing; order as a pure function."""
