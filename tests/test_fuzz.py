"""Parsers of strangers' files, fed with noise: they return, or raise the one error they promise."""

import json
import string
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from st_embfilter.errors import FormatError, PlacementError, UnembeddingError
from st_embfilter.files.folder import FolderFiles
from st_embfilter.files.stored import parse_header
from st_embfilter.files.tensors import open_checkpoint, parse_index
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.modules_file import filter_module, parse_modules

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FILE = save({"a": torch.ones(3, 4), "b": torch.zeros(2, 2, dtype=torch.bfloat16)})
LENGTH = struct.unpack("<Q", FILE[:8])[0]
HEADER = json.loads(FILE[8 : 8 + LENGTH])
METADATA: dict[str, Any] = {
    "format_version": 1,
    "base_model": {"id": "org/lm", "revision": None},
    "unembedding": {
        "tensor": "lm_head.weight",
        "shape": [200, 32],
        "dtype": "float32",
        "tied": False,
        "sha256": "0" * 64,
    },
    "filter": {"band": "bulk", "keep": 0.5, "d": 32, "k": 16, "start": 8, "seed": None},
    "calibration": None,
    "prompt": None,
    "versions": {},
}
FUZZ = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def check(holds: bool) -> None:
    assert holds


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(FolderFiles(path))
    found = {name: checkpoint.tensor(name) for name in checkpoint.names}
    return {name: stored.read_rows(0, stored.shape[0]) for name, stored in found.items()}


@FUZZ
@given(st.binary(max_size=64))
def test_noise_is_no_header(data: bytes) -> None:
    try:
        assert isinstance(parse_header(data, "f"), dict)
    except UnembeddingError as error:
        check("must be" in str(error))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), max_size=6))
def test_a_file_with_flipped_bytes(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """What is read, safetensors itself reads alike; what it refuses is refused."""
    data = bytearray(FILE)
    for position, value in flips:
        data[position] = value
    (tmp_path / "model.safetensors").write_bytes(data)
    try:
        ours = read_tensors(tmp_path)
    except UnembeddingError:
        return
    try:
        theirs = load(bytes(data))
    except SafetensorError:  # stricter about dtypes of tensors that nobody reads
        return
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(7.0), theirs[name].nan_to_num(7.0))


@FUZZ
@given(
    st.sampled_from(["a", "b"]), st.sampled_from(["dtype", "shape", "data_offsets", "more"]), JSON
)
def test_a_header_with_any_entry(tmp_path: Path, name: str, key: str, value: object) -> None:
    header = json.dumps({**HEADER, name: {**HEADER[name], key: value}}).encode()
    content = struct.pack("<Q", len(header)) + header + FILE[8 + LENGTH :]
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        assert set(read_tensors(tmp_path)) == {"a", "b"}
    except UnembeddingError as error:
        check("\n" not in str(error))


@FUZZ
@given(st.text(string.printable, max_size=12) | JSON)
def test_an_index_never_leaves_its_folder(shard: object) -> None:
    try:
        files = parse_index(json.dumps({"weight_map": {"a": shard}}).encode(), "index.json")
    except UnembeddingError:
        return
    assert (Path("/folder") / files["a"]).resolve().parent == Path("/folder")


@FUZZ
@given(
    st.sampled_from(["", "base_model", "unembedding", "filter"]),
    st.sampled_from(
        sorted(
            {key for part in METADATA.values() if isinstance(part, dict) for key in part}
            | set(METADATA)
        )
    ),
    JSON,
)
def test_metadata_with_any_value(part: str, key: str, value: object) -> None:
    document: dict[str, Any] = json.loads(json.dumps(METADATA))
    (document[part] if part else document)[key] = value
    try:
        metadata = FilterMetadata.from_json(json.dumps(document))
    except FormatError as error:
        check("embfilter.json" in str(error))
        return
    assert FilterMetadata.from_json(metadata.to_json()) == metadata
    assert 1 <= metadata.k <= metadata.d


@FUZZ
@given(st.text(max_size=40) | JSON.map(json.dumps))
def test_metadata_of_noise(text: str) -> None:
    with pytest.raises(FormatError):
        FilterMetadata.from_json(text)


@FUZZ
@given(
    JSON
    | st.lists(
        st.fixed_dictionaries({"type": st.text(max_size=9), "path": st.text("./\\x", max_size=6)})
    )
)
def test_modules_of_noise(value: object) -> None:
    try:
        modules = parse_modules(json.dumps(value).encode())
        filter_module(modules, trust_remote_code=True)
    except (FormatError, PlacementError):
        return
    for module in modules:
        assert Path("/folder") in [
            (Path("/folder") / module.path).resolve(),
            *(Path("/folder") / module.path).resolve().parents,
        ]


def test_the_unchanged_documents_are_good(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILE)
    assert set(read_tensors(tmp_path)) == {"a", "b"}
    assert FilterMetadata.from_json(json.dumps(METADATA)).k == 16
