"""The command line, one module a command: parse, call the library, print.

Commands import what they run inside their functions, so that `--help` is quick.
"""

from st_embfilter.cli import build, card, demo, inspect
from st_embfilter.cli.app import app

__all__ = ["app", "build", "card", "demo", "inspect"]
