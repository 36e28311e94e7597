"""`verify` and `inspect` of models whose filter is no module: static tables, rotated weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.saved.baked_folder import export_folder
from st_embfilter.saved.verify import verify
from tests.conftest import tiny_lm

TABLE = "0_StaticEmbedding/model.safetensors"
TEXTS = [f"w{i} w{i + 1} tea w{(7 * i) % 90}" for i in range(1, 60)]
Attack = Callable[[Path], object]


def results(folder: Path, base: Path | None, **options: Any) -> dict[str, bool | None]:
    found = verify(folder, base=base, show_progress_bar=False, **options)
    return {check.name: check.passed for check in found}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with gains that matter, and an untied head."""
    folder = tmp_path_factory.mktemp("folded") / "lm"
    model = tiny_lm(folder, bos_token_id=None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return folder


def build(lm: Path, target: Path, **options: Any) -> Path:
    model = st_embfilter.from_causal_lm(lm, device="cpu", show_progress_bar=False, **options)
    return st_embfilter.save_pretrained(model, target)


@pytest.fixture(scope="module")
def static(lm: Path) -> Path:
    return build(lm, lm.parent / "static", layers=0)


@pytest.fixture(scope="module")
def baked(lm: Path) -> Path:
    folder = build(lm, lm.parent / "filtered", norm="folded", keep=0.75)
    export_folder(folder, lm.parent / "baked")
    return lm.parent / "baked"


def edit(file: str, change: Callable[[Any], object]) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))

    return attack


def tensor(file: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    def attack(folder: Path) -> None:
        weights = load_file(folder / file)
        key = next(key for key in weights if name in key)
        weights[key] = change(weights[key].clone()).contiguous()
        save_file(weights, folder / file, metadata={"format": "pt"})

    return attack


# Static models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "normalize": True},
        {"dtype": "bfloat16", "token_weights": "zipf", "band": "edges", "keep": 9},
        {"norm": "folded", "dtype": "float32"},
    ],
)
def test_a_good_table(lm: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = build(lm, tmp_path / "static", layers=0, **options)
    for rebuild in (False, True):
        found = results(folder, lm, rebuild=rebuild)
        assert set(found.values()) == {True}, found
        assert {"files", "modules", "unembedding", "tokenizer", "rows"} <= set(found)


def test_a_calibrated_table(lm: Path, tmp_path: Path) -> None:
    folder = build(lm, tmp_path / "static", layers=0, calibrate=TEXTS, dtype="float32")
    found = results(folder, lm)
    assert (found.pop("calibration"), set(found.values())) == (None, {True})
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    tensor(TABLE, "embedding", lambda rows: rows @ turn)(folder)
    assert results(folder, lm)["rows"] is False


@pytest.mark.parametrize(
    "options",
    [
        {"calibrate": TEXTS},
        {"calibrate": "generic", "token_weights": "sif", "calibration_strength": 1.0},
        {"calibrate": "self", "norm": "folded", "dtype": None, "normalize": True},
        {"calibrate": TEXTS, "dtype": "float16"},
    ],
)
def test_the_calibration_of_a_table_is_repeated(
    lm: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"layers": 0, "dtype": "float32", "calibration_size": 48, **options}
    folder = build(lm, tmp_path / "static", **options)
    given = TEXTS if options["calibrate"] is TEXTS else None
    found = {check.name: check for check in verify(folder, base=lm, show_progress_bar=False)}
    assert found["calibration"].passed is None
    assert "--rebuild" in found["calibration"].detail
    assert set(results(folder, lm, rebuild=True, texts=given).values()) == {True}
    if given is not None:
        found = {check.name: check for check in verify(folder, base=lm, rebuild=True)}
        assert found["calibration"].passed is None
        assert "--texts" in found["calibration"].detail
    # One more symmetric positive affine map of the rows, which other texts might have made.
    made_up = Path(shutil.copytree(folder, tmp_path / "made-up"))
    tensor(TABLE, "embedding", lambda rows: rows * 0.75 + rows.float().mean().to(rows.dtype))(
        made_up
    )
    forged = results(made_up, lm, rebuild=True, texts=given)
    assert (forged["rows"], forged["calibration"]) == (True, False)


@pytest.mark.parametrize("options", [{}, {"calibrate": TEXTS}, {"dtype": "float16"}])
@pytest.mark.parametrize("ratio", [(999, 1000), (900, 1000)])
def test_a_sign_that_hangs_on_the_last_bits(
    tmp_path: Path, options: dict[str, Any], ratio: tuple[int, int]
) -> None:
    """An entry of just the magnitude that may decide the sign of its direction, or of a smaller.

    Planted exactly: a direction (a, -b, 0, ...) beside (b, a, 0, ...) and unit vectors.
    """
    model = tiny_lm(tmp_path / "lm", bos_token_id=None)
    weight, (a, b) = model.get_output_embeddings().weight, ratio
    d = weight.shape[1]
    with torch.no_grad():
        weight.zero_()
        weight[0, :2] = torch.tensor([2.0 * a, -2.0 * b])
        weight[1, :2] = torch.tensor([1.0 * b, 1.0 * a])
        weight[2:d, 2:] = torch.diag(torch.arange(2.0, d) * 10)
    model.save_pretrained(tmp_path / "lm")
    options = {"layers": 0, "band": "dominant", "keep": 4, "dtype": "float32", **options}
    folder = build(tmp_path / "lm", tmp_path / "static", **options)
    assert results(folder, tmp_path / "lm")["rows"] is True
    given = options.get("calibrate")
    for column in range(4):  # the planted directions are the strongest, in any nested order
        copy = Path(shutil.copytree(folder, tmp_path / f"column{column}"))
        turn = torch.ones(4).index_fill_(0, torch.tensor(column), -1.0)
        tensor(TABLE, "embedding", lambda rows, turn=turn: rows * turn.to(rows.dtype))(copy)
        found = results(copy, tmp_path / "lm", rebuild=True, texts=given)
        open_sign = column == 0 and ratio == (999, 1000)
        assert found["rows"] is open_sign, column
        if given is not None:
            assert found["calibration"] is open_sign, column


@pytest.mark.parametrize("options", [{}, {"calibrate": TEXTS}])
def test_directions_that_turn_in_one_row(tmp_path: Path, options: dict[str, Any]) -> None:
    """Of two equal singular values no computation knows the directions, but all rows have the same.

    Planted exactly: every singular value belongs to one dimension, and the first two are equal.
    """
    model = tiny_lm(tmp_path / "lm", bos_token_id=None)
    weight = model.get_output_embeddings().weight
    d = weight.shape[1]
    with torch.no_grad():
        weight.zero_()
        weight[:d] = torch.diag(torch.arange(2.0 * d, d, -1).clamp(max=2 * d - 1))
    model.save_pretrained(tmp_path / "lm")
    options = {"layers": 0, "band": "dominant", "keep": 4, "dtype": "float32", **options}
    folder = build(tmp_path / "lm", tmp_path / "static", **options)
    assert results(folder, tmp_path / "lm")["rows"] is True
    filtered = st_embfilter.build_filter(tmp_path / "lm", band="dominant", keep=4)
    (pair,) = torch.where(filtered.linear.weight[:, :2].norm(dim=1) > 0.5)
    assert len(pair) == 2
    turn = torch.eye(4)
    cos, sin = torch.tensor(0.02).cos(), torch.tensor(0.02).sin()
    turn[pair[:, None], pair] = torch.stack([cos, -sin, sin, cos]).view(2, 2)
    for name, rows in {"all": slice(None), "one": slice(17, 18)}.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))

        def change(table: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            table[rows] = table[rows] @ turn
            return table

        tensor(TABLE, "embedding", change)(copy)
        assert results(copy, tmp_path / "lm")["rows"] is (name == "all")


@pytest.mark.parametrize("options", [{}, {"calibrate": TEXTS}])
def test_a_table_that_is_none(lm: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each is told as a failure, whatever arithmetic would make of it."""
    folder = build(lm, tmp_path / "static", layers=0, **options)
    row, given = torch.tensor([5]), options.get("calibrate")
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "NaN": lambda rows: rows.index_fill_(0, row, float("nan")),
        "infinite": lambda rows: rows.index_fill_(0, row, float("inf")),
        "nothing": torch.zeros_like,
        "constant": torch.ones_like,
        "huge": lambda rows: rows.sign() * 1e38,
        "a row less": lambda rows: rows[:-1],
        "flat": lambda rows: rows.flatten(),
        "integers": lambda rows: rows.to(torch.int8),
    }
    for name, change in changes.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))
        tensor(TABLE, "embedding", change)(copy)
        for rebuild in (False, True):
            found = results(copy, lm, rebuild=rebuild, texts=given if rebuild else None)
            in_itself = name in ("NaN", "infinite", "flat", "integers")
            assert found["files"] is not in_itself, (name, found)
            assert in_itself or found["rows"] is False, (name, found)


def test_weights_of_tokens_that_are_unknown(static: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    edit("embfilter.json", lambda d: d["depth"].update(token_weights="evil"))(copy)
    (found,) = verify(copy)
    assert (found.name, found.passed) == ("files", False)
    assert "token_weights must be null or, with 0 layers, one of zipf, sif" in found.detail


def test_without_the_language_model_a_table_is_unproven(static: Path) -> None:
    found = results(static, None)
    assert found["unembedding"] is None
    assert "rows" not in found
    assert CliRunner().invoke(app, ["verify", str(static)]).exit_code == 3


def moved_row(rows: torch.Tensor) -> torch.Tensor:
    rows[17] *= 1.01
    return rows


STATIC_ATTACKS: dict[str, tuple[Attack, str]] = {
    "a row": (tensor(TABLE, "embedding", moved_row), "rows"),
    "two tokens": (tensor(TABLE, "embedding", lambda r: r[[1, 0, *range(2, len(r))]]), "rows"),
    "two columns": (tensor(TABLE, "embedding", lambda r: r[:, [1, 0, *range(2, 16)]]), "rows"),
    "a sign": (tensor(TABLE, "embedding", lambda r: r * torch.tensor([-1.0] + [1.0] * 15)), "rows"),
    "too few rows": (tensor(TABLE, "embedding", lambda r: r[:-1]), "rows"),
    "NaN": (tensor(TABLE, "embedding", lambda r: r * torch.nan), "files"),
    "another width": (tensor(TABLE, "embedding", lambda r: r[:, :8]), "files"),
    "the hash": (
        edit("embfilter.json", lambda d: d["unembedding"].update(sha256="0" * 64)),
        "unembedding",
    ),
    "another word": (
        edit(
            "0_StaticEmbedding/tokenizer.json",
            lambda d: d["model"]["vocab"].update(tea=d["model"]["vocab"].pop("cup")),
        ),
        "tokenizer",
    ),
    "a module": (
        edit("modules.json", lambda m: m.append({**m[0], "idx": 1, "name": "1"})),
        "modules",
    ),
    "no card": (lambda folder: (folder / "README.md").unlink(), "card"),
}


@pytest.mark.parametrize("name", STATIC_ATTACKS)
def test_a_forged_table(static: Path, lm: Path, tmp_path: Path, name: str) -> None:
    attack, check = STATIC_ATTACKS[name]
    copy = Path(shutil.copytree(static, tmp_path / "copy"))
    attack(copy)
    assert results(copy, lm)[check] is False


# Rotated weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_good_weights(tmp_path: Path, dtype: torch.dtype | None, tied: bool) -> None:
    tiny_lm(tmp_path / "lm", "qwen2", vocab_size=256, tie_word_embeddings=tied)
    folder = build(tmp_path / "lm", tmp_path / "filtered", norm="folded", normalize=tied)
    export_folder(folder, tmp_path / "baked", dtype=dtype)
    for base in (tmp_path / "lm", folder):
        found = results(tmp_path / "baked", base, rebuild=True)
        assert set(found.values()) == {True}, verify(tmp_path / "baked", base=base)
        assert {"gains", "directions", "unembedding", "rows", "backbone"} <= set(found)


def test_a_baked_model_with_fewer_blocks(lm: Path, tmp_path: Path) -> None:
    folder = build(lm, tmp_path / "filtered", norm="folded", layers=1)
    export_folder(folder, tmp_path / "baked")
    assert set(results(tmp_path / "baked", lm).values()) == {True}


def test_without_the_language_model_the_directions_are_proven(baked: Path) -> None:
    found = results(baked, None)
    assert found.pop("unembedding") is None
    assert set(found.values()) == {True}
    assert "rows" not in found


WEIGHTS = "model.safetensors"


def mixed(head: torch.Tensor) -> torch.Tensor:
    """Two columns turned by half a degree: the logits of no language model change much."""
    angle = torch.tensor(0.01)
    turn = torch.eye(32)
    turn[0, 0] = turn[1, 1] = angle.cos()
    turn[0, 1], turn[1, 0] = angle.sin(), -angle.sin()
    return head @ turn


def adapter_of_itself(folder: Path) -> None:
    """transformers finds it beside the weights, and loads it with them."""
    about = {"base_model_name_or_path": str(folder), "peft_type": "LORA", "r": 2, "lora_alpha": 8}
    about |= {"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    weights = {}
    for block in range(2):
        name = f"base_model.model.layers.{block}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.ones(2, 32)
        weights[f"{name}.lora_B.weight"] = torch.ones(32, 2)
    save_file(weights, folder / "adapter_model.safetensors")


def other_weights(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
    config(transformers_weights="other.safetensors")(folder)


def config(**values: object) -> Attack:
    return edit("config.json", lambda document: document.update(values))


def two_words(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    words["tea"], words["cup"] = words["cup"], words["tea"]


BAKED_ATTACKS: dict[str, tuple[Attack, set[str]]] = {
    "an adapter of itself": (adapter_of_itself, {"modules"}),
    "other weights": (other_weights, {"modules", "backbone"}),
    "code of its own": (config(auto_map={"AutoModel": "evil.Model"}), {"modules", "config"}),
    "an activation": (config(hidden_act="relu"), {"config"}),
    "heads": (config(num_attention_heads=2, num_key_value_heads=1, head_dim=16), {"config"}),
    "a base of RoPE": (
        edit("config.json", lambda d: d["rope_parameters"].update(rope_theta=7.0)),
        {"config"},
    ),
    "a longest text": (config(max_position_embeddings=7), {"config"}),
    "two words": (edit("tokenizer.json", two_words), {"tokenizer"}),
    "a token at the end": (
        edit(
            "tokenizer.json",
            lambda d: d.update(
                post_processor={"type": "BertProcessing", "sep": ["tea", 10], "cls": ["cup", 11]}
            ),
        ),
        {"tokenizer", "prompt"},
    ),
    "mixed directions": (tensor(WEIGHTS, "lm_head", mixed), {"directions", "rows"}),
    "swapped directions": (
        tensor(WEIGHTS, "lm_head", lambda w: w[:, [1, 0, *range(2, 32)]]),
        {"directions", "rows"},
    ),
    "a flipped sign": (
        tensor(WEIGHTS, "lm_head", lambda w: w * torch.tensor([-1.0] + [1.0] * 31)),
        {"rows"},
    ),
    "integers": (tensor(WEIGHTS, "q_proj", lambda w: w.to(torch.int8)), {"rows"}),
    "eight bits, which round as much as one likes": (
        tensor(WEIGHTS, "lm_head", lambda w: w.to(torch.float8_e4m3fn)),
        {"directions", "rows"},
    ),
    "a matrix that writes": (tensor(WEIGHTS, "o_proj", lambda w: w * 1.001), {"rows"}),
    "a matrix that reads": (tensor(WEIGHTS, "q_proj", lambda w: w.flip(1)), {"rows"}),
    "an embedding": (tensor(WEIGHTS, "embed_tokens", lambda w: w + 1e-4), {"rows"}),
    "a gain": (tensor(WEIGHTS, "model.norm", lambda w: w * 2), {"gains", "rows"}),
    "NaN": (tensor(WEIGHTS, "o_proj", lambda w: w * torch.nan), {"backbone", "rows"}),
    "the band": (
        edit("embfilter_baked.json", lambda d: d["filter"].update(band="dominant", start=0)),
        {"directions", "rows"},
    ),
    "the hash": (
        edit("embfilter_baked.json", lambda d: d["unembedding"].update(sha256="0" * 64)),
        {"unembedding"},
    ),
    "a Dense again": (
        edit(
            "modules.json",
            lambda m: m.append({**m[1], "type": "sentence_transformers.models.Dense"}),
        ),
        {"modules"},
    ),
    "no prefixes": (edit("config.json", lambda d: d.pop("is_matryoshka")), {"modules"}),
}


@pytest.mark.parametrize("name", BAKED_ATTACKS)
def test_forged_weights(baked: Path, lm: Path, tmp_path: Path, name: str) -> None:
    attack, checks = BAKED_ATTACKS[name]
    copy = Path(shutil.copytree(baked, tmp_path / "copy"))
    attack(copy)
    found = results(copy, lm)
    assert {name for name, passed in found.items() if not passed} == checks


def test_damaged_metadata_is_no_model_of_ours(baked: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(baked, tmp_path / "copy"))
    (copy / "embfilter_baked.json").write_text("{}")
    assert results(copy, None) == {"files": False}


def test_inspect(static: Path, baked: Path) -> None:
    for folder, told in ((static, "a table of token embeddings"), (baked, "the first 24 of 32")):
        run = CliRunner().invoke(app, ["inspect", str(folder)])
        assert run.exit_code == 0, run.output
        assert told in run.output
        assert "bulk" in run.output
