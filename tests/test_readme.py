"""Every block of the README is run as a reader would, with local folders and a local Hub."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

WHEEL_ONLY = "README_WHEEL_ONLY" in os.environ
hub_server = import_module("hub_server" if WHEEL_ONLY else "tests.hub_server")
ROOT = Path(__file__).parent if WHEEL_ONLY else Path(__file__).parents[1]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
)
DEMO_LM = ROOT / "examples" / "openstax-lm"

# What the README says about the sizes holds for Qwen2.5-0.5B; the demo LM stands in for it here.
STAND_INS = {"keep=448": "keep=100"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory in which the README's model names are local folders."""
    environment = {
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub_server.TOKEN,
    }
    with hub_server.LocalHub().running() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "HF_ENDPOINT": hub.url}.items():
            patch.setenv(name, value)
        yield furnished(tmp_path_factory)


def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    (place / "Qwen").mkdir()
    (place / "Qwen" / "Qwen2.5-0.5B").symlink_to(DEMO_LM)
    texts = [f"A text about thing {i}." for i in range(120)]
    (place / "texts.txt").write_text("\n".join(texts))
    pairs = [f"{a},{texts[i - 1]},{i % 6}" for i, a in enumerate(texts)]
    (place / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(pairs))
    code = """
import numpy as np
np.save("vectors.npy", np.random.default_rng(0).normal(size=(1000, 256)).astype(np.float32))
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
backbone = Transformer("Qwen/Qwen2.5-0.5B")
modules = [backbone, Pooling(backbone.get_embedding_dimension()), Normalize()]
SentenceTransformer(modules=modules).save_pretrained("my-decoder-model")
"""
    run(place, [sys.executable, "-c", code])
    return place


def run(place: Path, command: list[str]) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_with_checks(block: str) -> str:
    """The block; a line `expression  # (n, k)` also checks the shape, at the stand-in's size."""
    for name, stand_in in STAND_INS.items():
        block = block.replace(name, stand_in)
    sizes = {"448": "128", "224": "64", "896": "256"}
    if "keep=100" in block:
        sizes["448"] = "100"
    lines = []
    for line in block.splitlines():
        found = re.match(r"(?:(\w+) = )?(.*?)  # \((\d+), (\d+)\)$", line)
        if found:
            shape = tuple(int(sizes.get(size, size)) for size in found.groups()[2:])
            value = found[1] or f"({found[2]})"
            lines += [
                line if found[1] else "",
                f"_shape = tuple(getattr({value}, 'shape', {value}))",
            ]
            lines += [f"if _shape != {shape}: raise SystemExit(f'got {{_shape}}, not {shape}')"]
        else:
            lines.append(line.replace("truncate_dim=224", "truncate_dim=64"))
    return "\n".join(lines).replace("truncate_dim=224", "truncate_dim=64")


def test_the_readme_has_blocks() -> None:
    assert {"shell", "python"} == {language for language, _ in BLOCKS}
    assert len(BLOCKS) >= 6


#: Where the README first uses a word of the field, it says what that is.
EXPLAINED = {
    "W_U": "unembedding matrix, W_U, which turns a hidden state",
    "PromptEOL": "PromptEOL asks for the text in one word",
    "ECHO": "ECHO repeats it",
}


@pytest.mark.skipif(WHEEL_ONLY, reason="without the repository")
def test_the_first_lines_say_how_to_install_and_what_words_mean() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text[: text.index("## Why")]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=([\d.]+)"', project)
    library = re.search(r'"sentence-transformers>=(\d+\.\d+)', project)
    assert python
    assert library
    needed = f"Python {python[1]} and sentence-transformers {library[1]}, or newer"
    assert needed in re.sub(r"\s+", " ", start)
    assert "git clone" in start
    assert "`pip install .`" in start
    line = re.sub(r"\s+", " ", text)
    for word, meaning in EXPLAINED.items():
        assert line.index(word) == line.index(meaning) + meaning.index(word), word


def test_python_blocks(place: Path) -> None:
    """All in one process, which pays for the imports once, but each with names of its own."""
    blocks = [python_with_checks(body) for language, body in BLOCKS if language == "python"]
    if not find_spec("onnxruntime"):  # of the extra `onnx`
        blocks = [block for block in blocks if "export_onnx" not in block]
    code = f"for block in {blocks!r}:\n    exec(compile(block, block, 'exec'), {{}})"
    run(place, [sys.executable, "-W", "ignore", "-c", code])


def test_shell_lines(place: Path) -> None:
    """All in one process, as the blocks of Python."""
    lines = [line for language, body in BLOCKS if language == "shell" for line in body.splitlines()]
    commands = []
    for line in filter(None, lines):
        command = shlex.split(line, comments=True)
        if command[0] != "make":
            assert command[0] == "st-embfilter"
            if command[1] != "bench" or find_spec("faiss"):  # of the extra `eval`
                commands.append(command[1:])
        elif not WHEEL_ONLY:
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.M)
            if command[1] == "demo":  # its recipe; the set-up is what runs this test
                output = run(ROOT, [sys.executable, "-m", "examples.demo", "--lm", "openstax"])
                assert "1/8" in output
                assert "A search (PromptEOL) among" in output
    assert len(commands) > 5
    code = f"""
from st_embfilter.cli import app
for command in {commands!r}:
    code = app(command, standalone_mode=False)
    if code:
        raise SystemExit(f"{{command}} ended with {{code}}")
"""
    run(place, [sys.executable, "-W", "ignore", "-c", code])
