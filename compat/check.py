"""Loads a portable folder in one library, with nothing of this project installed.

Runs in the environment of that library: `python -I check.py STACK PACKAGE FOLDER TEXTS
OUTPUT`. Writes the embeddings as .npz and prints one JSON line.
"""

import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ANONYMIZED_TELEMETRY="False")

import numpy as np


def sentence_transformers(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    full = SentenceTransformer(folder, device="cpu").encode(texts)
    half = full.shape[1] // 2
    cut = SentenceTransformer(folder, device="cpu", truncate_dim=half).encode(texts)
    return {"embeddings": full, "truncated": cut}


def langchain(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(model_name=folder, model_kwargs={"device": "cpu"})
    queries = [model.embed_query(text) for text in texts]
    return {"embeddings": np.array(model.embed_documents(texts)), "queries": np.array(queries)}


def llama_index(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(model_name=folder, device="cpu")
    queries = [model.get_query_embedding(text) for text in texts]
    documents = model.get_text_embedding_batch(texts)
    return {"embeddings": np.array(documents), "queries": np.array(queries)}


def haystack(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        SentenceTransformersTextEmbedder,
    )

    device = ComponentDevice.from_str("cpu")
    documents = SentenceTransformersDocumentEmbedder(model=folder, device=device)
    queries = SentenceTransformersTextEmbedder(model=folder, device=device)
    documents.warm_up()
    queries.warm_up()
    embedded = documents.run([Document(content=text) for text in texts])["documents"]
    return {
        "embeddings": np.array([document.embedding for document in embedded]),
        "queries": np.array([queries.run(text)["embedding"] for text in texts]),
    }


def chroma(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    import chromadb
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    embed = SentenceTransformerEmbeddingFunction(model_name=folder, device="cpu")
    collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=embed)
    ids = [str(i) for i in range(len(texts))]
    collection.add(ids=ids, documents=texts)
    return {"embeddings": np.array(collection.get(ids=ids, include=["embeddings"])["embeddings"])}


def txtai(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from txtai import Embeddings

    model = Embeddings(path=folder, method="sentence-transformers", gpu=False)
    return {"embeddings": np.array(model.batchtransform(texts))}


def bertopic(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from bertopic import BERTopic
    from bertopic.dimensionality import BaseDimensionalityReduction
    from sklearn.cluster import KMeans

    topics = BERTopic(
        embedding_model=folder,
        umap_model=BaseDimensionalityReduction(),
        hdbscan_model=KMeans(3, n_init=1, random_state=0),
    )
    topics.fit(texts)
    return {"embeddings": topics.embedding_model.embed_documents(texts)}


def onnx(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    return _exported("onnx", folder, texts)


def openvino(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    # By default a CPU that can computes in 16 bits.
    return _exported("openvino", folder, texts, ov_config={"INFERENCE_PRECISION_HINT": "f32"})


def _exported(
    backend: str, folder: str, texts: list[str], **options: object
) -> dict[str, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    export = runpy.run_path(os.path.join(os.path.dirname(__file__), "export.py"))["export"]
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(folder, os.path.join(place, "model"))
        export(backend, Path(copy))
        model = SentenceTransformer(copy, device="cpu", backend=backend, model_kwargs=options)
        alone = np.concatenate([model.encode([text]) for text in texts])
        return {"embeddings": model.encode(texts), "alone": alone}


STACKS = {
    "sentence-transformers": sentence_transformers,
    "LangChain": langchain,
    "LlamaIndex": llama_index,
    "Haystack": haystack,
    "Chroma": chroma,
    "txtai": txtai,
    "BERTopic": bertopic,
    "ONNX Runtime": onnx,
    "OpenVINO": openvino,
}


def main() -> None:
    stack, package, folder, texts, output = sys.argv[1:]
    if importlib.util.find_spec("st_embfilter") is not None:
        raise SystemExit("st_embfilter is installed here, so nothing would be proved")
    with open(texts, encoding="utf-8") as file:
        arrays = STACKS[stack](folder, json.load(file))
    np.savez(output, **{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    packages = (package, "sentence-transformers", "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"stack": stack, "versions": versions, "parts": sorted(arrays)}))


if __name__ == "__main__":
    main()
