"""Loads a portable folder in one library, with nothing of this project installed.

Runs in the environment of that library: `python -I check.py STACK PACKAGE FOLDER TEXTS
OUTPUT`. Writes the embeddings as .npz and prints one JSON line.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys

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
    import onnxruntime

    file = next(iter(sorted(os.listdir(os.path.join(folder, "onnx")))))
    session = onnxruntime.InferenceSession(os.path.join(folder, "onnx", file))
    return _batched(lambda inputs: session.run(["sentence_embedding"], inputs)[0], folder, texts)


def openvino(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from openvino import Core

    # By default a CPU that can computes in 16 bits.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    model = Core().compile_model(os.path.join(folder, "onnx", "model.onnx"), "CPU", precision)
    return _batched(lambda inputs: model(inputs)["sentence_embedding"], folder, texts)


def _batched(run, folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    """All texts together, padded, and each alone."""
    from tokenizers import Tokenizer

    with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    tokenizer.enable_truncation(config["model_max_length"])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(config["pad_token"]))

    def embed(batch: list[str]) -> np.ndarray:
        encoded = tokenizer.encode_batch(batch)
        ids = np.array([one.ids for one in encoded], np.int64)
        mask = np.array([one.attention_mask for one in encoded], np.int64)
        return run({"input_ids": ids, "attention_mask": mask})

    alone = np.concatenate([embed([text]) for text in texts])
    return {"embeddings": embed(texts), "alone": alone}


def fastembed(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    with open(os.path.join(folder, "embfilter_onnx.json"), encoding="utf-8") as file:
        facts = json.load(file)
    TextEmbedding.add_custom_model(
        "filtered",
        pooling=PoolingType.DISABLED,
        normalization=False,
        output_name="sentence_embedding",
        sources=ModelSource(hf="filtered"),
        dim=facts["dimensions"],
        model_file=facts["file"],
    )
    model = TextEmbedding("filtered", specific_model_path=folder)
    alone = [next(iter(model.embed([text]))) for text in texts]
    return {"embeddings": np.array(list(model.embed(texts))), "alone": np.array(alone)}


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
    "fastembed": fastembed,
}


def main() -> None:
    stack, package, folder, texts, output = sys.argv[1:]
    if importlib.util.find_spec("st_embfilter") is not None:
        raise SystemExit("st_embfilter is installed here, so nothing would be proved")
    with open(texts, encoding="utf-8") as file:
        arrays = STACKS[stack](folder, json.load(file))
    np.savez(output, **{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    packages = (package, "sentence-transformers", "transformers", "torch")
    packages += ("onnxruntime", "tokenizers")
    versions = {
        name: importlib.metadata.version(name)
        for name in packages
        if importlib.util.find_spec(name.replace("-", "_"))
    }
    print(json.dumps({"stack": stack, "versions": versions, "parts": sorted(arrays)}))


if __name__ == "__main__":
    main()
