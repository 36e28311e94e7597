"""Every architecture that transformers maps to a causal LM, made tiny and taken the whole way.

`python -m tests.architectures` runs them all, each under a time limit in a process that a crash may
end, and writes docs/architectures.md. With `--resume FILE` outcomes are kept in that file, and what
is there is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

import st_embfilter
from st_embfilter.errors import BackboneError, DepthError, UnembeddingError
from st_embfilter.evaluation.depth import DepthStore
from st_embfilter.evaluation.sweep import without_filter
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack, cut_to
from st_embfilter.model.layer import filter_of
from st_embfilter.unembedding.source import open_unembedding

TEXTS: Final = ["the cup of tea is in the light", "a glacier", "sugar rates , sugar tea ."]

VOCAB: Final = 288  # more than the tokenizer has: padded, as many are
MAX_PARAMETERS: Final = 20_000_000

MAX_BYTES: Final = 8 * 2**30
TABLE: Final = Path(__file__).parents[1] / "docs" / "architectures.md"

#: Models whose forward takes no attention mask, so that padding changes their hidden states.
MIND_PADDING: Final = {"cpmant"}

#: Why transformers cannot build a model, where its own message does not say.
NOT_BUILT: Final = {
    "gemma3n": "its vision tower needs the library timm; `gemma3n_text` works",
    "gemma4_assistant": "drafts for another model whose keys and values it reads; none of its own",
    "musicgen": "writes audio codes, and AutoModelForCausalLM cannot build it from its own config",
    "musicgen_melody": (
        "writes audio codes, and AutoModelForCausalLM cannot build it from its own config"
    ),
}

#: Field names of configs and the size that makes a model tiny; the first that matches counts, and
#: no value is raised.
SIZES: Final = [
    (r".*vocab_size.*|.*_vocab", VOCAB),
    (r".*(key_value_heads|kv_heads|query_groups)", 4),
    (r"index_topk", 64),
    (r".*(per_tok|per_token|topk|top_k|top_k_experts|moe_k)", 2),
    (r".*(n_group|topk_group|expert_group|n_?groups)", 1),
    (r".*(experts|expert_num)", 4),
    (r".*(hidden_layers|n_layers?|num_layers|num_blocks|coder_layers|layers_per_stack)", 2),
    (r".*heads?", 4),
    (r".*(head_?dim|d_head|dim_head|kv_channels|head_size)", 8),
    (r".*(intermediate_size|ffn_dim|dff|d_inner|ffn_hidden_size|dim_ff|feed_forward_size)", 64),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embed_dim|embedding_size|width)", 32),
    (r".*(position_embeddings|n_positions|n_ctx|seq_len|context_length|_positions)", 128),
    (r".*_rank", 8),
    (r".*", 64),
]

#: Fields that are None by default where a model needs a value, or would derive a large one.
UNSET: Final = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}

#: What introspection cannot know: sizes that hang together in ways of their own.
EXCEPTIONS: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "blt": {"global_config": {"hidden_size": 64}},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            }
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 6, "<|extra_200|>": 7}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The config of an architecture with every size reduced, nested configs too."""
    return _shrink(CONFIG_MAPPING[model_type], overrides)


def _shrink(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    overrides = EXCEPTIONS.get(kind.model_type, {}) | overrides
    try:
        default = kind()
    except Exception:  # invalid by default
        default = kind(**overrides)
    fields = {field.name for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for name in fields:
        value = _value(default, name)
        if isinstance(value, PretrainedConfig):
            options[name] = _shrink(type(value), overrides.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            options[name] = _small(name, value)
        elif name == "eos_token_id" and isinstance(value, list):
            options[name] = 2
        elif value is None and name in UNSET:
            options[name] = UNSET[name]
    for name in fields & {"layer_types", "layers_block_type"}:  # one layer of every kind
        layers = list(dict.fromkeys(_value(default, name) or ()))
        if layers:
            layers = (layers * 2)[: max(2, len(layers))]
            options |= {name: layers, "num_hidden_layers": len(layers)}
            mlps = list(dict.fromkeys(_value(default, "mlp_layer_types") or ()))
            if mlps:
                options["mlp_layer_types"] = [
                    mlps[min(i, len(mlps) - 1)] for i in range(len(layers))
                ]
    nested = {name for name, value in options.items() if isinstance(value, PretrainedConfig)}
    options |= {name: value for name, value in overrides.items() if name not in nested}
    return kind(**options)


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # fields that differ by layer may not be read
        return vars(config).get(name)


def _small(name: str, value: int) -> int:
    if re.fullmatch(r".*token_(id|index)", name):
        return value if value < VOCAB else 3
    return next(min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name))


def tiny_model(
    config: PretrainedConfig, *, masked_lm: bool = False, seed: int = 0
) -> PreTrainedModel:
    """A random model as its checkpoints are saved, after a look at its size on the meta device.

    That is the vision-language model where there is one, with the text decoder nested.
    """
    vision = config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    factory = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    factory = AutoModelForMaskedLM if masked_lm else factory
    with torch.device("meta"):
        empty = factory.from_config(config)
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a tiny model must have at most {MAX_PARAMETERS} parameters, got {size}")
    torch.manual_seed(seed)
    model: PreTrainedModel = factory.from_config(config)
    with torch.no_grad():  # initial weights are so small that all hidden states look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def save_tiny(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint folder, with a tokenizer over bytes that every tokenizer class can be made from.

    Vision-language models come without the files, and the libraries, of their image processors.
    """
    model.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "AutoTokenizer"}))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one architecture; one row of the table.

    Attributes:
        model_type: Key of transformers' mapping.
        status: "works", "on request", "refused" or "not built".
        detail: The tensor's name, or the sentence that the user gets.
        note: What is worth knowing.
        depths: What `layers=` it takes: "0, 1, ..." or "1, ..." or "all".
        uncut: Why its layers cannot be cut, or not to none, in the sentence that the user gets.
    """

    model_type: str
    status: str
    detail: str
    note: str = ""
    depths: str = ""
    uncut: str = ""

    @property
    def row(self) -> str:
        """Its row in the table."""
        cells = [f"`{self.model_type}`", self.detail]
        if self.status in ("works", "on request"):
            cells = [f"`{self.model_type}`", f"`{self.detail}`", self.depths, self.note]
        return f"| {' | '.join(cells)} |"


def exercise(model_type: str, folder: Path) -> Outcome:
    """Takes an architecture the whole way.

    Saves a tiny model, finds W_U in the files, compares it with the live head, checks that it reads
    the backbone's last hidden state, builds, encodes, saves the portable folder and loads that with
    nothing but sentence-transformers.

    Raises:
        AssertionError: If a claim does not hold. Other errors are failures as well.
    """
    try:
        model = tiny_model(tiny_config(model_type))
    except Exception as error:  # of transformers: there is nothing to test then
        message = " ".join(str(error).split())
        return Outcome(model_type, "not built", NOT_BUILT.get(model_type, message))
    refusal = ""
    save_tiny(model, folder / "lm")
    try:
        found = open_unembedding(folder / "lm")
    except UnembeddingError as error:
        if (
            model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
            or "masked_lm" not in str(error)
        ):
            return Outcome(model_type, "refused", str(error))
        refusal = str(error)
        model = tiny_model(tiny_config(model_type), masked_lm=True)
        save_tiny(model, folder / "masked")
    source = folder / ("masked" if refusal else "lm")
    found = open_unembedding(source, masked_lm=bool(refusal))
    weight = torch.cat(list(found.blocks()))
    head = model.get_output_embeddings()
    check(torch.equal(weight, head.weight), "W_U is the live head")

    try:
        embedder = st_embfilter.from_causal_lm(
            source, keep=0.5, masked_lm=bool(refusal), device="cpu", show_progress_bar=False
        )
    except BackboneError as error:
        # This transformers does not load what it saved itself.
        return Outcome(model_type, "refused", str(error).replace(f", in {source}", ""))
    if not refusal:
        check_reads_hidden_state(model, embedder, weight)
    embeddings = embedder.encode(TEXTS)
    check(embeddings.shape == (len(TEXTS), found.d // 2), "embeddings are (n, k)")
    check(bool(np.isfinite(embeddings).all()), "embeddings are finite")
    check(len(np.unique(embeddings.round(5), axis=0)) == len(TEXTS), "texts differ")
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    if model_type not in MIND_PADDING:
        check(close(alone, embeddings), "a text embeds the same alone as in a batch")

    portable = st_embfilter.save_pretrained(embedder, folder / "portable")
    plain = SentenceTransformer(str(portable), device="cpu").encode(TEXTS)
    check(close(plain, embeddings), "the portable folder embeds the same")

    depths, uncut = check_cut(source, embedder, folder / "cut", bool(refusal))

    notes = ["tied"] if found.tied else []
    if getattr(head, "bias", None) is not None:
        notes.append("head bias ignored")
    if getattr(model.config, "text_config", None) is not None:
        notes.append("text decoder of a composite model")
    if model_type in MIND_PADDING:
        notes.append("no attention mask: encode with batch_size=1")
    status = "on request" if refusal else "works"
    return Outcome(model_type, status, found.stored.name, ", ".join(notes), depths, uncut)


def check_cut(
    source: Path, embedder: SentenceTransformer, folder: Path, masked_lm: bool
) -> tuple[str, str]:
    """Cuts a model to one block, and to none, and compares that with the states of the whole one.

    Returns:
        Which depths it takes, and why not all of them.
    """
    layer = filter_of(embedder)
    whole = without_filter(embedder)
    options: dict[str, Any] = {"keep": 0.5, "masked_lm": masked_lm, "device": "cpu"}
    options["show_progress_bar"] = False
    try:
        cut = st_embfilter.from_causal_lm(source, layers=1, **options)
    except DepthError as error:
        return "all", str(error)
    try:
        store = DepthStore(whole, [1], batch_size=1, show_progress_bar=False)
        states = store.at(1).encode(TEXTS)
    except DepthError:  # no final norm, e.g. because each block ends in one
        with cut_to(backbone_model(whole), 1):
            states = whole.encode(TEXTS, batch_size=1)
    expected = layer.linear(torch.from_numpy(states)).detach().numpy()
    saved = st_embfilter.save_pretrained(cut, folder)
    check(len(block_stack(backbone_model(cut))[1]) == 1, "a cut model has one block")
    plain = SentenceTransformer(str(saved), device="cpu").encode(TEXTS, batch_size=1)
    check(close(plain, expected), "a cut model embeds as the state after its blocks")
    try:
        st_embfilter.from_causal_lm(source, layers=0, **options)
    except DepthError as error:
        return "1, ...", str(error)
    return "0, 1, ...", ""


def check(holds: bool, claim: str) -> None:
    if not holds:
        raise AssertionError(f"does not hold: {claim}")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Ten times what float32 sums leave (`conftest.FLOAT32`): some architectures loop over time."""
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


def check_reads_hidden_state(
    model: PreTrainedModel, embedder: SentenceTransformer, weight: Tensor
) -> None:
    """Logits are a rising function of W_U h (+ bias), h the backbone's last hidden state.

    Rising is enough: scales and caps of logits change no direction.
    """
    features = embedder.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        hidden = embedder[0](dict(features))["token_embeddings"]
        logits = model(input_ids=features["input_ids"], use_cache=False).logits
    bias = getattr(model.get_output_embeddings(), "bias", None)
    lens = hidden @ weight.T + (0 if bias is None else bias)
    check(lens.shape == logits.shape, "logits have the shape of W_U h")
    rising = logits.gather(-1, lens.argsort(-1)).diff(dim=-1)
    # As in `close`.
    check(float(rising.min()) >= -1e-4 * float(logits.abs().max()), "logits rise with W_U h")


def run_all(seconds: float = 1800, kept: Path | None = None) -> list[Outcome]:
    """Every architecture, in processes of their own: one that hangs or crashes ends only itself.

    Args:
        seconds: When an answer is given up; a guard against a hang, however slow the machine.
        kept: File of outcomes that are there already; new ones are added to it.
    """
    every = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    outcomes: list[Outcome] = []
    if kept is not None and kept.is_file():
        outcomes = [Outcome(**json.loads(line)) for line in kept.read_text().splitlines()]
    there = {outcome.model_type for outcome in outcomes}
    waiting = [model_type for model_type in every if model_type not in there]
    while waiting:
        batch = waiting[:24]
        done: list[Outcome] = []
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.architectures", *batch],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as worker:
            for _ in batch:
                alarm = threading.Timer(seconds, worker.kill)
                alarm.start()
                line = worker.stdout.readline()
                alarm.cancel()
                if not line:
                    break
                done.append(Outcome(**json.loads(line)))
                print(done[-1], file=sys.stderr, flush=True)
        if len(done) < len(batch):
            failed = Outcome(batch[len(done)], "failed", f"no answer in {seconds:g} s, or a crash")
            done.append(failed)
        outcomes += done
        if kept is not None:
            with kept.open("a") as file:
                file.writelines(f"{json.dumps(dataclasses.asdict(one))}\n" for one in done)
        waiting = waiting[len(done) :]
    return sorted(outcomes, key=lambda outcome: every.index(outcome.model_type))


def work(model_types: list[str]) -> None:
    """One line of JSON for each architecture."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for model_type in model_types:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = exercise(model_type, Path(folder))
            except Exception as error:
                text = f"{type(error).__name__}: {error}".replace(folder, "").splitlines()[0]
                outcome = Outcome(model_type, "failed", text)
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


def table(outcomes: list[Outcome]) -> str:
    """docs/architectures.md."""
    by_status = {
        status: [outcome for outcome in outcomes if outcome.status == status]
        for status in ("works", "on request", "refused", "failed", "not built")
    }
    built = len(outcomes) - len(by_status["not built"])
    count = {status: len(found) for status, found in by_status.items()}
    usable = count["works"] + count["on request"]
    usable_ones = by_status["works"] + by_status["on request"]
    cuttable = sum(outcome.depths != "all" for outcome in usable_ones)
    static = sum(outcome.depths.startswith("0") for outcome in usable_ones)
    halves = sum("encoder-decoder" in outcome.detail for outcome in by_status["refused"])
    lines = [
        "# Architectures",
        "",
        "Written by `make coverage-full`; do not edit. "
        f"transformers {version('transformers')}, "
        f"sentence-transformers {version('sentence-transformers')}, torch {version('torch')}.",
        "",
        f"transformers maps {len(outcomes)} model types to a causal language model. Each was made "
        "tiny from its config with random weights and taken the whole way: saved; W_U found in the "
        "files alone and compared with the live head; checked that the logits rise with W_U h, h "
        "the backbone's last hidden state (so that scales and caps of logits do not matter); "
        "filtered; encoded, alone and in a batch; saved as a portable folder; loaded again with "
        "nothing but sentence-transformers; encoded again, with the same result.",
        "",
        "| outcome | model types |",
        "|---|---|",
        f"| works | {count['works']} |",
        "| works on request (`masked_lm=True`, `--masked-lm`): outside the paper "
        f"| {count['on request']} |",
        f"| refused, with the sentence below | {count['refused']} |",
        f"| fails | {count['failed']} |",
        f"| transformers could not build it here | {count['not built']} |",
        "",
        f"Of the {built} that could be built {usable} ({usable / built:.1%}) can be used. {halves} "
        "of the refused are encoder-decoders, of whose decoder alone AutoModel makes no backbone; "
        f"without them it is {usable} of {built - halves} ({usable / (built - halves):.1%}).",
        "",
        "A bias of the head shifts logits and is no part of W_U; it is ignored. Rows that only pad "
        "the vocabulary are rows of W_U like the others, as in the paper. A vision-language model "
        "is built for text; sentence-transformers loads its processor, which may need Pillow and "
        'torchvision (without them, `"processor_class": "AutoTokenizer"` in '
        "`tokenizer_config.json` makes it load the tokenizer alone).",
        "",
        "## Works",
        "",
        "| model type | W_U in the checkpoint | `layers=` | notes |",
        "|---|---|---|---|",
        *(outcome.row for outcome in by_status["works"]),
        "",
        "## On request",
        "",
        "Masked language models. Between their hidden states and the decoder matrix mostly stand "
        "layers of the head, and they are no decoders: the paper says nothing about them.",
        "",
        "| model type | decoder matrix in the checkpoint | `layers=` | notes |",
        "|---|---|---|---|",
        *(outcome.row for outcome in by_status["on request"]),
        "",
        "## Depth",
        "",
        f"`layers=` takes every number of blocks of {cuttable} of the {usable}, and 0 of {static}. "
        "Each was cut to one block, saved, loaded with nothing but sentence-transformers, and "
        "compared with the state of the whole model after that block and its final norm. The "
        "others:",
        "",
        "| model type | error |",
        "|---|---|",
        *(
            f"| `{outcome.model_type}` | {outcome.uncut} |"
            for outcome in usable_ones
            if outcome.uncut
        ),
        "",
        "## Refused",
        "",
        "| model type | error |",
        "|---|---|",
        *(outcome.row for outcome in by_status["refused"] + by_status["failed"]),
        "",
        "## Not built",
        "",
        "| model type | why |",
        "|---|---|",
        *(outcome.row for outcome in by_status["not built"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    resumed = Path(sys.argv[2]) if sys.argv[1:2] == ["--resume"] else None
    if len(sys.argv) > 1 and resumed is None:
        work(sys.argv[1:])
    else:
        TABLE.parent.mkdir(exist_ok=True)
        found = run_all(kept=resumed)
        TABLE.write_text(table(found), encoding="utf-8")
        sys.exit(f"failed: {bad}" if (bad := [o for o in found if o.status == "failed"]) else 0)
