"""`st-embfilter inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Revision, app, describe, escape, out, quiet_libraries

if TYPE_CHECKING:
    from st_embfilter.model.layer import EmbedFilterLayer
    from st_embfilter.model.metadata import FilterMetadata
    from st_embfilter.unembedding.source import Source


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a filtered model.")],
    revision: Revision = None,
) -> None:
    """Show backbone, window, spectrum and hashes of a filtered model."""
    quiet_libraries(model, quiet=False)
    from st_embfilter.model.prompts import describe_recipe, recipe_from_dict
    from st_embfilter.unembedding.source import Source

    opened = Source(model, revision)
    layer, metadata = _open(opened)
    prompt = metadata.prompt
    source = metadata.provenance
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "Backbone": _at(source.model_id, source.revision),
        "Unembedding": f"{source.tensor} {source.shape[0]:,} x {source.shape[1]:,} {source.dtype}"
        + (", tied to the input embedding" if source.tied else ""),
        "Window": describe(metadata),
        **_depth_rows(metadata),
        "sha256": source.sha256,
        **({} if layer is None else _spectrum_rows(layer)),
        "Calibration": _calibration(metadata),
        "Prompt": describe_recipe(recipe_from_dict(prompt) if prompt else None),
        **_pipeline_rows(opened),
        "Versions": ", ".join(f"{k} {v}" for k, v in metadata.versions.items()),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out.print(table, highlight=False)


def _open(source: Source) -> tuple[EmbedFilterLayer | None, FilterMetadata]:
    """The filter and its metadata; of a static model, whose filter is folded away, those alone."""
    from st_embfilter.model.find import find_filter
    from st_embfilter.saved.baked_checks import find_baked
    from st_embfilter.saved.load import load_filter

    baked = find_baked(source.files)
    if baked is not None:
        return None, baked
    found = find_filter(source)
    depth = None if found is None else found.metadata.depth
    if found is not None and depth is not None and depth.layers == 0:
        return None, found.metadata
    layer = load_filter(source)
    return layer, layer.metadata


def _depth_rows(metadata: FilterMetadata) -> dict[str, str]:
    depth = metadata.depth
    if depth is None:
        return {}
    if depth.layers:
        return {"Depth": f"the first {depth.layers} of {depth.of} blocks"}
    weights = "" if depth.token_weights is None else f", weighted by {depth.token_weights}"
    return {"Depth": f"0 of {depth.of} blocks: a table of token embeddings{weights}"}


def _pipeline_rows(source: Source) -> dict[str, str]:
    """What happens around the filter; nothing for a filter alone."""
    from st_embfilter.model.find import find_filter
    from st_embfilter.model.metadata import METADATA_FILE
    from st_embfilter.saved.baked_checks import find_baked
    from st_embfilter.saved.card_facts import facts_of_files

    baked = find_baked(source.files)
    if baked is not None:
        return {"Filter": f"baked into the weights: the first {baked.k} of {baked.d} numbers"}
    found = find_filter(source)
    if found is None or found.form == "alone":
        return {}
    names = (
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        f"{found.metadata_folder}{METADATA_FILE}",
    )
    paths = {name: source.files.path(name) for name in names}
    facts = facts_of_files({name: path.read_bytes() for name, path in paths.items() if path})
    length = facts.max_seq_length
    return {
        "Pooling": facts.pooling,
        "Length": "the model's own limit" if length is None else f"at most {length:,} tokens",
        "Normalised": "yes, unit length" if facts.normalized else "no",
    }


def _spectrum_rows(layer: EmbedFilterLayer) -> dict[str, str]:
    if layer.singular_values is None:
        return {}
    values = layer.singular_values
    energy = values.square() / values.square().sum()
    kept = layer.metadata.band.indices(layer.metadata.d)
    return {
        "Singular values": f"{values[0]:.4g} (largest) {values[len(values) // 2]:.4g} (middle) "
        f"{values[-1]:.4g} (smallest)",
        "Energy kept": f"{energy[kept].sum():.1%} of the squared spectrum "
        f"(the largest direction alone holds {energy[0]:.1%})",
    }


def _calibration(metadata: FilterMetadata) -> str:
    record = metadata.calibration
    if record is None:
        return "none (the filter alone)"
    texts = f"{record.texts:,} texts" + (
        {"self": f" of the model's own, seed {record.seed}", "generic": " of the generic ones"}.get(
            record.source, ""
        )
    )
    return f"strength {record.strength:g}, {texts}, shrinkage {record.shrinkage:.3f}"


def _at(model_id: str | None, revision: str | None) -> str:
    return f"{model_id or 'unknown'}{f' at {revision}' if revision else ''}"
