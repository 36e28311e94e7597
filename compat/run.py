"""Loads one saved folder through other libraries and compares the embeddings: `make compat`.

Creates a small environment for each set of requirements (minutes and about 1.5 GB each, once), runs
`check.py` in it, compares with the embeddings that this project gives, and writes the table of
docs/compatibility.md. A row that ran is kept beside the environments, with a hash of the code that
it ran with: a run that was ended goes on where it was, rows that failed run again, and the page is
written when every row ran with the code that is there. With --remove no environment outlives its
check.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

import st_embfilter
from compat import rules
from compat.page import TOLERANCE, Outcome, page
from compat.stacks import FOLDERS, GRAPHS, SERVERS, STACKS, TEXTS, Stack
from st_embfilter.saved.onnx_graph import Dtype

ROOT = Path(__file__).parents[1]
DEMO_LM = ROOT / "examples" / "openstax-lm"
PAGE = ROOT / "docs" / "compatibility.md"
CHECK = ROOT / "compat" / "check.py"

#: As transformers.js names them.
DTYPES = {"float32": "fp32", "int8": "q8"}


@dataclass(frozen=True)
class Case:
    """A folder and what its texts should give.

    Attributes:
        name: What it was built with.
        folder: Of a saved model, or of a graph.
        expected: (n, k), embeddings that this project gives.
        dtype: Of a graph's weights.
        loss: Of 8 bits, as the export measured it, relative to an embedding's length.
    """

    name: str
    folder: Path
    expected: np.ndarray
    dtype: Dtype = "float32"
    loss: float = 0.0


def main() -> int:
    """Runs what has not run yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=ROOT / ".compat")
    parser.add_argument("--remove", action="store_true", help="remove environments after use")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these, again if they ran")
    parser.add_argument("--code", action="store_true", help="print the hash of the code, and end")
    arguments = parser.parse_args()
    code = code_hash()
    if arguments.code:
        print(code)
        return 0
    kept = Kept(arguments.environments.absolute(), code)
    wanted = [one for one in STACKS if arguments.only is None or one.name in arguments.only]
    for i, stack in enumerate(wanted):
        before = kept.outcome(stack)
        if arguments.only is None and before is not None and before.problem is None:
            continue
        environment = kept.place.parent / stack.environment
        outcome = run(stack, environment, kept.cases(stack.graph))
        kept.keep(outcome)
        if arguments.remove and stack.environment not in {
            one.environment for one in wanted[i + 1 :]
        }:
            shutil.rmtree(environment, ignore_errors=True)
        print(json.dumps({"stack": stack.name, **fields(outcome)}), flush=True)
    return conclude(kept)


def conclude(kept: Kept) -> int:
    """Writes the page if every row is there; returns the exit code."""
    outcomes = [outcome for outcome in map(kept.outcome, STACKS) if outcome is not None]
    ran = {outcome.stack for outcome in outcomes}
    missing = [key(stack) for stack in STACKS if stack not in ran]
    if missing:
        print(f"Not run with this code yet: {', '.join(missing)}")
        return 1
    saved = {case.name: case.folder for case in kept.cases(graphs=False)}
    served = [by_rule(name, version, rule, saved) for name, version, rule in SERVERS]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(outcomes, served, kept.code), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")
    return int(any(one.problem for one in outcomes) or any(problem for *_, problem in served))


def code_hash() -> str:
    """What all files of the package and of this folder are, but for the words of the page."""
    found = sha256()
    for path in sorted(_files(ROOT / "st_embfilter", ROOT / "compat")):
        name = path.relative_to(ROOT).as_posix()
        if name == "compat/page.py":
            continue
        found.update(f"{name}\n{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def _files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                yield path


def key(stack: Stack) -> str:
    """Name and version of a row."""
    pinned = dict(text.split("==") for text in stack.requirements if "==" in text)
    return f"{stack.name} {pinned.get(stack.package, '')}".strip()


def fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its stack."""
    found = asdict(outcome)
    del found["stack"]
    return found


class Kept:
    """What ran with one state of the code: folders, graphs and rows.

    Args:
        environments: Where the environments are; `ran/` is beside them.
        code: Hash of the code; what another one left there is removed.
    """

    def __init__(self, environments: Path, code: str) -> None:
        self.place, self.code = environments / "ran", code
        stamp = self.place / "code.txt"
        if not (stamp.is_file() and stamp.read_text() == code):
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(parents=True)
            stamp.write_text(code)

    def outcome(self, stack: Stack) -> Outcome | None:
        """The row of a stack, if it ran."""
        file = self.place / f"{key(stack)}.json"
        return Outcome(stack, **json.loads(file.read_text())) if file.is_file() else None

    def keep(self, outcome: Outcome) -> None:
        """Stores a row."""
        file = self.place / f"{key(outcome.stack)}.json"
        file.write_text(json.dumps(fields(outcome)))

    def cases(self, graphs: bool) -> list[Case]:
        """The saved folders, or the graphs; made at their first use."""
        place = self.place / ("graphs" if graphs else "folders")
        if not place.is_dir():
            made = place.with_suffix(".part")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            (export if graphs else build)(made)
            made.rename(place)
        names = GRAPHS if graphs else FOLDERS
        return [stored(name, place / str(i)) for i, name in enumerate(names)]


def stored(name: str, folder: Path) -> Case:
    """A case that `build` or `export` wrote."""
    about = json.loads(folder.with_suffix(".json").read_text())
    return Case(name, folder, np.load(folder.with_suffix(".npy")), **about)


def build(place: Path) -> None:
    """Saves the folders and encodes the texts with them, as this project does."""
    for i, (options, _) in enumerate(FOLDERS.values()):
        folder = st_embfilter.save_pretrained(model(options), place / str(i))
        _store(folder, st_embfilter.load(folder, device="cpu"), {})


def export(place: Path) -> None:
    """Exports the graphs and encodes the texts in torch."""
    for i, (options, dtype) in enumerate(GRAPHS.values()):
        ours = model(options | {"dtype": "float32"})
        made = st_embfilter.export_onnx(ours, place / str(i), dtype=dtype)
        _store(place / str(i), ours, {"dtype": dtype, "loss": made.difference})


def _store(folder: Path, ours: SentenceTransformer, about: dict[str, Any]) -> None:
    np.save(folder.with_suffix(".npy"), ours.encode(TEXTS).astype(np.float64))
    folder.with_suffix(".json").write_text(json.dumps(about))


def model(options: dict[str, Any]) -> SentenceTransformer:
    """The bundled language model with these options."""
    return st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False, **options)


def run(stack: Stack, environment: Path, cases: list[Case]) -> Outcome:
    """Installs what a stack needs, runs its check on every folder, compares."""
    worst, loss, normalizes, memory = 0.0, None, False, None
    versions: dict[str, str] = {}
    problem = None
    try:
        for case in cases:
            expected, texts = case.expected, TEXTS
            if stack.javascript and "prompt" in GRAPHS[case.name][0]:
                expected, texts = expected[:-1], texts[:-1]
            parts, said = embed(stack, environment, case, texts)
            versions = said["versions"]
            if said.get("memory"):
                memory = max(memory or 0, said["memory"])
            for kind, part in parts.items():
                if stack.graph and case.dtype == "float32":
                    worst = max(worst, relative(part, expected))
                elif case.dtype == "float32":
                    error, unit = difference(part, expected)
                    worst = max(worst, error)
                    # What was cut off a unit vector is scaled by some, as their notes say.
                    normalizes |= unit and kind != "truncated"
                else:
                    loss = max(loss or 0.0, relative(part, expected))
            # Other texts than those of the export: as much again.
            if case.dtype != "float32" and (loss or 0.0) > 2 * case.loss:
                problem = f"8 bits lose {loss:.1e}, at the export {case.loss:.1e}"
    except (RuntimeError, ValueError) as error:
        return Outcome(stack, {}, None, False, str(error))
    if worst > TOLERANCE:
        problem = f"differs by {worst:.1e}"
    return Outcome(stack, versions, worst, normalizes, problem, loss, memory)


def embed(
    stack: Stack, environment: Path, case: Case, texts: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Embeddings by the way they were asked for; versions of packages, and memory in MB."""
    place = environment.parent / "ran"
    place.mkdir(exist_ok=True)
    (place / "texts.json").write_text(json.dumps(texts))
    if stack.javascript is not None:
        found = stack.javascript(environment, case.folder, place / "texts.json", DTYPES[case.dtype])
        parts = {name: np.array(rows) for name, rows in found.pop("arrays").items()}
        return parts, found | {"versions": {stack.package: found["version"]}}
    python = prepare(environment, stack.requirements, stack.without)
    output = place / "embeddings.npz"
    words = (stack.name, stack.package, case.folder, place / "texts.json", output)
    lines = call([python, "-I", CHECK, *words], cwd=place).splitlines()
    said = [one for one in lines if one.startswith('{"stack":')][-1]  # servers talk while they end
    with np.load(output) as parts:
        return dict(parts), json.loads(said)


def relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference relative to an embedding's length."""
    gap = np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)
    return float(gap.max())


def difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, bool]:
    """Largest difference of an entry, and whether they scaled to unit length, as cosines allow.

    Raises:
        ValueError: If they have another number of texts or more dimensions.
    """
    if len(theirs) != len(ours) or theirs.shape[1] not in (ours.shape[1], ours.shape[1] // 2):
        raise ValueError(f"got embeddings of shape {theirs.shape}, not {ours.shape}")
    ours = ours[:, : theirs.shape[1]]
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    scaled = bool(
        np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-4) and not np.allclose(ours, unit)
    )
    return float(np.abs(theirs - (unit if scaled else ours)).max()), scaled


def prepare(
    environment: Path, requirements: tuple[str, ...], without: tuple[str, ...] = ()
) -> Path:
    """An environment with these requirements and nothing else; kept for the next run."""
    python = environment / "bin" / "python"
    stamp = environment / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    # Our torch alone: not one with CUDA, gigabytes that no check needs, and no other pin of ours.
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if pin.startswith("torch==")))
    call([python, "-m", "pip", "install", "-q", "-c", constraints, *requirements])
    if without:
        call([python, "-m", "pip", "uninstall", "-q", "-y", *without])
    stamp.write_text(wanted)
    return python


def call(command: list[Any], **options: Any) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: With the last line of what it said, if it failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )
    if done.returncode:
        said = [text for text in (done.stderr + done.stdout).splitlines() if text.strip()]
        raise RuntimeError(said[-1].strip() if said else f"exit code {done.returncode}")
    return done.stdout


def by_rule(
    name: str, version: str, rule: Any, folders: dict[str, Path]
) -> tuple[str, str, str | None]:
    """What a server's parsing rules say about the folders: name, version, problem."""
    for kind, folder in folders.items():
        options, pooling = FOLDERS[kind]
        try:
            served = rule(folder)
        except rules.RuleError as error:
            return name, version, str(error)
        wanted = rules.Served(pooling, 256, int(256 * options["keep"]), 512)
        if served != wanted:
            return name, version, f"{served} instead of {wanted}"
    return name, version, None


if __name__ == "__main__":
    sys.exit(main())
