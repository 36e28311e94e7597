"""`verify` holds the prompt that the metadata name against the tokens that are really put in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import st_embfilter
from st_embfilter.model.backbone import TEXT_ONLY
from st_embfilter.model.prompts import MESSAGES, Echo, MetaEOL, PromptEOL
from st_embfilter.saved.baked_folder import export_folder
from st_embfilter.saved.checks import Check
from st_embfilter.saved.verify import verify
from tests.prompt_tokenizers import STYLES, make_lm

#: Recipes of the folders below, by name.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompteol": {"prompt": "prompteol"},
    "exact": {"prompt": "prompteol", "prompt_encoding": "exact"},
    "echo": {"prompt": "echo"},
    "metaeol": {"prompt": "metaeol"},
}
METADATA = "embfilter.json"
Attack = Callable[[Path], object]


def prompt_check(folder: Path, base: Path | None = None) -> Check:
    found = {check.name: check for check in verify(folder, base=base, show_progress_bar=False)}
    return found["prompt"]


def build(lm: Path, target: Path, **options: Any) -> Path:
    model = st_embfilter.from_causal_lm(lm, device="cpu", show_progress_bar=False, **options)
    return st_embfilter.save_pretrained(model, target)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model and a filtered model of every form."""
    place = tmp_path_factory.mktemp("prompts")
    make_lm("mistral", place / "lm")
    for name, options in FORMS.items():
        build(place / "lm", place / name, **options)
    build(place / "lm", place / "folded", prompt="prompteol", norm="folded", keep=0.75)
    export_folder(place / "folded", place / "baked")
    return place


@pytest.mark.parametrize("style", STYLES)
def test_what_every_tokenizer_puts_in(style: str, tmp_path: Path) -> None:
    start = STYLES[style][2]
    lm = make_lm(style, tmp_path / "lm")
    for name, options in FORMS.items():
        folder = build(lm, tmp_path / name, **options)
        for base in (None, lm):
            found = prompt_check(folder, base)
            assert found.passed is True, (name, found)
            told = name != "echo" or start is not None  # ECHO begins with something in any case
            assert (start is None) or not told or start in found.detail


def edit(file: str, change: Callable[[Any], object]) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / file).read_text(encoding="utf-8"))
        change(document)
        (folder / file).write_text(json.dumps(document), encoding="utf-8")

    return attack


def named(recipe: PromptEOL | Echo | MetaEOL | None, file: str = METADATA) -> Attack:
    """Another prompt in the metadata than in the tokenizer."""
    return edit(file, lambda d: d.update(prompt=None if recipe is None else recipe.to_dict()))


def pieces(change: Callable[[list[Any]], object]) -> Attack:
    """Another template in the tokenizer than in the metadata."""
    return edit("tokenizer.json", lambda d: change(d["post_processor"]["single"]))


def put_in_twice(template: list[Any]) -> None:
    (text,) = [piece for piece in template if "Sequence" in piece]
    template.append(text)


PAPER = PromptEOL().for_model("mistral")
BERT = "sentence_bert_config.json"

#: Attack by name, with the folder that it is made on.
ATTACKS: dict[str, tuple[str, Attack]] = {
    "a token less": ("prompteol", pieces(lambda p: p.pop(2))),
    "a token less at the end": ("prompteol", pieces(lambda p: p.pop())),
    "two tokens swapped": ("prompteol", pieces(lambda p: p.insert(2, p.pop(1)))),
    "a token twice": ("prompteol", pieces(lambda p: p.append(p[-1]))),
    "a word before BOS": ("prompteol", pieces(lambda p: p.insert(0, p[2]))),
    "the text twice": ("prompteol", pieces(put_in_twice)),
    "another text between": ("echo", pieces(lambda p: p.pop(-3))),
    "other templates": (
        "metaeol",
        edit(BERT, lambda d: d["prompt_token_ids"][1][1].append(7)),
    ),
    "a template less": ("metaeol", edit(BERT, lambda d: d["prompt_token_ids"].pop())),
    "another chat template": (
        "exact",
        edit("tokenizer_config.json", lambda d: d.update(chat_template=d["chat_template"] + "!")),
    ),
    "a chat template of a file": (
        "exact",
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
    ),
    "another number of tokens of the prompt": (
        "echo",
        edit("1_Pooling/config.json", lambda d: d.update(fixed_tokens=d["fixed_tokens"] + 2)),
    ),
    "a width that is none": (
        "echo",
        edit("1_Pooling/config.json", lambda d: d.update(embedding_dimension=7)),
    ),
    "no prompt is named": ("prompteol", named(None)),
    "another template is named": ("prompteol", named(PromptEOL("Said: {text} so"))),
    "another encoding is named": ("prompteol", named(PromptEOL(PAPER.template, "exact"))),
    "the portable encoding is named": ("exact", named(PAPER)),
    "another recipe is named": ("echo", named(PAPER)),
    "another template is named of echo": ("echo", named(Echo("{text} {text}"))),
    "other templates are named": ("metaeol", named(MetaEOL(("{text} is",)))),
    "no recipe of several is named": ("metaeol", named(None)),
    "a prompt is named": ("plain", named(PAPER)),
    "messages without a prompt": (
        "plain",
        edit(BERT, lambda d: d.update(modality_config=MESSAGES)),
    ),
    "no messages with one": ("exact", edit(BERT, lambda d: d.update(modality_config=TEXT_ONLY))),
    "baked: a token less": ("baked", pieces(lambda p: p.pop(2))),
    "baked: no prompt is named": ("baked", named(None, "embfilter_baked.json")),
    "baked: another template is named": (
        "baked",
        named(PromptEOL("Said: {text} so"), "embfilter_baked.json"),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_another_prompt_than_the_one_that_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    form, attack = ATTACKS[name]
    assert prompt_check(saved / form).passed is True
    copy = Path(shutil.copytree(saved / form, tmp_path / "copy"))
    attack(copy)
    assert prompt_check(copy).passed is False


def test_what_a_text_begins_with_is_told_and_held_against_the_language_model(
    saved: Path, tmp_path: Path
) -> None:
    """BOS is the language model's own: the folder alone cannot say that it is missing."""
    for form, options in FORMS.items():
        if form in ("exact", "metaeol"):  # their ids of BOS are in more places
            continue
        copy = Path(shutil.copytree(saved / form, tmp_path / form))
        if "prompt" in options:
            pieces(lambda p: p.pop(0))(copy)
        else:
            edit("tokenizer_config.json", lambda d: d.update(add_bos_token=False))(copy)
            edit("tokenizer.json", lambda d: d.update(post_processor=None))(copy)
        found = prompt_check(copy)
        assert found.passed is (form != "echo")  # which always begins with a token
        assert "<s>" not in found.detail
        assert prompt_check(copy, saved / "lm").passed is False


def test_a_static_model_has_no_prompt(saved: Path, tmp_path: Path) -> None:
    folder = build(saved / "lm", tmp_path / "static", layers=0)
    named(PAPER)(folder)
    found = {check.name: check.passed for check in verify(folder, base=saved / "lm")}
    assert found["modules"] is False
