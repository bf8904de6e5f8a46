"""Runs that are killed, stopped and starved; the full figures by `make torture`."""
