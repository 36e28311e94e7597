"""What the library must survive, tried out: `python -m hardening`."""
