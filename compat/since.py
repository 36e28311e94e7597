"""Writes st_embfilter/saved/since.py: the first transformers that knows an architecture.

`python -m compat.since FOLDER`: wheels of earlier releases are fetched into FOLDER, the last one of
every minor release, and read without being installed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Final

from transformers.models.auto import modeling_auto

TARGET: Final = Path(__file__).parents[1] / "st_embfilter" / "saved" / "since.py"

#: What sentence-transformers 6 needs, the first one that reads requirements.
OLDEST: Final = (5, 0)
_FILES: Final = ("configuration_auto.py", "auto_mappings.py")

_HEAD: Final = '''\
"""Which transformers an architecture needs. Written by `python -m compat.since`."""

from typing import Final

#: Model types that transformers {oldest} does not know, with the first minor release that does;
#: those that {newest} maps to a language model, with or without vision.
SINCE: Final[dict[str, str]] = {{
'''


def wheel(release: tuple[int, int], folder: Path) -> Path:
    """The wheel of the last patch of a minor release, in the folder."""
    name = f"transformers-{release[0]}.{release[1]}."
    if not any(folder.glob(f"{name}*.whl")):
        wanted = f"transformers=={release[0]}.{release[1]}.*"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, wanted], check=True)
    return next(folder.glob(f"{name}*.whl"))


def model_types(wheel: Path) -> set[str]:
    """The model types that a release maps to a configuration."""
    found: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in {f"transformers/models/auto/{file}" for file in _FILES} & set(
            archive.namelist()
        ):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Assign) and "CONFIG_MAPPING_NAMES" in ast.dump(
                    node.targets[0]
                ):
                    pairs = [one for one in ast.walk(node) if isinstance(one, ast.Tuple)]
                    keys = [pair.elts[0] for pair in pairs if len(pair.elts) == 2]
                    found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return found


def main() -> None:
    """Writes the table."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    newest = tuple(map(int, version("transformers").split(".")[:2]))
    language = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    unseen = language - model_types(wheel(OLDEST, folder))
    text = _HEAD.format(oldest=".".join(map(str, OLDEST)), newest=".".join(map(str, newest)))
    for minor in range(OLDEST[1] + 1, newest[1] + 1):
        release = (OLDEST[0], minor)
        new = unseen & model_types(wheel(release, folder)) if release < newest else unseen
        text += "".join(f'    "{name}": "{release[0]}.{minor}",\n' for name in sorted(new))
        unseen -= new
    TARGET.write_text(f"{text}}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
