"""Files behind http URLs, from a server of this machine."""

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_embfilter.corpus.inputs import MARKS, Position, Rows, find_inputs, index_rows
from st_embfilter.errors import CorpusError, MissingPackageError


class Handler(SimpleHTTPRequestHandler):
    """Files and listings; of files, parts too."""

    parts = lengths = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir() or not path.exists():
            (super().do_GET if self.command == "GET" else super().do_HEAD)()
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.parts:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        if self.lengths:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class WholeFiles(Handler):
    """Gives whole files only."""

    parts = False


class Silent(Handler):
    """Does not tell how long a file is."""

    parts = lengths = False


@pytest.fixture(params=[Handler])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of the folder `web`."""
    folder = tmp_path / "web"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text("".join(f'{{"text": "a {i}"}}\n' for i in range(MARKS + 9)))
    (folder / "b.txt").write_text("b 0\nhttp://nowhere.invalid/\n")
    pq.write_table(pa.table({"text": ["c 0", "c 1"]}), folder / "sub" / "c.parquet")

    def handler(*arguments: object) -> object:
        return request.param(*arguments, directory=str(folder))

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_without_its_package_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = vars(importlib.import_module("fsspec.registry"))["_registry"]
    for name in ("http", "https"):
        monkeypatch.delitem(loaded, name, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for pattern in ("https://host/a.jsonl", "simplecache::https://host/a.jsonl"):
        with pytest.raises(MissingPackageError, match=f"{pattern} needs .*: pip install aiohttp"):
            find_inputs([pattern])


def texts(*patterns: str) -> list[str | None]:
    return [row.text for row in Rows(find_inputs(patterns))]


def test_files_folders_patterns_and_queries(server: str) -> None:
    a = [f"a {i}" for i in range(MARKS + 9)]
    b, c = ["b 0", "http://nowhere.invalid/"], ["c 0", "c 1"]
    assert texts(f"{server}/a.jsonl?download=true") == a
    assert texts(f"{server}/b.txt", f"simplecache::{server}/b.txt") == 2 * b
    assert texts(f"{server}/sub/c.parquet") == c
    assert texts(f"{server}/*.txt") == b
    assert texts(f"{server}/") == a + b + c
    for item in find_inputs([f"{server}/", f"simplecache::{server}/b.txt"]):
        assert find_inputs([item.url]) == [item]


def test_reading_goes_on_in_the_middle(server: str) -> None:
    (file,) = find_inputs([f"{server}/a.jsonl"])
    count, marks = index_rows(file, "text", None)
    assert count == MARKS + 9
    start = Position(MARKS, 0, MARKS, marks[1])
    assert next(iter(Rows([file], start=start))).text == f"a {MARKS}"


@pytest.mark.parametrize("server", [WholeFiles], indirect=True)
def test_a_server_that_gives_whole_files_only(server: str) -> None:
    (file,) = find_inputs([f"{server}/a.jsonl"])
    with pytest.raises(CorpusError, match=r"can no longer be read: .* put simplecache:: before"):
        next(iter(Rows([file], start=Position(1, 0, 1, 16))))
    cached = Rows(find_inputs([f"simplecache::{server}/a.jsonl"]), start=Position(1, 0, 1, 16))
    assert next(iter(cached)).text == "a 1"


@pytest.mark.parametrize("server", [Silent], indirect=True)
def test_a_server_that_tells_no_lengths(server: str) -> None:
    with pytest.raises(CorpusError, match=r"no length of http.*/b.txt; put simplecache:: before"):
        find_inputs([f"{server}/b.txt"])
    assert texts(f"simplecache::{server}/b.txt")[0] == "b 0"


def test_what_no_server_answers(server: str) -> None:
    with pytest.raises(CorpusError, match=r"got http.*missing\.txt: 404"):
        find_inputs([f"{server}/missing.txt"])
    with pytest.raises(CorpusError, match=r"got http://127\.0\.0\.1:9/a\.txt: .*onnect"):
        find_inputs(["http://127.0.0.1:9/a.txt"])
