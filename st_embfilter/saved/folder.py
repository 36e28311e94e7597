"""Save a filtered model as a portable folder that loads everywhere with no custom code.

Every stack reads the names and keys of early sentence-transformers, so those are written, whatever
version is installed. Prompt recipes that need code of their own (ECHO, MetaEOL) are saved in plugin
form: the same folder and that code, which `trust_remote_code=True` runs from there. See
`portable_files` for the small files and `save_pretrained` for the rest.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

from st_embfilter.errors import FormatError, OutputError
from st_embfilter.files.hub import upload
from st_embfilter.files.staging import check_target, staged
from st_embfilter.files.tensors import SAFETENSORS_FILE, read_index
from st_embfilter.model.backbone import (
    TOKENIZER_CONFIG,
    backbone_files,
    backbone_model,
    check_links,
    has_adapter,
    is_unchanged,
    source_folder,
    source_name,
    tokenizer_patch,
)
from st_embfilter.model.layer import EmbedFilterLayer, check_placement, filter_card
from st_embfilter.model.metadata import METADATA_FILE, SPECTRUM_FILE
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.prompts import PromptEOL, Recipe, recipe_from_dict
from st_embfilter.model.tokenizer import write_tokenizer
from st_embfilter.saved.card import (
    CARD_FILE,
    base_card,
    card_of_folder,
    check_card,
    facts_of_files,
    render,
)

logger = logging.getLogger(__name__)


#: What no published folder can do without, beside the weights of the backbone and its tokenizer.
_FILTER_FILES: Final = (METADATA_FILE, "config.json", SAFETENSORS_FILE, CARD_FILE)
_PORTABLE_FILES: Final = (
    MODULES_FILE,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    f"2_Dense/{SAFETENSORS_FILE}",
    METADATA_FILE,
    CARD_FILE,
    "config.json",
)


#: Modules that are saved with their code, by file. By name, because those that were loaded from
#: such a folder are classes of their own.
_PLUGIN_CLASSES: Final = {
    "EchoTransformer": "echo_pooling.py",
    "EchoPooling": "echo_pooling.py",
    "MetaEOLTransformer": "meta_eol.py",
}

_POOLING_KEYS: Final = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
_ALWAYS_WRITTEN: Final = ("cls", "mean", "max", "mean_sqrt_len_tokens")

_TOKENIZER: Final = re.compile(
    r"tokenizer\.json|vocab\.(json|txt)|tekken\.json|.*\.(model|spm|tiktoken)"
)


def save_pretrained(
    model: SentenceTransformer,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Writes the portable folder; plain `SentenceTransformer(path)` loads it.

    The folder appears complete or not at all: it is written beside the target and renamed. Files
    of the backbone are copied unchanged from where it was loaded; a backbone whose weights are no
    longer those is saved by transformers instead.

    A model with ECHO or MetaEOL is saved in plugin form; a log line says so.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        path: Target folder; must be missing or empty.
        overwrite: Replace a model folder that is there already.
        token: Hub token, to read the base model's card for its licence and languages.

    Returns:
        The target folder.

    Raises:
        FormatError: If the model has other modules, which no portable folder can express.
        OutputError: If the target is not empty, or cannot be written.
    """
    target = Path(path).absolute()
    check_target(target, overwrite=overwrite)
    source = source_folder(model)
    if source is not None and source.resolve() == target.resolve():
        raise OutputError(f"the output folder must not be the model's source, got {path}")
    with staged(target, overwrite=overwrite) as folder:
        _write(model, folder, token=token)
    if is_plugin(model):
        logger.warning(
            "%s is in plugin form, because no portable folder can express its prompt; load it with "
            "trust_remote_code=True",
            target,
        )
    return target


def is_plugin(model: SentenceTransformer) -> bool:
    """Whether a model is saved with code of its own, which needs `trust_remote_code=True`."""
    return any(_code_file(module) is not None for module in model.children())


def push_to_hub(
    model: SentenceTransformer,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publishes a filtered model on the Hub; plain `SentenceTransformer(repo_id)` loads it.

    The portable folder becomes one commit. It is checked first: nothing is uploaded, and no
    repository is made, unless it is complete.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        repo_id: E.g. "org/name"; made if it does not exist.
        private: Visibility of a new repository; one that exists keeps its own.
        revision: Branch to commit to, made if need be; None for the main one.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Its first line.
        token: Hub token; None for the one that is logged in or in `HF_TOKEN`.

    Returns:
        What huggingface_hub says about the commit: `commit_url`, `oid`, `pr_url` ...

    Raises:
        FormatError: If the model has other modules, or the folder fails its validation.
        HubError: If the Hub refuses.
    """
    with tempfile.TemporaryDirectory(prefix="st-embfilter-") as folder:
        _write(model, Path(folder), _link, token=token)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publishes a portable folder, or the folder of a filter alone, on the Hub.

    Args:
        folder: As `save_pretrained` or `EmbedFilterLayer.save_pretrained` wrote it.
        repo_id: As all others, see `push_to_hub`.
        private: See there.
        revision: See there.
        create_pr: See there.
        commit_message: See there.
        token: See there.
    """
    validate_folder(folder)
    what = "filter" if _is_filter_alone(Path(folder)) else "embedding model"
    return upload(
        folder,
        repo_id,
        contents={CARD_FILE: _card_for(Path(folder), repo_id)},
        commit_message=commit_message or f"Add EmbedFilter {what}",
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )


def validate_folder(folder: str | os.PathLike[str]) -> None:
    """Checks that a folder is complete and consistent, before anybody gets it.

    Args:
        folder: A portable folder, or the folder of a filter alone.

    Raises:
        FormatError: Names the file that is missing or breaks a rule.
        UnembeddingError: If the weights of the backbone are missing or damaged.
    """
    folder = Path(folder)
    filter_alone = _is_filter_alone(folder)
    required = _FILTER_FILES if filter_alone else _PORTABLE_FILES
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"a folder to publish must hold {', '.join(required)}, got none of "
            f"{', '.join(missing)} in {folder}; write it with save_pretrained or `st-embfilter "
            "build`"
        )
    EmbedFilterLayer.from_pretrained(folder)
    if not filter_alone:
        _check_backbone(folder)
    check_card((folder / CARD_FILE).read_text(encoding="utf-8", errors="replace"))


def portable_files(
    model: SentenceTransformer, *, token: str | bool | None = None
) -> dict[str, bytes]:
    """Every small file of the portable folder by its relative path; all but the backbone's own.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        token: Hub token, to read the base model's card.

    Raises:
        FormatError: If the model is not Transformer, Pooling, EmbedFilterLayer, [Normalize].
    """
    transformer, pooling, layer, normalize = _pipeline(model)
    code = {}
    types = []
    for module, name in ((transformer, "Transformer"), (pooling, "Pooling")):
        file = _code_file(module)
        if file is None:
            types.append(f"sentence_transformers.models.{name}")
        else:
            code[file.name] = file.read_bytes()
            types.append(f"{file.stem}.{type(module).__name__}")
    modules = [(types[0], ""), (types[1], "1_Pooling")]
    modules.append(("sentence_transformers.models.Dense", "2_Dense"))
    if normalize:
        modules.append(("sentence_transformers.models.Normalize", "3_Normalize"))
    files = {
        **code,
        MODULES_FILE: _json(
            [
                {"idx": i, "name": str(i), "path": folder, "type": name}
                for i, (name, folder) in enumerate(modules)
            ]
        ),
        "sentence_bert_config.json": _json(_transformer_config(transformer, _recipe(layer))),
        "config_sentence_transformers.json": _json(
            {
                "prompts": dict(model.prompts),
                "default_prompt_name": model.default_prompt_name,
                "similarity_fn_name": str(model.similarity_fn_name),
            }
        ),
        "1_Pooling/config.json": _json(
            pooling.get_config_dict() if _code_file(pooling) else _pooling_config(pooling)
        ),
        "2_Dense/config.json": _json(layer.get_config_dict()),
        "2_Dense/model.safetensors": save(layer.weights()),
        METADATA_FILE: layer.metadata.to_json().encode(),
    }
    if layer.singular_values is not None:
        files[SPECTRUM_FILE] = save({"singular_values": layer.singular_values.cpu()})
    inherited_from = _base_card(model, token)
    files[CARD_FILE] = render(facts_of_files(files, base_card=inherited_from)).encode()
    return files


def _pipeline(
    model: SentenceTransformer,
) -> tuple[Transformer, Pooling, EmbedFilterLayer, bool]:
    modules = list(model.children())
    check_placement(modules)
    kinds = (Transformer, Pooling, EmbedFilterLayer, Normalize)
    fits = len(modules) in (3, 4) and all(
        isinstance(module, kind) for module, kind in zip(modules, kinds, strict=False)
    )
    if not fits:
        raise FormatError(
            "a portable folder holds Transformer > Pooling > EmbedFilterLayer [> Normalize], got "
            + " > ".join(type(module).__name__ for module in modules)
            + "; save other pipelines with model.save_pretrained(path)"
        )
    return modules[0], modules[1], modules[2], len(modules) == 4  # type: ignore[return-value]


def _code_file(module: nn.Module) -> Path | None:
    """The one file with the code of a module that travels with the model."""
    name = _PLUGIN_CLASSES.get(type(module).__name__)
    file = Path(inspect.getfile(type(module)))
    return file if file.name == name else None


def _recipe(layer: EmbedFilterLayer) -> Recipe | None:
    prompt = layer.metadata.prompt
    return None if prompt is None else recipe_from_dict(prompt)


def _transformer_config(transformer: Transformer, recipe: Recipe | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_seq_length": transformer.max_seq_length,
        "do_lower_case": bool(getattr(transformer, "do_lower_case", False)),
    }
    if isinstance(recipe, PromptEOL) and recipe.encoding == "exact":
        config["modality_config"] = transformer.modality_config
        config["module_output_name"] = transformer.module_output_name
    if hasattr(transformer, "prompt_token_ids"):
        config["prompt_token_ids"] = transformer.prompt_token_ids
    return config


def _pooling_config(pooling: Pooling) -> dict[str, Any]:
    mode = pooling.pooling_mode
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    config: dict[str, Any] = {"word_embedding_dimension": pooling.embedding_dimension}
    for name, key in _POOLING_KEYS.items():
        if name in _ALWAYS_WRITTEN or name in modes:
            config[key] = name in modes
    if not pooling.include_prompt:
        config["include_prompt"] = False
    return config


def _write(
    model: SentenceTransformer,
    folder: Path,
    place: Callable[[Path, Path], object] = shutil.copyfile,
    *,
    token: str | bool | None = None,
) -> None:
    """Fills an empty folder; `place(source, target)` puts the weights of the backbone there."""
    files = portable_files(model, token=token)
    inner = backbone_model(model)
    if has_adapter(inner):
        raise FormatError(
            "a portable folder holds merged weights, got a backbone with a PEFT adapter; load it "
            "with from_causal_lm, which merges, or save with model.save_pretrained(path)"
        )
    source = source_folder(model)
    if source is not None and is_unchanged(inner, source):
        check_links(source)  # no file of this machine becomes part of a model
        for file in backbone_files(source):
            large = file.suffix in (".safetensors", ".bin")
            (place if large else shutil.copyfile)(file, folder / file.name)
        patch = tokenizer_patch(source, model.tokenizer)
        if patch is not None:
            (folder / TOKENIZER_CONFIG).write_bytes(patch)
    else:
        inner.save_pretrained(str(folder))  # type: ignore[operator]
        model.tokenizer.save_pretrained(str(folder))
    if _pipeline(model)[2].metadata.prompt is not None:
        write_tokenizer(folder, model.tokenizer)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _is_filter_alone(folder: Path) -> bool:
    return not (folder / MODULES_FILE).is_file() and not (folder / "2_Dense").is_dir()


def _check_backbone(folder: Path) -> None:
    """Checks that weights are there, whole and readable; and a tokenizer."""
    files = backbone_files(folder)
    for file in files:
        if file.name.endswith(".index.json"):
            for shard in sorted(set(read_index(file).values())):
                if not (folder / shard).is_file():
                    raise FormatError(f"{file.name} names the shard {shard}, got no such file")
        elif file.suffix == ".safetensors":
            try:
                safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    f"{file.name} must be a whole safetensors file, got: {error}"
                ) from error
    if not any(_TOKENIZER.fullmatch(file.name) for file in files):
        raise FormatError(
            "a portable folder must hold a tokenizer, got none of its files; save the tokenizer "
            "of the language model into it"
        )


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The folder's card, which names the repository in its usage unless somebody edited it."""
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    if _is_filter_alone(folder):
        metadata = EmbedFilterLayer.from_pretrained(folder).metadata
        plain, named = filter_card(metadata), filter_card(metadata, repo_id)
    else:
        plain, named = card_of_folder(folder), card_of_folder(folder, repo_id=repo_id)
    return (named if text == plain else text).encode()


def _link(source: Path, target: Path) -> None:
    """A link where that is possible: a model that is only passed on needs no second copy."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def _base_card(model: SentenceTransformer, token: str | bool | None) -> str | None:
    name = source_name(model)
    commit = getattr(getattr(backbone_model(model), "config", None), "_commit_hash", None)
    return None if name is None else base_card(name, commit, token)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
