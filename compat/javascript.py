"""Runs an exported graph in transformers.js: in Node, and in headless Chromium from a static page.

The library comes from npm. Its native part asks a server of its own for files at installation; with
`--ignore-scripts` it takes those of the package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

TRANSFORMERS_JS: Final = "@huggingface/transformers@4.3.1"

#: What a browser loads: the library, and the WebAssembly that it starts.
LIBRARY: Final = "transformers.min.js"
RUNTIME: Final = "ort-wasm-simd-threaded.asyncify"

SCRIPT: Final = Path(__file__).with_name("transformers_js.mjs")

_PAGE: Final = """<!doctype html>
<meta charset="utf-8">
<script type="module">
import * as library from "./vendor/transformers.min.js";
import { embed } from "./transformers_js.mjs";
const post = (value) => fetch("./result", { method: "POST", body: JSON.stringify(value) });
try {
  library.env.allowRemoteModels = false;
  library.env.allowLocalModels = true;
  library.env.localModelPath = "./";
  library.env.useBrowserCache = false;
  library.env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL("./vendor/RUNTIME.mjs", location.href).href,
    wasm: new URL("./vendor/RUNTIME.wasm", location.href).href,
  };
  library.env.backends.onnx.wasm.numThreads = 1;
  const texts = await (await fetch("./texts.json")).json();
  const arrays = await embed(library, "model", texts, "DTYPE");
  await post({ arrays, version: library.env.version });
} catch (error) {
  await post({ error: String(error?.stack ?? error) });
}
</script>
"""


class JavaScriptError(RuntimeError):
    """JavaScript cannot be run here, or failed."""


def program(*names: str) -> str:
    """The path of the first of these programs that is there.

    Raises:
        JavaScriptError: If none is.
    """
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise JavaScriptError(f"needs {' or '.join(names)} on the PATH")


def chromium() -> str:
    """The browser. CHROMIUM may name it.

    Raises:
        JavaScriptError: If there is none.
    """
    return program(os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")


def node_packages(folder: Path) -> Path:
    """A folder in which Node finds transformers.js; kept for the next run."""
    stamp = folder / "requirements.txt"
    if not (stamp.is_file() and stamp.read_text() == TRANSFORMERS_JS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}\n')
        options = ("--ignore-scripts", "--no-audit", "--no-fund")
        _call([program("npm"), "install", *options, TRANSFORMERS_JS], folder)
        stamp.write_text(TRANSFORMERS_JS)
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    return folder


def vendor(folder: Path) -> None:
    """Puts what a browser loads into a folder, out of the packages on npm, if it is not there."""
    wanted = {LIBRARY, f"{RUNTIME}.mjs", f"{RUNTIME}.wasm"}
    stamp = folder / "versions.txt"
    there = {path.name for path in folder.glob("*")}
    if wanted <= there and stamp.is_file() and TRANSFORMERS_JS in stamp.read_text():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        needed = _unpack(TRANSFORMERS_JS, {LIBRARY}, Path(place), folder)
        runtime = f"onnxruntime-web@{needed['onnxruntime-web']}"
        _unpack(runtime, wanted - {LIBRARY}, Path(place), folder)
    stamp.write_text(f"{TRANSFORMERS_JS}\n{runtime}\n")


def _unpack(package: str, names: set[str], place: Path, folder: Path) -> dict[str, str]:
    """Copies files of a package's `dist`; returns what the package depends on."""
    said = _call([program("npm"), "pack", "--silent", package], place)
    with tarfile.open(place / said.split()[-1]) as archive:
        for name in names:
            content = archive.extractfile(f"package/dist/{name}")
            if content is None:
                raise JavaScriptError(f"{package} must hold dist/{name}, got none")
            (folder / name).write_bytes(content.read())
        about = archive.extractfile("package/package.json")
        found: dict[str, str] = json.loads(about.read() if about else b"{}")["dependencies"]
    return found


def in_node(environment: Path, folder: Path, texts: Path, dtype: str) -> dict[str, Any]:
    """Embeddings in Node: {"arrays": {name: rows}, "version": ...}."""
    node_packages(environment)
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output.json"
        command = [program("node"), environment / SCRIPT.name, folder, texts, output, dtype]
        _call(command, environment)
        found: dict[str, Any] = json.loads(output.read_text())
    return found


#: Seconds after which a page is given up: a guard against a hang, however slow the machine.
PATIENCE: Final = 1800


def in_browser(environment: Path, folder: Path, texts: Path, dtype: str) -> dict[str, Any]:
    """Embeddings in headless Chromium, by WebAssembly, from a page of static files."""
    vendor(environment)
    page = _PAGE.replace("RUNTIME", RUNTIME).replace("DTYPE", dtype)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "index.html").write_text(page, encoding="utf-8")
        (root / "vendor").symlink_to(environment.absolute())
        (root / "model").symlink_to(folder.absolute())
        shutil.copyfile(texts, root / "texts.json")
        shutil.copyfile(SCRIPT, root / SCRIPT.name)
        return visit(root, "index.html")


def visit(root: Path, page: str, *, tail: str = "", picture: Path | None = None) -> dict[str, Any]:
    """Opens a page in headless Chromium until it posts JSON to `./result`.

    Args:
        root: Folder of static files, as `python -m http.server` serves them.
        page: Path in it, with its query.
        tail: HTML that is put behind the page, to act in it.
        picture: PNG to write of the page after that.

    Raises:
        JavaScriptError: If the browser ends, nothing is posted, or an error.
    """
    results: list[dict[str, Any]] = []
    posted = threading.Event()
    options: list[str] = []
    if picture is not None:
        tail += '<img hidden alt="" src="./posted">'  # the picture is taken when all has loaded
        options = [f"--screenshot={picture.absolute()}", "--window-size=1000,640"]

    class Handler(_Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(204, b"")
            results.append(json.loads(body))
            posted.set()

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            if path.name == "posted":
                posted.wait(PATIENCE)
                self._answer(204, b"")
            elif tail and path.name == page.partition("?")[0]:
                self._answer(200, path.read_bytes() + tail.encode())
            else:
                super().do_GET()

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with (
        served(root, Handler) as url,
        # Chromium's other processes may write into it a moment longer than the one that is ended.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        _opened([*options, f"{url}/{page}"], profile) as browser,
    ):
        waited = 0.0
        while not posted.wait(0.5):
            waited += 0.5
            if browser.poll() is not None or waited > PATIENCE:
                raise JavaScriptError(f"the page must post a result, got none in {waited:.0f} s")
        if picture is not None:
            browser.wait(PATIENCE)
    if "error" in results[0]:
        raise JavaScriptError(results[0]["error"].splitlines()[0])
    return results[0]


class _Quiet(SimpleHTTPRequestHandler):
    """Static files, as `python -m http.server` serves them, without a log."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(root: Path, handler: type[SimpleHTTPRequestHandler] = _Quiet) -> Iterator[str]:
    """The address of a server of the files in a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _headless(profile: str) -> list[str]:
    """Chromium without a window; as root, as in a container, also without its sandbox."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [
        chromium(),
        "--headless=new",
        *(["--no-sandbox"] if root else []),
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ]


@contextmanager
def _opened(words: list[str], profile: str) -> Iterator[subprocess.Popen[bytes]]:
    quiet = subprocess.DEVNULL
    browser = subprocess.Popen([*_headless(profile), *words], stdout=quiet, stderr=quiet)
    try:
        yield browser
    finally:
        browser.terminate()
        browser.wait()


def _call(command: list[Any], cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise JavaScriptError(said[-1].strip() if said else f"exit code {done.returncode}")
    return done.stdout
