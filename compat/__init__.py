"""Proof that a portable folder loads everywhere: `make compat`."""
