"""The layout of a saved folder: what runtimes need of it, and folders of 0.1.0."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

import st_embfilter
from compat import rules
from st_embfilter.errors import FormatError
from st_embfilter.model.tokenizer import single_pieces
from st_embfilter.saved.folder import portable_files
from st_embfilter.saved.runtimes import requirements, state_nesting
from st_embfilter.saved.verify import verify
from tests.conftest import DEMO_LM, MakeLM, contents, same

OLD = Path(__file__).parents[1] / "golden" / "folder-0.1.0"
WANTED = json.loads(OLD.with_name("folder-0.1.0.embeddings.json").read_text(encoding="utf-8"))
SPECTRUM = "embfilter_spectrum.safetensors"


def checks(folder: Path) -> dict[str, str]:
    found = verify(folder, rebuild=True, show_progress_bar=False)
    assert {check.passed for check in found} == {True}, found
    return {check.name: check.detail for check in found}


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old folder, loaded and saved."""
    model = st_embfilter.load(OLD, device="cpu")
    return st_embfilter.save_pretrained(model, tmp_path_factory.mktemp("anew") / "model")


def test_a_folder_of_0_1_0_loads_and_verifies(anew: Path) -> None:
    assert (OLD / SPECTRUM).is_file()
    model = st_embfilter.load(OLD, device="cpu")
    assert model[2].singular_values is not None
    wanted = np.array(WANTED["embeddings"])
    for one in (model, SentenceTransformer(str(OLD), device="cpu")):
        assert same(one.encode(WANTED["texts"]), wanted)
    found = checks(OLD)
    for told in ("vLLM needs embfilter_spectrum.safetensors in 2_Dense/", "dimensions=", "single"):
        assert told in found["layout"]
    assert checks(anew)["layout"] == "for every runtime"


def test_an_old_folder_saved_anew_is_of_today(anew: Path) -> None:
    old, new = contents(OLD), contents(anew)
    assert new.pop(f"2_Dense/{SPECTRUM}") == old.pop(SPECTRUM)
    assert {name for name in old if old[name] != new.pop(name)} == {"config.json", "tokenizer.json"}
    assert not new
    assert rules.vllm(anew) == rules.Served("lasttoken", 32, 16, 64)
    assert '"' in rules.transformers_js(anew)
    for rule in (rules.vllm, rules.transformers_js):
        with pytest.raises(rules.RuleError):
            rule(OLD)
    tokenizers = [Tokenizer.from_file(str(f / "tokenizer.json")) for f in (OLD, anew)]
    for text in WANTED["texts"]:
        one, other = (tokenizer.encode(text) for tokenizer in tokenizers)
        assert (one.ids, one.type_ids) == (other.ids, other.type_ids)
        one, other = (tokenizer.encode(text, "tea") for tokenizer in tokenizers)
        assert (one.ids, one.type_ids) == (other.ids, other.type_ids)


def test_code_of_0_1_0_is_known(tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(DEMO_LM, prompt="echo", device="cpu")
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    code = saved / "echo_pooling.py"
    code.write_bytes(OLD.with_name("echo_pooling-0.1.0.txt").read_bytes())
    old = SentenceTransformer(str(saved), device="cpu", trust_remote_code=True)
    texts = [*WANTED["texts"], "ten " * 600]
    assert same(old.encode(texts), model.encode(texts))
    found = {check.name: check for check in verify(saved, show_progress_bar=False)}
    assert found["modules"].passed
    assert "echo_pooling.py is that of 0.1.0" in found["layout"].detail
    code.write_text(code.read_text() + "\n")
    assert {c.name: c.passed for c in verify(saved, show_progress_bar=False)}["modules"] is False


def test_the_new_place_comes_first(anew: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(anew, tmp_path / "both"))
    (both / SPECTRUM).write_bytes(b"damaged")
    stored = load_file(both / "2_Dense" / SPECTRUM)["singular_values"]
    assert st_embfilter.load(both, device="cpu")[2].singular_values.equal(stored)
    assert "in 2_Dense/, not in the root" in checks(both)["layout"]


def test_every_other_reader_ignores_the_key_of_vllm(saved_demo: Path, tmp_path: Path) -> None:
    """Transformers loads the same model and keeps the key; the filter's hash is of no config."""
    found, before = (AutoModel.from_pretrained(path) for path in (saved_demo, DEMO_LM))
    assert found.config.is_matryoshka is True
    assert type(found) is type(before)
    mine, theirs = (model.config.to_dict() for model in (found, before))
    assert mine.pop("is_matryoshka") is True
    for config in (mine, theirs):
        config.pop("_name_or_path", None)
    assert mine == theirs
    for name, value in before.state_dict().items():
        assert value.equal(found.state_dict()[name]), name
    found.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").is_matryoshka is True
    without = Path(shutil.copytree(saved_demo, tmp_path / "without"))
    config = json.loads((without / "config.json").read_text())
    del config["is_matryoshka"]
    (without / "config.json").write_text(json.dumps(config))
    assert 'only with "is_matryoshka": true' in checks(without).pop("layout")
    assert checks(without)["unembedding"] == checks(saved_demo)["unembedding"]
    vectors = [
        SentenceTransformer(str(f), device="cpu").encode(["tea"]) for f in (saved_demo, without)
    ]
    assert np.array_equal(*vectors)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a": 1e-05}', b'{"a": 1e-05,\n  "is_matryoshka": true\n}\n'),
        (b'{\r\n  "a": "\xc3\xa9"\r\n}', b'{\r\n  "a": "\xc3\xa9",\n  "is_matryoshka": true\n}\n'),
        (b'{"is_matryoshka": true}', b'{"is_matryoshka": true}'),
        (b'{"is_matryoshka": false}', b'{\n  "is_matryoshka": true\n}\n'),
        (b"{}", b'{\n  "is_matryoshka": true\n}\n'),
    ],
)
def test_one_key_and_no_other_byte(tmp_path: Path, before: bytes, after: bytes) -> None:
    (tmp_path / "config.json").write_bytes(before)
    state_nesting(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == after
    json.loads(after)


# What must be installed ----------------------------------------------------------------------


def test_a_new_architecture_names_the_transformers_it_needs(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert requirements("qwen3_5_text") == {"transformers": ">=5.2"}
    assert requirements("llama") == requirements(None) == {}
    model = st_embfilter.from_causal_lm(make_lm()[0], device="cpu", show_progress_bar=False)
    assert b"requirements" not in portable_files(model)["config_sentence_transformers.json"]
    monkeypatch.setattr("st_embfilter.saved.runtimes.SINCE", {"llama": "5.0"})
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    SentenceTransformer(str(folder), device="cpu")
    file = folder / "config_sentence_transformers.json"
    document = json.loads(file.read_text())
    assert document["requirements"] == {"transformers": ">=5.0"}
    assert checks(folder)["layout"] == "for every runtime"
    file.write_text(json.dumps(document | {"requirements": {"transformers": ">=9"}}))
    with pytest.raises(ImportError, match="transformers>=9"):
        SentenceTransformer(str(folder), device="cpu")
    file.write_text(json.dumps({**document, "requirements": None} | {"requirements": {}}))
    del document["requirements"]
    file.write_text(json.dumps(document))
    assert '"requirements": {"transformers": ">=5.0"}' in checks(folder)["layout"]


# Templates -----------------------------------------------------------------------------------


def test_pieces_of_tokens_that_look_like_a_template() -> None:
    """Names are tokens, which may hold what the string form of a template gives a meaning."""
    tokens = ["$A", ":", "a:1", "<s>"]
    special = {"p": {"id": "p", "ids": [0, 1, 2], "tokens": tokens[:3]}}
    special["<s>"] = {"id": "<s>", "ids": [3], "tokens": ["<s>"]}
    pieces: list[dict[str, Any]] = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"SpecialToken": {"id": "p", "type_id": 1}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "WordLevel",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "unk_token": "<s>",
        },
    }
    whole: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    marks = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    chain = {"type": "Sequence", "processors": [marks, whole]}
    for processor in (whole, chain):
        split = single_pieces(processor)
        assert split != processor
        assert single_pieces(split) == split
        texts = [
            Tokenizer.from_str(json.dumps({**document, "post_processor": one})).encode("x")
            for one in (processor, split)
        ]
        assert texts[0].ids == texts[1].ids == [3, 0, 1, 2, 3]
        assert texts[0].type_ids == texts[1].type_ids
    for other in (None, {"type": "ByteLevel"}):
        assert single_pieces(other) == other


def test_a_tokenizer_of_strangers(anew: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(anew, tmp_path / "copy"))
    document = json.loads((copy / "tokenizer.json").read_text())
    document["post_processor"]["single"][0]["SpecialToken"]["id"] = "no such piece"
    (copy / "tokenizer.json").write_text(json.dumps(document))
    found = {check.name: check for check in verify(copy, show_progress_bar=False)}
    assert found["layout"].passed is False
    assert FormatError.__name__ not in found["layout"].detail
    assert "tokenizer.json must be readable" in found["layout"].detail
