"""fxquant doctor: what it says of this machine, of a broken one and of a bare one; its exit status and its JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fxquant.__main__ import main
from fxquant.errors import CompilerMissing
from fxquant.shell import doctor
from fxquant.shell.doctor import machine, packages, training
from fxquant.shell.doctor.checks import BROKEN, LEFT_OUT, MISSING, NOTE, OK, Check, Finding, found_by, in_range
from fxquant.shell.doctor.tiny_file import check, inputs, model
from fxquant.targets import registry
from fxquant.targets.target import Package, Ran, Runtime

NAMES = [
    *("python", "torch", "compiler", "cpu", "cuda", "triton", "onnx", "onnxscript"),
    *("onnxruntime", "openvino", "tensorrt_rtx", "[report]", "[demo]", "[bench]", "[examples]"),
    *("train", "export", "verify"),
]


def asked(*names: str, quick: bool = False) -> list[Finding]:
    """The answers of some checks, in order; the others are not asked."""
    return [found_by(each) for each in doctor.checks(quick=quick) if each.name in names]


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if they were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def only(monkeypatch: pytest.MonkeyPatch, *asks: Callable[[], Finding]) -> None:
    """The doctor asks these alone."""
    checks = [Check(name=f"part{number}", doing="asking", ask=ask, mend="mend it") for number, ask in enumerate(asks)]
    monkeypatch.setattr(doctor, "checks", lambda quick: iter(checks))


def fine() -> Finding:
    return Finding(status=OK, found="1.0")


# ---------------------------------------------------------------- this machine


def test_it_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    """What pytest runs on has what the extra test installs."""
    assert main(["doctor", "--quick", "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert set(told) == {"ok", "fxquant", "platform", "findings"} and told["ok"] and captured.err == ""
    assert [each["name"] for each in told["findings"]] == NAMES
    found = {each["name"]: each for each in told["findings"]}
    assert set(found["torch"]) == {"name", "status", "found", "fix", "seconds"}
    assert found["torch"]["found"].startswith(torch.__version__) and found["train"]["status"] == LEFT_OUT
    assert "runs a Q/DQ file right, 1 of 1 products on integers" in found["onnxruntime"]["found"]


def test_the_proof() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train, export, verify = asked("train", "export", "verify")
    assert [each.status for each in (train, export, verify)] == [OK, OK, OK], (train, export, verify)
    assert "a compiled step without a graph break; loss " in train.found and export.found.startswith("a file of ")
    assert "2 of 2 products run on integers; 0 of 832 codes differ" in verify.found
    assert torch.equal(torch.get_rng_state(), before)


def test_the_compiler_is_tried() -> None:
    (compiler,) = asked("compiler")
    assert compiler.status == OK and "; compiled a kernel in " in compiler.found, compiler
    (quick,) = asked("compiler", quick=True)
    assert quick.status == OK and quick.found.endswith("; not tried")


@pytest.mark.skipif(not packages.is_there("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
def test_tensorrt_builds() -> None:
    (found,) = asked("tensorrt_rtx")
    assert found.status == OK and "builds a Q/DQ file; no kernel ran, 1 of 1 products on integers" in found.found
    (quick,) = asked("tensorrt_rtx", quick=True)
    assert quick.found.endswith("builds nothing with --quick")


# ---------------------------------------------------------------- checks that fail


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("no\nmore"), "RuntimeError: no ("),
        (ImportError("libgomp.so.1: cannot open"), "ImportError: libgomp.so.1: cannot open ("),
        (SystemExit(3), "SystemExit: 3 ("),
        (AssertionError(), "AssertionError ("),
    ],
)
def test_a_check_that_raises_is_broken(error: BaseException, found: str) -> None:
    def ask() -> Finding:
        raise error

    told = found_by(Check(name="part", doing="asking", ask=ask, mend="mend it"))
    assert (told.name, told.status, told.fix) == ("part", BROKEN, "mend it")
    assert told.found.startswith(found) and "test_doctor.py, line " in told.found


def test_an_interrupt_comes_through(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ask() -> Finding:
        raise KeyboardInterrupt

    only(monkeypatch, fine, ask)
    assert main(["doctor"]) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\npart0        ok        1.0\n") and captured.err.endswith("doctor: interrupted\n")


def test_what_a_check_prints_is_not_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def ask() -> Finding:
        print("a banner")
        warnings.warn("an old name", stacklevel=1)
        return fine()

    only(monkeypatch, ask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["doctor", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["ok"] and captured.err == ""


def test_the_exit_status_and_the_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Finding:
        return Finding(status=MISSING, found="not installed", fix="pip install it")

    def broken() -> Finding:
        raise RuntimeError("no")

    only(monkeypatch, fine, missing)
    assert main(["doctor"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("fxquant 0.1.0 on ") and lines == [
        "part0        ok        1.0",
        "part1        missing   not installed → pip install it",
        "Training works here. 1 optional part is missing.",
    ]
    assert main(["doctor", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Nothing that is installed is broken, as far as --quick")
    only(monkeypatch, fine, broken, missing, broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "broken: part1, part3"
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and [each["status"] for each in told["findings"]] == [OK, BROKEN, MISSING, BROKEN]


def test_each_line_is_written_as_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    seen: list[int] = []

    def ask() -> Finding:
        seen.append(len(out.getvalue().splitlines()))
        return fine()

    only(monkeypatch, ask, ask)
    assert doctor.examine(out) == 0 and seen == [1, 2]


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("module", "extra"),
    [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino"),
     ("tensorrt_rtx", "tensorrt")],
)  # fmt: skip
def test_a_missing_package_comes_with_its_command(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, module)
    (found,) = asked(module)
    assert found.status == MISSING and found.fix == f'pip install "fxquant[{extra}]"'
    needed = {"onnx": [LEFT_OUT, LEFT_OUT], "onnxscript": [LEFT_OUT, LEFT_OUT], "onnxruntime": [LEFT_OUT, LEFT_OUT]}
    after = [found_by(dataclasses.replace(each, ask=fine)) for each in training.checks(quick=False)][1:]
    if module == "onnxruntime":
        assert [each.status for each in after] == [OK, LEFT_OUT] and after[1].found == "without onnxruntime"
    else:
        assert [each.status for each in after] == needed.get(module, [OK, OK])


def test_a_runtime_without_onnx_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnx")
    (found,) = asked("onnxruntime")
    assert found.status == LEFT_OUT and found.found.endswith("; no file to run without onnx")


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    found = {each.name: each for each in asked("python", "torch", "compiler", "cuda", "triton", "train", "verify")}
    assert found["torch"].status == BROKEN and found["torch"].fix == 'pip install "torch>=2.11"'
    assert found["python"].status == OK
    for name in ("compiler", "cuda", "triton", "train", "verify"):
        assert found[name].status == LEFT_OUT and found[name].found == "without torch"


def test_extras_say_which_package_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("rich", "numpy"):
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(packages.importlib.metadata, "version", version)
    report, bench = asked("[report]", "[bench]")
    assert (report.status, report.found) == (MISSING, "not installed: rich, numpy")
    assert report.fix == 'pip install "fxquant[report]"'
    assert (bench.status, bench.found) == (OK, "transformers 1.0")


def test_an_extra_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib")
    (found,) = asked("[report]")
    assert found.status == BROKEN and found.fix == 'pip install --force-reinstall "fxquant[report]"'


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.10.1", BROKEN),
        ("2.11.0", None),
        ("2.15.3+cu130", None),
        ("2.16.0.dev1", NOTE),
        ("3.0", NOTE),
        ("1.99", BROKEN),
    ],
)
def test_ranges(version: str, status: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = in_range(version, "2.11", "2.15", "install it")
    assert (told.status if told else None) == status
    if told:
        assert version in told.found and told.fix == ("install it" if status == BROKEN else "")
    monkeypatch.setattr(torch, "__version__", version)
    (found,) = asked("torch")
    assert found.status == (status or OK) and version in found.found
    assert in_range("0.1", "", "1.0", "") is None, "no oldest"


def test_an_old_runtime_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    (found,) = asked("onnxruntime")
    assert found.status == BROKEN and found.found == "1.19.2 is older than 1.20"
    assert found.fix == 'pip install --upgrade "fxquant[onnx]"'
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")
    (found,) = asked("onnxruntime")
    assert found.status == NOTE and "1.99.0 is newer than 1.32, the newest that was tried; runs a Q/DQ" in found.found


@pytest.mark.parametrize(("version", "status"), [("3.9.1", BROKEN), ("3.12.0", OK), ("3.14.0", NOTE)])
def test_pythons(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "python_version", lambda: version)
    (found,) = asked("python")
    assert found.status == status and version in found.found


# ---------------------------------------------------------------- compiler, processor, GPU


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise CompilerMissing("none")

    monkeypatch.setattr("fxquant.backend.inductor.require_compiler.cpp_compiler", none)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    (found,) = asked("compiler")
    assert found.status == BROKEN and found.fix.startswith("Install g++ (apt install g++), or point CXX at one")
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    (found,) = asked("compiler")
    assert found.fix.startswith("xcode-select --install, or ")


@pytest.mark.parametrize(
    ("output", "found", "fix"),
    [
        ("x.cpp:1:\nx.cpp:2: fatal error: Python.h: No such file", "fatal error: Python.h", "Install Python's headers"),
        ("cc1plus: out of memory", "cc1plus: out of memory", "Install "),
        ("", "RuntimeError: C++ compile error", "Install "),
    ],
)
def test_a_compiler_that_fails(output: str, found: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str) -> float:
        raise RuntimeError(f"C++ compile error\n\nCommand:\ng++ --error\n\nOutput:\n{output}")

    monkeypatch.setattr(machine, "_compiled_on", refused)
    (told,) = asked("compiler")
    assert told.status == BROKEN and found in told.found and told.fix.startswith(fix)


def test_a_compiler_that_computes_another_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x: function(x) + 1)
    (told,) = asked("compiler")
    assert told.status == BROKEN and "a compiled x + x is not 2 * x on cpu" in told.found


def test_a_processor_without_integer_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.targets.cpu.integer_dot_support", lambda: "This CPU has none.")
    (found,) = asked("cpu")
    assert found.status == NOTE and found.found.endswith(". This CPU has none.")
    monkeypatch.setattr("fxquant.targets.cpu.integer_dot_support", lambda: None)
    (found,) = asked("cpu")
    assert found.status == OK and "integer kernels fast" in found.found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of one."""
    told = {
        "is_available": True,
        "current_device": 0,
        "get_device_name": "H200",
        "get_device_capability": (9, 0),
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "_compiled_on", lambda device: 1.5)


def test_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = SimpleNamespace(path="cuda", reason="compiled by NVRTC 13.0 for sm_90")
    monkeypatch.setattr("fxquant.kernels.dispatch.status", lambda build: ready)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7", __spec__=SimpleNamespace()))
    cuda, triton = asked("cuda", "triton")
    assert cuda.found == "H200 (9.0); kernels compiled by NVRTC 13.0 for sm_90; Inductor compiled one in 1.5 s"
    assert (cuda.status, triton.status, triton.found) == (OK, OK, "3.7")
    (quick,) = asked("cuda", quick=True)
    assert quick.found == "H200 (9.0), CUDA 13.0; not tried"
    ready.path, ready.reason = "aten", "no libnvrtc.so.13 is found"
    (cuda,) = asked("cuda")
    assert cuda.status == NOTE and "aten: no libnvrtc.so.13" in cuda.found and "nvidia-cuda-nvrtc" in cuda.fix


def test_a_gpu_without_triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    (triton,) = asked("triton")
    assert triton.status == MISSING and triton.fix == 'pip install "triton"' and "cannot train on CUDA" in triton.found


# ---------------------------------------------------------------- runtimes and training that are wrong


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Replaces what onnxruntime gives."""

    def put(run: Any) -> None:
        target = registry.TARGETS["onnxruntime"]
        changed = dataclasses.replace(target, runtime=dataclasses.replace(target.runtime, run=run))
        monkeypatch.setitem(registry.TARGETS, "onnxruntime", changed)

    yield put


def test_a_runtime_that_gives_other_numbers(wrong: Callable[[Any], None]) -> None:
    wrong(lambda path, feeds: Ran(runtime="onnxruntime", rows=(), outputs=[np.zeros((2, 4), np.float32)]))
    (found,) = asked("onnxruntime")
    assert (
        found.status == BROKEN and "a Q/DQ file must give the standard's numbers: got a difference of " in found.found
    )
    assert found.fix == 'pip install --force-reinstall "fxquant[onnx]"'


def test_a_made_up_runtime_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx.reference import ReferenceEvaluator

    def run(path: Any, feeds: Any) -> Ran:
        return Ran(runtime="Wonder", rows=(), outputs=list(ReferenceEvaluator(str(path)).run(None, dict(feeds))))

    package = Package(module="rich", extra="wonder", oldest="1.0", newest="99.0")
    monkeypatch.setattr("rich.__version__", "7.0", raising=False)
    runtime = Runtime(require=lambda: sys, run=run, kernels=lambda path: (), package=package)
    target = dataclasses.replace(registry.TARGETS["generic"], runtime=runtime)
    monkeypatch.setitem(registry.TARGETS, "wonder", target)
    (found,) = asked("rich")
    assert (found.status, found.found) == (
        OK,
        "7.0; tried: 1.0 to 99.0; runs a Q/DQ file right, 0 of 0 products on integers",
    )


def test_the_tiny_file_is_the_standard_s() -> None:
    from onnx.checker import check_model
    from onnx.reference import ReferenceEvaluator

    check_model(model(), full_check=True)
    outputs: Any = ReferenceEvaluator(model()).run(None, inputs())
    check(outputs)
    for bad in ([outputs[0] + 1 / 512], [outputs[0] * np.nan], [], [*outputs, *outputs]):
        with pytest.raises(RuntimeError, match="standard's numbers"):
            check(bad)


def test_a_package_that_is_not_installed_has_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "list_backends", lambda exclude_tags=(): ["inductor"])
    train, export, verify = asked("train", "export", "verify")
    assert train.status == BROKEN and "knows no backend" in train.found and train.fix.startswith("pip install -e .")
    assert (export.found, verify.found) == ("nothing was trained", "nothing was exported")
    assert export.status == verify.status == LEFT_OUT


def test_a_step_that_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile  # prepare calls it too

    def plain(model: Any, **options: Any) -> Any:
        return model if options["backend"] == "fxquant" else compiled(model, **options)

    monkeypatch.setattr(torch, "compile", plain)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    (train,) = asked("train")
    assert train.status == BROKEN and train.found.startswith("a step must lower the loss") and "bug" in train.fix


@pytest.mark.parametrize(
    ("plain", "saturates", "status"), [(True, True, NOTE), (True, False, BROKEN), (False, True, BROKEN)]
)
def test_a_file_that_does_not_hold(plain: bool, saturates: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [SimpleNamespace(holds=plain), SimpleNamespace(holds=False)]
    report = SimpleNamespace(rows=(), differing_codes=3, compared_codes=8, levels=levels, runtime="onnxruntime")
    monkeypatch.setattr(training.fxquant, "verify_onnx", lambda *args, **options: report)
    monkeypatch.setattr("fxquant.targets.cpu.sums_saturate", lambda: saturates)
    proof = training.Proof()
    proof.exported = True
    found = training._verify(proof, training.Path("tiny.onnx"))
    assert found.status == status and "3 of 8 codes differ" in found.found and found.fix
