"""The page of examples/browser in headless Chromium: what it shows is what the graph says.

It needs Chromium, the extra `onnx`, and the library that `make browser` fetches from npm; each test
is skipped where something is missing, and says what.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from compat.javascript import LIBRARY, JavaScriptError, chromium, served, visit
from examples.browser.prepare import prepare, typing
from tests.conftest import DEMO_LM, ROOT
from tests.saved.test_onnx_out import run

EXAMPLE = ROOT / "examples" / "browser"
QUERY = "Interest rates went up again."


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder, with the bundled language model."""
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        pytest.skip("needs the extra onnx")
    if not (EXAMPLE / "vendor" / LIBRARY).is_file():
        pytest.skip("needs transformers.js, which `make browser` fetches")
    try:
        chromium()
    except JavaScriptError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("browser")
    shutil.copyfile(EXAMPLE / "index.html", folder / "index.html")
    (folder / "vendor").symlink_to(EXAMPLE / "vendor")
    prepare(folder, DEMO_LM, "The bundled language model")
    return folder


def test_what_is_typed_is_searched_raw_and_filtered(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    shown = visit(page, "index.html", tail=typing(QUERY), picture=picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    texts = json.loads((page / "texts.json").read_text())["texts"]
    assert len(texts) == 660
    vectors = run(page / "model", "onnx/model_quantized.onnx", [QUERY, *texts])
    for name, width in (("raw", 256), ("filtered", 128)):
        part = vectors[:, :width] / np.linalg.norm(vectors[:, :width], axis=1, keepdims=True)
        cosines = part[1:] @ part[0]
        best = np.sort(cosines)[::-1][:5]
        assert len(shown[name]) == 5
        for (text, value), expected in zip(shown[name], best, strict=True):
            # Three places are shown; both sums are in at least 32 bits.
            assert value == pytest.approx(expected, abs=6e-4)
            assert value == pytest.approx(cosines[texts.index(text)], abs=6e-4)
    assert shown["raw"] != shown["filtered"]


def test_a_missing_model_is_said(page: Path, tmp_path: Path) -> None:
    for name in ("index.html", "vendor"):
        (tmp_path / name).symlink_to(page / name)
    with pytest.raises(JavaScriptError, match="is not valid JSON"):
        visit(tmp_path, "index.html", tail=typing(QUERY))


def test_everything_that_the_page_loads_lies_beside_it() -> None:
    content = (EXAMPLE / "index.html").read_text()
    assert "://" not in content
    assert content.count("./vendor/") == 3


def test_static_files_are_served(tmp_path: Path) -> None:
    from urllib.request import urlopen

    (tmp_path / "a.txt").write_text("there")
    with served(tmp_path) as url, urlopen(f"{url}/a.txt") as answer:
        assert answer.read() == b"there"
