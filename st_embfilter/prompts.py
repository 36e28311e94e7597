"""Prompt recipes."""

from __future__ import annotations

from st_embfilter.errors import PromptError


def check_prompt(prompt: str | None) -> None:
    """Rejects prompt recipes that are not known.

    Raises:
        PromptError: Names the known ones.
    """
    if prompt is not None:
        raise PromptError(f"prompt must be None (plain text), got {prompt!r}")
