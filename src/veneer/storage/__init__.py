"""How a base weight is stored: reading and writing it, and linear layers over quantised weights."""
