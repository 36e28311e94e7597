"""A table of malformed and malicious models: what is done to a good folder, and what must be said.

The tests run it, and `python -m hardening` counts it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import st_embfilter
from st_embfilter.errors import EmbedFilterError, FormatError, PlacementError, UnembeddingError
from st_embfilter.model.build import build_filter
from st_embfilter.saved.load import load_filter
from tests.conftest import tiny_lm

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "shard-1.safetensors"
HEAD = "lm_head.weight"
PROJECTION = "2_Dense/model.safetensors"

#: A file with this name, in the working directory, shows that code of a model ran.
CANARY = "code-ran"

Change = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """One malformed input.

    Attributes:
        name: Of the test.
        change: What is done to a copy of a good folder.
        says: Part of the message, as a regular expression.
        error: Its type.
        how: "build" reads the unembedding matrix, "embed" makes a whole model of a language model;
            "filter" and "load" read a saved one.
    """

    name: str
    change: Change
    says: str
    error: type[EmbedFilterError] = UnembeddingError
    how: str = "build"

    def spoil(self, good: Path, folder: Path) -> None:
        """Copies a good model (see `good_models`) and changes the copy."""
        shutil.copytree(good / ("lm" if self.how in ("build", "embed") else "saved"), folder)
        self.change(folder)

    def attempt(self, folder: Path) -> None:
        """Opens the model."""
        if self.how == "build":
            build_filter(folder, show_progress_bar=False)
        elif self.how == "embed":
            st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
        elif self.how == "filter":
            load_filter(folder)
        else:
            st_embfilter.load(folder, device="cpu")


def good_models(place: Path) -> Path:
    """A tiny language model, `lm`, and a filtered model of it, `saved`, in a folder."""
    tiny_lm(place / "lm", tie_word_embeddings=False)
    model = st_embfilter.from_causal_lm(
        place / "lm", normalize=True, device="cpu", show_progress_bar=False
    )
    st_embfilter.save_pretrained(model, place / "saved")
    return place


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {CANARY}",))


def write(name: str, content: str | bytes) -> Change:
    """Replaces a file."""

    def change(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return change


def document(name: str, edit: Callable[[Any], Any]) -> Change:
    """Edits a JSON file in place, or replaces it by what the edit returns."""

    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        result = edit(value)
        (folder / name).write_text(json.dumps(value if result is None else result))

    return change


def put(*path: str, value: object) -> Callable[[Any], None]:
    """Sets a nested key."""

    def edit(at: Any) -> None:
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


def raw_header(edit: Callable[[dict[str, Any], int], bytes | None]) -> Change:
    """Edits the header of the weights; their data stay as they are."""

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        text = edit(header, len(data) - 8 - length) or json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def entry(key: str, value: object) -> Change:
    """Sets a key in the header entry of the head; None removes it."""

    def edit(header: dict[str, Any], size: int) -> None:
        header[HEAD][key] = value
        if value is None:
            del header[HEAD][key]

    return raw_header(edit)


def overlap(header: dict[str, Any], size: int) -> None:
    other = header["model.embed_tokens.weight"]
    header[HEAD]["data_offsets"] = other["data_offsets"]


def hole(header: dict[str, Any], size: int) -> None:
    del header["model.norm.weight"]


def duplicate(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f', "{HEAD}": ' + json.dumps(header[HEAD]) + "}").encode()


def prefix(length: int) -> Change:
    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])

    return change


def cut(name: str, keep: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Change:
    """Edits tensors and saves the file anew."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def fill(rows: slice | int, value: float) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD][rows] = value

    return weights(edit)


def few_rows(folder: Path) -> None:
    weights(lambda t: t.update({HEAD: t[HEAD][:8].clone()}))(folder)
    document("config.json", put("vocab_size", value=8))(folder)


def index(*, target: object = SHARD, name: str = INDEX, **other: object) -> Change:
    """Adds an index that places the head in the given file."""

    def change(folder: Path) -> None:
        if (folder / WEIGHTS).exists() and name == INDEX:  # without an index, that is read first
            (folder / WEIGHTS).rename(folder / SHARD)
        content = other or {"weight_map": {HEAD: target}}
        if other.get("weight_map", ...) is not ...:
            content = {"weight_map": other["weight_map"]}
        (folder / name).write_text(json.dumps(content))

    return change


def bare_index(content: str) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(content)

    return change


def adapter(config: dict[str, Any], weights: dict[str, torch.Tensor] | object = None) -> Change:
    """Makes the folder an adapter of a language model beside it, with a LoRA of the head."""

    def change(folder: Path) -> None:
        shutil.copytree(folder, folder / "base")
        for name in ("config.json", WEIGHTS):
            (folder / name).unlink()
        content = {"base_model_name_or_path": str(folder / "base"), "lora_alpha": 8, **config}
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        lora = {
            "base_model.model.lm_head.lora_A.weight": torch.ones(2, 32),
            "base_model.model.lm_head.lora_B.weight": torch.ones(200, 2),
        }
        if weights is None or isinstance(weights, dict):
            save_file({**lora, **(weights or {})}, folder / "adapter_model.safetensors")
        else:
            torch.save(weights, folder / "adapter_model.bin")

    return change


def no_shard(folder: Path) -> None:
    index(target="model-00001-of-00002.safetensors")(folder)


def shard_without_tensor(folder: Path) -> None:
    save_file({"x": torch.ones(2, 2)}, folder / "other.safetensors")
    index(target="other.safetensors")(folder)


def shard_is_a_folder(folder: Path) -> None:
    (folder / "shard.safetensors").mkdir()
    index(target="shard.safetensors")(folder)


def duplicate_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(f'{{"weight_map": {{"{HEAD}": "{WEIGHTS}", "{HEAD}": "x"}}}}')


def link_out(name: str) -> Change:
    """Moves a file out of the folder and leaves a symbolic link to it."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"outside-{Path(name).name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def linked_shard(folder: Path) -> None:
    link_out(WEIGHTS)(folder)
    (folder / WEIGHTS).rename(folder / SHARD)
    index()(folder)


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def loop(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def torch_bin(value: object, *, keep: float = 1.0, protocol: int | None = None) -> Change:
    """Replaces the weights by a `.bin` file with this value."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        path = folder / "pytorch_model.bin"
        if protocol is not None:
            path.write_bytes(pickle.dumps(value, protocol=protocol))
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return change


def torch_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index(target="../outside.bin", name="pytorch_model.bin.index.json")(folder)


def remote_code(folder: Path) -> None:
    code = f"import os\nos.system('touch {CANARY}')\n"
    (folder / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    document("config.json", lambda c: c | {"auto_map": auto, "model_type": "evil"})(folder)


def remote_module(folder: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.system('touch {CANARY}')\n")
    document("modules.json", put_type(1, "evil.Pooling"))(folder)


def put_type(position: int, name: str) -> Callable[[Any], None]:
    def edit(modules: Any) -> None:
        modules[position]["type"] = name

    return edit


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def empty_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def after_normalize(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    modules[2], modules[3] = modules[3], modules[2]
    return modules


def twice(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*modules[:3], {**modules[2], "idx": 3, "name": "3"}]


def module_path(path: str) -> Callable[[Any], None]:
    def edit(modules: Any) -> None:
        modules[2]["path"] = path

    return edit


def projection(edit: Callable[[torch.Tensor], torch.Tensor], name: str = "linear.weight") -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = edit(tensors.pop("linear.weight")).contiguous()

    return weights(change, PROJECTION)


def nan(matrix: torch.Tensor) -> torch.Tensor:
    matrix[3, 5] = torch.nan
    return matrix


def repeated(matrix: torch.Tensor) -> torch.Tensor:
    matrix[1] = matrix[0]
    return matrix


def meta(*path: str, value: object) -> Change:
    return document("embfilter.json", put(*path, value=value))


def twice_in(name: str, key: str) -> Change:
    """Writes a key of a JSON file once more, with another value."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert f'"{key}":' in text
        (folder / name).write_text(text.replace(f'"{key}":', f'"{key}": null, "{key}":', 1))

    return change


def drop(*path: str) -> Change:
    def edit(at: Any) -> None:
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return document("embfilter.json", edit)


def spectrum(values: torch.Tensor, name: str = "singular_values") -> Change:
    file = "2_Dense/embfilter_spectrum.safetensors"
    return lambda folder: save_file({name: values}, folder / file)


#: Of no model here.
CALIBRATION = {
    "source": "texts",
    "texts": 40,
    "sha256": "0" * 64,
    "strength": 1.0,
    "shrinkage": 0.1,
    "seed": None,
}


def saved(
    name: str,
    change: Change,
    says: str,
    error: type[EmbedFilterError] = FormatError,
    how: str = "filter",
) -> Hostile:
    return Hostile(name, change, says, error, how)


DEEP = "[" * 100_000

LAYER = "model.layers.0.mlp.up_proj.weight"


def embedded(name: str, change: Change, says: str) -> Hostile:
    return Hostile(name, change, says, EmbedFilterError, "embed")


def tokenizer(**parts: object) -> Change:
    return document("tokenizer.json", lambda content: content.update(parts))


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
NO_TOKEN = {
    "type": "TemplateProcessing",
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "x", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {},
}
PADDED = {
    "strategy": {"Fixed": 10**5},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}

CHECKPOINTS = [
    # The start of a safetensors file.
    Hostile("empty", write(WEIGHTS, b""), "must start with the length"),
    Hostile("seven bytes", write(WEIGHTS, b"\0" * 7), "must start with the length"),
    Hostile("eight bytes", write(WEIGHTS, b"\2" + b"\0" * 7), "must start with the length"),
    Hostile(
        "no safetensors file", write(WEIGHTS, b"version https://git-lfs"), "no safetensors file"
    ),
    Hostile("header longer than the file", prefix(10**6), "must start with the length"),
    Hostile("header of 18 exabytes", prefix(2**64 - 1), "must start with the length"),
    Hostile("header of no bytes", prefix(0), "must start with the length"),
    Hostile("header of one byte", prefix(1), "must start with the length"),
    Hostile("header cut short", prefix(40), "must be JSON"),
    Hostile("header with rubbish", raw_header(lambda h, n: b"{]" * 40), "must be JSON"),
    Hostile("header not in UTF-8", raw_header(lambda h, n: b'{"\xff\xfe": 1}'), "must be JSON"),
    Hostile("header nested deeply", raw_header(lambda h, n: DEEP.encode()), "must be JSON"),
    Hostile("header is a list", raw_header(lambda h, n: b"[1, 2, 3]"), "must be a JSON object"),
    Hostile("header is empty", raw_header(lambda h, n: b"{}"), "must|tensor"),
    Hostile("huge integer", raw_header(lambda h, n: b'{"a": ' + b"9" * 5000 + b"}"), "must be"),
    # One tensor in it.
    Hostile("entry is a list", raw_header(lambda h, n: h.update({HEAD: []})), "must be an object"),
    Hostile("entry is null", raw_header(lambda h, n: h.update({HEAD: None})), "must be an object"),
    Hostile("no dtype", entry("dtype", None), "must be stored in one of"),
    Hostile("unknown dtype", entry("dtype", "F31"), "must be stored in one of"),
    Hostile("dtype is a number", entry("dtype", 32), "must be stored in one of"),
    Hostile("dtype is a list", entry("dtype", ["F32"]), "must be stored in one of"),
    Hostile("integers", entry("dtype", "I64"), "must be stored in one of"),
    Hostile("booleans", entry("dtype", "BOOL"), "must be stored in one of"),
    Hostile("wider dtype", entry("dtype", "F64"), "truncated or damaged"),
    Hostile("no shape", entry("shape", None), "as whole numbers"),
    Hostile("more rows than stored", entry("shape", [201, 32]), "truncated or damaged"),
    Hostile("fewer rows than stored", entry("shape", [199, 32]), "truncated or damaged"),
    Hostile("shape swapped", entry("shape", [32, 200]), "must have the shape of the config"),
    Hostile("negative shape", entry("shape", [-200, -32]), "as whole numbers"),
    Hostile("broken shape", entry("shape", [200.5, 32]), "as whole numbers"),
    Hostile("shape of strings", entry("shape", ["200", "32"]), "as whole numbers"),
    Hostile("shape of booleans", entry("shape", [True, True]), "as whole numbers"),
    Hostile("shape that overflows", entry("shape", [2**62, 2**62]), "truncated or damaged"),
    Hostile("zero rows", entry("shape", [0, 32]), "V, d >= 1"),
    Hostile("vector", entry("shape", [6400]), "must have the shape of the config"),
    Hostile("three axes", entry("shape", [20, 10, 32]), "must have shape"),
    Hostile("no offsets", entry("data_offsets", None), "as whole numbers"),
    Hostile("three offsets", entry("data_offsets", [0, 1, 2]), "as whole numbers"),
    Hostile("offsets reversed", entry("data_offsets", [25600, 0]), "data_offsets"),
    Hostile("offsets outside", entry("data_offsets", [10**9, 10**9 + 25600]), "data_offsets|cover"),
    Hostile("offsets far outside", entry("data_offsets", [2**63, 2**64]), "data_offsets|cover"),
    Hostile("tensors that overlap", raw_header(overlap), "overlap"),
    Hostile("a hole between tensors", raw_header(hole), "overlap"),
    Hostile(
        "bytes after the tensors",
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x" * 9),
        "overlap",
    ),
    Hostile("the same tensor twice", raw_header(duplicate), "twice"),
    Hostile("data cut off", cut(WEIGHTS, 0.6), "truncated|overlap"),
    Hostile(
        "one byte missing",
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
        "truncated|overlap",
    ),
    # Numbers.
    Hostile("a row of NaN", fill(7, torch.nan), "row 7"),
    Hostile("a row of Inf", fill(199, torch.inf), "row 199"),
    Hostile("minus infinity", fill(0, -torch.inf), "row 0"),
    Hostile("all zero", fill(slice(None), 0.0), "all zero"),
    Hostile("fewer rows than columns", few_rows, "at least as many rows"),
    # The index.
    Hostile("shard above the folder", index(target="../../x"), "plain file name"),
    Hostile("shard by absolute path", index(target="/etc/passwd"), "plain file name"),
    Hostile("shard with backslashes", index(target="..\\x"), "plain file name"),
    Hostile("shard with a NUL", index(target="x\0.safetensors"), "plain file name"),
    Hostile(
        "shard name of 5,000 letters", index(target="x" * 5000), "plain file name|no such file"
    ),
    Hostile("shard is this folder", index(target="."), "plain file name|no such file"),
    Hostile("shard is a number", index(target=7), "plain file name"),
    Hostile("shard is missing", no_shard, "must hold the shard"),
    Hostile("shard is a folder", shard_is_a_folder, "must hold the shard"),
    Hostile("shard without the tensor", shard_without_tensor, "got no such tensor"),
    Hostile("shard is the config", index(target="config.json"), "must start with the length"),
    Hostile("index without a map", index(metadata={}), "non-empty object 'weight_map'"),
    Hostile("map is empty", index(weight_map={}), "non-empty object 'weight_map'"),
    Hostile("map is a list", index(weight_map=[HEAD]), "non-empty object 'weight_map'"),
    Hostile("index is no JSON", bare_index("{"), "must be JSON"),
    Hostile("index is a list", bare_index("[]"), "must be a JSON object"),
    Hostile("one tensor in two places", duplicate_place, "twice"),
    # Links and special files.
    Hostile("weights behind a link", link_out(WEIGHTS), "link"),
    Hostile("config behind a link", link_out("config.json"), "link"),
    Hostile("shard behind a link", linked_shard, "link"),
    Hostile(
        "tokenizer behind a link",
        link_out("tokenizer.json"),
        "link",
        how="embed",
        error=EmbedFilterError,
    ),
    Hostile("a link to itself", loop, "must hold|link"),
    Hostile("weights are a pipe", pipe, "must hold"),
    Hostile(
        "weights are a folder",
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "must hold",
    ),
    # Adapters.
    Hostile("adapter without lora_alpha", adapter({"lora_alpha": ...}), "lora_alpha"),
    Hostile("adapter with alpha in words", adapter({"lora_alpha": "8"}), "lora_alpha"),
    Hostile("adapter with a huge alpha", adapter({"lora_alpha": 10**400}), "lora_alpha"),
    Hostile("adapter with a list as revision", adapter({"revision": ["main"]}), "revision"),
    Hostile("adapter with a bad pattern", adapter({"alpha_pattern": {"(": 3}}), "alpha_pattern"),
    Hostile(
        "adapter with words in a pattern",
        adapter({"alpha_pattern": {"lm_head": "x"}}),
        "lora_alpha",
    ),
    Hostile("adapter that is a pickle with code", adapter({}, [Payload()]), "adapter"),
    Hostile("adapter that is a list", adapter({}, [torch.ones(2)]), "tensors by name"),
    Hostile("adapter of numbers", adapter({}, [7]), "tensors by name"),
    Hostile(
        "adapter with a vector",
        adapter({}, {"base_model.model.lm_head.lora_A.weight": torch.ones(32)}),
        "must fit it",
    ),
    Hostile(
        "adapter of no rank",
        adapter({}, {"base_model.model.lm_head.lora_A.weight": torch.ones(0, 32)}),
        "must fit it",
    ),
    Hostile(
        "adapter that says alpha twice",
        lambda f: (
            adapter({})(f),
            (f / "adapter_config.json").write_text(
                (f / "adapter_config.json").read_text().replace("{", '{"lora_alpha": 1, ', 1)
            ),
        ),
        "twice",
    ),
    # Pickles.
    Hostile("pickle with code", torch_bin({HEAD: Payload()}), "weights_only=True"),
    Hostile("old pickle with code", torch_bin({HEAD: Payload()}, protocol=2), "weights_only=True"),
    Hostile("bare code", torch_bin(b"cos\nsystem\n(S'touch code-ran'\ntR."), "weights_only=True"),
    Hostile(
        "pickle cut off", torch_bin({HEAD: torch.ones(200, 32)}, keep=0.5), "weights_only=True"
    ),
    Hostile("empty .bin", torch_bin(b""), "weights_only=True"),
    Hostile(".bin with a list", torch_bin([torch.ones(2)]), "must hold a dict"),
    Hostile(
        ".bin with integers", torch_bin({HEAD: torch.ones(200, 32, dtype=torch.int64)}), "floating"
    ),
    Hostile(".bin with numbers", torch_bin({HEAD: 7}), "floating"),
    Hostile(".bin with odd keys", torch_bin({7: torch.ones(2), HEAD: torch.ones(2)}), "must"),
    Hostile(
        ".bin with a sparse tensor",
        torch_bin({HEAD: torch.ones(200, 32).to_sparse()}),
        "dense|strided",
    ),
    Hostile(".bin index above the folder", torch_index, "plain file name"),
    # The config.
    Hostile("no config", remove("config.json"), "must hold config.json"),
    Hostile("config is no JSON", write("config.json", "{"), "must describe a model"),
    Hostile("config is a list", write("config.json", "[]"), "must describe a model"),
    Hostile("config is not UTF-8", write("config.json", b"\xff\xfe{}"), "must describe a model"),
    Hostile("config is empty", write("config.json", "{}"), "must describe a model"),
    Hostile("config nested deeply", write("config.json", DEEP), "must describe a model"),
    Hostile(
        "unknown model type", document("config.json", put("model_type", value="x")), "must describe"
    ),
    Hostile(
        "model type is a list",
        document("config.json", put("model_type", value=[1])),
        "must describe",
    ),
    Hostile(
        "vocabulary is a string",
        document("config.json", put("vocab_size", value="many")),
        "must|needs",
    ),
    Hostile(
        "vocabulary is negative", document("config.json", put("vocab_size", value=-5)), "must|needs"
    ),
    Hostile(
        "width is a string", document("config.json", put("hidden_size", value="wide")), "must|needs"
    ),
    Hostile(
        "width is another", document("config.json", put("hidden_size", value=64)), "must|needs"
    ),
    Hostile("width is zero", document("config.json", put("hidden_size", value=0)), "must|needs"),
    Hostile("width is null", document("config.json", put("hidden_size", value=None)), "must|needs"),
    Hostile(
        "heads are zero", document("config.json", put("num_attention_heads", value=0)), "must|needs"
    ),
    Hostile(
        "a billion layers", document("config.json", put("num_hidden_layers", value=10**9)), "layers"
    ),
    Hostile(
        "layers are a string",
        document("config.json", put("num_hidden_layers", value="two")),
        "must|needs",
    ),
    Hostile(
        "unknown activation", document("config.json", put("hidden_act", value="evil")), "must|needs"
    ),
    Hostile("code in the config", remote_code, "must describe a model"),
    Hostile(
        "weights in another file",
        document("config.json", put("transformers_weights", value=WEIGHTS)),
        "must leave the weights in their usual files",
    ),
    # The tokenizer.
    Hostile(
        "no tokenizer",
        remove("tokenizer.json", "tokenizer_config.json"),
        "",
        how="embed",
        error=EmbedFilterError,
    ),
    Hostile(
        "tokenizer is no JSON",
        write("tokenizer.json", "{"),
        "",
        how="embed",
        error=EmbedFilterError,
    ),
    Hostile(
        "tokenizer is a list",
        write("tokenizer.json", "[]"),
        "",
        how="embed",
        error=EmbedFilterError,
    ),
    Hostile(
        "tokenizer without vocabulary",
        empty_vocabulary,
        "vocabulary",
        how="embed",
        error=EmbedFilterError,
    ),
    embedded("a normalizer at which Rust panics", tokenizer(normalizer=CHARSMAP), "charsmap"),
    embedded("a template at which Rust panics", tokenizer(post_processor=NO_TOKEN), "short text"),
    embedded("padding of astronomical length", tokenizer(padding=PADDED), "short text|backbone"),
    embedded("tokenizer nested deeply", write("tokenizer.json", DEEP), ""),
    embedded("settings nested deeply", write("tokenizer_config.json", DEEP), "recursion"),
    embedded("settings that are a list", write("tokenizer_config.json", "[]"), "list"),
    # The layers, of which transformers would make up what is missing.
    embedded("a layer without a tensor", weights(lambda t: t.pop(LAYER)), "is not stored"),
    embedded(
        "a layer of another shape",
        weights(lambda t: t.update({LAYER: torch.ones(3, 3)})),
        "another shape",
    ),
    embedded(
        "a layer of astronomical size",
        document("config.json", put("intermediate_size", value=10**12)),
        "another shape",
    ),
    embedded(
        "angles that are no numbers",
        document("config.json", put("rope_parameters", "rope_theta", value=-1.0)),
        "NaN or infinity in .*inv_freq",
    ),
    embedded("NaN in a layer", weights(lambda t: t[LAYER].fill_(torch.nan)), "NaN or infinity"),
    embedded(
        "one Inf in a layer", weights(lambda t: t[LAYER][2:3, 3].fill_(torch.inf)), "NaN or inf"
    ),
    embedded(
        "no embeddings", weights(lambda t: t.pop("model.embed_tokens.weight")), "is not stored"
    ),
    embedded(
        "an epsilon that is NaN",
        document("config.json", put("rms_norm_eps", value=float("nan"))),
        "NaN or infinity for a short text",
    ),
    embedded(
        "an epsilon of -1", document("config.json", put("rms_norm_eps", value=-1.0)), "NaN or inf"
    ),
    embedded("an epsilon in words", document("config.json", put("rms_norm_eps", value="x")), ""),
    embedded("an adapter that is a pickle with code", adapter({}, [Payload()]), "adapter"),
    embedded("an adapter of a list", adapter({}, [7]), "tensors by name"),
    embedded("an adapter without a base", adapter({"base_model_name_or_path": ...}), "base_model"),
    embedded(
        "an adapter of itself",
        lambda f: (
            adapter({})(f),
            document("adapter_config.json", put("base_model_name_or_path", value=str(f)))(f),
        ),
        "",
    ),
    embedded(
        "an adapter whose base has a long name",
        adapter({"base_model_name_or_path": "x" * 300}),
        "",
    ),
]

FILTERS = [
    # embfilter.json.
    saved("no metadata", remove("embfilter.json"), "must hold embfilter.json"),
    saved("metadata is no JSON", write("embfilter.json", "{"), "must be JSON"),
    saved("metadata nested deeply", write("embfilter.json", DEEP), "must be JSON"),
    saved("metadata is a list", write("embfilter.json", "[]"), "must be a JSON object"),
    saved("metadata is empty", write("embfilter.json", ""), "must be JSON"),
    saved("metadata not in UTF-8", write("embfilter.json", b"\xff{}"), "must be"),
    saved("a newer format", meta("format_version", value=2), "newer st-embfilter"),
    saved("format 0", meta("format_version", value=0), "newer st-embfilter"),
    saved("format is true", meta("format_version", value=True), "newer st-embfilter"),
    saved("format is a string", meta("format_version", value="1"), "newer st-embfilter"),
    saved("no base model", drop("base_model"), "base_model must be an object"),
    saved("no unembedding", drop("unembedding"), "unembedding must be an object"),
    saved("no filter", drop("filter"), "filter must be an object"),
    saved(
        "shape of one number", meta("unembedding", "shape", value=[256]), "shape must be two ints"
    ),
    saved(
        "shape is negative", meta("unembedding", "shape", value=[-1, 32]), "shape must be two ints"
    ),
    saved("another width", meta("unembedding", "shape", value=[200, 64]), "must be|must have"),
    saved("an astronomical shape", meta("unembedding", "shape", value=[10**30, 10**30]), "must be"),
    saved("no hash", meta("unembedding", "sha256", value=None), "sha256"),
    saved("a hash that is none", meta("unembedding", "sha256", value="../../x"), "sha256"),
    saved("tied is a string", meta("unembedding", "tied", value="no"), "tied must be"),
    saved("unknown band", meta("filter", "band", value="best"), "band must be one of"),
    saved(
        "keep is NaN",
        meta("filter", "keep", value=float("nan")),
        "must be JSON, got the constant NaN",
    ),
    saved("keep is 0", meta("filter", "keep", value=0), "keep must be"),
    saved("keep is a list", meta("filter", "keep", value=[1]), "keep must be"),
    saved("keep is too wide", meta("filter", "keep", value=10**9), "keep must be"),
    saved("k is another", meta("filter", "k", value=15), "filter.k must be 16"),
    saved("d is another", meta("filter", "d", value=31), "filter.d must be 32"),
    saved("start is another", meta("filter", "start", value=3), "filter.start must be 8"),
    saved("seed of a bulk band", meta("filter", "seed", value=3), "seed"),
    saved("a random band", meta("filter", "band", value="random"), "seed|start"),
    saved("order is a number", meta("filter", "order", value=7), "order must be"),
    saved("order of strings", meta("filter", "order", value=["a"]), "order"),
    saved("unknown recipe", meta("prompt", value={"recipe": "evil"}), "prompt"),
    saved("recipe is a string", meta("prompt", value="evil"), "prompt must be"),
    saved("versions are a list", meta("versions", value=[]), "versions must be"),
    saved("empty calibration", meta("calibration", value={}), "must be"),
    saved("calibration is a list", meta("calibration", value=[]), "calibration must be"),
    # JSON that readers take differently.
    saved("metadata says keep twice", twice_in("embfilter.json", "keep"), "'keep' twice"),
    saved("metadata says format twice", twice_in("embfilter.json", "format_version"), "twice"),
    saved("half a surrogate pair", meta("base_model", "id", value="a\ud800"), "surrogate"),
    saved("infinite strength", meta("filter", "seed", value=float("inf")), "Infinity"),
    saved("modules say type twice", twice_in("modules.json", "type"), "twice", how="load"),
    saved("modules nested deeply", write("modules.json", DEEP), "levels", how="load"),
    saved("Dense says bias twice", twice_in("2_Dense/config.json", "bias"), "twice", how="load"),
    saved("dtype twice", twice_in("embfilter.json", "dtype"), "'dtype' twice"),
    saved("norm is another", meta("filter", "norm", value="evil"), "norm"),
    saved("norm is a list", meta("filter", "norm", value=["folded"]), "norm must be"),
    saved("depth is a number", meta("depth", value=3), "depth"),
    saved("depth of -1", meta("depth", value={"layers": -1, "of": 2}), "depth"),
    saved("depth beyond all", meta("depth", value={"layers": 10**30, "of": 2}), "depth"),
    saved(
        "a strength of 2",
        meta("calibration", value={**CALIBRATION, "strength": 2}),
        "strength must be",
    ),
    saved("-5 texts", meta("calibration", value={**CALIBRATION, "texts": -5}), "texts >= 1"),
    saved(
        "a calibration with a seed of 10^30",
        meta("calibration", value={**CALIBRATION, "source": "self", "seed": 10**30}),
        "seed must be",
    ),
    saved(
        "a calibration that is not there",
        meta("calibration", value=CALIBRATION),
        "bias|calibrat|weights",
    ),
    saved("a list as revision", meta("base_model", "revision", value=["main"]), "revision must be"),
    saved(
        "prompts nested deeply",
        write("config_sentence_transformers.json", DEEP),
        "must load with",
        EmbedFilterError,
        "load",
    ),
    saved(
        "pooling nested deeply",
        write("1_Pooling/config.json", DEEP),
        "must load with",
        EmbedFilterError,
        "load",
    ),
    saved(
        "pooling is a list",
        write("1_Pooling/config.json", "[]"),
        "must load with",
        EmbedFilterError,
        "load",
    ),
    saved("dtype is a function", meta("unembedding", "dtype", value="load"), "dtype must be"),
    saved("dtype is a module", meta("unembedding", "dtype", value="nn"), "dtype must be"),
    saved("dtype is nothing", meta("unembedding", "dtype", value=""), "dtype must be"),
    saved(
        "an astronomical seed",
        document(
            "embfilter.json",
            lambda d: d["filter"].update(band="random", seed=10**30, start=None),
        ),
        "seed must be in",
    ),
    saved(
        "a negative seed",
        document(
            "embfilter.json",
            lambda d: d["filter"].update(band="random", seed=-1, start=None),
        ),
        "seed must be in",
    ),
    saved(
        "length of -1",
        document("sentence_bert_config.json", put("max_seq_length", value=-1)),
        "max_seq_length",
        how="load",
    ),
    saved(
        "length in words",
        document("sentence_bert_config.json", put("max_seq_length", value="x")),
        "max_seq_length",
        how="load",
    ),
    saved("length nested deeply", write("sentence_bert_config.json", DEEP), "levels", how="load"),
    saved(
        "Dense reads another feature",
        document("2_Dense/config.json", put("module_input_name", value="token_embeddings")),
        "other keys",
        how="load",
    ),
    saved(
        "filter in another folder",
        lambda f: (
            shutil.copytree(f / "2_Dense", f / "evil_Dense"),
            document("modules.json", module_path("evil_Dense"))(f),
        ),
        "where modules.json places them",
        how="load",
    ),
    # The projection.
    saved("projection in fp8", projection(lambda p: p.to(torch.float8_e4m3fn)), "must be finite"),
    saved("no projection", remove(PROJECTION), "weights of"),
    saved("projection is empty", write(PROJECTION, b""), "must be a safetensors file"),
    saved("projection cut off", cut(PROJECTION, 0.7), "must be a safetensors file"),
    saved("projection with NaN", projection(nan), "must be finite"),
    saved("projection too narrow", projection(lambda p: p[:, :31]), "must be finite and of shape"),
    saved("projection too short", projection(lambda p: p[:15]), "must be finite and of shape"),
    saved("projection transposed", projection(lambda p: p.T), "must be finite and of shape"),
    saved("projection of integers", projection(lambda p: p.to(torch.int32)), "must be"),
    saved("projection by another name", projection(lambda p: p, "weight"), "must be"),
    saved("projection scaled", projection(lambda p: 1.1 * p), "orthonormal"),
    saved("a row twice", projection(repeated), "orthonormal"),
    saved("projection all zero", projection(lambda p: 0 * p), "orthonormal"),
    saved(
        "random projection",
        projection(lambda p: torch.randn(p.shape, generator=torch.Generator().manual_seed(0))),
        "orthonormal",
    ),
    saved(
        "a surplus tensor",
        weights(lambda t: t.update(extra=torch.ones(2)), PROJECTION),
        "weights of this filter must be",
    ),
    saved("projection behind a link", link_out(PROJECTION), "link", EmbedFilterError),
    saved("spectrum too short", spectrum(torch.ones(31, dtype=torch.float64)), "singular values"),
    saved(
        "spectrum with NaN",
        spectrum(torch.full((32,), torch.nan, dtype=torch.float64)),
        "singular values",
    ),
    saved(
        "spectrum not descending",
        spectrum(torch.arange(32, dtype=torch.float64)),
        "singular values",
    ),
    saved("spectrum of integers", spectrum(torch.arange(32).flip(0)), "singular values"),
    saved("spectrum in fp8", spectrum(torch.ones(32).to(torch.float8_e4m3fn)), "singular values"),
    saved("spectrum of a matrix", spectrum(torch.ones(32, 1)), "singular values"),
    saved("spectrum below zero", spectrum(-torch.arange(32.0)), "singular values"),
    saved("spectrum without values", spectrum(torch.ones(32), "x"), "singular values"),
    # modules.json.
    saved("modules is no JSON", write("modules.json", "{"), "must be JSON", how="load"),
    saved("modules is an object", write("modules.json", "{}"), "modules.json", how="load"),
    saved("no modules", write("modules.json", "[]"), "modules.json", how="load"),
    saved("a module is a string", write("modules.json", '["x"]'), "modules.json", how="load"),
    saved(
        "filter after Normalize",
        document("modules.json", after_normalize),
        "before Normalize",
        PlacementError,
        "load",
    ),
    saved("filter twice", document("modules.json", twice), "one Dense", how="load"),
    saved(
        "module above the folder",
        document("modules.json", module_path("../2_Dense")),
        "inside",
        how="load",
    ),
    saved(
        "module by absolute path",
        document("modules.json", module_path("/2_Dense")),
        "inside",
        how="load",
    ),
    saved(
        "module path is a number",
        document("modules.json", lambda m: m[2].update(path=7)),
        "modules.json",
        how="load",
    ),
    saved("code among the modules", remote_module, "trust_remote_code", EmbedFilterError, "load"),
    saved(
        "a function as module",
        document("modules.json", put_type(1, "os.system")),
        "trust_remote_code",
        EmbedFilterError,
        "load",
    ),
    saved(
        "pooling is a pipe",
        lambda f: ((f / "1_Pooling/config.json").unlink(), os.mkfifo(f / "1_Pooling/config.json")),
        "must hold files and folders",
        how="load",
    ),
    saved(
        "a device by a link",
        lambda f: (f / "1_Pooling/notes").symlink_to("/dev/zero"),
        "must hold files and folders",
        how="load",
    ),
    saved(
        "another kind of model",
        document("config_sentence_transformers.json", put("model_type", value="SparseEncoder")),
        "must load with its Dense module|must load with sentence-transformers",
        EmbedFilterError,
        "load",
    ),
    saved("no Pooling folder", remove("1_Pooling/config.json"), "", EmbedFilterError, "load"),
    saved(
        "Dense with Tanh",
        document(
            "2_Dense/config.json",
            put("activation_function", value="torch.nn.modules.activation.Tanh"),
        ),
        "activation",
        how="load",
    ),
    saved(
        "activation is code",
        document("2_Dense/config.json", put("activation_function", value="os.system")),
        "activation",
        how="load",
    ),
    saved(
        "Dense width is another",
        document("2_Dense/config.json", put("out_features", value=99)),
        "out_features",
        how="load",
    ),
    saved("Dense config is no JSON", write("2_Dense/config.json", "{"), "must be JSON", how="load"),
]
