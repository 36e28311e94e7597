"""Model cards: what they say, what they inherit, what the Hub would refuse."""

import inspect
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import typer
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import st_embfilter
from model_cards.render import FOLDER as CARDS
from model_cards.render import PAPER_MODELS, cards
from st_embfilter import MetaEOL, PromptEOL
from st_embfilter.cli.app import app
from st_embfilter.errors import FormatError
from st_embfilter.saved.card import (
    _build_command,
    base_card,
    card_of_folder,
    render,
    write_card,
)
from st_embfilter.saved.card_facts import CardFacts
from st_embfilter.saved.card_rules import check_card, front_matter, inherited
from st_embfilter.saved.folder import portable_files
from st_embfilter.saved.results import Result, parse_results
from st_embfilter.spectrum.whitening import Calibration
from tests.conftest import DEMO_LM, MakeLM, same

GOLDEN = Path(__file__).parents[1] / "golden"


def score(*values: object, **others: Any) -> Result:
    names = ("task", "dataset", "split", "metric", "dims", "score", "configuration")
    intervals = ("delta", "delta_low", "delta_high")
    return Result(**dict(zip((*names, *intervals), values, strict=False)), **others)


def rows_of(text: str) -> tuple[Result, ...]:
    return parse_results(text, "results.jsonl", FormatError)


BASE = """---
license: other
license_name: some-licence
license_link: LICENSE
language: [en, de, "no", english, 3]
tags: [llama]
---
# A base model
"""

FACTS = CardFacts(
    base_model="org/base-1B",
    d=64,
    k=32,
    band="offset:8",
    start=8,
    keep=32,
    revision="0123456789abcdef0123456789abcdef01234567",
    tensor="lm_head.weight",
    vocabulary=1000,
    dtype="bfloat16",
    sha256="ab" * 32,
    prompt=MetaEOL(('In one word: "{text}"', "Keyword of `{text}`:")),
    pooling="lasttoken",
    normalized=True,
    max_seq_length=128,
    form="plugin",
    inherited=inherited(BASE),
    results=(
        score("STS12", "STS 12", "test", "cosine_spearman", 64, 0.5, "raw"),
        score(
            "STS12", "STS 12", "test", "cosine_spearman", 32, 0.6251, "offset:8", 0.1251, 0.1, 0.15
        ),
        score("STS12", "STS 12", "test", "cosine_spearman", 16, 0.45, "offset:8", -0.05),
        score("STS12", "STS 12", "test", "cosine_spearman", 48, 0.99, "offset:8"),
        score("STS12", "STS 12", "test", "cosine_spearman", 32, 0.99, "whiten"),
        score("Banking", "Banking", "test", "accuracy", 32, 0.7, "offset:8", command="measure it"),
        score("Other", "Other", "dev", "ap", 32, 0.1, "offset:8", source="a paper"),
    ),
)


def cli(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


# Rendering ---------------------------------------------------------------------------------------


def test_a_card_with_everything() -> None:
    text = render(FACTS, repo_id="me/filtered")
    assert text == (GOLDEN / "card.md").read_text(encoding="utf-8")
    check_card(text)


def test_published_cards_are_rendered_from_their_sources() -> None:
    rendered = cards()
    assert {path.name for path in CARDS.glob("*.md")} == set(rendered)
    for name, text in rendered.items():
        assert text == (CARDS / name).read_text(encoding="utf-8"), f"{name}: run make model-cards"
        check_card(text)


def test_reported_figures_are_said_to_be_and_are_not_metadata() -> None:
    for facts in PAPER_MODELS:
        text = render(facts)
        assert "**Reported in the paper** (arXiv 2606.07502)" in text
        assert "Measured" not in text
        assert "sha256" not in text
        assert ModelCard(text).data.eval_results is None
        averages = [s.score for s in facts.results if s.dataset == "All (49)"]
        for average in averages:
            assert f"{100 * average:.2f}" in text


def test_metadata_and_table_give_the_same_figures() -> None:
    text = render(FACTS)
    scores = ModelCard(text).data.eval_results
    assert {(s.dataset_name, s.metric_type, s.metric_value) for s in scores} == {
        ("STS 12", "cosine_spearman", 62.51),
        ("STS 12", "cosine_spearman", 45.0),
        ("Banking", "accuracy", 70.0),
    }
    for score in scores:
        assert f" {score.metric_value:.2f} " in text


def test_long_tables_are_cut_into_parts() -> None:
    scores = [score("T", f"set {i}", "test", "ap", 32, i / 100, "offset:8") for i in range(19)]
    text = render(replace(FACTS, results=tuple(scores)))
    heads = [line for line in text.splitlines() if line.startswith("| | dimensions")]
    assert [head.count("set ") for head in heads] == [8, 8, 3]


def test_nothing_is_made_up_about_an_unknown_base() -> None:
    facts = CardFacts(base_model=None, d=8, k=1, band="random:7", start=None, keep=1, on_hub=False)
    text = render(facts)
    check_card(text)
    data = ModelCard(text).data.to_dict()
    assert not {"license", "language", "base_model", "base_model_relation"} & set(data)
    assert "None" not in text.replace("None yet", "")
    assert "its card was not at hand" in text


def test_backticks_in_a_template_stay_in_their_code() -> None:
    text = render(replace(FACTS, prompt=PromptEOL("`a` ``{text}``")))
    assert "- template: ``` `a` ``{text}`` ```" in text


def test_a_calibrated_model_says_so_and_no_more() -> None:
    own = Calibration("self", 1024, "ab" * 32, 0.5, 0.125, seed=3)
    text = render(replace(FACTS, calibration=own))
    check_card(text)
    assert "of 1,024 texts that the\nlanguage model wrote itself" in text
    assert "no data was used" in text
    assert "strength 0.5, shrinkage 0.125, 1024 texts, seed 3" in text
    assert "are the filter of that width" not in text
    assert "--calibrate self" in text
    assert "--calibration-strength 0.5" in text
    generic = render(replace(FACTS, calibration=replace(own, source="generic", seed=None)))
    check_card(generic)
    assert "of 1,024 texts that come\nwith st-embfilter" in generic
    assert "no data" not in generic
    assert "--calibrate generic" in generic
    given = render(replace(FACTS, calibration=replace(own, source="texts", strength=1.0)))
    assert "no data" not in given
    assert "--calibrate texts.txt" in given
    assert "--calibration-strength 1.0" in given


def test_a_measured_order_cannot_be_built_by_name() -> None:
    text = render(replace(FACTS, band="optimal", start=None, results=()))
    assert "st-embfilter build" not in text
    assert "measured on texts" in text


def test_commands_name_no_folder_of_the_machine() -> None:
    command = (
        "st-embfilter eval /home/me/lm --sts '/data/my sets/sts.csv' -o ~/out.jsonl --keep 1/2"
    )
    score = replace(FACTS.results[5], command=command)
    text = render(replace(FACTS, results=(score,)))
    assert "st-embfilter eval lm --sts sts.csv -o out.jsonl --keep 1/2" in text
    assert "/home" not in text


def test_the_exact_encoding_names_the_version_it_needs() -> None:
    text = render(replace(FACTS, form="portable", prompt=PromptEOL("{text}:", "exact")))
    assert "version 5.6 or later" in text
    assert "--prompt-encoding exact" in text
    assert "5.6" not in render(replace(FACTS, form="portable"))


# What it says is true ----------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_usage_runs_as_written(saved_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = card_of_folder(saved_demo, repo_id=str(saved_demo))
    names: dict[str, Any] = {}
    exec(blocks(text, "python")[0], names)
    assert "(2, 128)" in capsys.readouterr().out
    full = names["embeddings"]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+)% \| (\d+) MB \| .*?truncate_dim=(\d+)", text, re.M)
    assert [row[0] for row in rows] == ["64", "32"]
    for dims, share, megabytes, cut in rows:
        model = names["SentenceTransformer"](str(saved_demo), device="cpu", truncate_dim=int(cut))
        embeddings = model.encode(["The cat sat on the mat."])
        assert embeddings.shape == (1, int(dims))
        assert same(embeddings, full[:1, : int(cut)])
        assert float(share) == 100 * int(dims) / 256
        assert int(megabytes) == embeddings.nbytes  # of a million, in millions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 10, "pooling": "lasttoken", "normalize": True, "max_seq_length": 9},
        {"keep": 0.25, "band": "offset:3"},
        {"band": "random:7"},
        {"prompt": "prompteol", "prompt_encoding": "exact"},
        {"prompt": 'Of "{text}" in a word:', "normalize": True},
    ],
)
def test_the_build_command_builds_the_same_model(
    options: dict[str, Any], make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_lm()
    monkeypatch.chdir(folder.parent)  # where the base model's name is its folder
    model = st_embfilter.from_causal_lm("lm", device="cpu", **options)
    files = portable_files(model)
    command = blocks(files["README.md"].decode(), "shell")[0]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "st-embfilter"
    assert cli(*words[1:])[0] == 0
    for name, content in files.items():
        assert (tmp_path / "lm-embfilter" / name).read_bytes() == content, name


# What it inherits --------------------------------------------------------------------------------


def test_licence_and_languages_come_from_the_base_model(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    (folder / "README.md").write_text(BASE)
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    data = ModelCard.load(
        st_embfilter.save_pretrained(model, tmp_path / "saved") / "README.md"
    ).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "some-licence",
        "LICENSE",
    )
    assert data.language == ["en", "de", "no"]
    assert "llama" not in data.tags


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# no metadata",
        "---\n: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 3\n---\n",
    ],
)
def test_nothing_is_inherited_from_a_card_that_says_nothing(card: str | None) -> None:
    assert inherited(card) == {}


def test_a_card_that_grows_inherits_nothing() -> None:
    """Each line is twice the one before: forty of them are no list that a machine can hold."""
    lines = ["a0: &a0 [mit]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 6))]
    assert (
        inherited("---\n" + "\n".join([*lines, "license: *a5", "language: en"]) + "\n---\n") == {}
    )
    assert inherited("---\nlicense: [[mit]]\nlanguage: en\n---\n") == {"language": ["en"]}


def test_the_card_of_a_cached_base_model_is_found(
    saved_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--org--base"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "README.md").write_text(BASE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_card("org/base", commit) == BASE
    for name in ("org/other", "no folder/and/no id", ""):
        assert base_card(name, commit) is None
    saved = tmp_path / "saved"
    saved.mkdir()
    metadata = json.loads((saved_demo / "embfilter.json").read_text())
    metadata["base_model"] = {"id": "org/base", "revision": commit}
    (saved / "embfilter.json").write_text(json.dumps(metadata))
    (saved / "modules.json").write_bytes((saved_demo / "modules.json").read_bytes())
    data = ModelCard(card_of_folder(saved)).data
    assert (data.base_model, data.license_name) == ("org/base", "some-licence")


# Checks ------------------------------------------------------------------------------------------


def changed(**values: Any) -> str:
    card = ModelCard(render(FACTS))
    for key, value in values.items():
        card.data[key] = value
    return str(card)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# no metadata\n", "no YAML metadata"),
        ("---\n: [\n---\n", "no YAML metadata"),
        (changed(library_name="keras"), "library_name 'keras' instead of 'sentence-transformers'"),
        (changed(pipeline_tag="text-generation"), "pipeline_tag 'text-generation'"),
        (changed(tags=["x"]), "tags without sentence-transformers, embedfilter"),
        (changed(language=["english"]), "language 'english', which is no ISO 639 code"),
        (changed(license=3), "license 3, which is no identifier"),
        (changed(license="other", license_name=None), "license 'other' without license_name"),
        (changed(base_model="a/b/c"), "base_model 'a/b/c', which is no Hub id"),
        (changed(base_model_relation="child"), "base_model_relation 'child'"),
        (render(FACTS) + "hf_" + "a" * 34, "a Hub token"),
        (
            re.sub(r"    dataset:\n(      .*\n)+", "", render(FACTS)),
            "metadata that huggingface_hub refuses",
        ),
    ],
)
def test_what_the_hub_would_refuse(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        check_card(text)


ROW = {
    "task": "STS12",
    "dataset": "STS 12",
    "split": "test",
    "metric": "ap",
    "dims": 8,
    "score": 0.5,
    "configuration": "bulk",
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "results.jsonl line 2: must be JSON"),
        ("[]", "results.jsonl line 2: must be a JSON object"),
        (json.dumps(ROW)[:-1] + ', "task": "other"}', "must be JSON, got the name 'task' twice"),
        (json.dumps({**ROW, "task": "a\ud800"}), "must be JSON, got half a surrogate pair"),
        (json.dumps({**ROW, "dims": "8"}), "line 2: a result needs a valid 'dims', got '8'"),
        (json.dumps({**ROW, "dims": True}), "line 2: a result needs a valid 'dims', got True"),
        (json.dumps({**ROW, "delta": "x"}), "line 2: a result needs a valid 'delta', got 'x'"),
        (json.dumps({**ROW, "score": 54.6}), "a score must be in [-1, 1], got 54.6"),
        (json.dumps({**ROW, "score": float("nan")}), "must be JSON, got the constant NaN"),
        (json.dumps(dict(list(ROW.items())[1:])), "a result needs a valid 'task', got None"),
    ],
)
def test_malformed_results_name_their_line(line: str, message: str) -> None:
    good = json.dumps({**ROW, "units": 7, "delta": None})
    assert rows_of(f"{good}\n\n")[0].score == 0.5
    with pytest.raises(FormatError, match=re.escape(message)):
        rows_of(f"{good}\n{line}\n")


# The command -------------------------------------------------------------------------------------


def test_rendering_again_takes_up_results_and_keeps_the_licence(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    folder, _ = make_lm()
    (folder / "README.md").write_text(BASE)
    saved = st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(folder, device="cpu"), tmp_path / "saved"
    )
    before = (saved / "README.md").read_bytes()
    assert write_card(saved).read_bytes() == before
    (saved / "results.jsonl").write_text(json.dumps({**ROW, "score": 0.4321}) + "\n")
    code, output = cli("card", saved, "--repo-id", "me/filtered")
    assert (code, output.startswith("Wrote ")) == (0, True)
    text = (saved / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer("me/filtered")' in text
    assert "| bulk | 8 | 43.21 |" in text
    assert ModelCard(text).data.license_name == "some-licence"
    assert not list(saved.glob(".*"))


def test_rendering_the_form_that_sentence_transformers_saves(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu", pooling="lasttoken")
    model.save_pretrained(str(tmp_path / "theirs"))
    text = write_card(tmp_path / "theirs").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in text
    assert "needs the package `st-embfilter`" in text
    assert "| Pooling | `lasttoken` |" in text
    assert "32 to 16 dimensions" in text


@pytest.mark.parametrize("content", ["[", "{}", "[3]", '[{"type": "x"}]'])
def test_malformed_modules(saved_demo: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "embfilter.json").write_bytes((saved_demo / "embfilter.json").read_bytes())
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(FormatError, match=r"modules\.json"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_errors_leave_the_card_as_it_is(saved_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(saved_demo)
    for folder in (DEMO_LM, tmp_path):  # a model without a filter, and a folder above one with it
        before = sorted(folder.rglob("*"))
        code, output = cli("card", folder)
        assert code == 1
        assert "must hold embfilter.json" in output
        assert sorted(folder.rglob("*")) == before
    results = saved_demo / "results.jsonl"
    card = (saved_demo / "README.md").read_bytes()
    secret = {**ROW, "dataset": "hf_" + "x" * 34}
    try:
        for line, message in (("{", "line 1: must be JSON"), (json.dumps(secret), "a Hub token")):
            results.write_text(line)
            code, output = cli("card", saved_demo)
            assert code == 1
            assert message in output
            assert "xxxxxx" not in output
    finally:
        results.unlink()
    assert (saved_demo / "README.md").read_bytes() == card


BUILDS = [
    {},
    {"keep": 7, "band": "offset:3", "normalize": True},
    {"band": "random:5", "pooling": "lasttoken", "max_seq_length": 40},
    {"calibrate": "generic", "calibration_size": 40, "calibration_strength": 0.5},
    {"calibrate": "self", "calibration_size": 48, "calibration_seed": 3},
    {"calibrate": "self", "calibration_size": 32, "calibration_strength": 0.5},
    {"prompt": 'In a\nword ``` "{text}" is "', "keep": 0.25},
    {"prompt": "prompteol", "pooling": "mean", "prompt_encoding": "exact"},
    {"prompt": "echo", "normalize": True},
    {"prompt": "metaeol"},
    {"norm": "folded", "layers": 1},
    {"layers": 0, "token_weights": "zipf"},
    {"layers": 0, "dtype": "float32", "normalize": True},
    {"dtype": "bfloat16"},
]

#: Options of `build` that a card's command need not have: where and how it is built, what the
#: package refuses to guess, and another thing altogether.
OTHER_OPTIONS = {"--device", "--quiet", "--overwrite", "--trust-remote-code", "--masked-lm"}
OTHER_OPTIONS |= {"--filter-only"}


def test_every_option_that_changes_a_model_is_in_the_command_of_its_card() -> None:
    stated = set(re.findall(r'"(--[a-z-]+)"', inspect.getsource(_build_command)))
    command = typer.main.get_command(app).commands["build"]  # type: ignore[attr-defined]
    options = {p.opts[0] for p in command.params if p.opts[0].startswith("--")}
    assert stated == options - OTHER_OPTIONS - {"--help"}


@pytest.mark.parametrize("arguments", BUILDS, ids=range(len(BUILDS)))
def test_the_command_of_the_card_builds_the_same_bytes(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False, **arguments)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    text = (saved / "README.md").read_text()
    command = text.split("Build it again")[1].split("shell\n", 1)[1].split("\n```", 1)[0]
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["st-embfilter", "build", folder.name]
    output = words[words.index("--output") + 1]
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["build", str(folder), *words[3:], "--quiet"])
    assert run.exit_code == 0, run.output
    assert tree(tmp_path / output) == tree(saved)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_names_of_strangers_cannot_break_the_card(tmp_path: Path) -> None:
    evil = "x\n\n# Owned\n<img src=x onerror=alert(1)>|a|`b`\x1b[2J"
    facts = CardFacts(
        evil, 8, 4, "bulk", 2, 0.5, on_hub=False, tensor=evil, sha256="0" * 64, revision=evil
    )
    row = {**ROW, "dataset": evil, "split": evil, "metric": evil, "command": f"a '{evil}'\n```"}
    text = render(replace(facts, results=rows_of(json.dumps(row))))
    body = text.split("---\n", 2)[2]
    assert "\n# Owned" not in body
    assert "\x1b" not in body
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<img", outside)
    tables = [line for line in body.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert widths <= {3, 4, 5}, tables


@pytest.mark.parametrize("value", ["[" * 20_000, "2026-13-45", "!!int x", "*a", "{"])
def test_metadata_that_no_parser_reads_are_none(value: str) -> None:
    """It recurses, converts and resolves, and each of these fails with an error of its own."""
    assert front_matter(f"---\nlicense: {value}\n---\nA card.\n") == {}
    assert front_matter("---\nlicense: mit\n---\nA card.\n") == {"license": "mit"}
