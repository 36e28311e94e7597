"""No file of a model folder is followed out of it, and no name in it can be prepared."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch

import st_embfilter
from st_embfilter.errors import EmbedFilterError, FormatError, LinkError, OutputError
from st_embfilter.files.staging import replace_file
from st_embfilter.saved import folder as saving
from st_embfilter.saved import push as pushing
from st_embfilter.saved.card import card_of_folder, write_card
from st_embfilter.saved.push import push_folder
from tests.conftest import MakeLM


@pytest.fixture
def copy(saved_demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_demo, tmp_path / "copy"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("mine")
    return file


@pytest.mark.parametrize(
    "name", [".README.md.tmp", "README.md.tmp", "results.jsonl.tmp", ".results.jsonl.tmp"]
)
def test_prepared_links_are_not_written_through(copy: Path, secret: Path, name: str) -> None:
    (copy / name).symlink_to(secret)
    write_card(copy)
    replace_file(copy / "results.jsonl", b"")
    assert secret.read_text() == "mine"
    assert not (copy / "README.md").is_symlink()


def test_a_linked_target_is_replaced_itself(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "file").symlink_to(secret)
    replace_file(tmp_path / "file", b"new")
    assert secret.read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "secret"]
    with pytest.raises(OutputError, match="cannot write"):
        replace_file(tmp_path / "file" / "below", b"")


def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    replace_file(tmp_path / "new", b"")
    modes = {os.stat(tmp_path / name).st_mode for name in ("usual", "new")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["lens.md", "README.md", "results.jsonl", "modules.json"])
def test_a_card_reads_no_link_out_of_the_folder(copy: Path, secret: Path, name: str) -> None:
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    with pytest.raises(LinkError, match="symbolic link"):
        card_of_folder(copy)


@pytest.mark.parametrize(
    "name", ["notes.txt", "LICENSE", "tokenizer.json", "README.md", "docs", "2_Dense/notes.txt"]
)
def test_a_push_uploads_no_link_out_of_the_folder(
    copy: Path, secret: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "upload", lambda *a, **k: pytest.fail("uploaded"))
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret.parent if name == "docs" else secret)
    with pytest.raises(LinkError, match=re.escape(name)):
        push_folder(copy, "org/name")


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "modeling_evil.py"])
def test_a_link_in_the_source_is_not_copied(
    make_lm: MakeLM, tmp_path: Path, secret: Path, name: str
) -> None:
    """Not even one that was put there after the model was loaded."""
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    (folder / name).symlink_to(secret)
    with pytest.raises(LinkError, match=re.escape(name)):
        st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_pipe_in_the_source_is_not_opened(make_lm: MakeLM, tmp_path: Path) -> None:
    """It would wait for a writer for ever, so there is one here, who waits for a reader."""
    folder, _ = make_lm()
    pipes = [folder / "z.safetensors", folder / "LICENSE"]
    writers = []
    for pipe in pipes:
        os.mkfifo(pipe)
        writers.append(Thread(target=pipe.write_bytes, args=(b"",), daemon=True))
        writers[-1].start()
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert all(writer.is_alive() for writer in writers)
    for pipe, writer in zip(pipes, writers, strict=True):
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
        writer.join()
    assert {path.name for path in saved.iterdir()}.isdisjoint({"z.safetensors", "LICENSE"})


def test_a_link_within_the_folder_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(pushing, "upload", lambda folder, repo, **options: seen.append(repo))
    (copy / "notes.txt").symlink_to("README.md")
    push_folder(copy, "org/name")
    assert seen == ["org/name"]


def adapted(model: object) -> None:
    vars(model[0].auto_model)["_hf_peft_config_loaded"] = True  # type: ignore[index]


def another_module(model: object) -> None:
    model.append(torch.nn.Identity())  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [adapted, another_module])
def test_what_cannot_be_saved_is_refused_before_the_network_is_asked(
    make_lm: MakeLM,
    tmp_path: Path,
    change: Callable[[object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    change(model)
    monkeypatch.setattr(saving, "base_card", lambda *a: pytest.fail("asked the network"))
    with pytest.raises(FormatError):
        st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_beside_a_left_over_index_are_those_that_transformers_reads(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    folder, _ = make_lm()
    before = st_embfilter.build_filter(folder, show_progress_bar=False)
    make = {"weight_map": {"model.embed_tokens.weight": "old.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(make))
    after = st_embfilter.build_filter(folder, show_progress_bar=False)
    assert after.metadata.provenance == before.metadata.provenance
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert not (saved / "model.safetensors.index.json").exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(EmbedFilterError):
        st_embfilter.build_filter(folder, show_progress_bar=False)
