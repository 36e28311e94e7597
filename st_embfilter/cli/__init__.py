"""The command line, one module a command: parse, call the library, print.

Commands import what they run inside their functions, so that `--help` is quick.
"""

from st_embfilter.cli import (
    apply,
    bench,
    build,
    card,
    encode,
    evaluate,
    export,
    inspect,
    lens,
    push,
    verify,
)
from st_embfilter.cli.app import app

__all__ = [
    "app",
    "apply",
    "bench",
    "build",
    "card",
    "encode",
    "evaluate",
    "export",
    "inspect",
    "lens",
    "push",
    "verify",
]
