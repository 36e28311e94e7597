"""`st-embfilter bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Device, Quiet, RemoteCode, Revision, app, out, quiet_libraries
from st_embfilter.errors import BackboneError
from st_embfilter.text import reading


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a filtered model or a causal LM.")
    ],
    retrieval: Annotated[
        Path | None, typer.Option(help="BEIR folder; quality is then measured too.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line; every 50th is a query.")
    ] = None,
    hnsw: Annotated[bool, typer.Option(help="Also approximate search.")] = True,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Compare storage, speed and quality of indexes at every width and precision."""
    if (retrieval is None) == (texts is None):
        raise typer.BadParameter("give --retrieval FOLDER or --texts FILE")
    quiet_libraries(model, quiet)
    from st_embfilter.evaluation.indexes import Collection, storage_table

    collection = (
        Collection.of_texts(texts) if texts is not None else Collection.of_beir(str(retrieval))
    )
    from st_embfilter.model.build import from_causal_lm
    from st_embfilter.model.find import find_filter
    from st_embfilter.saved.load import load
    from st_embfilter.unembedding.source import Source

    source = Source(model, revision, trust_remote_code=trust_remote_code)
    if find_filter(source) is not None:
        loaded = load(source, device=device)
    else:
        # All directions in nested order: the full width is the raw model turned, and every prefix
        # is the paper's window.
        loaded = from_causal_lm(source, keep=1.0, device=device, show_progress_bar=not quiet)
    with reading(model, BackboneError, "embed texts"):
        documents = loaded.encode_document(
            collection.documents, batch_size=batch_size, show_progress_bar=not quiet
        )
        queries = loaded.encode_query(
            collection.queries, batch_size=batch_size, show_progress_bar=False
        )
    rows = storage_table(
        documents,
        queries,
        kinds=("flat", "hnsw") if hnsw else ("flat",),
        gains=collection.gains,
    )
    table = Table(
        title=f"{len(collection.documents):,} vectors, {len(collection.queries):,} queries, "
        "one thread",
        title_justify="left",
    )
    for column in ("dims", "precision", "index", "MB", "ms/query", "recall@10"):
        table.add_column(column, justify="left" if column in ("precision", "index") else "right")
    if collection.gains is not None:
        table.add_column("nDCG@10", justify="right")
    for row in rows:
        cells = [
            str(row.dims),
            row.precision,
            row.kind,
            f"{row.index_bytes / 1e6:.3f}",
            f"{row.milliseconds:.3f}",
            f"{100 * row.recall:.1f}",
        ]
        if row.ndcg is not None:
            cells.append(f"{100 * row.ndcg:.2f}")
        table.add_row(*cells)
    out.print(table)
    out.print(
        f"Recall counts the neighbours of exact float32 search at {rows[0].dims} dimensions.",
        highlight=False,
    )
