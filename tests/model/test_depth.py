"""Cut models: the states between the blocks of the whole one, wherever they come from."""

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import CONFIG_MAPPING, AutoModel
from typer.testing import CliRunner, Result

import st_embfilter
from st_embfilter.cli.app import app
from st_embfilter.errors import DepthError
from st_embfilter.files import writer
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.cut import cut_checkpoint
from st_embfilter.model.depth import (
    LAYERS,
    Depth,
    block_stack,
    config_changes,
    cut_to,
)
from st_embfilter.model.layer import filter_of
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.source import Source
from tests.architectures import VOCAB, save_tiny, tiny_config, tiny_model
from tests.conftest import FLOAT32, TEXTS, MakeLM, same
from tests.hub_server import LocalHub

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "qwen2": {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "gemma3_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 4,
    },
}
RECIPES = [None, "prompteol", "echo", "metaeol"]


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def cut_at() -> Iterator[Any]:
    """Embeddings of a whole model whose backbone hands out what comes after N blocks."""
    hooks: list[Any] = []

    def embed(model: SentenceTransformer, layers: int, texts: list[str]) -> np.ndarray:
        backbone: Any = model[0].auto_model
        found: dict[str, torch.Tensor] = {}

        def leave(module: Any, args: Any, output: Any) -> None:
            found["states"] = output if isinstance(output, torch.Tensor) else output[0]

        def norm(module: Any, args: Any) -> Any:
            return (found["states"],)

        hooks.append(backbone.layers[layers - 1].register_forward_hook(leave))
        hooks.append(backbone.norm.register_forward_pre_hook(norm))
        embeddings: np.ndarray = model.encode(texts, batch_size=len(texts))
        for hook in hooks:
            hook.remove()
        return embeddings

    return embed


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_cut_model_is_the_state_after_its_blocks(
    make_lm: MakeLM, tmp_path: Path, cut_at: Any, model_type: str, recipe: str | None
) -> None:
    folder, lm = make_lm(model_type, vocab_size=VOCAB, **MODELS[model_type])
    save_tiny(lm, folder)  # with a tokenizer that every class can be made from
    options: dict[str, Any] = {"device": "cpu", "show_progress_bar": False, "prompt": recipe}
    whole = st_embfilter.from_causal_lm(folder, **options)
    # Bytes are tokens here and 64 of them are read: more only costs the tokenizer's time.
    texts = [text[:300] for text in TEXTS if text] + ["tea"]
    for layers in (1, 3):
        expected = {}
        for side in ("right", "left"):  # which rounds otherwise, at other positions
            whole.tokenizer.padding_side = side
            expected[side] = cut_at(whole, layers, texts)
        cut = st_embfilter.from_causal_lm(folder, layers=layers, **options)
        saved = st_embfilter.save_pretrained(cut, tmp_path / f"saved-{layers}")
        plain = SentenceTransformer(
            str(saved), device="cpu", trust_remote_code=recipe in ("echo", "metaeol")
        )
        assert len(block_stack(plain[0].auto_model)[1]) == layers
        for batch_size, side in product((1, 3, 32), ("right", "left")):
            plain.tokenizer.padding_side = side
            found = plain.encode(texts, batch_size=batch_size)
            # One batch is the same sums in the same order; others round otherwise.
            assert same(found, expected[side], 1e-6 if batch_size >= len(texts) else FLOAT32)
        metadata = json.loads((saved / "embfilter.json").read_text())
        assert metadata["depth"] == {"layers": layers, "of": 4, "token_weights": None}
        if "layer_types" in MODELS[model_type]:
            kept = json.loads((saved / "config.json").read_text())["layer_types"]
            assert kept == MODELS[model_type]["layer_types"][:layers]
        again = filter_of(st_embfilter.load(saved, trust_remote_code=True))
        assert again is not None
        assert again.metadata.depth == Depth(layers, 4)
        assert not [check for check in verify(saved) if check.passed is False]


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_tensors_are_copied_bit_for_bit_and_only_those_needed(
    make_lm: MakeLM, tmp_path: Path, form: str
) -> None:
    folder, lm = make_lm(
        num_hidden_layers=4,
        dtype=torch.bfloat16,
        shards="20KB" if form == "shards" else "50GB",
        torch_bin=form == "bin",
    )
    target = tmp_path / "cut"
    target.mkdir()
    cut_checkpoint(Source(str(folder)), target, 2)
    stored = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
    state = lm.state_dict()
    needed = {n for n in state if ".layers." not in n or int(n.split(".")[2]) < 2}
    assert set(stored) in (needed, needed - {"lm_head.weight"})
    for name, value in stored.items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value.view(torch.int16), state[name].view(torch.int16))
    loaded, report = AutoModel.from_pretrained(target, output_loading_info=True)
    assert len(loaded.layers) == 2
    assert not report["missing_keys"]


def test_no_piece_in_memory_is_larger_than_the_limit(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_lm(num_hidden_layers=3)
    monkeypatch.setattr(writer, "_PIECE", 1000)
    pieces = []
    whole = writer.raw_tensors
    monkeypatch.setattr(
        "st_embfilter.model.cut.raw_tensors",
        lambda file: (
            pieces.extend(
                len(piece) for tensor in whole(file).values() for piece in tensor.pieces()
            )
            or whole(file)
        ),
    )
    (tmp_path / "cut").mkdir()
    cut_checkpoint(Source(str(folder)), tmp_path / "cut", 1)
    assert max(pieces) == 1000
    with safe_open(tmp_path / "cut" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.up_proj.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("layers", "kept"), [(0, 0), (6, 6), (1.0, 6), (1 / 3, 2), (0.01, 1), (0.5, 3)]
)
def test_layers_are_a_number_or_a_ratio(layers: float | int, kept: int) -> None:
    assert Depth.parse(layers, 6).layers == kept


@pytest.mark.parametrize("layers", [7, -1, 0.0, 1.5, True, "6"])
def test_other_layers_are_refused(layers: Any) -> None:
    with pytest.raises(DepthError, match=r"an int in \[0, 6\] or a ratio in \(0, 1\], got"):
        Depth.parse(layers, 6)


def test_all_layers_are_no_cut(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, layers=2, device="cpu", show_progress_bar=False)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "depth" not in json.loads((saved / "embfilter.json").read_text())


def test_a_model_that_is_there_is_cut_in_place(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm(num_hidden_layers=4)
    whole = st_embfilter.from_causal_lm(folder, layers=2, device="cpu", show_progress_bar=False)
    model = SentenceTransformer(modules=list(whole.children())[:2], device="cpu")
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    bare = SentenceTransformer(modules=list(model.children())[:2], device="cpu")
    st_embfilter.add_filter(bare, layers=0.5, show_progress_bar=False)
    expected = whole.encode(["the cup of tea", "sugar"])
    assert np.array_equal(bare.encode(["the cup of tea", "sugar"]), expected)
    saved = st_embfilter.save_pretrained(bare, tmp_path / "saved")
    names = load_file(saved / "model.safetensors")
    assert not any(name.startswith("model.layers.2.") for name in names)
    assert np.array_equal(
        SentenceTransformer(str(saved), device="cpu").encode(["the cup of tea", "sugar"]), expected
    )
    other = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    other = SentenceTransformer(modules=list(other.children())[:2], device="cpu")
    with pytest.raises(DepthError, match="must keep a block, got layers=0"):
        st_embfilter.add_filter(other, layers=0, show_progress_bar=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_an_adapter_is_merged_before_the_cut(make_lm: MakeLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, lm = make_lm(num_hidden_layers=3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    texts = ["the cup of tea", "sugar"]
    options: dict[str, Any] = {"layers": 2, "device": "cpu", "show_progress_bar": False}
    model = st_embfilter.from_causal_lm(tmp_path / "adapter", **options)
    merged = st_embfilter.from_causal_lm(tmp_path / "merged", **options)
    assert same(model.encode(texts), merged.encode(texts))
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    plain = SentenceTransformer(str(saved), device="cpu")
    assert np.array_equal(plain.encode(texts), model.encode(texts))
    assert len(block_stack(plain[0].auto_model)[1]) == 2


def test_only_the_shards_that_are_needed_are_downloaded(make_lm: MakeLM, hub: LocalHub) -> None:
    folder, _ = make_lm(num_hidden_layers=4, shards="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    last = {shard for name, shard in index.items() if ".layers.3." in name}
    needed = {
        shard for name, shard in index.items() if ".layers." not in name or ".layers.0." in name
    }
    hub.add("org/lm", folder)
    model = st_embfilter.from_causal_lm("org/lm", layers=1, device="cpu", show_progress_bar=False)
    expected = st_embfilter.from_causal_lm(folder, layers=1, device="cpu", show_progress_bar=False)
    assert np.array_equal(model.encode(["tea"]), expected.encode(["tea"]))
    asked = {request.path.rpartition("/")[2] for request in hub.requests if request.sent}
    assert last - needed
    assert not asked & (last - needed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_a_gguf_file_is_cut(tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("gguf")
    from tests.gguf_files import tiny_model, write_gguf

    lm = tiny_model(architecture)
    path = write_gguf(tmp_path / "tiny.gguf", lm, architecture, kind="Q8_0")
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "show_progress_bar": False}
    whole = st_embfilter.from_causal_lm(path, **options)
    texts = ["the tea", "sugar and light"]
    with cut_to(backbone_model(whole), 1):
        expected = whole.encode(texts)
    for layers in (1, 0.5):
        cut = st_embfilter.from_causal_lm(path, layers=layers, **options)
        saved = st_embfilter.save_pretrained(cut, tmp_path / f"saved-{layers}")
        found = SentenceTransformer(str(saved), device="cpu").encode(texts)
        assert same(found, expected)
        metadata = json.loads((saved / "embfilter.json").read_text())
        assert metadata["depth"] == {"layers": 1, "of": 2, "token_weights": None}
        assert metadata["base_model"]["gguf_sha256"]
        assert not [check for check in verify(saved) if check.passed is False]
    static = st_embfilter.from_causal_lm(path, layers=0, **options)
    saved = st_embfilter.save_pretrained(static, tmp_path / "static")
    assert SentenceTransformer(str(saved), device="cpu").encode(texts).shape == (2, 32)


def test_lists_of_as_many_entries_as_blocks_by_chance_stay() -> None:
    """`time_step_limit` of Bamba has two entries at every depth, `layer_types` one a block."""
    config = CONFIG_MAPPING["bamba"](num_hidden_layers=2)
    changes = config_changes(config, 1)
    assert changes[LAYERS] == 1
    assert "time_step_limit" not in changes


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--layers", "1/2"], 2),
        (["--layers", "0.25"], 1),
        (["--layers", "3", "--prompt", "echo"], 3),
        (["--layers", "0"], 0),
        (["--layers", "0", "--token-weights", "sif"], 0),
    ],
)
def test_build_to_a_depth(make_lm: MakeLM, tmp_path: Path, arguments: list[str], kept: int) -> None:
    folder, _ = make_lm(num_hidden_layers=4)
    built = cli("build", folder, "-o", tmp_path / "m", "-q", *arguments)
    assert built.exit_code == 0, built.output
    assert f", {kept} of 4 blocks" in built.output.replace("\n", " ")
    shown = cli("inspect", tmp_path / "m")
    assert shown.exit_code == 0, shown.output
    depth = "0 of 4 blocks: a table" if kept == 0 else f"the first {kept} of 4 blocks"
    assert depth in re.sub(r"\s+", " ", shown.output)
    assert max(map(len, shown.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "-1"], "layers must be an int in [0, 2] or a ratio in (0, 1], got -1"),
        (["--layers", "3"], "layers must be an int in [0, 2] or a ratio in (0, 1], got 3"),
        (["--layers", "1.5"], "got 1.5; this model has 2 blocks"),
        (["--layers", "0.0"], "got 0.0"),
        (["--layers", "half"], "layers must be a number of blocks like 6, or a ratio like 1/3"),
        (["--layers", "0", "--prompt", "prompteol"], "takes no prompt and no other pooling"),
        (["--layers", "0", "--prompt", "echo"], "takes no prompt and no other pooling"),
        (["--layers", "0", "--pooling", "lasttoken"], "takes no prompt and no other pooling"),
        (["--token-weights", "sif"], "token_weights need layers=0"),
        (["--layers", "0", "--token-weights", "idf"], "must be None or one of zipf, sif"),
        (["--layers", "1", "--filter-only"], "--layers must come without --filter-only"),
    ],
)
def test_depths_that_cannot_be_built(
    make_lm: MakeLM, tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder, _ = make_lm()
    result = cli("build", folder, "-o", tmp_path / "m", "-q", *arguments)
    assert result.exit_code != 0
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "Traceback" not in result.output
    assert not (tmp_path / "m").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # of peft
def test_a_table_of_an_adapter_is_that_of_the_merged_model(make_lm: MakeLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, lm = make_lm(tie_word_embeddings=False)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    tables: list[Any] = [
        st_embfilter.from_causal_lm(
            tmp_path / name, layers=0, dtype="float32", device="cpu", show_progress_bar=False
        )[0].embedding.weight
        for name in ("adapter", "merged")
    ]
    assert same(*tables)


def test_a_table_takes_only_the_shards_without_blocks(make_lm: MakeLM, hub: LocalHub) -> None:
    folder, _ = make_lm(num_hidden_layers=4, shards="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    hub.add("org/lm", folder)
    model = st_embfilter.from_causal_lm("org/lm", layers=0, device="cpu", show_progress_bar=False)
    expected = st_embfilter.from_causal_lm(folder, layers=0, device="cpu", show_progress_bar=False)
    assert np.array_equal(model.encode(["tea"]), expected.encode(["tea"]))
    asked = {request.path.rpartition("/")[2] for request in hub.requests if request.sent}
    first = {shard for name, shard in index.items() if ".layers.0." in name}
    assert not asked & (
        set(index.values())
        - first
        - {index["model.embed_tokens.weight"]}
        - {index["model.norm.weight"], index.get("lm_head.weight", "")}
    )


def test_a_model_without_one_list_of_blocks_is_refused(make_lm: MakeLM) -> None:
    folder, lm = make_lm()
    lm.model.other = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    with pytest.raises(DepthError, match="got 2 such lists in LlamaForCausalLM"):
        block_stack(lm)
    with pytest.raises(DepthError, match=r"an int in \[0, 2\]"):
        st_embfilter.from_causal_lm(folder, layers=3, device="cpu", show_progress_bar=False)


def test_a_model_whose_blocks_depend_on_their_number_is_refused(tmp_path: Path) -> None:
    """MiniCPM3 scales what a block adds by the square root of the number of blocks."""
    save_tiny(tiny_model(tiny_config("minicpm3")), tmp_path / "lm")
    with pytest.raises(DepthError, match="got another residual_scale in MiniCPM3DecoderLayer"):
        st_embfilter.from_causal_lm(
            tmp_path / "lm", layers=1, device="cpu", show_progress_bar=False
        )
    # Cut live, it keeps the scale that it was built with; but no folder of it would load so.
    model = st_embfilter.from_causal_lm(tmp_path / "lm", device="cpu", show_progress_bar=False)
    bare = SentenceTransformer(modules=list(model.children())[:2], device="cpu")
    st_embfilter.add_filter(bare, layers=1, show_progress_bar=False)
    with pytest.raises(DepthError, match="must compute its first blocks as before"):
        st_embfilter.save_pretrained(bare, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_number_of_blocks_that_transformers_refuses(tmp_path: Path) -> None:
    save_tiny(tiny_model(tiny_config("olmo_hybrid")), tmp_path / "lm")
    with pytest.raises(
        DepthError, match=r"with 1 of its blocks, got: .* one attention layer; keep"
    ):
        st_embfilter.from_causal_lm(
            tmp_path / "lm", layers=1, device="cpu", show_progress_bar=False
        )
