"""Runtimes of `bench_versions.py`, each in a folder of its own, and what it makes of the files there.

A version is ``package==1.2`` of pip, ``npm:package@1.2`` in node, or ``chromium:package@1.2`` in a page of a browser.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import venv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

Row = dict[str, object]

CHILDREN = Path(__file__).parent / "runtimes"
PIP = {"onnxruntime": "onnxruntime", "openvino": "openvino", "opencv-python-headless": "opencv", "tract": "tract"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No profile, no sandbox (which needs more rights than a container has), and nothing fetched in the background.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 600.0


class Declined(Exception):
    """A program that this machine lacks, with the command that installs it."""


class Failed(Exception):
    """An installation or a child that ended before all its rows."""


def package_of(version: str) -> str:
    """The name of the package of a version."""
    return re.split("==|@", version.partition(":")[2] or version)[0]


def rows(version: str, files: Path, home: Path) -> list[Row]:
    """What one version makes of the files; one that cannot be tried has a single row, which says why."""
    run = {"npm": node, "chromium": browser}.get(version.partition(":")[0], python)
    try:
        found = run(version, files, home)
    except Declined as why:
        found = [{"declined": str(why)}]
    except Failed as why:
        found = [{"error": str(why)}]
    return [{"version": version, **row} for row in found]


def python(version: str, files: Path, home: Path) -> list[Row]:
    """In a virtual environment with numpy alone beside the runtime."""
    place = home / version
    venv.create(place, with_pip=True)
    started(place / "bin" / "python", "-m", "pip", "install", "--quiet", version, "numpy")
    return read(started(place / "bin" / "python", CHILDREN / "run.py", PIP[package_of(version)], files))


def node(version: str, files: Path, home: Path) -> list[Row]:
    """In node."""
    program = needed("node", "apt-get install nodejs npm")
    return read(started(program, CHILDREN / "run.mjs", package_of(version), files, modules(version, home)))


def browser(version: str, files: Path, home: Path) -> list[Row]:
    """In a page that a server on this machine hands to chromium."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None) or needed("chromium", "apt-get install chromium")
    told = subprocess.run([program, "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    with Served(files, modules(version, home) / "node_modules") as served, opened(program, served.page()):
        ended = served.ended.wait(SECONDS)
    if not ended or served.failure:
        raise Failed(f"the page in {told.strip()} must run to its end: got {served.failure or 'no end'}")
    return [{**row, "browser": told.strip()} for row in served.rows]


def modules(version: str, home: Path) -> Path:
    """The folder with node_modules; onnxruntime-node's install script would fetch CUDA's library: it is not run."""
    npm, name = needed("npm", "apt-get install nodejs npm"), version.partition(":")[2]
    place = home / name
    if not place.exists():
        place.mkdir()
        (place / "package.json").write_text("{}", encoding="utf-8")
        started(npm, "install", "--silent", "--ignore-scripts", "--prefix", place, name)
    return place


def needed(program: str, command: str) -> str:
    """Where a program is; Declined where it is not installed."""
    found = shutil.which(program)
    if found is None:
        raise Declined(f"{program} must be installed: it is not. Run `{command}`.")
    return found


def started(*command: str | Path) -> str:
    """What a command prints; Failed with the last line of its errors."""
    words = list(map(str, command))
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no word"])[-1][-300:]
        raise Failed(f"{Path(words[0]).name} {words[1]} must end with 0: got {ran.returncode}, {last}")
    return ran.stdout


def read(text: str) -> list[Row]:
    """Rows of a child's output, which may hold other lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"file"')]


@contextlib.contextmanager
def opened(program: str, page: str) -> Iterator[None]:
    """A browser with a page, in an empty profile, until the block ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command: Sequence[str] = (program, *FLAGS, f"--user-data-dir={profile}", page)
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            running.terminate()
            running.wait(30)


class Served(http.server.ThreadingHTTPServer):
    """The page, the modules and the files, on a port of this machine; it holds the rows that the page sends."""

    def __init__(self, files: Path, modules: Path) -> None:
        self.rows: list[Row] = []
        self.failure: str | None = None
        self.ended = threading.Event()
        self.folders = {"files": files, "modules": modules, "runtimes": CHILDREN}
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(CHILDREN)))

    def page(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}/runtimes/page.html"

    def __enter__(self) -> Served:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    """``/files``, ``/modules`` and ``/runtimes``, and rows that are POSTed."""

    server: Served

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        """By the ending, the same on every machine; compiling wasm as it comes needs its own."""
        known = {".mjs": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}
        return known.get(Path(path).suffix, "application/octet-stream")

    def translate_path(self, path: str) -> str:
        """A file of one of the folders, and nothing outside."""
        _, name, rest = path.partition("?")[0].split("/", 2) if path.count("/") > 1 else ("", "", "")
        folder = self.server.folders.get(name, CHILDREN / "none").resolve()
        found = (folder / rest).resolve()
        return str(found if found.is_relative_to(folder) else folder / "none")

    def do_POST(self) -> None:
        """A row, or ``{"end": why}``, where why is null after all rows."""
        row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "end" in row:
            self.server.failure = row["end"]
            self.server.ended.set()
        else:
            self.server.rows.append(row)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing of each request."""
