"""The one JSON reader, and what is shown of a stranger's texts."""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import st_embfilter
from st_embfilter.errors import DataError, FormatError
from st_embfilter.text import (
    MAX_JSON_DEPTH,
    cell,
    code,
    fence,
    first_line,
    inline,
    literal,
    read_json,
    shown,
)

REFUSED = [
    ("", "must be JSON"),
    ("{", "must be JSON"),
    (b"\xff\xfe{\x00}\x00", "must be JSON in UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "must be JSON in UTF-8"),
    ("\ufeff{}", "must be JSON"),
    ("[1, 2]", "must be a JSON object"),
    ("null", "must be a JSON object"),
    ('{"a": 1, "a": 1}', "the name 'a' twice"),
    ('{"b": [{"a": 1, "\\u0061": 2}]}', "the name 'a' twice"),
    ('{"a": NaN}', "NaN"),
    ('{"a": [Infinity]}', "Infinity"),
    ('{"a": -Infinity}', "-Infinity"),
    ('{"a": 1e999}', "range of float64"),
    ('{"a": "\\ud800"}', "surrogate"),
    ('{"a": ["x", {"\\udc00b": 1}]}', "surrogate"),
    ('{"a": "\ud800"}', "surrogate"),
    ('{"a": ' + "1" * 5000 + "}", "must be JSON"),
    ('{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}", "levels"),
    ("[" * 100_000, "levels"),
    ('{"a":' * 100_000, "levels"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refuses_what_two_readers_could_take_differently(text, message):
    with pytest.raises(FormatError, match=r"^x\.json must be") as caught:
        read_json(text, "x.json", FormatError)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_class_of_the_error_and_kind_are_the_callers():
    assert read_json("[1]", "x", DataError, list) == [1]
    with pytest.raises(DataError, match="x must be a JSON array"):
        read_json("{}", "x", DataError, list)
    assert read_json('{"a": -Infinity}', "x", DataError, infinity=True) == {"a": -float("inf")}
    with pytest.raises(DataError, match="NaN"):
        read_json('{"a": NaN}', "x", DataError, infinity=True)
    deepest = "[" * MAX_JSON_DEPTH + "1" + "]" * MAX_JSON_DEPTH
    assert read_json(deepest, "x", DataError, list) == json.loads(deepest)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_reads_what_is_json(value, escaped):
    text = json.dumps(value, ensure_ascii=escaped)
    assert read_json(text, "x", FormatError) == value
    assert read_json(text.encode(), "x", FormatError) == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_anything_is_read_or_refused(data):
    try:
        read_json(data, "x", FormatError)
    except FormatError as error:
        shows = str(error).isprintable()
        assert shows


def test_no_other_reader_of_files_in_the_package():
    """`json.loads` stands in `read_json`, and where a library hands over its own JSON."""
    root = Path(st_embfilter.__file__).parent
    own = {"text.py": 1, "model/tokenizer.py": 2, "model/fingerprint.py": 1}
    own |= {"model/gguf_backbone.py": 1, "model/static.py": 1}
    own |= {"corpus/shard.py": 1, "corpus/cluster.py": 2}  # their own
    own |= {"saved/onnx_out.py": 1}  # of the folder that is being written
    own |= {"saved/static_checks.py": 2, "saved/baked_checks.py": 1}  # what tokenizers hands over
    found = {}
    for file in root.rglob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
            and node.attr in ("loads", "load", "JSONDecoder")
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
        ]
        if calls:
            found[file.relative_to(root).as_posix()] = len(calls)
    assert found == own


@given(st.text())
def test_shown_is_one_printable_line(text):
    line = shown(text)
    assert len(line.splitlines()) <= 1
    assert not any(c in line for c in "\x1b\x07\x9b\u202e\u2066\u200b\r\n")
    assert len(shown("x" * 10_000)) == 200


def test_shown_keeps_letters_and_escapes_the_rest():
    assert shown("naïve 日本 🙂") == "naïve 日本 🙂"
    assert shown("a\x1b[2Jb\u202ec\n\ud800") == r"a\x1b[2Jb\u202ec\n\ud800"
    assert shown(b"\xffx") == "\ufffdx"


def test_first_line_of_an_error():
    assert first_line(ValueError("\n one.\n two")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("\x1b]0;title\x07")) == r"\x1b]0;title\x07"


def test_a_strangers_words_make_nothing_of_their_own_in_markdown():
    evil = "<img src=x>|[a](b)`c`&lt;\n# d\x1b[2J"
    assert inline(evil) == (r"\<img src=x\>\|\[a\](b)\`c\`\&lt;\\n# d\\x1b\[2J")
    assert literal("*a*  _b_ $c$ ~d~ " + evil).startswith(r"\*a\* \_b\_ \$c\$ \~d\~ \<img")


@pytest.mark.parametrize("text", ["a`b", "``", "`", "a|b", "x\ny", "<b>", "\x1b"])
def test_code_stays_in_its_line_and_its_cell(text):
    line = code(text)
    ticks = line[: len(line) - len(line.lstrip("`"))]
    assert line.endswith(ticks)
    assert line[len(ticks) : -len(ticks)].count(ticks) == 0
    assert not {"\n", "\x1b"} & set(line)
    assert cell(text).count("|") == cell(text).count("\\|")
    body = fence(text).split("\n")
    assert body[0].rstrip("tex") == body[-1]
    assert body[-1] not in text
