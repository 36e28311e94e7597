"""Small things that every room needs: names that load late, JSON, text that is safe to show."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from st_embfilter.errors import EmbedFilterError, FormatError

if TYPE_CHECKING:
    from jinja2 import Template
    from tqdm import tqdm

#: Deepest nesting of arrays and objects. No file of a model comes near; those who parse it again,
#: or print it, run out of stack somewhere above.
MAX_JSON_DEPTH: Final = 64

_KINDS: Final = {dict: "object", list: "array"}

#: Half of a pair that stands for one character beyond the first 65,536.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package that imports a public name at its first use.

    Args:
        package: Dotted name of the package.
        homes: Public name to the module, relative to the package, that defines it.

    Raises:
        AttributeError: From the function that is returned, for any other name.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load


def read_json(
    data: str | bytes | bytearray,
    what: str,
    error: type[EmbedFilterError],
    kind: type[dict[str, Any]] | type[list[Any]] = dict,
    *,
    infinity: bool = False,
) -> Any:
    """The value of a JSON text, read strictly: what two readers could take differently is refused.

    Args:
        data: The text; bytes must be UTF-8.
        what: Name of the text in errors, e.g. "modules.json" or "results.jsonl, line 3".
        error: Class of the error to raise.
        kind: What stands at the top: an object (dict) or an array (list).
        infinity: Whether the words Infinity and -Infinity, which are no JSON, stand for numbers.

    Raises:
        EmbedFilterError: A `error`, if the text is no JSON of that kind; or holds a name
            twice in one object, NaN, a number beyond the range of float64, half a surrogate pair,
            or more than `MAX_JSON_DEPTH` levels.
    """

    def constant(word: str) -> float:
        if infinity and word != "NaN":
            return float(word)
        raise ValueError(f"the constant {word}, which is no JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"a number beyond the range of float64: {digits:.40}")
        return value

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=constant, parse_float=number
        )
        _check_json(value, escapes="\\u" in text or _SURROGATE.search(text) is not None)
    except UnicodeDecodeError as found:
        raise error(
            f"{what} must be JSON in UTF-8, got {found.reason} at byte {found.start}"
        ) from found
    except RecursionError as found:
        raise error(f"{what} must be JSON of at most {MAX_JSON_DEPTH} levels, got more") from found
    except ValueError as found:
        raise error(f"{what} must be JSON, got {shown(found)}") from found
    if not isinstance(value, kind):
        raise error(f"{what} must be a JSON {_KINDS[kind]}, got {shown(data)[:60]}")
    return value


def json_text(value: object) -> str:
    """A JSON document as this package writes them: indented, in UTF-8, closed by a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Writes a JSON document, see `json_text`."""
    path.write_text(json_text(value), encoding="utf-8")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        doubled = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {doubled!r:.80} twice")
    return found


def _check_json(value: object, escapes: bool) -> None:
    """Checks depth and, if there may be any, half surrogate pairs."""
    level: list[object] = [value]
    for depth in count():
        inner: list[object] = []
        for item in level:
            if isinstance(item, (dict, list)):
                if depth == MAX_JSON_DEPTH:
                    raise RecursionError
                inner += item.values() if isinstance(item, dict) else item
                if escapes and isinstance(item, dict):
                    inner += item
            elif escapes and isinstance(item, str) and _SURROGATE.search(item):
                raise ValueError(f"half a surrogate pair in {item!r:.80}")
        if not inner:
            return
        level = inner


def progress_bar(
    title: str,
    unit: str,
    total: int | None = None,
    *,
    show: bool,
    scaled: bool = False,
    leave: bool = True,
) -> tqdm[Any]:
    """A progress bar on standard error, where a person watches.

    Args:
        title: What goes on.
        unit: What is counted.
        total: How many there are, where that is known.
        show: False for no bar at all.
        scaled: Print counts with k, M, G.
        leave: Keep the finished bar on the screen.
    """
    from tqdm.auto import tqdm

    return tqdm(
        total=total,
        unit=unit,
        unit_scale=scaled,
        desc=title,
        leave=leave,
        disable=None if show else True,  # None: only on a terminal
    )


def shown(text: object, limit: int = 200) -> str:
    r"""A stranger's text for messages, on one line: what steers a terminal is written as escapes.

    Args:
        text: Shown as `str` gives it; bytes as UTF-8, as far as they are.
        limit: Most characters of it that are shown.

    Returns:
        E.g. `a\x1b[2J` for a text that clears the screen, `a\u202eb` for one that turns around.
    """
    if isinstance(text, (bytes, bytearray)):
        text = text[: 4 * limit].decode("utf-8", errors="replace")
    text = str(text)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return visible(text)


def visible(text: str, keep: str = "") -> str:
    """The text with what steers a terminal as escapes, except for the characters `keep`."""
    return "".join(
        repr(c)[1:-1]
        if c not in keep and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else c
        for c in text
    )


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, or its class where it has none, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0], limit).rstrip(".")


def is_failure(error: BaseException) -> bool:
    """Whether something failed, in Python or in a library in Rust; no interrupt, no exit.

    A panic of Rust is no `Exception`, on purpose; a stranger's tokenizer makes one.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def reading(
    what: object, error: type[EmbedFilterError] = FormatError, must: str = "be readable"
) -> Iterator[None]:
    """A boundary around the reading of a stranger's file: every failure becomes a typed error.

    Our own errors pass, for they say more. Whatever else a parser raises, on whatever file, is an
    error of the class `error`, so that no list of exceptions can be too short.

    Args:
        what: Name of the file, as the message shows it.
        error: Class of the error to raise.
        must: The rule that it breaks.
    """
    try:
        yield
    except EmbedFilterError:
        raise
    except BaseException as found:
        if not is_failure(found):
            raise
        raise error(f"{shown(what)} must {must}, got {first_line(found)}") from found


@cache
def template(name: str) -> Template:
    """A template of this package, in Markdown or, by its name, in HTML.

    Filters: `code` and `cell`, a code span in Markdown, also in a table; `literal` and `inline`,
    text that Markdown takes as it is, all of it or but for emphasis; `fence`, a block of code.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("st_embfilter", "templates"),
        autoescape=name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "cell": cell,
        "fence": fence,
        "inline": inline,
        "literal": literal,
    }
    return environment.get_template(name)


def literal(text: object) -> str:
    """Text on one line that Markdown takes as it is."""
    return re.sub(r"([\\`*_\[\]<>|$&~])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Inline code on one line, whatever backticks or control characters are in it."""
    line = shown(text, limit=100_000)
    ticks = "`" * (1 + _longest_run(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def cell(text: object) -> str:
    """Inline code in a cell of a table, where a bar would end the cell."""
    return code(text).replace("|", "\\|")


def inline(text: object) -> str:
    """Text on one line that makes no HTML, link or cell of its own in Markdown."""
    return re.sub(r"([\\`\[\]<>|&])", r"\\\1", shown(text, limit=1000))


def fence(text: object, language: str = "text") -> str:
    """A block of code, whatever backticks are in it."""
    ticks = "`" * max(3, 1 + _longest_run(str(text)))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
