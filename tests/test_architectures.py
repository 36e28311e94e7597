"""A core set of architectures goes the whole way; docs/architectures.md tells of all of them.

`make coverage-full` runs every one and writes that table, with the transformers of constraints.txt.
With another transformers an architecture must still end as the table says, working or refused; the
words of its row are that release's own.
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto

from tests.architectures import TABLE, exercise, run_all

#: One of each kind: tied and untied, head bias, output projection, capped and scaled logits,
#: experts, state spaces, hybrids, composite configs, wide outputs, and each kind of refusal.
CORE = [
    "bart",
    "bert",
    "cohere",
    "gemma2",
    "gemma3",
    "gpt2",
    "gptj",
    "llama",
    "llama4",
    "mamba",
    "minicpm3",
    "mllama",
    "modernbert-decoder",
    "opt",
    "qwen3_5",
    "qwen3_moe",
    "reformer",
    "trocr",
]


def table_is_of_this_transformers() -> bool:
    found = re.search(r"transformers (\d[^,]*),", TABLE.read_text(encoding="utf-8"))
    assert found is not None
    return found[1] == version("transformers")


def rows(depth: bool = False) -> dict[str, str]:
    """The table's rows by model type, or those of what cannot be cut to every depth."""
    before, section, after = re.split(
        r"(?ms)^(## Depth$.*?)(?=^## )", TABLE.read_text(encoding="utf-8")
    )
    text = section if depth else before + after
    return {row[1]: row[0] for row in re.finditer(r"^\| `([^`]+)` \| .* \|$", text, re.M)}


@pytest.mark.parametrize("model_type", CORE)
@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
def test_architecture(model_type: str, tmp_path: Path) -> None:
    outcome = exercise(model_type, tmp_path)
    row = rows()[model_type]
    if table_is_of_this_transformers():
        assert outcome.row == row
        uncut = f"| `{model_type}` | {outcome.uncut} |" if outcome.uncut else None
        assert rows(depth=True).get(model_type) == uncut
    else:
        works = row.startswith(f"| `{model_type}` | `")  # the name of a tensor, not a sentence
        assert (outcome.status in ("works", "on request")) == works


def test_the_table_is_of_every_architecture_of_its_transformers() -> None:
    assert "| fails | 0 |" in TABLE.read_text(encoding="utf-8")
    if table_is_of_this_transformers():
        assert set(rows()) == set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_at_least_95_percent_can_be_used() -> None:
    built, halves, usable = (
        int(re.search(pattern, TABLE.read_text(encoding="utf-8"))[1])  # type: ignore[index]
        for pattern in (r"Of the (\d+) that", r"(\d+) of the refused", r"built (\d+) \(")
    )
    assert usable >= 0.95 * (built - halves)


def test_an_architecture_that_hangs_or_crashes_ends_only_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"no-such-type": "", "llama": ""}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", names)
    statuses = [outcome.status for outcome in run_all(seconds=0.05)]
    assert statuses == ["failed", "failed"]


def test_the_readme_counts_as_the_table_does() -> None:
    table = TABLE.read_text(encoding="utf-8")
    readme = (TABLE.parents[1] / "README.md").read_text(encoding="utf-8")
    said = re.search(
        r"of the (\d+) model types that transformers (\S+) maps to a causal"
        r"\s+language model, (\d+) work",
        readme,
    )
    assert said is not None
    assert f"transformers maps {said[1]} model types" in table
    assert f" transformers {said[2]}." in table
    assert f"| works | {said[3]} |" in table
