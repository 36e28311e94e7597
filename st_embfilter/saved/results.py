"""Result rows, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from st_embfilter.errors import DataError, EmbedFilterError
from st_embfilter.files.staging import replace_file
from st_embfilter.text import read_json, reading

if TYPE_CHECKING:
    import pandas as pd


def _kinds(annotation: str) -> tuple[type, ...]:
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,)}
    return kinds.get(annotation.removesuffix(" | None"), (int, float))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One score: a configuration on a task. Its fields are the keys of `results.jsonl`.

    Scores are as MTEB gives them: correlations in [-1, 1], all others in [0, 1]. Those of a paper
    have a `source` and not much else; what was measured here has all but that.

    Attributes:
        task: Name of the task.
        task_type: STS, Retrieval, Classification, Clustering ...
        dataset: Name of the data.
        revision: Version of the data; for local files a hash of their bytes.
        split: Part of the data.
        metric: Name of the score, as in MTEB.
        configuration: "raw", "truncate", "bulk", "offset:128", "whiten" ...
        dims: Width of the embeddings.
        full_dims: Width of the raw embeddings.
        start: First kept singular direction of a contiguous band.
        needs_data: Whether the configuration was fitted on texts.
        fitted_on: On which ones.
        score: The task's main score.
        low: Lower bound of the score's bootstrap interval, None where it cannot be resampled.
        high: Upper bound.
        delta: The score minus the raw model's.
        delta_low: Lower bound of the paired bootstrap interval of delta.
        delta_high: Upper bound.
        std: Standard deviation over seeds, for the mean over random directions.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
        units: Pairs, queries or texts that were resampled.
        model: Folder name or Hub id of the language model.
        prompt: Prompt recipe, None for plain text.
        pooling: Pooling mode.
        normalize: Whether embeddings had unit length.
        max_seq_length: Longest text in tokens.
        measured_by: Whose code computed the score, with its version.
        command: The command line that gave this row, if it was one.
        layers: Number of blocks that were run, in a sweep over depth; None for all of them.
        source: Who reports the score; None if it was measured with this project.
    """

    task: str
    task_type: str = ""
    dataset: str
    revision: str | None = None
    split: str
    metric: str
    configuration: str
    dims: int
    full_dims: int = 0
    start: int | None = None
    needs_data: bool = False
    fitted_on: str | None = None
    score: float
    low: float | None = None
    high: float | None = None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    std: float | None = None
    level: float = 0.95
    resamples: int = 0
    units: int = 0
    model: str | None = None
    prompt: str | None = None
    pooling: str | None = None
    normalize: bool = False
    max_seq_length: int | None = None
    measured_by: str = ""
    command: str | None = None
    layers: int | None = None
    source: str | None = None

    @classmethod
    def parse(cls, row: Mapping[str, Any], where: str, error: type[EmbedFilterError]) -> Result:
        """A row from its JSON object; unknown keys are left out.

        Raises:
            EmbedFilterError: Of the class `error`, if a key is missing or of the wrong kind; names
                `where`.
        """
        values: dict[str, Any] = {}
        for name, kinds, required in _KEYS:
            value = row.get(name)
            if value is None and not required:
                continue
            fits = isinstance(value, kinds) and (type(value) is not bool or bool in kinds)
            if not fits or (type(value) is int and abs(value) >= 2**53):
                raise error(f"{where}: a result needs a valid {name!r}, got {value!r:.80}")
            values[name] = value
        if not -1.0 <= values["score"] <= 1.0:
            raise error(
                f"{where}: a score must be in [-1, 1], got {values['score']!r}; cards show it x 100"
            )
        return cls(**values)

    @property
    def verdict(self) -> str:
        """Sign of delta if its interval excludes zero, "=" if it does not, "?" without one."""
        if self.delta_low is None or self.delta_high is None:
            return "?"
        return "+" if self.delta_low > 0 else "-" if self.delta_high < 0 else "="

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Its values by name; `source` only where there is one."""
        values = asdict(self)
        if self.source is None:
            del values["source"]
        return values


#: Every key, the types of its values, and whether a row must have it.
_KEYS: Final = tuple(
    (field.name, _kinds(str(field.type)), field.default is MISSING) for field in fields(Result)
)


def write_results(rows: Iterable[Result], file: str | os.PathLike[str]) -> None:
    """Writes JSON Lines, or CSV if the name ends in .csv; the file is replaced at once."""
    stream = io.StringIO()
    if Path(file).suffix == ".csv":
        writer = csv.DictWriter(stream, [f.name for f in fields(Result) if f.name != "source"])
        writer.writeheader()
        writer.writerows(row.to_dict() for row in rows)
    else:
        stream.writelines(f"{row.to_json()}\n" for row in rows)
    replace_file(file, stream.getvalue().encode())


def read_results(file: str | os.PathLike[str]) -> list[Result]:
    """Reads JSON Lines that `write_results` wrote.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    with reading(path, DataError):
        text = path.read_text(encoding="utf-8")
    return list(parse_results(text, str(path), DataError))


def parse_results(text: str, name: str, error: type[EmbedFilterError]) -> tuple[Result, ...]:
    """Rows from JSON Lines.

    Args:
        text: Content of the file; empty lines are left out.
        name: Name of the file, for errors.
        error: Class of the errors.

    Raises:
        EmbedFilterError: Of that class; names the line.
    """
    lines = [(f"{name} line {i}", line) for i, line in enumerate(text.splitlines(), 1)]
    return tuple(
        Result.parse(read_json(line, f"{where}:", error), where, error)
        for where, line in lines
        if line.strip()
    )


def results_frame(rows: Sequence[Result]) -> pd.DataFrame:
    """The rows as a pandas table."""
    import pandas as pd

    return pd.DataFrame([row.to_dict() for row in rows])
