"""`st-embfilter push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import Quiet, app, out, quiet_libraries


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model, or of a filter alone.")],
    repo: Annotated[str, typer.Argument(help="Hub id, e.g. org/name; made if need be.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    quiet: Quiet = False,
) -> None:
    """Publish a saved model on the Hugging Face Hub, as one commit.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    quiet_libraries(repo, quiet)
    from st_embfilter.saved.push import push_folder

    commit = push_folder(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    out.print(f"Pushed to {commit.pr_url or commit.commit_url}", highlight=False, soft_wrap=True)
