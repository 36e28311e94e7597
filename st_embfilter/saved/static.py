"""The folder of a static model: one table, one tokenizer, no language model.

Names and keys are those that every version of `StaticEmbedding` and model2vec read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from torch import Tensor

from st_embfilter.errors import FormatError
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.files.writer import RawTensor, write_safetensors
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.static import static_metadata
from st_embfilter.saved.card import base_card, render
from st_embfilter.saved.card_facts import facts_of_files
from st_embfilter.saved.layout import CARD_FILE, FLOATS, STATIC_FOLDER, TABLE
from st_embfilter.text import json_text

STATIC_FILES: Final = (
    MODULES_FILE,
    "config_sentence_transformers.json",
    f"{STATIC_FOLDER}/{SAFETENSORS_FILE}",
    f"{STATIC_FOLDER}/tokenizer.json",
    METADATA_FILE,
    CARD_FILE,
)


def static_files(
    model: SentenceTransformer, *, token: str | bool | None = None
) -> dict[str, bytes]:
    """Every file of a static model's folder but its table.

    Args:
        model: From `from_causal_lm(..., layers=0)`.
        token: Hub token, to read the base model's card.

    Raises:
        FormatError: If something else than Normalize follows the table.
    """
    modules: list[Any] = list(model.children())
    metadata = static_metadata(model)
    kinds = (StaticEmbedding, Normalize)
    fits = all(isinstance(m, kind) for m, kind in zip(modules, kinds, strict=False))
    if metadata is None or len(modules) > len(kinds) or not fits:
        raise FormatError(
            "a static model holds StaticEmbedding [> Normalize], got "
            + " > ".join(type(module).__name__ for module in modules)
        )
    config = {
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "similarity_fn_name": str(model.similarity_fn_name),
    }
    files = {
        MODULES_FILE: json_text(static_modules(normalize=len(modules) > 1)).encode(),
        "config_sentence_transformers.json": json_text(config).encode(),
        f"{STATIC_FOLDER}/tokenizer.json": modules[0].tokenizer.to_str(pretty=True).encode(),
        METADATA_FILE: metadata.to_json().encode(),
    }
    source = metadata.provenance
    base = None
    if source.model_id is not None and source.revision is not None:
        base = base_card(source.model_id, source.revision, token)
    dtype = str(modules[0].embedding.weight.dtype).removeprefix("torch.")
    files[CARD_FILE] = render(facts_of_files(files, base_card=base, dtype=dtype)).encode()
    return files


def static_modules(*, normalize: bool) -> list[dict[str, object]]:
    """The content of `modules.json`.

    Args:
        normalize: Whether embeddings are scaled to unit length at the end.
    """
    names = ["StaticEmbedding", *(["Normalize"] if normalize else [])]
    return [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]


def write_table(model: SentenceTransformer, folder: Path) -> None:
    """Writes the table of a static model into its folder."""
    modules: list[Any] = list(model.children())
    (folder / STATIC_FOLDER).mkdir(exist_ok=True)
    table = {TABLE: RawTensor.of(modules[0].embedding.weight)}
    write_safetensors(folder / STATIC_FOLDER / SAFETENSORS_FILE, table)


def read_table(path: Path | None, metadata: FilterMetadata) -> Tensor:
    """The table of a static model, (V, k), finite and in one of the dtypes of `FLOATS`.

    Args:
        path: Its file.
        metadata: What it must fit.

    Raises:
        FormatError: If it is missing, of another width or dtype, or not finite.
    """
    try:
        with safe_open(path or "", framework="pt") as stored:
            table: Tensor = stored.get_tensor(TABLE)
    except Exception as error:  # safetensors names many
        raise FormatError(
            f"{STATIC_FOLDER}/{SAFETENSORS_FILE} must hold {TABLE}, got: {error}"
        ) from error
    fits = table.ndim == 2 and table.shape[1] == metadata.k and table.dtype in FLOATS
    if not fits or not bool(torch.isfinite(table).all()):
        raise FormatError(
            f"the table must be finite, of floats and {metadata.k} wide as {METADATA_FILE} says, "
            f"got shape {tuple(table.shape)} and {table.dtype}; the files do not belong together"
        )
    return table


def is_static(folder: Path) -> bool:
    """Whether a folder holds a static model."""
    return (folder / STATIC_FOLDER).is_dir()
