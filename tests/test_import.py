"""Importing stays light: heavy and optional libraries load where they are used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HEAVY = (
    "mteb",
    "datasets",
    "pyarrow",
    "ray",
    "matplotlib",
    "faiss",
    "pandas",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


PACKAGE = Path(__file__).parents[1] / "st_embfilter"


def imports_within(package: Path) -> dict[str, set[str]]:
    """The modules of a package, and which of the others each imports, anywhere in its text."""
    name = package.name
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in package.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module in modules:
        path = package.parent / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (names & modules) or {node.module}
        graph[module] = {other for other in found & modules if other not in (module, name)}
    return graph


#: Rooms from the ground up: a module imports from its own room and those before it.
ROOMS = (
    "errors",
    "text",
    "spectrum",
    "files",
    "unembedding",
    "model",
    "saved",
    "corpus",
    "lens",
    "evaluation",
    "cli",
)


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_every_module_is_in_a_room_and_imports_point_down() -> None:
    graph = imports_within(PACKAGE)
    TopologicalSorter(graph).prepare()  # raises CycleError
    del graph["st_embfilter"]
    upwards = [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if room(other) > room(module)
    ]
    assert not upwards
    assert len(graph["st_embfilter.model.build"]) > 5  # the graph is not empty
    for copied in ("echo_pooling", "meta_eol"):  # into model folders
        assert graph[f"st_embfilter.model.{copied}"] == set()


def test_the_order_of_the_rooms_can_fail() -> None:
    assert room("st_embfilter.model.build") > room("st_embfilter.spectrum.gram")
    with pytest.raises(ValueError, match="not in tuple"):
        room("st_embfilter.loose")


#: Lines of the longest file: what one responsibility takes.
LONGEST = 420


def test_no_file_has_grown_into_several() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > 50
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST}


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("frequencies", "count_tokens"),
        ("report", "open_model"),
        ("results", "write_results"),
        ("tasks", "STSTask"),
    ],
)
def test_old_paths_of_documented_modules_still_work(old: str, name: str) -> None:
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from st_embfilter.{old} import {name}
print([str(w.message) for w in caught if "st_embfilter" in str(w.message)], {name}.__module__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"st_embfilter.{old} is now st_embfilter." in run.stdout


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
    assert "st_embfilter.saved.folder" in loaded
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
