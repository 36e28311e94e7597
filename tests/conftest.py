"""Shared fixtures: the demo LM, planted spectra, tiny checkpoints of other architectures."""

import os

# Before any library is imported: offline, quiet, deterministic.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TERM"] = "dumb"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads would fight for them
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import settings
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import hub as transformers_hub

import st_embfilter
from tests.hub_server import LocalHub

# Of the environment, torch takes no more threads than there are cores: three are three here.
if os.environ.get("OMP_NUM_THREADS", "").isdigit():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).parents[1]
DEMO_LM = ROOT / "examples" / "openstax-lm"

TEXTS = [
    "The glacier retreats.",
    "",
    "A hot cup of tea helps me wake up in the morning, long before anybody else is awake.",
    "Interest rates went up again last week, which makes loans for small companies dearer.",
    "Photosynthesis turns light into sugar.",
    'She said: "no".',
    "  spaces around  ",
    "ten " * 60,
]


# Machines are noisy: no test is judged by its time.
settings.register_profile("no-deadline", deadline=None, derandomize=True)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def demo_lm() -> Path:
    return DEMO_LM


@pytest.fixture(scope="session")
def demo_model() -> SentenceTransformer:
    """The demo LM with the whole spectrum kept in nested order: every smaller filter inside."""
    return st_embfilter.from_causal_lm(DEMO_LM, keep=1.0, device="cpu", show_progress_bar=False)


@pytest.fixture(scope="session")
def saved_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable folder of the demo LM at keep=0.5."""
    model = st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False)
    return st_embfilter.save_pretrained(model, tmp_path_factory.mktemp("saved") / "demo")


def planted(
    rows: int, singular_values: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values and its right singular vectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    d = singular_values.shape[0]

    def orthonormal(n: int, m: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0]

    left, right = orthonormal(rows, d), orthonormal(d, d)
    return ((left * singular_values.to(torch.float64)) @ right.T).to(dtype), right.T


def sine(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between two row spaces of equal dimension."""
    qa = torch.linalg.qr(a.to(torch.float64).T)[0]
    qb = torch.linalg.qr(b.to(torch.float64).T)[0]
    # The part of b outside a; its norm is the sine, accurate for small angles.
    return float(torch.linalg.matrix_norm(qb - qa @ (qa.T @ qb), ord=2))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


#: A sum of n float32 terms errs by sqrt(n) 2^-24 of the product of norms; a forward pass chains
#: about ten of them here, with n up to 256: sqrt(256) 2^-24 10, relative to the vector's length.
FLOAT32 = 1e-5

#: float64 sums of up to 4,000 terms, in any order: n 2^-53.
FLOAT64 = 1e-12

#: Directions of a matrix with a condition number up to 20 through its Gram matrix in float64: the
#: rounding of d eps |W|^2 over its smallest square, d 2^-52 20^2 for d up to 100, times 1,000 for
#: what is multiplied with them afterwards.
GRAM64 = 1e-8

Array = np.ndarray | Tensor


def same(a: Array, b: Array, tolerance: float = FLOAT32) -> bool:
    """Equal but for the last bits: kernels, batches and alignment choose the order of sums.

    The tolerance is relative to the length of the longest vector, or to 1.
    """
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x) for x in (a, b))
    if a.shape != b.shape:
        return False
    length = max(1.0, float(np.linalg.norm(b, axis=-1).max()))
    return float(np.abs(a - b).max()) <= tolerance * length


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over 200 words with the given special tokens."""
    words = ["<unk>", "<s>", "</s>", "the", "of", "a", "to", "in", "is"]
    words += ["glacier", "tea", "cup", "rates", "light", "sugar", ".", ",", '"']
    words += [f"w{i}" for i in range(200 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


TINY = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "gemma3_text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "qwen2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def tiny_lm(folder: Path, model_type: str = "llama", **config: object) -> PreTrainedModel:
    """Saves a tiny random causal LM with a tokenizer of 200 words."""
    torch.manual_seed(0)
    options = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, **TINY[model_type]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(options | config)))
    with torch.no_grad():  # initial weights are so small that all hidden states look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model.eval()


MakeLM = Callable[..., tuple[Path, PreTrainedModel]]


@pytest.fixture
def make_lm(tmp_path: Path) -> MakeLM:
    """Saves a tiny random causal LM with a tokenizer; returns its folder and the live model."""

    def make(
        model_type: str = "llama",
        *,
        name: str = "lm",
        shards: str = "50GB",
        torch_bin: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **config: object,
    ) -> tuple[Path, PreTrainedModel]:
        torch.manual_seed(seed)
        options = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, **TINY[model_type]}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **(options | config))
        ).to(dtype)
        with torch.no_grad():  # initial weights are so small that all hidden states look alike
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)
        folder = tmp_path / name
        if torch_bin:
            folder.mkdir()
            model.config.save_pretrained(folder)
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        else:
            model.save_pretrained(folder, max_shard_size=shards)
        word_tokenizer().save_pretrained(folder)
        return folder, model.eval()

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub on this machine, used by this process with an empty cache and no token."""
    local = LocalHub()
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": local.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{local.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # its protocol is not spoken here
    }.items():
        monkeypatch.setattr(constants, name, value)
    for shared in (huggingface_hub.hf_api.api, transformers_hub.hf_api()):
        monkeypatch.setattr(shared, "endpoint", local.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    with local.running():
        yield local
        huggingface_hub.close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the code under test wanted to sleep; it does not."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits
