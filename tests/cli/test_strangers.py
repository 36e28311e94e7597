"""Whatever stands in a stranger's files, a command ends with one sentence and 1 or 2."""

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import st_embfilter
from st_embfilter.cli.app import TRACEBACK, app, err
from st_embfilter.corpus.folder import Folder
from st_embfilter.errors import EmbedFilterError
from st_embfilter.text import reading
from tests.conftest import tiny_lm

DEEP = b"[" * 100_000
#: What breaks parsers, whatever the file.
NOISE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "no UTF-8": lambda data: b"\xff\xfe" + data,
    "deep": lambda data: DEEP,
    "deep inside": lambda data: b'{"a": ' + DEEP,
    "null": lambda data: b"null",
    "a list": lambda data: b"[1]",
    "a NUL": lambda data: data.replace(b"e", b"\0"),
    "surrogate": lambda data: b'{"_id": "\\ud800", "text": "\\udfff", "task": "\\ud800"}\n' + data,
    "huge": lambda data: re.sub(rb"\d+", b"1" + b"0" * 5000, data),
    "large": lambda data: re.sub(rb"\d+", b"1" + b"0" * 30, data),
    "negative": lambda data: re.sub(rb"\d+", b"-1", data),
    "superscript": lambda data: re.sub(rb"\d", "²".encode(), data),
    "strings": lambda data: re.sub(rb": *[^,\n}\[{]+", b': "load"', data),
    "lists": lambda data: re.sub(rb": *[^,\n}\[{]+", b": [1]", data),
    "nulls": lambda data: re.sub(rb": *[^,\n}\[{]+", b": null", data),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LM, a filtered model of it, and data of each kind."""
    place = tmp_path_factory.mktemp("place")
    tiny_lm(place / "lm")
    st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(place / "lm", keep=16, device="cpu", show_progress_bar=False),
        place / "saved",
    )
    texts = [f"w{i} w{i + 1} w{i + 3}" for i in range(14, 54)]
    (place / "pairs.csv").write_text("\n".join(f"{t},{u},1" for t, u in pairwise(texts)))
    (place / "pairs.csv.gz").write_bytes(gzip.compress((place / "pairs.csv").read_bytes()))
    (place / "texts.txt").write_text("\n".join(texts))
    (place / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    beir = place / "beir"
    (beir / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"{i}", "text": t}) for i, t in enumerate(texts)]
        (beir / f"{name}.jsonl").write_text("\n".join(rows))
    (beir / "qrels" / "test.tsv").write_text("\n".join(f"{i}\t{i}\t1" for i in range(20)))
    files = {"saved": place / "saved", "texts": place / "texts.txt", "vectors": place / "vectors"}
    finish = Folder.finish

    def kept(folder: Folder) -> None:  # as if killed before the last step
        shutil.copytree(folder.path, place / "unfinished")
        finish(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "finish", kept)
        assert cli(*(word.format(**files) for word in ENCODE)).exit_code == 0
    torch.manual_seed(0)
    return place


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "place"))


@pytest.fixture(autouse=True)
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that is no error of ours comes out as itself."""
    monkeypatch.setenv(TRACEBACK, "1")


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check(result: Result, *codes: int) -> str:
    assert result.exit_code in codes, (result.output, result.exc_info)
    if not isinstance(result.exception, SystemExit | None):
        raise AssertionError(f"{result.exception!r} is no error of ours") from result.exception
    assert "Traceback" not in result.output
    return re.sub(r"[\s│]+", " ", result.output)


#: Files of a place, and the commands that read them.
EVAL = ("eval", "{lm}", "--no-baselines", "--keep", "4", "--no-cache", "-q")
FOLDERS = ("lm", "saved", "beir", "vectors", "unfinished")
ENCODE = ("encode", "{saved}", "{texts}", "-o", "{vectors}", "--shard-rows", "16", "-q")
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairs.csv": ((*EVAL, "--sts", "{file}"),),
    "texts.txt": ((*EVAL, "--clustering", "{file}"), ("bench", "{lm}", "--texts", "{file}", "-q")),
    "corpus.jsonl": (
        ("lens", "{lm}", "--corpus", "{file}", "--column", "text", "-q"),
        ("encode", "{saved}", "{file}", "-o", "{out}", "--id", "text", "-q"),
    ),
    "vectors/_manifest.json": (ENCODE,),
    "unfinished/_journal.jsonl": ((*ENCODE[:4], "{unfinished}", *ENCODE[5:]),),
    "beir/corpus.jsonl": ((*EVAL, "--retrieval", "{beir}"),),
    "beir/queries.jsonl": (("bench", "{lm}", "--retrieval", "{beir}", "-q", "--no-hnsw"),),
    "pairs.csv.gz": ((*EVAL, "--sts", "{file}"),),
    "beir/qrels/test.tsv": ((*EVAL, "--retrieval", "{beir}"),),
    "lm/config.json": (("build", "{lm}", "-o", "{out}", "-q"),),
    "lm/tokenizer.json": (("build", "{lm}", "-o", "{out}", "-q"),),
    "lm/tokenizer_config.json": (("build", "{lm}", "-o", "{out}", "-q"),),
    "lm/generation_config.json": (
        ("build", "{lm}", "-o", "{out}", "-q", "--calibrate", "self", "--calibration-size", "16"),
    ),
    "lm/model.safetensors": (("build", "{lm}", "-o", "{out}", "-q"), ("lens", "{lm}", "w20", "-q")),
    **{
        f"saved/{name}": (
            ("inspect", "{saved}"),
            ("verify", "{saved}", "-q"),
            ("lens", "{saved}", "w20", "-q"),
            ("card", "{saved}"),
            ("bench", "{saved}", "--texts", "{texts}", "-q", "--no-hnsw"),
        )
        for name in (
            "embfilter.json",
            "modules.json",
            "sentence_bert_config.json",
            "config_sentence_transformers.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/embfilter_spectrum.safetensors",
            "README.md",
            "results.jsonl",
            "config.json",
            "tokenizer_config.json",
        )
    },
}


@pytest.mark.filterwarnings("ignore")  # other libraries warn before they fail
@pytest.mark.parametrize("name", READERS)
def test_noise_in_a_file(name: str, place: Path, copy: Path) -> None:
    """Each kind of noise, and bytes flipped at random places."""
    file = copy / name
    good = file.read_bytes() if file.exists() else b'{"task": "a", "score": 1}\n'
    rng = random.Random(name)
    paths = {"file": file, "out": copy / "out", "texts": place / "texts.txt"}
    paths |= {folder: copy / folder for folder in FOLDERS}
    folder = name.split("/", maxsplit=1)[0]
    written = folder if folder in ("vectors", "unfinished") else "out"
    kinds = rng.sample(sorted(NOISE), 5) if name.startswith(("saved/", "lm/")) else sorted(NOISE)
    failed = 0
    for kind in [*kinds, "flips", "flips"]:
        if kind == "flips":
            data = bytearray(good)
            for _ in range(min(3, len(data))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        else:
            data = bytearray(NOISE[kind](good))
        file.write_bytes(data)
        for command in READERS[name]:
            result = cli(*(word.format(**paths) for word in command))
            said = check(result, 0, 1, 2)
            failed += result.exit_code != 0
            assert result.exit_code == 0 or "rror" in said or "FAILED" in said, (kind, said)
            shutil.rmtree(copy / written, ignore_errors=True)
            if written != "out":
                shutil.copytree(place / written, copy / written)
    assert failed or name == "saved/README.md", "the noise was seen by none"


def test_a_run_that_was_interrupted_goes_on(place: Path, copy: Path) -> None:
    """What the noise above is put into is good."""
    paths = {"saved": copy / "saved", "texts": place / "texts.txt"}
    for folder in ("vectors", "unfinished"):
        command = (word.format(**paths, vectors=copy / folder) for word in ENCODE)
        assert "40 vectors" in check(cli(*command), 0)
    assert (copy / "unfinished" / "_manifest.json").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("build nope.gguf -o {out}", "a GGUF file must exist, got nope.gguf; check the path"),
        ("build {lm} -o {out} --device gpu", "must be a device that torch has here"),
        ("build {lm} -o {out} --device meta:x", "must be a device that torch has here"),
        ("build {lm} -o {out} --device cuda:99", "must be a device that torch has here"),
        ("eval {lm} --sts {pairs} --device gpu", "must be a device that torch has here"),
        ("bench {lm} --texts {pairs} --device cuda:99", "must be a device that torch has here"),
        ("build {lm} -o {out} --band random:99999999999999999999", r"seed must be in \[0, 2\*\*63"),
        ("build {lm} -o {out} --band optimal", "lens MODEL --band optimal"),
        ("build {lm} -o {out} --band offset:" + "9" * 5000, "band must look like"),
        ("build {lm} -o {out} --keep " + "9" * 5000, "keep must be a ratio like"),
        ("build {lm} -o {out} --keep 1" + "0" * 400 + "/1", "keep must be a ratio like"),
        ("eval {lm} --sts {pairs} -o {lm}", "the output must be a file, got the folder"),
        ("eval {lm} --sts {pairs} --figure {lm}", "the output must be a file, got the folder"),
        ("eval {lm} --sts {pairs} -o {pairs}/rows.jsonl", "cannot write"),
        ("eval {lm} --sts {pairs} --cache {pairs}", "cannot write"),
        ("eval {lm} --sts {pairs} --cache {long}", "cannot write"),
        ("eval {lm} --sts {pairs} -o {long}", "cannot write"),
        ("eval {lm} --sts {long}.csv", "must (be readable|exist)"),
        ("eval {lm} --retrieval {long}", "must hold"),
        ("eval {lm} --classification {long}", "must"),
        ("eval {lm} --clustering {long}.txt", "must"),
        ("eval {long} --sts {pairs}", "must exist"),
        ("build {long} -o {out}", "must exist"),
        ("build {long}.gguf -o {out}", "must exist"),
        ("build {lm} -o {long}", "cannot write"),
        ("inspect {long}", ""),
        ("verify {long}", "FAILED"),
        ("card {long}", ""),
        ("lens {long} w20", "must exist"),
        ("lens {lm} w20 --corpus {long}.txt", ""),
        ("encode {saved} {long}.txt -o {out}", "inputs must"),
        ("encode {saved} {texts} -o {long}", "cannot|must"),
        ("apply {saved} {long}.npy -o {out}", ""),
        ("export {saved} --baked {long}", "cannot write|folded"),
        ("export {long}.gguf --gguf {out}", ""),
        ("bench {lm} --texts {long}", "must (be readable|exist)"),
    ],
)
def test_what_a_user_can_get_wrong(place: Path, tmp_path: Path, command: str, says: str) -> None:
    paths = {"lm": place / "lm", "pairs": place / "pairs.csv", "out": tmp_path / "out"}
    paths |= {"saved": place / "saved", "texts": place / "texts.txt", "long": Path("x" * 300)}
    said = check(cli(*(word.format(**paths) for word in command.split())), 1, 2)
    assert re.search(says, said), said
    assert len(said) < 1000
    assert not (tmp_path / "out").exists()


def test_a_home_that_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = check(cli("eval", place / "lm", "--sts", place / "pairs.csv"), 1)
    assert "cannot write" in said


def test_the_boundary_keeps_our_errors_and_replaces_all_others() -> None:
    class OwnError(EmbedFilterError):
        pass

    with pytest.raises(OwnError, match=r"^mine$"), reading("a file"):
        raise OwnError("mine")
    for error in (KeyError("k"), MemoryError(), RecursionError("deep"), OSError(5, "a\x1bb")):
        with (
            pytest.raises(OwnError, match=r"^the file must be good, got ") as caught,
            reading("the file", OwnError, "be good"),
        ):
            raise error
        assert caught.value.__cause__ is error
        assert str(caught.value).isprintable()


def test_an_unforeseen_failure_is_one_sentence(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK)
    monkeypatch.setattr("st_embfilter.saved.card.write_card", lambda *_, **__: 1 / 0)
    said = check(cli("card", copy / "saved"), 1)
    assert "Error: ZeroDivisionError: division by zero; set ST_EMBFILTER_TRACEBACK=1" in said


HOSTILE = "\x1b[2J\x9b31m\u202e\a"


def test_a_strangers_text_does_not_steer_the_terminal(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of documents and names of tensors, in errors and in tables."""
    (copy / "beir" / "qrels" / "test.tsv").write_text(f"0\t{HOSTILE}\t1\n")
    shown = [
        cli(
            *(
                w.format(lm=copy / "lm", beir=copy / "beir")
                for w in (*EVAL, "--retrieval", "{beir}")
            )
        )
    ]
    metadata = json.loads((copy / "saved" / "embfilter.json").read_text())
    metadata["unembedding"]["tensor"] = HOSTILE
    metadata["base_model"]["id"] = f"org/{HOSTILE}"
    (copy / "saved" / "embfilter.json").write_text(json.dumps(metadata))
    shown += [cli(command, copy / "saved") for command in ("inspect", "verify")]
    (copy / "lm" / "model.safetensors").unlink()
    save_file({HOSTILE: torch.ones(2, 2)}, copy / "lm" / "model.safetensors")
    shown += [cli("build", copy / "lm", "-o", copy / "out")]
    err.print(HOSTILE)
    for output in (*(result.output for result in shown), capsys.readouterr().err):
        assert not set(output) & {"\x1b", "\x9b", "\u202e", "\a"}
    assert "\\x1b[2J" in shown[0].output


def test_help_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"st-embfilter \d+\.\d+\.\d+\S*\n", cli("--version").output)
    monkeypatch.setenv("COLUMNS", "80")
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert len(names) >= 9
    for name in names:
        output = cli(name, "--help").output
        assert "…" not in output, name
        assert max(map(len, output.splitlines())) <= 80


def test_a_model_with_code_says_which_option_lets_it_run(place: Path, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        place / "lm", prompt="echo", keep=16, device="cpu", show_progress_bar=False
    )
    echo = st_embfilter.save_pretrained(model, tmp_path / "echo")
    for command in (
        ("eval", echo, "--sts", place / "pairs.csv", "--no-baselines", "--no-cache", "-q"),
        ("bench", echo, "--texts", place / "texts.txt", "--no-hnsw", "-q"),
        ("lens", echo, "w20", "-q"),
        ("encode", echo, place / "texts.txt", "-o", tmp_path / "vectors", "-q"),
    ):
        said = check(cli(*command), 1)
        assert "--trust-remote-code" in said, said
        check(cli(*command, "--trust-remote-code"), 0)


def test_keep_1_says_what_it_is(place: Path, tmp_path: Path) -> None:
    said = check(cli("build", place / "lm", "-o", tmp_path / "a", "--keep", "1"), 0)
    assert "--keep 1 keeps one direction; 1.0 keeps all" in said
    assert "Note" not in check(cli("build", place / "lm", "-o", tmp_path / "b", "--keep", "2"), 0)
