"""Small things that every room needs: names that load late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package that imports a public name at its first use.

    Args:
        package: Dotted name of the package.
        homes: Public name to the module, relative to the package, that defines it.

    Raises:
        AttributeError: From the function that is returned, for any other name.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
