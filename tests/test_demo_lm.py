"""The scripts that make the demo LM, at a tiny size."""

import importlib
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.conftest import DEMO_LM, FLOAT32

TRAINING = DEMO_LM / "training"
SCRIPTS = ("prepare", "train", "check_overlap", "plot_loss")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, found as Python finds them when one is run."""
    sys.path.insert(0, str(TRAINING))
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    sys.path.remove(str(TRAINING))
    for name in SCRIPTS:
        del sys.modules[name]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs that follow a grammar a tiny model can learn something of."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for book in ("b", "a"):
        lines = [
            " ".join(
                f"The {draw.choice(['cat', 'dog'])} sees {draw.randint(0, 99)}." for _ in "123"
            )
            for _ in range(200)
        ]
        (folder / f"{book}.txt").write_text(" \n\n".join(lines) + " \n", encoding="utf-8")
    return folder


@pytest.fixture
def recipe() -> dict[str, Any]:
    """The recipe with everything small."""
    recipe: dict[str, Any] = json.loads((TRAINING / "recipe.json").read_text())
    recipe["model"] |= {"vocab_size": 280, "hidden_size": 16, "intermediate_size": 24}
    recipe["model"] |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    recipe["model"] |= {"num_key_value_heads": 2, "head_dim": 8}
    recipe["data"] |= {"window": 16, "heldout_fraction": 0.1}
    recipe["training"] |= {"batch": 4, "steps": 12, "warmup_steps": 3}
    recipe["training"] |= {"evaluate_every": 5, "checkpoint_every": 4, "bfloat16": False}
    return recipe


def losses(log: Path, key: str = "loss") -> dict[int, float]:
    entries = map(json.loads, log.read_text().splitlines())
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def test_the_recipe_is_the_one_of_the_bundled_model() -> None:
    recipe = json.loads((TRAINING / "recipe.json").read_text())
    assert json.dumps(recipe["model"], indent=2) == (DEMO_LM / "config.json").read_text()
    with torch.device("meta"):
        config = LlamaForCausalLM.config_class.from_dict(recipe["model"])
        model = LlamaForCausalLM(config)
    assert model.num_parameters() == 6_769_920


def test_the_tokenizer_has_the_bundled_form(
    scripts: dict[str, ModuleType], corpus: Path, tmp_path: Path
) -> None:
    """All but what was learnt is the bundled tokenizer's, byte for byte, and twice the same."""
    prepare = scripts["prepare"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = prepare.corpus_files([corpus])
        tokenizer = prepare.train_tokenizer(files, 280, show_progress_bar=False)
        prepare.save_tokenizer(tokenizer, tmp_path / name, max_length=512)
    for name in prepare.TOKENIZER_FILES:
        made = (tmp_path / "one" / name).read_bytes()
        assert made == (tmp_path / "two" / name).read_bytes()
        if name != "tokenizer.json":
            assert made == (DEMO_LM / name).read_bytes()
    made, bundled = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (tmp_path / "one", DEMO_LM)
    )
    learnt = made["model"].pop("vocab"), made["model"].pop("merges")
    vocab = bundled["model"].pop("vocab")
    assert bundled["model"].pop("merges")[96] == ["Ġ", "Ċ"]  # ends of lines were counted
    assert made == bundled
    assert list(learnt[0])[:257] == list(vocab)[:257]
    assert any("Ċ" in merge for pair in learnt[1] for merge in pair)


def test_windows_are_paragraphs_behind_bos(
    scripts: dict[str, ModuleType], corpus: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    prepared = scripts["prepare"].prepare([corpus], tmp_path, recipe, show_progress_bar=False)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    lines = [
        *(corpus / "a.txt").read_text().split("\n"),
        *(corpus / "b.txt").read_text().split("\n"),
    ]
    texts = {line for line in lines if line}
    pieces = {}
    for name, windows in (("train", prepared.train), ("heldout", prepared.heldout)):
        text = tokenizer.decode(windows.reshape(-1).tolist(), skip_special_tokens=False)
        first, *whole = text.split("<|endoftext|>")
        assert first == ""
        pieces[name] = set(whole[:-1])  # the last one may be cut
    assert pieces["train"] | pieces["heldout"] <= texts
    assert not pieces["train"] & pieces["heldout"]
    assert len(pieces["train"] | pieces["heldout"]) >= len(texts) - 2
    assert 0.02 < len(pieces["heldout"]) / len(texts) < 0.25


def test_prepared_data_are_made_again_only_when_something_changed(
    scripts: dict[str, ModuleType],
    corpus: Path,
    tmp_path: Path,
    recipe: dict[str, Any],
) -> None:
    def run(files: list[Path]) -> tuple[str, int]:
        made = scripts["prepare"].prepare(files, tmp_path, recipe, show_progress_bar=False)
        return made.fingerprint, (tmp_path / "train.npy").stat().st_mtime_ns

    first = run([corpus])
    assert run([corpus / "b.txt", corpus / "a.txt"]) == first
    assert run([corpus / "a.txt"])[0] != first[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "files and folders that exist"),
        ("latin.txt", b"caf\xe9\n", "must be UTF-8"),
        ("short.txt", b"Too little.\n", "too little text"),
        ("empty", None, "no \\*.txt file"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    recipe: dict[str, Any],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    elif name == "empty":
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=message):
        scripts["prepare"].prepare(
            [tmp_path / name], tmp_path / "out", recipe, show_progress_bar=False
        )


def test_a_resumed_run_is_the_uninterrupted_one(
    scripts: dict[str, ModuleType], corpus: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    """Stopped on a checkpoint, and cut off two steps after one."""
    train = scripts["train"]
    quiet = {"show_progress_bar": False}
    prepared = scripts["prepare"].prepare([corpus], tmp_path / "data", recipe, **quiet)
    assert train.train(prepared, recipe, tmp_path / "whole", **quiet) == 12
    parts = tmp_path / "parts"
    assert train.train(prepared, recipe, parts, last_step=4, **quiet) == 4
    checkpoint = (parts / "checkpoint.pt").read_bytes()
    assert train.train(prepared, recipe, parts, budget_minutes=1e-9, **quiet) == 5
    assert train.train(prepared, recipe, parts, last_step=6, **quiet) == 6
    (parts / "checkpoint.pt").write_bytes(checkpoint)  # as if killed before the next one
    assert train.train(prepared, recipe, parts, **quiet) == 12

    for key in ("loss", "average", "rate"):
        whole, resumed = (losses(tmp_path / name / "log.jsonl", key) for name in ("whole", "parts"))
        assert list(whole) == list(resumed) == list(range(1, 13))
        # Losses near 5 of 12 steps: each chains the errors of all before.
        assert resumed == pytest.approx(whole, rel=12 * FLOAT32)
    heldout = losses(tmp_path / "whole" / "log.jsonl", "heldout_loss")
    assert list(heldout) == [5, 10, 12]
    assert heldout[12] < heldout[5] < math.log(280)

    model = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float32)
    training = train.Training(**recipe["training"])
    # It is saved in float16. Rounding to 11 bits in each of n matrices in a row moves logits, of a
    # size of about 1, by sqrt(n) of it, and a loss by twice what they move at most.
    matrices = sum(parameter.ndim == 2 for parameter in model.parameters())
    assert train.heldout_loss(model, prepared.heldout, training) == pytest.approx(
        heldout[12], abs=2 * matrices**0.5 * 2.0**-11
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "model")
    assert tokenizer("The cat")["input_ids"][0] == tokenizer.bos_token_id == 0

    recipe["training"]["peak_rate"] = 1.0
    with pytest.raises(SystemExit, match="same recipe and corpus"):
        train.train(prepared, recipe, parts, **quiet)


def test_each_epoch_reads_every_window_once(
    scripts: dict[str, ModuleType], recipe: dict[str, Any]
) -> None:
    train = scripts["train"]
    training = train.Training(**recipe["training"])
    epochs = [
        np.concatenate([train.rows_of_step(step, 40, training) for step in steps])
        for steps in (range(1, 11), range(11, 21))
    ]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])


def test_the_rate_warms_up_and_falls(scripts: dict[str, ModuleType]) -> None:
    train = scripts["train"]
    settings = json.loads((TRAINING / "recipe.json").read_text())["training"]
    rates = [train.rate(step, train.Training(**settings)) for step in (1, 50, 100, 905, 1710)]
    assert rates == pytest.approx([3e-5, 1.5e-3, 3e-3, 3e-3 * 0.525, 1.5e-4])


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest(
    scripts: dict[str, ModuleType], recipe: dict[str, Any]
) -> None:
    train = scripts["train"]
    model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_dict(recipe["model"]))
    muon, adamw = train.optimizers(model, train.Training(**recipe["training"]))
    sizes = [
        sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in (muon, adamw)
    ]
    assert sizes == [4 * 16 * 16 + 3 * 16 * 24, 280 * 16 + 3 * 16]


def test_overlaps_are_found_and_only_those(scripts: dict[str, ModuleType]) -> None:
    """The pruned search gives what comparing every pair gives."""
    check = scripts["check_overlap"]
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(12)]
    texts, corpus = (
        [" ".join(draw.choices(vocabulary, k=draw.randint(3, 8))) for _ in range(300)]
        for _ in range(2)
    )
    corpus += [text.upper() + "!" for text in texts[:20]]
    corpus += [f"{text} again" for text in texts[20:60]]
    found = check.overlaps(corpus, {"set": texts}, similarity=0.7)["set"]

    compared = {tuple(text.split()) for text in texts if len(text.split()) >= check.MIN_WORDS}
    others = [s for text in corpus for s in check.sentences(text) if len(s) >= check.MIN_WORDS]
    best = {
        sentence: max(
            len(check.features(sentence) & check.features(other))
            / len(check.features(sentence) | check.features(other))
            for other in others
        )
        for sentence in compared
    }
    assert found.compared == compared
    assert found.exact == compared & set(others)
    assert found.exact
    expected = {s: score for s, score in best.items() if score >= 0.7 and s not in found.exact}
    assert {s: score for s, (score, _) in found.near.items()} == pytest.approx(expected)
    assert expected


def test_a_whole_text_is_all_of_its_sentences(scripts: dict[str, ModuleType]) -> None:
    check = scripts["check_overlap"]
    one, two = "The cat sat on the mat.", "A dog slept under the table."
    found = check.overlaps(
        [f"{one} More text here."], {"set": [one, f"{one} {two}", "Too short."]}, similarity=0.7
    )["set"]
    assert (len(found.texts), len(found.exact), len(found.near), found.whole) == (3, 1, 0, 1)


def test_evaluation_folders_are_read(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('"One, two.",Three.,5.0\n')
    (tmp_path / "labelled.csv").write_text("text,category\nFour.,a_label\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "title": "Five", "text": "Six."}\n')
    (tmp_path / "qrels.tsv").write_text("1\t1\t1\n")
    texts = set(scripts["check_overlap"].evaluation_texts(tmp_path))
    assert texts == {"One, two.", "Three.", "Four.", "Five. Six."}


def test_the_figure_and_the_comparison(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "log.jsonl"
    entries = [{"step": step, "loss": 9.0, "average": 9.0 - step / 100} for step in range(1, 31)]
    log.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    figure = tmp_path / "loss.png"
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", str(log), "--output", str(figure)])
    scripts["plot_loss"].main()
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[1].split() == ["25", "8.89", "8.75", "-0.14"]
