"""Files in other versions of the runtimes: what runs in the other environments, and what of its rows is wrong."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
NODE_MODULES = ROOT / "build" / "node"

SQUARE = '<ir_version: 10, opset_import: ["" : 21]> net (float[4] x) => (float[4] y) { y = Mul(x, x) }'
FLOAT = """<ir_version: 10, opset_import: ["" : 21]> net (float[4, 4] x) => (float[4, 4] y)
    <float[4, 4] w = {%s}> { y = MatMul(x, w) }"""
INT8 = """<ir_version: 10, opset_import: ["" : 21]> net (float[4, 4] x) => (float[4, 4] y)
    <int8[4, 4] w = {%s}, float one = {1}, float s = {0.0625}, uint8 z = {128}, int8 none = {0}> {
    q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, one, none)
    y = MatMul(d, v) }"""

# What onnxruntime's packages have, with a net that squares; a session's profile is printed as wasm prints it.
STUB = """
export class Tensor { constructor(type, data, dims) { this.data = data; } }
class Session {
  inputNames = ["x"]; outputNames = ["y"];
  constructor(profiled) { this.profiled = profiled; }
  async run({ x }) { return { y: { data: x.data.map((value) => value * value) } }; }
  async release() {}
  endProfiling() {
    const event = (name, op) => JSON.stringify({ name, args: { op_name: op } }).replace("{", '{"cat" : "Node",');
    if (this.profiled)
      print(["[", event("a_kernel_time", "QLinearConv") + ",", event("b_kernel_time", "MatMul") + ",",
             event("b_fence_before", "MatMul") + ",", event("c_kernel_time", "Add"), "]"].join("\\n"));
  }
}
export const InferenceSession = {
  async create(bytes, options) {
    if (bytes.length < 9) throw new Error("no\\n model");
    return new Session(options.enableProfiling);
  },
};
export const env = { wasm: {} };
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Imported as the script is, and forgotten afterwards, with what it imports of its folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module("bench_versions")
    for name in {"bench_versions", "machine", "versions_files", "versions_install"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def install(bench: ModuleType) -> ModuleType:
    return sys.modules["versions_install"]


def row(**given: Any) -> dict[str, Any]:
    usual = {"version": "onnxruntime==1.20.0", "file": "net.onnxruntime.int8.onnx", "level": "all"}
    return {**usual, "off": 0, "furthest": 1e-7, "of": 4, "error": None, **given}


def timed(**given: Any) -> dict[str, Any]:
    measured = {"int8_ms": 1.0, "float_ms": 2.0, "ratio": 0.5, "integer": 5, "products": 6, "kernels": {"MatMul": 1}}
    return row(**{**measured, **given})


CV, TRACT, NODE = "opencv-python-headless==5.0.0.93", "tract==0.23.9", "npm:onnxruntime-node@1.30.0"
PAGE = "chromium:onnxruntime-web@1.30.0"
KEYS = "attention.openvino.w4a8.onnx"
DYNAMIC, STAGE = "net.onnxruntime.w4a4_dynamic.onnx", "stage.onnxruntime.int8.onnx"


@pytest.mark.parametrize(
    ("given", "cpu", "told"),
    [
        ({}, "", None),
        ({"off": 2}, "", "net.onnxruntime.int8.onnx in onnxruntime==1.20.0, all: 2 of 4 values are off"),
        ({"off": 2}, "saturates", None),
        ({"off": 2, "level": "disable"}, "saturates", "2 of 4 values are off"),
        ({"off": 2, "file": "net.onnxruntime.w4a8.onnx"}, "saturates", "2 of 4 values are off"),
        ({"off": None, "error": "no kernel"}, "saturates", "net.onnxruntime.int8.onnx in onnxruntime==1.20.0, all: no"),
        ({"off": 2, "version": "openvino==2", "file": "net.onnxruntime.int8.onnx"}, "", None),
        ({"off": 2, "file": "net.generic.int8.onnx"}, "", "2 of 4 values are off"),
        ({"off": 2, "version": NODE}, "saturates", None),
        ({"off": 2, "version": PAGE}, "saturates", "2 of 4 values are off"),
        ({"off": 2, "version": TRACT}, "saturates", "2 of 4 values are off"),
        ({"off": 2, "version": "openvino==2", "file": "n.generic.w4a4.onnx", "level": "f32"}, "bfloat16", "are off"),
        ({"off": 2, "version": "openvino==2", "file": "n.generic.w4a4.onnx", "level": "default"}, "bfloat16", None),
        ({"off": 2, "version": "openvino==2", "file": "n.generic.w4a4.onnx", "level": "default"}, "", "are off"),
        ({"off": 2, "level": "default"}, "bfloat16", "2 of 4 values are off"),
        ({"off": None, "error": "y_scale must be a const", "version": TRACT, "file": DYNAMIC}, "", None),
        ({"off": None, "error": "y_scale must be a const", "version": TRACT}, "", "y_scale must be a const"),
        ({"off": None, "error": "a panic", "version": TRACT, "file": DYNAMIC}, "", "known for 'y_scale"),
        ({"version": TRACT, "file": DYNAMIC}, "", "known for 'y_scale must be a const', and it is right"),
        ({"off": None, "error": "failed: bufidx >= 0 in", "version": CV, "file": STAGE}, "", None),
        ({"off": 2, "file": KEYS}, "", None),
        ({"off": 2, "file": KEYS, "level": "disable"}, "", "2 of 4 values are off"),
        ({"off": 2, "file": KEYS, "version": "onnxruntime==1.27.0"}, "", "2 of 4 values are off"),
        ({"file": KEYS}, "", "known for 'values are off', and it is right"),
    ],
)
def test_what_is_wrong(bench: ModuleType, given: dict[str, Any], cpu: str, told: str | None) -> None:
    found = bench.why_wrong(row(**given), saturates=cpu == "saturates", bfloat16=cpu == "bfloat16")
    assert found is None if told is None else told in found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"integer": 6}, None),
        ({"integer": 4}, "all: 4 of 6 products are integers: {'MatMul': 1}"),
        ({"integer": 0, "products": 1}, "0 of 1 products are integers"),
        ({"integer": 4, "file": "net.generic.int8.onnx"}, None),
        ({"ratio": 1.2}, "1.2 of the float file's time"),
        ({"ratio": 1.2, "file": "net.generic.int8.onnx"}, None),
        ({"ratio": 1.2, "integer": 0, "version": CV}, None),
        ({"version": CV}, "known to be float, and 5 of 6 products are integers"),
    ],
)
def test_integers_and_speed_are_claims(bench: ModuleType, given: dict[str, Any], told: str | None) -> None:
    found = bench.why_wrong(timed(**given), saturates=False)
    assert found is None if told is None else told in found


def test_no_ratio_is_claimed_without_vnni(bench: ModuleType) -> None:
    assert bench.why_wrong(timed(ratio=1.2), saturates=True) is None


def test_a_version_that_cannot_be_tried(bench: ModuleType) -> None:
    declined = {"version": PAGE, "declined": "chromium must be installed: it is not."}
    failed = {"version": NODE, "error": "npm install must end with 0: got 1"}
    assert bench.why_wrong(declined, saturates=False) is None
    assert bench.why_wrong(failed, saturates=False) == f"{NODE}: npm install must end with 0: got 1"
    told = bench.table([declined, row(off=1), timed(file=STAGE), row(error="no", off=None), row(file=DYNAMIC)])
    assert told.splitlines()[2:] == [
        f"| {PAGE} | chromium must be installed: it is not. | | | | |",
        "| onnxruntime==1.20.0 | 3 of 4 | 1 | 1e-07 | stage 5 of 6 | stage 0.5 (1.0 / 2.0 ms) |",
    ]


def test_every_version_is_judged(bench: ModuleType, install: ModuleType) -> None:
    packages = {install.package_of(version) for version in bench.VERSIONS}
    assert packages == set(bench.JUDGED) == set(bench.BEST)
    assert all(best in bench.JUDGED[package] for package, (best, _) in bench.BEST.items())


def net(folder: Path, name: str, text: str | None, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """A file with input and output, as versions_files.py writes them; ``None`` is no model."""
    path = folder / f"{name}.onnxruntime.int8.onnx"
    path.write_bytes(b"no model" if text is None else onnx.parser.parse_model(text).SerializeToString())
    x.astype("<f4").tofile(path.with_suffix(".x"))
    y.astype("<f4").tofile(path.with_suffix(".y"))
    return {"file": path.name, "shape": list(x.shape)}


def written(folder: Path, pairs: bool = True) -> list[str]:
    """Two files, of which one has another last output than told and one is no model; a pair of a product."""
    x = np.arange(4, dtype=np.float32)
    files = [net(folder, "net", SQUARE, x, np.array([0, 1, 4, 10])), net(folder, "none", None, x, x)]
    numbers = ", ".join(map(str, range(-8, 8)))
    square = np.linspace(-4, 4, 16, dtype=np.float32).reshape(4, 4)
    codes = np.round(square * 16) / 16
    product = codes @ np.arange(-8, 8, dtype=np.float32).reshape(4, 4)
    pair = {
        "int8": net(folder, "int8", INT8 % numbers, square, product),
        "float": net(folder, "float", FLOAT % numbers, square, product),
    }
    given = {"files": files, "pairs": [pair] if pairs else [], "rounds": 3, "settle_ms": 0}
    (folder / "files.json").write_text(json.dumps(given), encoding="utf-8")
    return [file["file"] for file in files]


def child(*command: object) -> list[dict[str, Any]]:
    ran = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def held(found: list[dict[str, Any]], levels: int) -> None:
    """Rows of the two files at each level: one value is a tenth of the range off, and why there is none."""
    files, rest = found[: 2 * levels], found[2 * levels :]
    assert [(each["file"].partition(".")[0], each["off"], each["furthest"]) for each in files] == [
        *[("net", 1, 0.1)] * levels,
        *[("none", None, None)] * levels,
    ]
    assert len({each["level"] for each in files}) == levels
    assert all((each["error"] is None) == (each["off"] is not None) for each in files)
    assert all("\n" not in (each["error"] or "") for each in files)
    for each in rest:
        assert each["off"] == 0 and each["ratio"] > 0 and each["int8_ms"] > 0 and each["rounds"] == 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_python_tells_each_level(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    written(tmp_path)
    found = child(sys.executable, BENCH / "runtimes" / "run.py", runtime, tmp_path)
    held(found, {"onnxruntime": 5, "openvino": 2}[runtime])
    (last,) = (each for each in found if "ratio" in each)
    kernels = {"onnxruntime": {"MatMulIntegerToFloat": 1}, "openvino": {"FullyConnected u8": 1}}
    assert (last["integer"], last["products"], last["kernels"]) == (1, 1, kernels[runtime])
    assert last["clock"] == "CPU"


def node() -> str:
    return shutil.which("node") or pytest.skip("node is not installed")


def stub(folder: Path, package: str, prints: str, ending: str = "index.mjs") -> None:
    """A package with no runtime in it, to which both ways of loading lead."""
    place = folder / "node_modules" / package
    (place / Path(ending).parent).mkdir(parents=True)
    (place / ending).write_text(f"{STUB}\nfunction print(text) {{ {prints} }}\n", encoding="utf-8")
    exported = STUB.replace("export const ", "exports.").replace("export class Tensor", "exports.Tensor = class")
    (place / "index.cjs").write_text(
        f'const fs = require("fs");\n{exported}\nfunction print(text) {{ {prints} }}\n', encoding="utf-8"
    )
    (place / "package.json").write_text(json.dumps({"main": "index.cjs"}), encoding="utf-8")
    (folder / "package.json").write_text("{}", encoding="utf-8")


def test_node_tells_each_level(tmp_path: Path) -> None:
    program = node()
    stub(tmp_path, "onnxruntime-web", r'fs.writeSync(1, text + "\n")')
    files = tmp_path / "files"
    files.mkdir()
    written(files)
    for each in ("int8", "float"):  # what the stub makes of it
        x = np.fromfile(files / f"{each}.onnxruntime.int8.x", "<f4")
        (x * x).tofile(files / f"{each}.onnxruntime.int8.y")
    found = child(program, BENCH / "runtimes" / "run.mjs", "onnxruntime-web", files, tmp_path)
    held(found, 5)
    assert found[5]["error"] == "no model"
    counted = {"integer": 1, "products": 2, "kernels": {"MatMul": 1, "QLinearConv": 1}}
    assert {key: found[-1][key] for key in counted} == counted


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_onnxruntime_in_node(package: str, tmp_path: Path) -> None:
    program = node()
    if not (NODE_MODULES / "node_modules" / package).exists():
        pytest.skip(f"needs `npm install --ignore-scripts --prefix build/node {package}`")
    (NODE_MODULES / "package.json").touch()
    written(tmp_path)
    found = child(program, BENCH / "runtimes" / "run.mjs", package, tmp_path, NODE_MODULES)
    held(found, 5)
    assert (found[-1]["integer"], found[-1]["kernels"]) == (1, {"MatMulIntegerToFloat": 1})


def test_the_page_in_a_browser(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(shutil.which, install.BROWSERS)):
        pytest.skip("chromium is not installed")
    stub(tmp_path, "onnxruntime-web", "console.log(text)", "dist/ort.wasm.min.mjs")
    files = tmp_path / "files"
    files.mkdir()
    written(files, pairs=False)
    monkeypatch.setattr(install, "modules", lambda version, home: tmp_path)
    found = install.rows(PAGE, files, tmp_path)
    held(found, 5)
    assert {each["version"] for each in found} == {PAGE} and "hromium" in found[0]["browser"]


def test_the_page_says_why_it_ended(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "modules").mkdir()
    with install.Served(tmp_path, tmp_path / "modules") as served:
        at = served.page().partition("/runtimes")[0]
        with urllib.request.urlopen(f"{at}/files/one") as answer:
            assert answer.read() == b"1"
        with urllib.request.urlopen(served.page()) as answer:
            assert answer.headers["Content-Type"] == "text/html" and b"rows.mjs" in answer.read()
        for outside in ("/files/../secret", "/modules/../one", "/etc/hosts", "/none", "/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(at + outside)
        for sent in (row(), {"end": "TypeError: no wasm"}):
            urllib.request.urlopen(f"{at}/rows", data=json.dumps(sent).encode())
        assert served.ended.wait(10) and served.failure == "TypeError: no wasm" and served.rows == [row()]


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (NODE, "node must be installed: it is not. Run `apt-get install nodejs npm`."),
        (PAGE, "chromium must be installed: it is not. Run `apt-get install chromium`."),
    ],
)
def test_a_program_that_is_not_here_is_declined(
    install: ModuleType, version: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert install.rows(version, tmp_path, tmp_path) == [{"version": version, "declined": told}]


def test_an_installation_that_fails_is_a_row(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.venv, "create", lambda place, with_pip: None)
    program = tmp_path / "tract==0" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho a warning >&2; echo no such version >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o755)
    (found,) = install.rows("tract==0", tmp_path, tmp_path)
    assert found == {"version": "tract==0", "error": "python -m must end with 0: got 3, no such version"}


def test_files_name_their_inputs_and_outputs(bench: ModuleType, tmp_path: Path) -> None:
    made = sys.modules["versions_files"]
    held = made.quantized(tmp_path, "convnet", "onnxruntime", "int8")
    assert held == {"file": "convnet.onnxruntime.int8.onnx", "shape": [2, 3, 16, 16]}
    sizes = {ending: (tmp_path / f"convnet.onnxruntime.int8.{ending}").stat().st_size for ending in ("x", "y")}
    assert sizes == {"x": 4 * 2 * 3 * 16 * 16, "y": 4 * 2 * 10}
