"""Publishing to a Hub over real HTTP: one commit or nothing; filters alone; the whole way."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import st_embfilter
from st_embfilter import EmbedFilterLayer, build_filter
from st_embfilter.cli.app import app
from st_embfilter.errors import FormatError, HubError, ProvenanceError, ShapeError
from st_embfilter.saved import folder as publish
from st_embfilter.saved import push as pushing
from st_embfilter.saved.push import push_folder, push_to_hub, validate_folder
from tests.conftest import DEMO_LM, TEXTS, MakeLM, contents, same
from tests.hub_server import TOKEN, LocalHub

# huggingface_hub's own upload of a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def model(make_lm: MakeLM) -> SentenceTransformer:
    folder, _ = make_lm(tie_word_embeddings=False)
    return st_embfilter.from_causal_lm(folder, device="cpu", normalize=True)


def pushed(hub: LocalHub, repo: str = "me/model") -> dict[str, bytes]:
    return {name: data for name, data in hub.repos[repo].files.items() if name != ".gitattributes"}


# Models ------------------------------------------------------------------------------------------


def test_push_is_the_portable_folder_in_one_commit(
    hub: LocalHub, model: SentenceTransformer, tmp_path: Path
) -> None:
    done = push_to_hub(model, "me/model", token=TOKEN)
    _, commit = hub.repos["me/model"].commits
    assert (done.oid, done.repo_url.repo_id) == (commit.sha, "me/model")
    assert done.commit_url == f"{hub.url}/me/model/commit/{commit.sha}"
    assert not hub.repos["me/model"].private
    saved = contents(st_embfilter.save_pretrained(model, tmp_path / "saved"))
    readme = saved.pop("README.md")
    files = pushed(hub)
    assert files.pop("README.md") != readme
    assert files == saved
    assert 'SentenceTransformer("me/model")' in hub.repos["me/model"].files["README.md"].decode()
    again = SentenceTransformer("me/model", device="cpu")
    assert same(again.encode(TEXTS), model.encode(TEXTS))
    assert [type(module).__name__ for module in again][2] == "Dense"
    live = st_embfilter.load("me/model", device="cpu")
    assert isinstance(live[2], EmbedFilterLayer)


def test_pushing_again(hub: LocalHub, model: SentenceTransformer) -> None:
    push_to_hub(model, "me/model", token=TOKEN)
    repo = hub.repos["me/model"]
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    kept = {"results.json": b"{}", "images/plot.png": b"png"}
    repo.commit("main", {**repo.files, **stale, **kept}, "by hand")
    del model._modules["3"]  # no Normalize
    push_to_hub(model, "me/model", token=TOKEN, commit_message="Without Normalize")
    assert repo.commits[-1].message == "Without Normalize"
    assert len(repo.commits) == 4
    assert set(kept) <= set(repo.files)
    assert not set(stale) & set(repo.files)
    assert not any(name.startswith("3_") for name in repo.files)
    again = SentenceTransformer("me/model", device="cpu")
    assert same(again.encode(["the light"]), model.encode(["the light"]))


def test_where_to_push(hub: LocalHub, model: SentenceTransformer) -> None:
    push_to_hub(model, "me/model", private=True, revision="half", token=TOKEN)
    repo = hub.repos["me/model"]
    assert repo.private
    assert set(repo.branches) == {"main", "half"}
    assert set(repo.files) == {".gitattributes"}
    request = push_to_hub(model, "me/model", create_pr=True, token=TOKEN)
    assert request.pr_url == f"{hub.url}/me/model/discussions/1"
    assert set(repo.files) == {".gitattributes"}
    assert "modules.json" in repo.branches["refs/pr/1"].files


def test_nothing_is_uploaded_that_fails_validation(
    hub: LocalHub, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "render", lambda *_, **__: "no metadata")
    with pytest.raises(FormatError, match="a model card must be valid, got: no YAML metadata"):
        push_to_hub(model, "me/model", token=TOKEN)
    monkeypatch.undo()
    del model._modules["1"]
    with pytest.raises(FormatError, match="a portable folder holds Transformer > Pooling"):
        push_to_hub(model, "me/model", token=TOKEN)
    assert not hub.requests
    assert not hub.repos


def test_what_the_hub_says_about_a_card_is_passed_on(
    hub: LocalHub, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "check_card", lambda *_: None)
    monkeypatch.setattr(publish, "render", lambda *_, **__: "---\nlicense: mine\n---\n")
    with pytest.raises(HubError, match=r'Invalid metadata in README.md. - "license" is unknown'):
        push_to_hub(model, "me/model", token=TOKEN)
    assert set(hub.repos["me/model"].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("kind", "path", "method", "message"),
    [
        ("500", "repos/create", "POST", "must answer for me/model, got 500"),
        ("403", "repos/create", "POST", "needs a token with the right to do this, got 403"),
        ("500", "preupload", "POST", "must answer for me/model, got 500"),
        ("500", "objects/batch", "POST", "must answer for me/model, got 500"),
        ("500", "/lfs/", "PUT", "must answer for me/model, got 500"),
        ("403", "/lfs/", "PUT", "got 403"),
        ("cut", "/lfs/", "PUT", None),  # only its answer is cut, which is empty
        ("500", "/commit/", "POST", "must answer for me/model, got 500"),
        ("404", "/commit/", "POST", "got 404"),
        ("cut", "/commit/", "POST", "must be reachable to read or write me/model, got Rem"),
    ],
)
def test_a_failed_push_is_no_partial_repository(
    hub: LocalHub,
    waits: list[float],
    model: SentenceTransformer,
    kind: str,
    path: str,
    method: str,
    message: str | None,
) -> None:
    hub.fail(kind, path, method=method)
    if message is not None:
        with pytest.raises(HubError, match=message) as caught:
            push_to_hub(model, "me/model", token=TOKEN)
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)
    hub.faults.clear()
    partial = hub.repos.get("me/model")
    complete = kind == "cut" and path == "/commit/"  # the answer was lost, not the commit
    assert partial is None or complete or set(partial.files) == {".gitattributes"}
    push_to_hub(model, "me/model", token=TOKEN)
    assert "modules.json" in hub.repos["me/model"].files


def test_passing_faults_of_an_upload(
    hub: LocalHub, waits: list[float], model: SentenceTransformer
) -> None:
    hub.fail("500", "/lfs/", method="PUT", times=2)
    hub.fail("503", "objects/batch", method="POST", times=1)
    push_to_hub(model, "me/model", token=TOKEN)
    assert "modules.json" in hub.repos["me/model"].files


def test_the_licence_of_a_private_base_model(hub: LocalHub, tmp_path: Path) -> None:
    hub.add("org/lm", DEMO_LM, private=True)
    model = st_embfilter.from_causal_lm("org/lm", device="cpu", token=TOKEN)
    st_embfilter.save_pretrained(model, tmp_path / "saved", token=TOKEN)
    push_to_hub(model, "me/model", token=TOKEN)
    for card in (tmp_path / "saved" / "README.md").read_bytes(), pushed(hub)["README.md"]:
        assert b"\nlicense: cc-by-4.0\n" in card


def test_without_a_token(hub: LocalHub, model: SentenceTransformer) -> None:
    with pytest.raises(HubError, match="needs a valid token or does not exist, got 401; log in"):
        push_to_hub(model, "me/model")
    with pytest.raises(HubError, match="needs a token, got none; log in with"):
        push_to_hub(model, "me/model", token=True)
    with pytest.raises(HubError, match="must be named like 'org/name', got 'a/b/c'"):
        push_to_hub(model, "a/b/c", token=TOKEN)
    assert not hub.repos


def test_the_push_of_sentence_transformers_works_too(
    hub: LocalHub, model: SentenceTransformer
) -> None:
    model.push_to_hub("me/model", token=TOKEN)
    assert "2_EmbedFilterLayer/embfilter.json" in hub.repos["me/model"].files
    again = SentenceTransformer("me/model", device="cpu", trust_remote_code=True)
    assert isinstance(again[2], EmbedFilterLayer)
    assert same(again.encode(TEXTS), model.encode(TEXTS))
    alone = EmbedFilterLayer.from_pretrained("me/model")
    assert torch.equal(alone.projection, model[2].projection)


# Validation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "modules.json",
        "config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "embfilter.json",
        "README.md",
        "model.safetensors",
        "tokenizer.json",
    ],
)
def test_every_missing_file_is_noticed(saved_demo: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(saved_demo, tmp_path / "copy"))
    validate_folder(folder)
    (folder / file).unlink()
    with pytest.raises((FormatError, ValueError), match="must hold"):
        validate_folder(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
def test_truncated_weights_are_noticed(saved_demo: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(saved_demo, tmp_path / "copy"))
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-100])
    with pytest.raises(FormatError, match=r"model.safetensors must be a (whole )?safetensors file"):
        validate_folder(folder)


def test_a_missing_shard_is_noticed(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm(shards="20KB")
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    validate_folder(saved)
    next(saved.glob("model-00002-*")).unlink()
    with pytest.raises(FormatError, match="names the shard model-00002-of-"):
        validate_folder(saved)


def test_an_edited_card_is_pushed_as_it_is(hub: LocalHub, saved_demo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_demo, tmp_path / "copy"))
    push_folder(folder, "me/plain", token=TOKEN)
    card = (folder / "README.md").read_text()
    assert "me/plain" in hub.repos["me/plain"].files["README.md"].decode()
    assert (folder / "README.md").read_text() == card
    (folder / "README.md").write_text(f"{card}\nEdited.\n")
    push_folder(folder, "me/edited", token=TOKEN)
    assert hub.repos["me/edited"].files["README.md"].decode() == f"{card}\nEdited.\n"


# Filters alone -----------------------------------------------------------------------------------


def test_a_filter_alone_makes_the_round_trip(hub: LocalHub, tmp_path: Path) -> None:
    layer = build_filter(DEMO_LM, show_progress_bar=False)
    folder = layer.save_pretrained(tmp_path / "filter")
    assert sum(map(len, contents(folder).values())) < 200_000
    layer.push_to_hub("me/filter", token=TOKEN)
    assert len(hub.repos["me/filter"].commits) == 2
    push_folder(folder, "me/folder", token=TOKEN)
    readme = hub.repos["me/filter"].files["README.md"].decode()
    assert layer.metadata.provenance.sha256 in readme
    assert '"me/filter")' in readme
    for name in (folder, "me/filter", "me/folder"):
        again = EmbedFilterLayer.from_pretrained(name)
        assert torch.equal(again.projection, layer.projection)
        assert torch.equal(again.singular_values, layer.singular_values)
        assert again.metadata == layer.metadata


def test_a_filter_of_a_model_on_the_hub_needs_no_backbone(hub: LocalHub, saved_demo: Path) -> None:
    hub.add("me/model", saved_demo)
    layer = EmbedFilterLayer.from_pretrained("me/model")
    assert layer.out_features == 128
    assert hub.sent() < 200_000


def test_stacking_on_the_model_it_was_made_from(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm(tie_word_embeddings=False, dtype=torch.bfloat16)
    expected = st_embfilter.from_causal_lm(folder, device="cpu")
    filter_folder = build_filter(folder, show_progress_bar=False).save_pretrained(tmp_path / "f")
    plain = SentenceTransformer(modules=list(expected)[:2], device="cpu")
    assert st_embfilter.add_filter(plain, filter_folder) is plain
    assert same(plain.encode(TEXTS), expected.encode(TEXTS))
    # A copy in memory, in a wider dtype, is the same matrix.
    wide = SentenceTransformer(modules=list(expected)[:2], device="cpu")
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    st_embfilter.add_filter(wide, filter_folder, unembedding=live)


def test_stacking_on_another_model_names_both_hashes(make_lm: MakeLM, tmp_path: Path) -> None:
    first, _ = make_lm(name="first", seed=1)
    second, _ = make_lm(name="second", seed=2)
    wider, _ = make_lm(name="wider", hidden_size=64)
    layer = build_filter(first, show_progress_bar=False)
    model = st_embfilter.from_causal_lm(second, device="cpu")
    theirs = model[2].metadata.provenance.sha256
    del model._modules["2"]
    with pytest.raises(ProvenanceError, match="build one for this model with add_filter") as caught:
        st_embfilter.add_filter(model, layer)
    for part in (layer.metadata.provenance.sha256, theirs, "first", "second"):
        assert part in str(caught.value)
    assert len(list(model)) == 2
    other = st_embfilter.from_causal_lm(wider, device="cpu")
    del other._modules["2"]
    with pytest.raises(ShapeError, match="got 64 for the embedding and 32"):
        st_embfilter.add_filter(other, layer)


def test_stacking_on_a_model_from_the_hub(hub: LocalHub, make_lm: MakeLM) -> None:
    folder, _ = make_lm(tie_word_embeddings=False)
    hub.add("org/lm", folder)
    build_filter("org/lm", show_progress_bar=False).push_to_hub("me/filter", token=TOKEN)
    expected = st_embfilter.from_causal_lm("org/lm", device="cpu", show_progress_bar=False)
    plain = SentenceTransformer(modules=list(expected)[:2], device="cpu")
    before = len(hub.requests)
    st_embfilter.add_filter(plain, "me/filter")
    assert same(plain.encode(TEXTS), expected.encode(TEXTS))
    assert not [
        r for r in hub.requests[before:] if re.search("file=model.*", r.path) and r.sent > 9000
    ]


def test_no_filter_there(hub: LocalHub, tmp_path: Path) -> None:
    hub.add("org/lm", DEMO_LM)
    with pytest.raises(FormatError, match=r"must hold embfilter.json and .* none in org/lm"):
        EmbedFilterLayer.from_pretrained("org/lm")
    with pytest.raises(HubError, match="org/none must be a model folder or a Hub repository"):
        EmbedFilterLayer.from_pretrained("org/none")
    with pytest.raises(FormatError, match="got none in "):
        EmbedFilterLayer.from_pretrained(tmp_path)


# The command line --------------------------------------------------------------------------------


def cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, (HubError, FormatError))
    return re.sub(r"\s+", " ", f"{result.exit_code} {result.output}")


def test_push_command(
    hub: LocalHub, saved_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "1 Error: me/x needs a valid token" in cli("push", saved_demo, "me/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = cli("push", saved_demo, "me/x", "--message", "First", "--private", "-q")
    assert done.startswith(f"0 Pushed to {hub.url}/me/x/commit/")
    assert hub.repos["me/x"].commits[-1].message == "First"
    assert hub.repos["me/x"].private
    assert "discussions/1" in cli("push", saved_demo, "me/x", "--create-pr", "-q")
    assert "1 Error: a folder to publish must hold" in cli("push", tmp_path, "me/y")
    assert "me/y" not in hub.repos


def test_build_filter_only(hub: LocalHub, tmp_path: Path) -> None:
    hub.add("org/lm", DEMO_LM)
    target = tmp_path / "filter"
    done = cli("build", "org/lm", "--filter-only", "--keep", "64", "-o", target)
    assert "0 bulk band, 64 of 256 dimensions, directions 96 to 159 Saved the filter to" in done
    assert EmbedFilterLayer.from_pretrained(target).out_features == 64
    assert hub.sent() < 4_400_000  # of 13.5 MB
    assert "org/lm at " in cli("inspect", target)
    assert "must be missing or empty" in cli("build", "org/lm", "--filter-only", "-o", target)
    cli("build", "org/lm", "--filter-only", "--keep", "32", "-o", target, "--overwrite")
    assert EmbedFilterLayer.from_pretrained(target).out_features == 32
    wrong = cli("build", "org/lm", "--filter-only", "--normalize", "-o", tmp_path / "x")
    assert "--normalize must come without --filter-only" in wrong.replace("│", "")
    hub.fail("500", "/lfs/", skip=2)
    hub.repos["org/lm"].private = True
    assert cli("build", "org/lm", "--filter-only", "-o", tmp_path / "x").startswith("1 Error: org/")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))


# The whole way -----------------------------------------------------------------------------------


def run(hub: LocalHub, home: Path, code: str) -> str:
    """Runs code in a process that knows the local Hub and has an empty cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "debug",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home.parent,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_the_whole_way(hub: LocalHub, tmp_path: Path) -> None:
    """Build, push, and load elsewhere without this package: two processes with empty caches."""
    hub.add("org/lm", DEMO_LM, private=True)
    stored = 8192 * 256 * 2
    with (DEMO_LM / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    ours = run(
        hub,
        tmp_path / "home",
        f"""
        import json, os
        from huggingface_hub import get_session
        import st_embfilter
        from st_embfilter.cli import app
        app(["build", "org/lm", "--filter-only", "-o", "filter"], standalone_mode=False)
        get_session().get(os.environ["HF_ENDPOINT"] + "/built")
        model = st_embfilter.from_causal_lm("org/lm", device="cpu")
        st_embfilter.push_to_hub(model, "me/model", private=True)
        print(json.dumps(model.encode({TEXTS!r}).tolist()))
        """,
    ).splitlines()[-1]
    built = [request.path for request in hub.requests].index("/built")
    assert sum(request.sent for request in hub.requests[:built]) <= 1.02 * stored + header
    assert EmbedFilterLayer.from_pretrained(tmp_path / "filter").out_features == 128
    theirs = run(
        hub,
        tmp_path / "elsewhere",
        f"""
        import json, sys
        sys.modules["st_embfilter"] = None  # an import of it would fail
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer("me/model", device="cpu")
        print(json.dumps(model.encode({TEXTS!r}).tolist()))
        """,
    )
    assert same(np.array(json.loads(ours)), np.array(json.loads(theirs)))
    assert np.array(json.loads(theirs)).shape == (len(TEXTS), 128)
    files = hub.repos["me/model"].files
    for name in ("model.safetensors", "tokenizer.json"):
        assert files[name] == (DEMO_LM / name).read_bytes()
    base = json.loads((DEMO_LM / "config.json").read_text(encoding="utf-8"))
    assert json.loads(files["config.json"]) == {**base, "is_matryoshka": True}
    assert {request.token for request in hub.requests if not request.at_hub} == {None}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, data in pushed(hub).items() if TOKEN.encode() in data]
