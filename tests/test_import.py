"""Importing stays light: heavy and optional libraries load where they are used."""

import subprocess
import sys

import pytest

HEAVY = ("mteb", "datasets", "matplotlib", "faiss", "pandas", "onnxruntime")


def loaded_after(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


def test_using_the_package_loads_nothing_heavy() -> None:
    names = "import st_embfilter\nfor n in st_embfilter.__all__: getattr(st_embfilter, n)"
    loaded = loaded_after(names)
    assert "st_embfilter.publish" in loaded
    # sentence-transformers itself loads some of them where they are installed
    assert not (loaded - loaded_after("import sentence_transformers")) & set(HEAVY)


def test_this_test_can_fail() -> None:
    assert "json" in loaded_after("import json")
    assert "json" not in loaded_after("pass")


@pytest.mark.parametrize("module", ["st_embfilter", "st_embfilter.cli"])
def test_the_package_and_the_command_line_do_not_wait_for_torch(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", "transformers", "sentence_transformers"}


def test_public_names() -> None:
    import st_embfilter

    assert set(dir(st_embfilter)) == set(st_embfilter.__all__)
    for name in st_embfilter.__all__:
        assert getattr(st_embfilter, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        st_embfilter.nothing  # noqa: B018
