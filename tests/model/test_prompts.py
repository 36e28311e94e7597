"""Prompt recipes: the token ids and the embeddings that the paper's texts give."""

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

import st_embfilter
from compat import rules
from st_embfilter import Echo, MetaEOL, PromptEOL
from st_embfilter.cli.app import app
from st_embfilter.errors import DataError, FormatError, PromptError
from st_embfilter.evaluation.sweep import raw_model
from st_embfilter.model.layer import filter_of
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.prompts import NAMED_TEMPLATES, parse_prompt, recipe_from_dict
from tests import prompt_tokenizers
from tests.conftest import DEMO_LM, ROOT, TEXTS, same
from tests.prompt_tokenizers import EOS, STYLES

LIMIT = 128

EDGES = [
    "The glacier retreats.",
    "",
    " ".join(["ten"] * 600),
    "  spaces around  ",
    " mat",
    '"Quoted."',
    'She said: "no".',
    ". . .",
    "word",
    "\U0001f469\u200d\U0001f680 \U0001f389!",
    "שלום עולם.",
    "مرحبا",
    "\nnew\n\nlines \n",
    "naïve café",
    "[MASK]",
]

META = MetaEOL(('The topic of "{text}" is:"', '"{text}", in one word:"'))
RECIPES = {
    "portable": PromptEOL(),
    "exact": PromptEOL(encoding="exact"),
    "echo": Echo(),
    "metaeol": META,
}


@pytest.fixture(scope="session", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code that travels with models is cached here and not in the user's home."""
    cache = tmp_path_factory.mktemp("modules")
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(cache)
    return cache


@dataclass
class Sample:
    style: str
    source: Path
    model: SentenceTransformer
    saved: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's own."""
        return AutoTokenizer.from_pretrained(self.source)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Sample]:
    root = tmp_path_factory.mktemp("styles")
    found = {}
    for style in STYLES:
        source = prompt_tokenizers.make_lm(style, root / style)
        for name, recipe in RECIPES.items():
            model = st_embfilter.from_causal_lm(
                source, prompt=recipe, max_seq_length=LIMIT, device="cpu", show_progress_bar=False
            )
            model.preprocess(EDGES)  # which leaves its truncation and padding in the tokenizer
            saved = st_embfilter.save_pretrained(model, root / f"{style}-{name}")
            found[style, name] = Sample(style, source, model, saved)
    return found


def unpadded(features: dict[str, torch.Tensor]) -> list:
    """Lists of ids, without padding on any side."""
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    if ids.ndim == 3:
        rows = zip(ids, mask, strict=True)
        return [unpadded({"input_ids": i, "attention_mask": m}) for i, m in rows]
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


# The rendering of the paper, written down again -----------------------------------------------


def alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eol_texts(style: str) -> tuple[str, str]:
    if style == "mistral":
        return 'This sentence: "', '" means [MASK]'
    return 'Summarize the sentence: "', '" in one word:"'


def rendered(sample: Sample, name: str, text: str) -> list:
    tokenizer = sample.tokenizer
    bos = STYLES[sample.style][2]
    start = [] if bos is None else [tokenizer.convert_tokens_to_ids(bos)]
    x = alone(tokenizer, text)
    if name == "metaeol":
        pairs = [('The topic of "', '" is:"'), ('"', '", in one word:"')]
    else:
        pairs = [eol_texts(sample.style)]
    if name == "echo":
        eos = [tokenizer.convert_tokens_to_ids(EOS[sample.style])]
        before = (start or eos) + alone(tokenizer, "Rewrite the following paragraph: ")
        middle = alone(tokenizer, ". The rewritten paragraph: ")
        x = x[: (LIMIT - len(before) - len(middle) - 1) // 2]
        return before + x + middle + x + eos
    rows = []
    for prefix, suffix in pairs:
        before, after = start + alone(tokenizer, prefix), alone(tokenizer, suffix)
        rows.append(before + x[: LIMIT - len(before) - len(after)] + after)
    return rows if name == "metaeol" else rows[0]


@pytest.mark.parametrize("name", ["portable", "echo", "metaeol"])
@pytest.mark.parametrize("style", STYLES)
def test_token_ids(
    samples: dict[tuple[str, str], Sample], code_cache: Path, style: str, name: str
) -> None:
    """Live, and as plain sentence-transformers reads the saved folder; in one batch and alone."""
    sample = samples[style, name]
    wanted = [rendered(sample, name, text) for text in EDGES]
    longest = max(len(row) for rows in wanted for row in ([rows] if name != "metaeol" else rows))
    assert LIMIT - 1 <= longest <= LIMIT
    again = SentenceTransformer(
        str(sample.saved), device="cpu", trust_remote_code=name in ("echo", "metaeol")
    )
    for model in (sample.model, again):
        assert unpadded(model.preprocess(EDGES)) == wanted
        assert [unpadded(model.preprocess([text]))[0] for text in EDGES] == wanted


@pytest.mark.parametrize("style", STYLES)
def test_token_ids_of_the_exact_encoding(
    samples: dict[tuple[str, str], Sample], style: str
) -> None:
    """The whole prompt as one string; a long one keeps its beginning and the template's end."""
    sample = samples[style, "exact"]
    prefix, suffix = eol_texts(style)
    whole = [sample.tokenizer(prefix + text + suffix)["input_ids"] for text in EDGES]
    for model in (sample.model, SentenceTransformer(str(sample.saved), device="cpu")):
        for ids, wanted in zip(unpadded(model.preprocess(EDGES)), whole, strict=True):
            if len(wanted) <= LIMIT:
                assert ids == wanted
            else:
                assert len(ids) == LIMIT
                assert ids[: LIMIT - 20] == wanted[: LIMIT - 20]
                assert ids[-5:] == wanted[-5:]


@pytest.mark.parametrize("style", STYLES)
def test_what_servers_read(samples: dict[tuple[str, str], Sample], style: str) -> None:
    """tokenizer.json alone, and the class that AutoTokenizer picks for the saved folder."""
    for name in ("portable", "echo"):
        sample = samples[style, name]
        assert rules.transformers_js(sample.saved)
        server = Tokenizer.from_file(str(sample.saved / "tokenizer.json"))
        assert (server.truncation, server.padding) == (None, None)
        fixed = server.num_special_tokens_to_add(False)
        server.enable_truncation(LIMIT if name == "portable" else (LIMIT + fixed) // 2)
        tokenizer = AutoTokenizer.from_pretrained(sample.saved)
        for text in EDGES:
            wanted = rendered(sample, name, text)
            assert server.encode(text).ids == wanted
            if len(wanted) < LIMIT - 1:
                assert tokenizer(text)["input_ids"] == wanted


def test_second_occurrence_in_type_ids(samples: dict[tuple[str, str], Sample]) -> None:
    sample = samples["mistral", "echo"]
    encoding = Tokenizer.from_file(str(sample.saved / "tokenizer.json")).encode("word mat")
    x = alone(sample.tokenizer, "word mat")
    marked = [i for i, kind in zip(encoding.ids, encoding.type_ids, strict=True) if kind == 1]
    assert marked == [*x, sample.tokenizer.convert_tokens_to_ids("</s>")]


def test_user_templates(samples: dict[tuple[str, str], Sample]) -> None:
    source = samples["llama3", "portable"].source
    for prompt in ('{text} means "', PromptEOL('{text} means "')):
        model = st_embfilter.from_causal_lm(source, prompt=prompt, device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(source)
        wanted = tokenizer("mat")["input_ids"] + alone(tokenizer, ' means "')
        assert unpadded(model.preprocess(["mat"])) == [wanted]


@pytest.mark.parametrize(
    "template", ["line\nbreak \"{text}\" \\n 'q' %", 'tab\t"\U0001f389": {text} \\', "{text} %"]
)
@pytest.mark.parametrize("style", STYLES)
def test_exact_encoding_takes_any_character(
    samples: dict[tuple[str, str], Sample], style: str, template: str
) -> None:
    source = samples[style, "exact"].source
    if template.startswith("{text}") and style in ("llama2", "mistral"):
        # Whether these put a space behind BOS hangs on the text; no fixed beginning can say that.
        with pytest.raises(PromptError, match="no chat template gives this tokenizer's ids"):
            exact(source, template)
        return
    model = exact(source, template)
    whole = AutoTokenizer.from_pretrained(source)(template.replace("{text}", "a mat"))["input_ids"]
    assert unpadded(model.preprocess(["a mat"])) == [whole]


def exact(source: Path, template: str) -> SentenceTransformer:
    return st_embfilter.from_causal_lm(
        source, prompt=template, prompt_encoding="exact", device="cpu"
    )


# Embeddings -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RECIPES)
def demo(request: pytest.FixtureRequest) -> tuple[str, SentenceTransformer]:
    model = st_embfilter.from_causal_lm(
        DEMO_LM, prompt=RECIPES[request.param], device="cpu", show_progress_bar=False
    )
    return request.param, model


BATCH = [*TEXTS, *(f"{text} {i}" for i in range(3) for text in TEXTS)]


def test_batch_and_padding_side_do_not_matter(
    demo: tuple[str, SentenceTransformer], tmp_path: Path
) -> None:
    name, model = demo
    assert len(BATCH) == 32
    wanted = model.encode(BATCH, batch_size=1)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    plugin = name in ("echo", "metaeol")
    again = SentenceTransformer(str(saved), device="cpu", trust_remote_code=plugin)
    loaded = st_embfilter.load(saved, device="cpu", trust_remote_code=plugin)
    for other, side in ((model, "left"), (again, "right"), (again, "left"), (loaded, "right")):
        other.tokenizer.padding_side = side
        assert same(other.encode(BATCH, batch_size=32), wanted)
    model.tokenizer.padding_side = "right"
    assert filter_of(loaded).metadata == filter_of(model).metadata


def test_what_is_pooled(demo: tuple[str, SentenceTransformer]) -> None:
    """From the hidden states of the bare model, text by text."""
    name, model = demo
    bare = AutoModel.from_pretrained(DEMO_LM)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    projection = filter_of(model).projection
    for text, embedding in zip(TEXTS, model.encode(TEXTS), strict=True):
        rows = unpadded(model.preprocess([text]))[0]
        with torch.no_grad():
            if name == "metaeol":
                states = [bare(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
                pooled = torch.stack(states).mean(0)
            else:
                hidden = bare(torch.tensor([rows])).last_hidden_state[0]
                copies = len(alone(tokenizer, text)) + 1  # and the closing EOS
                pooled = hidden[-copies:].mean(0) if name == "echo" else hidden[-1]
        assert same((projection @ pooled).numpy(), embedding)


def test_a_prompt_in_a_prompt_is_an_error(tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(DEMO_LM, prompt="prompteol", device="cpu")
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    for prompt in (None, "echo"):
        with pytest.raises(PromptError, match=r"read texts as they are, .* or build from openstax"):
            st_embfilter.from_causal_lm(saved, prompt=prompt, device="cpu")
    with pytest.raises(DataError, match="a prompt and a pooling of its own"):
        raw_model(saved, prompt="echo", device="cpu")
    plain = st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(DEMO_LM, device="cpu"), tmp_path / "plain"
    )
    assert st_embfilter.from_causal_lm(plain, keep=32, device="cpu")[2].out_features == 32


def test_meta_eol_is_the_mean_of_prompt_eol() -> None:
    def encode(prompt: MetaEOL | str) -> np.ndarray:
        return st_embfilter.from_causal_lm(
            DEMO_LM, prompt=prompt, max_seq_length=50, device="cpu", show_progress_bar=False
        ).encode(TEXTS)

    parts = [encode(template) for template in META.templates]
    assert same(np.mean(parts, axis=0), encode(META))
    assert np.abs(parts[0] - parts[1]).max() > 0.1


def test_task_prompts_go_to_the_front_of_the_text(
    demo: tuple[str, SentenceTransformer], tmp_path: Path
) -> None:
    name, model = demo
    wanted = model.encode(["Task: light", "Task: a cup of tea"])
    texts = ["light", "a cup of tea"]
    assert same(model.encode(texts, prompt="Task: "), wanted)
    assert np.abs(model.encode(texts) - wanted).max() > 0.1
    model.prompts["query"] = "Task: "
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    again = SentenceTransformer(
        str(saved), device="cpu", trust_remote_code=name in ("echo", "metaeol")
    )
    assert same(again.encode(texts, prompt_name="query"), wanted)


def test_max_seq_length_may_change_later() -> None:
    model = st_embfilter.from_causal_lm(DEMO_LM, prompt="echo", device="cpu")
    assert model.max_seq_length == 512
    for limit in (64, 65):
        model.max_seq_length = limit
        assert 63 <= model.preprocess(["ten " * 600])["input_ids"].shape[1] <= limit
    model.max_seq_length = 10
    with pytest.raises(ValueError, match=r"room for the text twice beside the .* tokens .*got 10"):
        model.encode(["light"])


@pytest.mark.parametrize("template", [Echo().template, "so: {text}{text}"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_echo_cuts_a_text_before_it_repeats_it(template: str, side: str) -> None:
    """The tokenizer's own cutting makes n^2 sequences of a text in n pieces."""
    model = st_embfilter.from_causal_lm(
        DEMO_LM, prompt=Echo(template), max_seq_length=61, device="cpu"
    )
    tokenizer = model.tokenizer
    tokenizer.truncation_side = side
    words = [f"tea {i}" for i in range(500)]
    row = model.preprocess([" ".join(words)])["input_ids"][0].tolist()
    assert tokenizer.backend_tokenizer.truncation is None
    bare = AutoTokenizer.from_pretrained(DEMO_LM)
    whole = bare(" ".join(words), add_special_tokens=False, verbose=False)["input_ids"]
    fixed = tokenizer.num_special_tokens_to_add()
    room = (61 - fixed) // 2
    text = whole[-room:] if side == "left" else whole[:room]
    before = row.index(text[0])
    assert row[before : before + room] == text
    assert row[-1 - room : -1] == text
    assert len(row) == fixed + 2 * room
    assert row[:before] + row[before + room : -1 - room] + row[-1:] == tokenizer("")["input_ids"]


# Saved ------------------------------------------------------------------------------------------


def test_plugin_form_says_so_in_one_line(
    tmp_path: Path, samples: dict[tuple[str, str], Sample], caplog: pytest.LogCaptureFixture
) -> None:
    said = []
    with caplog.at_level(logging.WARNING, logger="st_embfilter"):
        for name in RECIPES:
            caplog.clear()
            st_embfilter.save_pretrained(samples["llama3", name].model, tmp_path / name)
            said.append(" ".join(caplog.messages))
    assert said[:2] == ["", ""]
    for line in said[2:]:
        assert "\n" not in line
        assert line.endswith("load it with trust_remote_code=True")


def test_plugin_form_needs_no_install(
    tmp_path: Path, samples: dict[tuple[str, str], Sample]
) -> None:
    """In a process in which our package cannot be imported; and saved from there once more."""
    code = f"""
        import sys, json
        sys.modules["st_embfilter"] = None  # an import of it would fail
        from sentence_transformers import SentenceTransformer
        def embeddings(path, again=None):
            model = SentenceTransformer(path, device="cpu", trust_remote_code=True)
            if again:
                model.save_pretrained(again)
            return model.encode({EDGES!r}).tolist()
        for path in sys.argv[1:]:
            print(json.dumps([embeddings(path, path + "-again"), embeddings(path + "-again")]))
    """
    names = ("echo", "metaeol")
    paths = [str(samples["qwen2", name].saved) for name in names]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")},
    )
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        ours = samples["qwen2", name].model.encode(EDGES)
        for theirs in json.loads(line):
            assert same(np.array(theirs), ours)


@pytest.mark.parametrize(
    ("name", "file"), [("echo", "echo_pooling.py"), ("metaeol", "meta_eol.py")]
)
def test_plugin_form_is_loaded_and_saved_again(
    tmp_path: Path, samples: dict[tuple[str, str], Sample], name: str, file: str
) -> None:
    saved = samples["llama3", name].saved
    assert [path.name for path in saved.glob("*.py")] == [file]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(saved), device="cpu")
    loaded = st_embfilter.load(saved, device="cpu", trust_remote_code=True)
    copy = st_embfilter.save_pretrained(loaded, tmp_path / "copy")
    before, after = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (saved, copy)
    )
    assert before == after


def test_modules_of_the_plugin_form(samples: dict[tuple[str, str], Sample]) -> None:
    def read(name: str, file: str) -> object:
        return json.loads((samples["llama3", name].saved / file).read_text())

    def types(name: str) -> list[tuple[str, str]]:
        return [(module["path"], module["type"]) for module in read(name, "modules.json")]

    dense = ("2_Dense", "sentence_transformers.models.Dense")
    assert types("echo") == [
        ("", "echo_pooling.EchoTransformer"),
        ("1_Pooling", "echo_pooling.EchoPooling"),
        dense,
    ]
    assert types("metaeol") == [
        ("", "meta_eol.MetaEOLTransformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        dense,
    ]
    for name in ("portable", "exact"):
        assert {kind.rsplit(".", 1)[0] for _, kind in types(name)} == {
            "sentence_transformers.models"
        }
        assert read(name, "1_Pooling/config.json")["pooling_mode_lasttoken"] is True
    plain = {"max_seq_length": LIMIT, "do_lower_case": False}
    assert read("portable", "sentence_bert_config.json") == plain
    assert read("echo", "sentence_bert_config.json") == plain


@pytest.mark.parametrize("style", STYLES)
def test_saved_tokenizer_config(samples: dict[tuple[str, str], Sample], style: str) -> None:
    for name in RECIPES:
        sample = samples[style, name]
        config = json.loads((sample.saved / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not {"add_bos_token", "add_eos_token"} & set(config)
        assert config["eos_token"] == EOS[style]
        assert config["pad_token"] == sample.model.tokenizer.pad_token


def test_other_vocabularies_are_left_behind(
    samples: dict[tuple[str, str], Sample], tmp_path: Path
) -> None:
    """A stack that finds another tokenizer file would read that one, without the prompt."""
    source = prompt_tokenizers.make_lm("mistral", tmp_path / "source")
    names = ("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "tekken.json")
    for name in names:
        (source / name).write_text("{{ messages }}", encoding="utf-8")
    for prompt, encoding in ((None, None), ("prompteol", "portable"), ("prompteol", "exact")):
        model = st_embfilter.from_causal_lm(
            source, prompt=prompt, prompt_encoding=encoding, device="cpu"
        )
        saved = st_embfilter.save_pretrained(model, tmp_path / f"{prompt}-{encoding}")
        assert {name for name in names if (saved / name).exists()} == set(
            names if not prompt else ()
        )
        again = SentenceTransformer(str(saved), device="cpu")
        assert unpadded(again.preprocess(["a mat"])) == unpadded(model.preprocess(["a mat"]))


def test_own_saving_of_sentence_transformers_keeps_the_prompt(
    samples: dict[tuple[str, str], Sample], tmp_path: Path
) -> None:
    for (style, name), sample in samples.items():
        path = tmp_path / f"{style}-{name}"
        sample.model.save_pretrained(str(path))
        again = SentenceTransformer(str(path), device="cpu", trust_remote_code=True)
        assert unpadded(again.preprocess(EDGES)) == unpadded(sample.model.preprocess(EDGES))
        config = json.loads((path / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")


# Recipes as data --------------------------------------------------------------------------------


def test_recipes_are_saved_and_strictly_read(samples: dict[tuple[str, str], Sample]) -> None:
    for (style, name), sample in samples.items():
        text = (sample.saved / "embfilter.json").read_text(encoding="utf-8")
        metadata = FilterMetadata.from_json(text)
        recipe = recipe_from_dict(metadata.prompt)
        assert recipe == RECIPES[name].for_model(STYLES[style][1])
        assert metadata.prompt == recipe.to_dict() == json.loads(text)["prompt"]
        assert "{text}" in recipe.templates[0]
    assert recipe_from_dict(samples["mistral", "exact"].model[2].metadata.prompt) == PromptEOL(
        'This sentence: "{text}" means [MASK]', "exact"
    )
    document = json.loads(text)
    for damaged in (
        {"recipe": "other"},
        {"recipe": "echo"},
        {"recipe": "echo", "template": "x {text}"},
        {"recipe": "echo", "template": 3},
        {"recipe": "prompteol", "template": "{text}:", "encoding": "portable", "more": 1},
        {"recipe": "prompteol", "template": "{text}:", "encoding": "loose"},
        {"recipe": "metaeol", "templates": []},
    ):
        with pytest.raises(FormatError, match=r"embfilter\.json: prompt: "):
            FilterMetadata.from_json(json.dumps({**document, "prompt": damaged}))


def test_names() -> None:
    assert parse_prompt(None) is None
    assert parse_prompt("prompteol", "exact") == PromptEOL(encoding="exact")
    assert parse_prompt("echo") == Echo()
    cot = 'After thinking step by step , this sentence : "{text}" means in one word:"'
    assert parse_prompt("pretended-cot") == PromptEOL(cot)
    assert parse_prompt("knowledge", "exact").encoding == "exact"
    for name, template in NAMED_TEMPLATES.items():  # older versions load and rebuild it
        recipe = parse_prompt(name)
        assert recipe.to_dict()["recipe"] == "prompteol"
        assert parse_prompt(recipe.option) == recipe
        assert template in recipe.templates
    assert len(parse_prompt("metaeol").templates) == 5
    assert PromptEOL().for_model("llama").templates == (
        'Summarize the sentence: "{text}" in one word:"',
    )
    assert PromptEOL("a {text}").for_model("mistral").template == "a {text}"
    assert Echo().template == (
        "Rewrite the following paragraph: {text}. The rewritten paragraph: {text}"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "eol"},
            "one of prompteol, echo, metaeol, pretended-cot, knowledge, or a",
        ),
        ({"prompt": "{sentence}:"}, "must have {text} exactly once, got 0 in '{sentence}:'"),
        ({"prompt": "{text} {text}"}, "exactly once, got 2 in .*; Echo"),
        ({"prompt": "{text} {x}"}, "must have no braces beside {text}, got '{text} {x}'"),
        ({"prompt": 7}, "got 7"),
        ({"prompt": "echo", "prompt_encoding": "exact"}, "is for PromptEOL .* got 'exact'"),
        ({"prompt_encoding": "exact"}, "is for PromptEOL .* with prompt=None"),
        (
            {"prompt": "prompteol", "prompt_encoding": "x"},
            "must be one of portable, exact, got 'x'",
        ),
        ({"prompt": "prompteol", "max_seq_length": 5}, "beside the .* tokens of the prompt, got 5"),
        (
            {"prompt": "echo", "pooling": "mean"},
            "echo has a pooling of its own, got pooling='mean'",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PromptError, match=message.replace("{", r"\{").replace("}", r"\}")):
        st_embfilter.from_causal_lm(DEMO_LM, **arguments)


def test_wrong_recipes() -> None:
    with pytest.raises(PromptError, match="twice, got 1"):
        Echo("again: {text}")
    with pytest.raises(PromptError, match="must end with its second"):
        Echo("{text} {text}.")
    for templates in ((), "{text}"):
        with pytest.raises(PromptError, match="a list of at least one template, got"):
            MetaEOL(templates)


# Command line ---------------------------------------------------------------------------------


def test_command_line(tmp_path: Path) -> None:
    def cli(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return re.sub(r"\s+", " ", result.output)

    path = tmp_path / "model"
    template = 'In a word, "{text}" is "'
    cli("build", DEMO_LM, "-o", path, "--prompt", template, "--prompt-encoding", "exact", "-q")
    assert f"prompteol (exact): {template}" in cli("inspect", path)
    assert "one of prompteol, echo, metaeol" in cli("build", DEMO_LM, "-o", "x", "--prompt", "eol")


def test_blocks_of_the_documentation() -> None:
    text = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block.replace("Qwen/Qwen2.5-0.5B", str(DEMO_LM)), {})
