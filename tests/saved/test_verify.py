"""`verify` finds what is wrong with a saved model, and nothing wrong with a good one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.saved import calibration_checks
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.matrix import Unembedding
from tests.conftest import TEXTS, tiny_lm
from tests.hostile import CHARSMAP

PROJECTION = "2_Dense/model.safetensors"


SPECTRUM = "2_Dense/embfilter_spectrum.safetensors"

Attack = Callable[[Path], object]


def results(folder: Path, *, rebuild: bool = True, **options: Any) -> dict[str, bool | None]:
    found = verify(folder, rebuild=rebuild, show_progress_bar=False, **options)
    return {check.name: check.passed for check in found}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tiny_lm(folder / "lm")
    model = st_embfilter.from_causal_lm(folder / "lm", device="cpu", show_progress_bar=False)
    return st_embfilter.save_pretrained(model, folder / "saved")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_good_model_passes_every_check(saved: Path) -> None:
    found = results(saved)
    assert len(found) >= 7
    assert set(found.values()) == {True}
    assert "rebuild" not in results(saved, rebuild=False)


def test_a_filter_alone(saved: Path, tmp_path: Path) -> None:
    st_embfilter.load(saved, device="cpu")[2].save_pretrained(tmp_path / "filter")
    assert results(tmp_path / "filter", rebuild=False)["rows"] is True


@pytest.mark.parametrize("band", ["offset:3", "edges", "random:5"])
def test_other_bands(saved: Path, tmp_path: Path, band: str) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm", band=band, keep=12, device="cpu", show_progress_bar=False
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert set(results(path).values()) == {True}


def tampered(copy: Path, rows: list[int]) -> None:
    weights = load_file(copy / PROJECTION)
    weights["linear.weight"] = weights["linear.weight"][rows].contiguous()
    save_file(weights, copy / PROJECTION)


def test_rows_in_another_order(copy: Path) -> None:
    """Orthonormal and of the same space, but no prefix is a filter any more."""
    tampered(copy, list(range(16))[::-1])
    found = results(copy)
    assert found["rows"] is True
    assert found["directions"] is False
    assert found["rebuild"] is False
    assert results(copy, rebuild=False)["directions"] is False


def test_another_space(copy: Path) -> None:
    weights = load_file(copy / PROJECTION)
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    weights["linear.weight"] = torch.linalg.qr(noise)[0].T.contiguous()
    save_file(weights, copy / PROJECTION)
    found = results(copy)
    assert (found["rows"], found["directions"], found["rebuild"]) == (True, False, False)


def test_a_matrix_that_was_changed(copy: Path) -> None:
    """One value of the unembedding matrix, far too small to move the subspace."""
    weights = load_file(copy / "model.safetensors")
    name = next(key for key in weights if "embed" in key or "head" in key)
    for key in weights:
        if weights[key].shape == weights[name].shape:
            weights[key][0, 0] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found = results(copy)
    assert found["unembedding"] is False
    assert found["rebuild"] is True


def test_a_hash_of_another_matrix(copy: Path) -> None:
    document = json.loads((copy / "embfilter.json").read_text())
    document["unembedding"]["sha256"] = "0" * 64
    (copy / "embfilter.json").write_text(json.dumps(document))
    assert results(copy)["unembedding"] is False


def test_a_card_without_metadata(copy: Path) -> None:
    (copy / "README.md").write_text("# A model\n")
    assert results(copy, rebuild=False)["card"] is False
    (copy / "README.md").unlink()
    assert results(copy, rebuild=False)["card"] is False


def test_a_dense_that_is_not_linear(copy: Path) -> None:
    config = json.loads((copy / "2_Dense/config.json").read_text())
    del config["activation_function"]
    (copy / "2_Dense/config.json").write_text(json.dumps(config))
    assert results(copy) == {"files": False}


CALIBRATION = [f"the w{i} of w{i + 1} in tea" for i in range(40)] + TEXTS


def test_a_calibrated_model(saved: Path, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm", calibrate=CALIBRATION, device="cpu", show_progress_bar=False
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    found = results(path)
    assert (found["rows"], found["directions"], found["rebuild"]) == (True, True, True)
    assert found["calibration"] is None
    assert results(path, texts=CALIBRATION)["calibration"] is True
    assert results(path, texts=CALIBRATION[1:])["calibration"] is None
    assert results(path, texts=CALIBRATION, rebuild=False)["calibration"] is None
    (tmp_path / "texts.txt").write_text("\n".join(CALIBRATION))
    assert exit_code(path) == exit_code(path, "--rebuild") == 3
    assert exit_code(path, "--rebuild", "--texts", tmp_path / "texts.txt") == 0
    weights = load_file(path / PROJECTION)
    weights["linear.weight"] += 0.01 * weights["linear.weight"].flip(1)
    save_file(weights, path / PROJECTION)
    assert results(path)["rebuild"] is False
    assert results(path)["directions"] is False


def test_a_model_calibrated_with_its_own_texts(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm",
        calibrate="self",
        calibration_size=48,
        device="cpu",
        show_progress_bar=False,
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert set(results(path).values()) == {True}
    weights = load_file(path / PROJECTION)
    weights["linear.weight"] *= 1e6
    weights["linear.bias"] += 1e6
    save_file(weights, path / PROJECTION)
    found = results(path)
    assert found["rebuild"] is True  # the space is the same
    assert found["calibration"] is False
    edit(path / "embfilter.json", lambda d: d["calibration"].update(texts=10**12))

    def for_years(*_: object, **__: object) -> list[str]:
        raise AssertionError("10^12 texts are sampled")

    monkeypatch.setattr(calibration_checks, "sample_texts", for_years)
    assert results(path)["calibration"] is None


def test_a_model_calibrated_with_generic_texts(saved: Path, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm",
        calibrate="generic",
        calibration_size=48,
        device="cpu",
        show_progress_bar=False,
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert set(results(path).values()) == {True}
    edit(path / "embfilter.json", lambda d: d["calibration"].update(sha256="0" * 64))
    assert results(path)["calibration"] is None  # other texts than those of this version
    edit(path / "embfilter.json", lambda d: d["calibration"].update(texts=4096))
    assert results(path)["calibration"] is False


def exit_code(*arguments: str | Path) -> int:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)]).exit_code


def edit(file: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    def attack(folder: Path) -> None:
        weights = load_file(folder / PROJECTION)
        weights["linear.weight"] = change(weights["linear.weight"]).contiguous()
        save_file(weights, folder / PROJECTION)

    return attack


def of_dropped(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of directions outside the window."""
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = matrix.double()
    noise -= noise @ kept.T @ kept
    return torch.linalg.qr(noise.T)[0].T[:16].float()


def rotated(matrix: torch.Tensor) -> torch.Tensor:
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    return turn @ matrix


def swapped(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[[1, 0, *range(2, 16)]]


def flipped(matrix: torch.Tensor) -> torch.Tensor:
    return matrix * torch.tensor([-1.0] + [1.0] * 15)[:, None]


def no_spectrum(folder: Path) -> None:
    (folder / SPECTRUM).unlink()


def forged(change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    def attack(folder: Path) -> None:
        values = load_file(folder / SPECTRUM)["singular_values"]
        save_file({"singular_values": change(values.clone())}, folder / SPECTRUM)

    return attack


def outside(values: torch.Tensor) -> torch.Tensor:
    values[0] *= 2
    values[-1] *= 0.5
    return values


def both(*attacks: Attack) -> Attack:
    def attack(folder: Path) -> None:
        for one in attacks:
            one(folder)

    return attack


def evil_dense(folder: Path) -> None:
    shutil.copytree(folder / "2_Dense", folder / "evil_Dense")
    edit(folder / "modules.json", lambda m: m[2].update(path="evil_Dense"))


def evil_backbone(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "evil")
    shutil.move(folder.parent / "evil", folder / "0_Transformer")
    edit(folder / "modules.json", lambda m: m[0].update(path="0_Transformer"))


def renumbered(modules: list[dict[str, Any]]) -> None:
    for i, entry in enumerate(modules):
        entry.update(idx=i, name=str(i))


def module(kind: str, position: int, folder: str = "") -> Attack:
    def attack(path: Path) -> None:
        entry = {"path": folder, "type": f"sentence_transformers.models.{kind}"}
        edit(path / "modules.json", lambda m: m.insert(position, entry) or renumbered(m))

    return attack


def without(position: int) -> Attack:
    return lambda folder: edit(folder / "modules.json", lambda m: m.pop(position) and renumbered(m))


def filter_first(folder: Path) -> None:
    edit(folder / "modules.json", lambda m: m.insert(1, m.pop(2)) or renumbered(m))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def attack(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return attack


def norm(weights: dict[str, torch.Tensor]) -> str:
    return next(key for key in weights if key.endswith("layers.0.input_layernorm.weight"))


def config(file: str, **values: object) -> Attack:
    return lambda folder: edit(folder / file, lambda document: document.update(values))


def nan_in_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'("rms_norm_eps": )[^,]+', r"\1NaN", text))


def linked(name: str) -> Attack:
    def attack(folder: Path) -> None:
        target = folder.parent / "secret"
        target.write_text("mine")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def linked_folder(folder: Path) -> None:
    (folder / "docs").symlink_to(folder.parent)


def other_weights(folder: Path) -> None:
    """transformers reads the weights that the config names; all others read model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    changed = {name: value * (1.5 if "mlp" in name else 1.0) for name, value in weights.items()}
    save_file(changed, folder / "other.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", lambda d: d.update(transformers_weights="other.safetensors"))


def card_says(text: str) -> Attack:
    return lambda folder: (folder / "README.md").write_text(f"---\n{text}\n---\n# A card\n")


#: Each line ten times the one before.
DOUBLED = "\n".join(
    ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 12)]
)


MODEL_CONFIG = "config_sentence_transformers.json"
CALLED = {"method": "get_input_embeddings", "method_output_name": "last_hidden_state"}


ATTACKS: dict[str, tuple[Attack, str]] = {
    "other weights": (other_weights, "modules"),
    "another method of the backbone": (
        config("sentence_bert_config.json", modality_config={"text": CALLED}),
        "modules",
    ),
    "another output of the backbone": (
        config("sentence_bert_config.json", module_output_name="sentence_embedding"),
        "modules",
    ),
    "lower case in words": (config("sentence_bert_config.json", do_lower_case="yes"), "modules"),
    "pooling of a prompt in words": (
        config("1_Pooling/config.json", include_prompt="no"),
        "modules",
    ),
    "prompts that are no texts": (config(MODEL_CONFIG, prompts={"query": 5}), "modules"),
    "prompts in a list": (config(MODEL_CONFIG, prompts=["query"]), "modules"),
    "a prompt that is not there": (config(MODEL_CONFIG, default_prompt_name="x"), "modules"),
    "an unknown similarity": (config(MODEL_CONFIG, similarity_fn_name="evil"), "modules"),
    "requirements in a list": (config(MODEL_CONFIG, requirements=[{}]), "modules"),
    "another kind of model": (config(MODEL_CONFIG, model_type="SparseEncoder"), "modules"),
    "another Dense": (evil_dense, "files"),
    "another backbone": (evil_backbone, "modules"),
    "an extra Normalize": (module("Normalize", 2), "files"),
    "an extra LayerNorm": (module("LayerNorm", 3, "1_Pooling"), "modules"),
    "an extra Dropout": (module("Dropout", 3, "1_Pooling"), "modules"),
    "an extra Pooling": (module("Pooling", 1, "1_Pooling"), "modules"),
    "an unknown class": (module("Evil", 3), "modules"),
    "no Pooling": (without(1), "modules"),
    "no Transformer": (without(0), "modules"),
    "filter before Pooling": (filter_first, "modules"),
    "arguments of a module": (
        lambda f: edit(f / "modules.json", lambda m: m[0].update(kwargs=["task"])),
        "modules",
    ),
    "Dense reads another feature": (
        config("2_Dense/config.json", module_input_name="token_embeddings"),
        "files",
    ),
    "Dense adds what it reads": (config("2_Dense/config.json", use_residual=True), "files"),
    "arguments of transformers": (
        config("sentence_bert_config.json", model_args={"num_hidden_layers": 1}),
        "modules",
    ),
    "length of -1": (config("sentence_bert_config.json", max_seq_length=-1), "files"),
    "two poolings": (config("1_Pooling/config.json", pooling_mode_cls_token=True), "modules"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}'),
        "modules",
    ),
    "Dense as a pickle too": (lambda f: torch.save({}, f / "2_Dense/pytorch_model.bin"), "modules"),
    "rows of dropped directions": (rows(of_dropped), "directions"),
    "no spectrum, dropped directions": (both(no_spectrum, rows(of_dropped)), "directions"),
    "no spectrum, rotated rows": (both(no_spectrum, rows(rotated)), "directions"),
    "no spectrum, swapped rows": (both(no_spectrum, rows(swapped)), "directions"),
    "no spectrum, a flipped sign": (both(no_spectrum, rows(flipped)), "directions"),
    "a flipped sign": (rows(flipped), "directions"),
    "a spectrum forged outside": (forged(outside), "spectrum"),
    "a spectrum forged inside": (forged(lambda v: v * 1.001), "spectrum"),
    "a random space, its spectrum forged": (
        both(rows(lambda m: rotated(of_dropped(m))), forged(lambda v: v.mean().expand(32).clone())),
        "directions",
    ),
    "a tensor is missing": (tensors(lambda w: w.pop(norm(w))), "backbone"),
    "a tensor of another shape": (
        tensors(lambda w: w.update({norm(w): torch.ones(7)})),
        "backbone",
    ),
    "a tokenizer that panics": (
        config("tokenizer.json", normalizer=CHARSMAP),
        "backbone",
    ),
    "a tokenizer of other tokens": (
        lambda f: edit(f / "tokenizer.json", lambda d: d["model"]["vocab"].update(A=10**6)),
        "backbone",
    ),
    "NaN in a layer": (tensors(lambda w: w[norm(w)].fill_(torch.nan)), "backbone"),
    "Inf in a layer": (tensors(lambda w: w[norm(w)][3:4].fill_(torch.inf)), "backbone"),
    "an epsilon of NaN": (nan_in_config, "modules"),
    "an epsilon of 10^9": (config("config.json", rms_norm_eps=1e9), "modules"),
    "a card that grows": (card_says(f"{DOUBLED}\nlicense: *a11\nlanguage: *a11"), "card"),
    "a card nested deeply": (card_says("license: " + "[" * 20_000), "card"),
    "a card with code": (
        card_says("a: !!python/object/apply:os.system ['touch code-ran']"),
        "card",
    ),
    "a card of no date": (card_says("license: 2020-99-99"), "card"),
    "a link beside": (linked("notes.txt"), "links"),
    "a link that is hidden": (linked(".README.md.tmp"), "links"),
    "a link in a folder": (linked("1_Pooling/notes.txt"), "links"),
    "a link of the card": (linked("README.md"), "links"),
    "a link to a folder": (linked_folder, "links"),
}


@pytest.mark.filterwarnings("ignore")  # transformers warns of what it makes up
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_without_a_rebuild(copy: Path, name: str) -> None:
    attack, check = ATTACKS[name]
    attack(copy)
    found = results(copy, rebuild=False)
    assert found[check] is False, found


def test_a_prompt_before_every_text_is_told(copy: Path) -> None:
    config(MODEL_CONFIG, prompts={"q": "find: "}, default_prompt_name="q")(copy)
    found = {check.name: check for check in verify(copy)}
    assert found["modules"].passed is True
    assert "'find: ' goes before every text" in found["modules"].detail


def test_what_is_absent_is_unproven(copy: Path) -> None:
    no_spectrum(copy)
    assert results(copy)["spectrum"] is None
    assert results(copy)["directions"] is True
    assert exit_code(copy) == 3


def test_a_filter_of_a_local_model_names_it(saved: Path, tmp_path: Path) -> None:
    st_embfilter.load(saved, device="cpu")[2].save_pretrained(tmp_path / "filter")
    assert results(tmp_path / "filter")["unembedding"] is None
    assert exit_code(tmp_path / "filter") == 3
    found = results(tmp_path / "filter", base=saved.parent / "lm")
    assert set(found.values()) == {True}
    assert exit_code(tmp_path / "filter", "--base", saved.parent / "lm") == 0
    tiny_lm(tmp_path / "other", initializer_range=0.03)
    assert results(tmp_path / "filter", base=tmp_path / "other")["unembedding"] is False


@pytest.mark.parametrize("recipe", ["prompteol", "echo", "metaeol"])
def test_every_recipe_that_is_saved(saved: Path, tmp_path: Path, recipe: str) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm", prompt=recipe, normalize=True, device="cpu", show_progress_bar=False
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert set(results(path).values()) == {True}
    for file in path.glob("*.py"):
        file.write_text(file.read_text() + "\n# edited\n")
        assert results(path, rebuild=False)["modules"] is False


def test_edited_code_never_runs_without_trust(saved: Path, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm",
        prompt="echo",
        calibrate=CALIBRATION,
        device="cpu",
        show_progress_bar=False,
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert results(path, texts=CALIBRATION)["calibration"] is None
    assert results(path, texts=CALIBRATION, trust_remote_code=True)["calibration"] is True
    file = path / "echo_pooling.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + file.read_text())
    found = results(path, texts=CALIBRATION)
    assert (found["modules"], found["calibration"]) == (False, None)
    assert not (tmp_path / "ran").exists()


def test_the_matrix_is_read_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    blocks = Unembedding.blocks

    def counted(self: Unembedding, *args: Any, **kwargs: Any) -> Any:
        read.append(self.stored.name)
        return blocks(self, *args, **kwargs)

    monkeypatch.setattr(Unembedding, "blocks", counted)
    assert set(results(saved).values()) == {True}
    assert len(read) == 1


@pytest.mark.parametrize("name", ["x" * 300, "a/b/c", "no-such-folder/", "a\ud800b"])
def test_a_name_that_is_none(name: str) -> None:
    assert results(Path(name))["files"] is False


def test_nothing_of_a_model_steers_the_terminal(copy: Path) -> None:
    edit(
        copy / "embfilter.json",
        lambda d: d["base_model"].update(id="org/\x1b[2J\x07\u202eevil", revision=None),
    )
    shown = CliRunner().invoke(app, ["verify", str(copy)]).output
    assert not set("\x1b\x07\u202e") & set(shown)


def test_command(saved: Path, copy: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(saved), "--rebuild"])
    assert good.exit_code == 0, good.output
    assert "FAILED" not in good.output
    tampered(copy, list(range(16))[::-1])
    bad = CliRunner().invoke(app, ["verify", str(copy)])
    assert bad.exit_code == 1
    assert "FAILED" in bad.output
