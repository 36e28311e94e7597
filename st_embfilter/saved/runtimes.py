"""What runtimes beside sentence-transformers need in a folder, each rule taught by one of them.

- vLLM reads every `*.safetensors` in the root as weights of the backbone, so the spectrum lies
  beside the projection; it cuts embeddings only of models whose config says that it may.
- transformers.js gives a token of a template the id that its name has in the vocabulary.
- sentence-transformers >= 6 says which transformers is needed, where the folder names it.

Folders of 0.1.0 do none of this; they load as before, and `verify` names what they should change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.model.metadata import SPECTRUM_FILE
from st_embfilter.model.tokenizer import TOKENIZER_FILE, single_pieces
from st_embfilter.saved.layout import BACKBONE_CONFIG, EARLIER_CODE, MODEL_CONFIG
from st_embfilter.saved.since import SINCE
from st_embfilter.text import read_json, reading, write_json

_NESTED: Final = "is_matryoshka"


def requirements(model_type: object) -> dict[str, str]:
    """What must be installed to load an architecture, for `config_sentence_transformers.json`.

    Args:
        model_type: As `config.json` names it.

    Returns:
        A version specifier by package; nothing where sentence-transformers asks for enough itself.
    """
    since = SINCE.get(model_type) if isinstance(model_type, str) else None
    return {} if since is None else {"transformers": f">={since}"}


def state_nesting(folder: Path) -> None:
    """Makes `config.json` say that every prefix of an embedding is one, and nothing else."""
    path = folder / BACKBONE_CONFIG
    stored = path.read_bytes()
    config = read_json(stored, BACKBONE_CONFIG, FormatError, infinity=True)
    if config.get(_NESTED) is True:
        return
    if _NESTED in config or not config:
        config[_NESTED] = True
        write_json(path, config)
    else:  # every other byte stays
        values = stored.rstrip().removesuffix(b"}").rstrip()
        path.write_bytes(values + f',\n  "{_NESTED}": true\n}}\n'.encode())


def older_layout(files: ModelFiles, *, prompted: bool) -> Iterator[str]:
    """What `save_pretrained` writes in another way today, a sentence each.

    Args:
        files: Of a saved model.
        prompted: Whether its tokenizer puts a prompt around texts.

    Raises:
        FormatError: If a file cannot be read.
    """
    if files.path(SPECTRUM_FILE) is not None:
        yield f"vLLM needs {SPECTRUM_FILE} in 2_Dense/, not in the root"
    config = _read(files, BACKBONE_CONFIG)
    if config.get(_NESTED) is not True:
        yield f'vLLM takes dimensions= only with "{_NESTED}": true in {BACKBONE_CONFIG}'
    needed = requirements(config.get("model_type"))
    if needed and "requirements" not in _read(files, MODEL_CONFIG):
        yield f'{MODEL_CONFIG} should say "requirements": {json.dumps(needed)}'
    for (file, sha256), version in EARLIER_CODE.items():
        path = files.path(file)
        if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            yield f"{file} is that of {version}, which needs much time and memory for long texts"
    path = files.path(TOKENIZER_FILE) if prompted else None
    if path is not None:
        with reading(TOKENIZER_FILE, FormatError):
            document = read_json(path.read_text("utf-8"), TOKENIZER_FILE, FormatError)
            processor = document["post_processor"]
            single = processor == single_pieces(processor)
        if not single:
            yield f"transformers.js needs a template of single tokens in {TOKENIZER_FILE}"


def _read(files: ModelFiles, name: str) -> dict[str, Any]:
    path = files.path(name)
    if path is None:
        return {}
    document: dict[str, Any] = read_json(path.read_bytes(), name, FormatError, infinity=True)
    return document
