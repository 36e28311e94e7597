"""A folder with one ONNX graph, from token ids to the filtered embedding, beside its tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from st_embfilter.errors import FormatError
from st_embfilter.files.staging import EXPORT_FILE, check_target, staged
from st_embfilter.model.backbone import TOKENIZER_CONFIG
from st_embfilter.model.layer import FEATURE, filter_of
from st_embfilter.model.prompts import PromptEOL, recipe_from_dict
from st_embfilter.model.static import static_metadata
from st_embfilter.model.tokenizer import TOKENIZER_FILE, single_pieces
from st_embfilter.saved import onnx_file, onnx_graph
from st_embfilter.saved.onnx_graph import INPUTS, OPSET, Dtype, Pipeline
from st_embfilter.text import read_json, write_json

#: Where transformers.js looks for each type (`dtype`: "fp32", "fp16", "q8").
FILES: Final[dict[Dtype, str]] = {
    "float32": "onnx/model.onnx",
    "float16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}

#: Keys in the metadata of the graph.
DIMENSIONS_KEY: Final = "st_embfilter.dimensions"
FILTER_KEY: Final = "st_embfilter.filter"

#: Two computations of a deep network in float32 may differ by this part of a vector's length: each
#: sum of n terms errs by up to n 2^-24 of their size, and some hundred of them follow each other.
_FLOAT32_ERROR: Final = 1e-3

#: Option of ONNX Runtime: where a model in memory has its weights.
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"

#: A text without limit is cut here when the graph is checked.
_LONGEST_CHECK: Final = 512

_LINE: Final = (
    'The river Ålsta (東京, Ελλάδα) rose in March; "nobody", she said, had measured it: 42.5 cm. '
    "By evening every cellar was full of water, and the ferry stood in the market. "
)


@dataclass(frozen=True)
class OnnxExport:
    """What was written, and how far it is from the model in torch.

    Attributes:
        file: The graph, relative to its folder.
        dtype: What its weights are stored in.
        opset: Of ONNX.
        dimensions: Width of the embeddings; any prefix of them is the filter of that width.
        max_tokens: Longest text in tokens; None where there is no limit.
        texts: How many were compared.
        difference: Largest difference of their embeddings, relative to their length.
        cosine: Lowest cosine between the two embeddings of a text.
    """

    file: str
    dtype: Dtype
    opset: int
    dimensions: int
    max_tokens: int | None
    texts: int
    difference: float
    cosine: float


def export_onnx(
    model: SentenceTransformer,
    path: str | os.PathLike[str],
    *,
    dtype: Dtype = "float32",
    opset: int = OPSET,
    overwrite: bool = False,
) -> OnnxExport:
    """Writes a model as one ONNX graph beside its tokenizer.

    Backbone, pooling, filter, calibration and normalisation are in the graph: `input_ids` and
    `attention_mask` (batch, tokens) go in, `sentence_embedding` (batch, k) float32 comes out, for
    any number of texts and tokens. ONNX Runtime, fastembed and transformers.js read the folder.
    It is checked: ONNX Runtime's embeddings of texts of many lengths, with the tokenizer in the
    folder, against those of torch.

    "float32" and "float16" compute in float32; the latter stores matrices in 16 bits. "int8" stores
    them in 8, with a scale for every 32 numbers of a column, and for each row of a table of tokens.
    ONNX Runtime rounds what they are multiplied with in the same way where it has a kernel for it
    (`MatMulNBits`, `accuracy_level` 4); elsewhere it is exact. No text changes another one's
    embedding.

    Args:
        model: Any model of this package or plain pipeline but for MetaEOL, which reads a text
            several times, and PromptEOL in its exact encoding, which no tokenizer file holds.
        path: Target folder; must be missing or empty. Appears complete or not at all.
        dtype: How weights are stored; names the file: `onnx/model.onnx`, `onnx/model_fp16.onnx`,
            `onnx/model_quantized.onnx`. Above 2 GB weights go into a second file beside it.
        opset: Of ONNX.
        overwrite: Replace a folder of this function that is there already.

    Returns:
        What was written, with the measured loss; the same is in `embfilter_onnx.json`.

    Raises:
        FormatError: If the model cannot be one graph, or its graph gives other embeddings.
        OutputError: If the target is not empty, or cannot be written.
        MissingPackageError: If the extra `onnx` is not installed.
    """
    if dtype not in get_args(Dtype):
        raise FormatError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    _check(model)
    check_target(Path(path), overwrite=overwrite)
    onnx_graph.libraries()
    with staged(path, overwrite=overwrite) as folder:
        pipeline = Pipeline(model)
        width = pipeline.width()
        limit = _write_tokenizer(model, folder, width)
        file = folder / FILES[dtype]
        file.parent.mkdir()
        _write_graph(pipeline, file, dtype, opset, _metadata(model, width))
        if file.with_name(f"{file.name}_data").exists():
            config = _read(folder / "config.json")
            config["transformers.js_config"] = {"use_external_data_format": {file.name: 1}}
            write_json(folder / "config.json", config)
        made = OnnxExport(FILES[dtype], dtype, opset, width, limit, 0, 0.0, 1.0)
        made = _compare(model, pipeline, folder, made)
        if dtype == "float32" and made.difference > _FLOAT32_ERROR:
            raise FormatError(
                "the graph must give the embeddings of the model, got a difference of "
                f"{made.difference:.1e} of their length; this is a mistake of the exporter or of "
                "this package"
            )
        write_json(folder / EXPORT_FILE, _facts(model, made))
    return made


def _check(model: SentenceTransformer) -> None:
    """Checks that the model is a function of ids and mask."""
    first = next(iter(model.children()), None)
    if _is_a(first, "MetaEOLTransformer"):
        raise FormatError(
            "a graph reads a text once, got MetaEOL, which reads it in several prompts; use "
            "PromptEOL or ECHO"
        )
    if not isinstance(first, (Transformer, StaticEmbedding)):
        raise FormatError(
            "a graph starts with Transformer or StaticEmbedding, got " + type(first).__name__
        )
    layer = filter_of(model)
    prompt = None if layer is None else layer.metadata.prompt
    recipe = None if prompt is None else recipe_from_dict(prompt)
    if isinstance(recipe, PromptEOL) and recipe.encoding == "exact":
        raise FormatError(
            "a graph takes the ids that tokenizer.json gives, got PromptEOL in its exact encoding, "
            "which is in no tokenizer file; build the model with prompt_encoding='portable'"
        )
    if any(isinstance(m, Pooling) and not m.include_prompt for m in model.children()):
        raise FormatError(
            "a graph takes ids and mask alone, got a Pooling that leaves out the prompt, whose "
            "length they do not say; use include_prompt=True"
        )


def _write_tokenizer(model: SentenceTransformer, folder: Path, width: int) -> int | None:
    """Writes tokenizer and config; returns the longest text in tokens."""
    first: Any = model[0]
    if isinstance(first, StaticEmbedding):
        backend = Tokenizer.from_str(first.tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.save(str(folder / TOKENIZER_FILE))
        # The mask leaves out what is padded, with whichever token.
        config = {
            "tokenizer_class": PreTrainedTokenizerFast.__name__,
            "pad_token": backend.id_to_token(0),
            "model_max_length": 2**30,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / TOKENIZER_CONFIG, config)
        shape = {"hidden_size": width, "vocab_size": first.embedding.num_embeddings}
        config = {"model_type": "static_embedding", "pad_token_id": 0, **shape}
        write_json(folder / "config.json", config)
        return None
    tokenizer = first.tokenizer
    tokenizer.save_pretrained(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise FormatError(
            "a graph is used with a tokenizer that tokenizer.json can hold, got "
            f"{type(tokenizer).__name__}"
        )
    document = _read(folder / TOKENIZER_FILE)
    document |= {"truncation": None, "padding": None}  # of the last batch
    document["post_processor"] = single_pieces(document.get("post_processor"))
    write_json(folder / TOKENIZER_FILE, document)
    limit: int | None = first.max_seq_length
    path = folder / TOKENIZER_CONFIG
    config = _read(path)
    if limit is not None:
        config["model_max_length"] = limit
        if _is_a(first, "EchoTransformer"):  # tokenizers count a text once that comes twice
            config["model_max_length"] = (limit + tokenizer.num_special_tokens_to_add()) // 2
    config["pad_token"] = tokenizer.pad_token
    write_json(path, config)
    config = {**first.auto_model.config.to_dict(), "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "config.json", config)
    return limit


def _read(path: Path) -> dict[str, Any]:
    return read_json(path.read_bytes(), path.name, FormatError)  # type: ignore[no-any-return]


def _metadata(model: SentenceTransformer, width: int) -> dict[str, str]:
    """What the graph says about itself."""
    layer = filter_of(model)
    found = static_metadata(model) if layer is None else layer.metadata
    facts = {DIMENSIONS_KEY: str(width)}
    return facts if found is None else {**facts, FILTER_KEY: found.to_json()}


def _facts(model: SentenceTransformer, made: OnnxExport) -> dict[str, Any]:
    """The content of `embfilter_onnx.json`."""
    layer = filter_of(model)
    found = static_metadata(model) if layer is None else layer.metadata
    name = model.default_prompt_name
    return {
        "format_version": 1,
        **asdict(made),
        "inputs": list(INPUTS),
        "output": FEATURE,
        "normalized": any(isinstance(module, Normalize) for module in model.children()),
        # What sentence-transformers puts before a text, and no tokenizer does.
        "prompt": model.prompts.get(name) if name else None,
        "filter": None if found is None else json.loads(found.to_json()),
    }


def _write_graph(
    pipeline: Pipeline, file: Path, dtype: Dtype, opset: int, metadata: dict[str, str]
) -> None:
    graph = onnx_graph.trace(pipeline, opset)
    if dtype != "float32":
        onnx_graph.narrow(graph, dtype)
    onnx_file.write(graph, file, metadata)


def _compare(
    model: SentenceTransformer, pipeline: Pipeline, folder: Path, made: OnnxExport
) -> OnnxExport:
    """Runs the written graph on texts of many lengths, alone and together.

    Raises:
        FormatError: If the tokenizer in the folder gives other ids than the model's.
    """
    import onnxruntime

    config = _read(folder / TOKENIZER_CONFIG)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    tokenizer.enable_truncation(config["model_max_length"])
    pad = tokenizer.token_to_id(config["pad_token"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    file = folder / made.file
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(file.parent))
    session = onnxruntime.InferenceSession(
        onnx_file.without_weights(file), options, providers=["CPUExecutionProvider"]
    )
    expected, found = [], []
    for texts in _batches(made.max_tokens):
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        _check_ids(model, texts, rows)
        ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        found.append(session.run([FEATURE], dict(zip(INPUTS, (ids, mask), strict=True)))[0])
        with torch.inference_mode():
            expected.append(pipeline(torch.from_numpy(ids), torch.from_numpy(mask)).numpy())
    difference, cosine = _loss(np.concatenate(found), np.concatenate(expected))
    return replace(made, texts=sum(map(len, found)), difference=difference, cosine=cosine)


def _loss(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """Largest relative difference of two sets of vectors (n, k), and the lowest cosine.

    Raises:
        FormatError: If vectors are not finite, or of another width.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise FormatError(
            f"the graph must give finite embeddings of shape {expected.shape}, got shape "
            f"{found.shape} with {int((~np.isfinite(found)).sum())} numbers that are not finite"
        )
    lengths = np.linalg.norm(expected, axis=1)
    there = lengths > 0  # a static model has nothing to say of an empty text
    gap = np.linalg.norm(found - expected, axis=1)
    if bool((gap[~there] > 0).any()):
        return float("inf"), -1.0
    product = np.linalg.norm(found, axis=1) * lengths
    cosine = (found * expected).sum(1)[there] / np.maximum(product[there], 1e-30)
    return float((gap[there] / lengths[there]).max()), float(min(1.0, cosine.min()))


def _batches(limit: int | None) -> list[list[str]]:
    """Texts from one word to the longest, alone, then some of them together."""
    words = (_LINE * (_LONGEST_CHECK // 8)).split()
    longest = min(limit or _LONGEST_CHECK, _LONGEST_CHECK)
    counts = [1]
    while counts[-1] < longest:
        counts.append(2 * counts[-1] + 1)
    texts = [" ".join(words[i : i + n]) for i, n in enumerate(counts)]
    return [*([text] for text in texts), texts[:5][::-1]]


def _check_ids(model: SentenceTransformer, texts: list[str], rows: list[list[int]]) -> None:
    """Checks that the model reads the ids that the folder's tokenizer gives."""
    first: Any = model[0]
    prepare: Callable[..., Any] = getattr(first, "preprocess", None) or first.tokenize
    features = prepare(texts)
    ids = features["input_ids"]
    if isinstance(first, StaticEmbedding):
        ends = [*features["offsets"].tolist()[1:], len(ids)]
        read = [ids[i:j].tolist() for i, j in zip(features["offsets"].tolist(), ends, strict=True)]
    else:
        mask = features["attention_mask"].bool()
        read = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    if read != rows:
        raise FormatError(
            "the tokenizer file must give the ids that the model reads, got others; the model "
            f"changes its texts before ({type(first).__name__} with lower-casing, a chat template "
            "or padding of its own)"
        )


def _is_a(module: object, name: str) -> bool:
    """By name: the code of a recipe may have come with the model."""
    return any(kind.__name__ == name for kind in type(module).__mro__)
