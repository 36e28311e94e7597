"""What `verify` asks of the small files beside a filter: that they load what was looked at.

transformers and sentence-transformers read more files, and more keys of them, than are written by
`save_pretrained`; each could put another model in the place of the one that was checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.model import echo_pooling
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.saved import layout
from st_embfilter.saved.checks import odd_numbers
from st_embfilter.text import read_json, shown
from st_embfilter.unembedding.source import OTHER_WEIGHTS

#: Files that change what other libraries load.
_FOREIGN: Final = ("adapter_config.json", "2_Dense/pytorch_model.bin")


def document(files: ModelFiles, name: str, kind: Any = dict, *, infinity: bool = False) -> Any:
    """The content of a JSON file of a model.

    Args:
        files: Of the model.
        name: Of the file.
        kind: As in `read_json`.
        infinity: As there.

    Raises:
        FormatError: If it is missing or malformed.
    """
    path = files.path(name)
    if path is None:
        raise FormatError(f"a saved model must hold {name}, got none")
    return read_json(path.read_bytes(), name, FormatError, kind, infinity=infinity)


def check_modules(files: ModelFiles, d: int) -> tuple[tuple[bool | None, str], tuple[str, ...]]:
    """The pipeline and its small files must be those that `save_pretrained` writes.

    Args:
        files: Of a portable folder.
        d: Width of the model.

    Returns:
        What was found; and the code files that come with the pipeline, which are ours.

    Raises:
        FormatError: If a file is missing or says something else.
    """
    code = layout.plugin_files(document(files, MODULES_FILE, list))
    for file in code:
        path = files.path(file)
        ours = Path(echo_pooling.__file__).with_name(file).read_bytes()
        found = b"" if path is None else path.read_bytes()
        known = (file, hashlib.sha256(found).hexdigest()) in layout.EARLIER_CODE
        if found != ours and not known:
            return (False, f"{file} is not the code of this package, byte for byte; read it"), code
    layout.check_transformer_config(document(files, layout.TRANSFORMER_CONFIG))
    if "echo_pooling.py" not in code:
        layout.check_pooling_config(document(files, layout.POOLING_CONFIG), d)
    with_code = f", with {', '.join(code)} of this package" if code else ""
    return check_surroundings(files, f"as save_pretrained writes them{with_code}"), code


def check_surroundings(files: ModelFiles, good: str) -> tuple[bool | None, str]:
    """The files around the modules of a model with a backbone, whatever the modules.

    Args:
        files: Of the model.
        good: What to say if nothing is wrong with them.

    Raises:
        FormatError: If a file is missing or malformed.
    """
    for file in _FOREIGN:
        if files.path(file) is not None:
            return False, f"{file} changes what other libraries load; it must not be there"
    prompt = layout.check_model_config(document(files, layout.MODEL_CONFIG))
    config = document(files, layout.BACKBONE_CONFIG, infinity=True)
    found = odd_config(config)
    if found is not None:
        return False, f"{layout.BACKBONE_CONFIG}: {found}"
    if "auto_map" in config:
        return None, "the backbone has code of its own (trust_remote_code); read it"
    return True, good if not prompt else f"{good}; {shown(repr(prompt))} goes before every text"


def odd_config(config: Mapping[str, Any]) -> str | None:
    """What in the configuration of a backbone no model of ours has; None for nothing."""
    odd = next(odd_numbers(config), None)
    if odd is not None:
        return shown(odd)
    if OTHER_WEIGHTS in config:
        return f"{OTHER_WEIGHTS} names other weights than those that were looked at"
    return None
