"""One answer to whether a model is filtered: in every form, in folders and on the Hub."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.errors import FormatError, PromptError
from st_embfilter.evaluation.sweep import raw_model
from st_embfilter.lens.report import open_model
from st_embfilter.model.find import find_filter
from st_embfilter.model.layer import filter_of
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.source import Source
from tests.conftest import TEXTS, MakeLM, same
from tests.hub_server import TOKEN, LocalHub


@pytest.fixture
def forms(make_lm: MakeLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> dict[str, Path]:
    """The same filter in every form, beside its language model and one without a filter."""
    folder, _ = make_lm(tie_word_embeddings=True)  # sentence-transformers saves no head
    model = st_embfilter.from_causal_lm(
        folder,
        prompt="prompteol",
        keep=0.25,
        normalize=True,
        max_seq_length=40,
        device="cpu",
        show_progress_bar=False,
    )
    portable = st_embfilter.save_pretrained(model, tmp_path / "portable")
    with caplog.at_level("WARNING", "st_embfilter"):
        model.save_pretrained(str(tmp_path / "package"))
    [line] = [r.getMessage() for r in caplog.records if r.name == "st_embfilter.model.layer"]
    assert "st_embfilter.save_pretrained(model, path) writes the form that loads everywhere" in line
    alone = filter_of(model).save_pretrained(tmp_path / "alone")
    return {"lm": folder, "portable": portable, "package": tmp_path / "package", "alone": alone}


@pytest.mark.parametrize("on_hub", [False, True])
def test_every_form(forms: dict[str, Path], hub: LocalHub, on_hub: bool) -> None:
    for form, folder in forms.items():
        hub.add(f"org/{form}", folder, private=True)
        source = Source(f"org/{form}", token=TOKEN) if on_hub else Source(str(folder))
        found = find_filter(source)
        assert (found and found.form) == (None if form == "lm" else form)
        if found is not None:
            assert found.metadata.k == 8
            assert source.files.path(f"{found.weights_folder}model.safetensors") is not None


def test_a_revision_is_asked(forms: dict[str, Path], hub: LocalHub) -> None:
    first = hub.add("org/model", forms["lm"])
    hub.add("org/model", forms["portable"])
    assert find_filter(Source("org/model", first)) is None
    assert find_filter(Source("org/model")) is not None


def test_malformed_metadata_is_no_answer(forms: dict[str, Path]) -> None:
    (forms["portable"] / "embfilter.json").write_text("{")
    with pytest.raises(FormatError, match="must be JSON"):
        find_filter(Source(str(forms["portable"])))


@pytest.mark.parametrize("form", ["portable", "package"])
def test_a_filtered_model_on_the_hub_is_measured_as_itself(
    forms: dict[str, Path], hub: LocalHub, form: str
) -> None:
    hub.add("org/model", forms[form], private=True)
    trust = {"trust_remote_code": form == "package", "device": "cpu"}
    local = raw_model(forms[form], **trust)
    remote = raw_model("org/model", token=TOKEN, **trust)
    assert (remote.prompt, remote.pooling, remote.normalize) == ("prompteol", "lasttoken", True)
    assert remote.model.max_seq_length == local.model.max_seq_length == 40
    assert remote.layer is not None
    assert remote.name == "org/model"
    texts = [text for text in TEXTS if text]
    assert same(remote.model.encode(texts), local.model.encode(texts))
    expected = st_embfilter.from_causal_lm(forms["lm"], prompt="prompteol", keep=1.0, device="cpu")
    raw = expected[1](expected[0](expected.preprocess(["the light"])))["sentence_embedding"]
    assert same(remote.model.encode(["the light"]), raw.detach().numpy())


@pytest.mark.parametrize("form", ["portable", "package"])
@pytest.mark.parametrize("on_hub", [False, True])
def test_a_prompt_is_not_put_in_twice(
    forms: dict[str, Path], hub: LocalHub, form: str, on_hub: bool
) -> None:
    hub.add("org/model", forms[form])
    name = "org/model" if on_hub else forms[form]
    with pytest.raises(PromptError, match="got a filtered model with a prompt"):
        st_embfilter.from_causal_lm(name, device="cpu", show_progress_bar=False)


def test_the_lens_and_verify_read_a_filtered_model_on_the_hub(
    forms: dict[str, Path], hub: LocalHub
) -> None:
    commit = hub.add("org/model", forms["portable"], private=True)
    hub.add("org/model", {"README.md": b"gone"})
    opened, unembedding = open_model("org/model", revision=commit, token=TOKEN, device="cpu")
    assert filter_of(opened).metadata.k == 8
    assert unembedding.d == 32
    found = verify("org/model", revision=commit, token=TOKEN, rebuild=True)
    assert {check.passed for check in found} == {True}
    found = verify("org/model", token=TOKEN)
    assert [(check.name, check.passed) for check in found] == [("files", False)]
    loaded = st_embfilter.load("org/model", revision=commit, token=TOKEN, device="cpu")
    assert loaded[2].out_features == 8


@pytest.mark.parametrize("pinned", [False, True])
def test_commands_read_a_filtered_model_on_the_hub(
    forms: dict[str, Path],
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pinned: bool,
) -> None:
    commit = hub.add("org/model", forms["portable"], private=pinned)
    revision = []
    if pinned:  # the filter is in no branch any more, and asks for a token
        hub.add("org/model", forms["lm"])
        revision = ["--revision", commit]
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pairs = tmp_path / "pairs.csv"
    rows = [f"the light w{i},a cup of w{i * i % 97},{i}" for i in range(40)]
    pairs.write_text("\n".join(["sentence1,sentence2,score", *rows]))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the light of w{i}" for i in range(120)))
    out = tmp_path / "rows.jsonl"
    for arguments, said in (
        (["inspect", "org/model"], "8 of 32 dimensions"),
        (["verify", "org/model", "--rebuild"], "unembedding"),
        (["lens", "org/model", "the light"], "8 of 32 dimensions"),
        (["eval", "org/model", "--sts", pairs, "-o", out, "--no-cache", "--quiet"], "bulk"),
        (["bench", "org/model", "--texts", texts, "--no-hnsw", "--quiet"], "recall@10"),
        (["encode", "org/model", texts, "-o", tmp_path / "vectors", "--quiet"], "120 vectors"),
    ):
        run = CliRunner().invoke(app, [str(argument) for argument in [*arguments, *revision]])
        assert run.exit_code == 0, run.output
        assert said in run.output
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["prompt"], row["pooling"], row["normalize"]) == ("prompteol", "lasttoken", True)
    again = ["build", "org/model", "-o", str(tmp_path / "again"), *revision]
    run = CliRunner().invoke(app, again)
    assert run.exit_code == 1
    assert "got a filtered model with a prompt" in " ".join(run.output.split())
