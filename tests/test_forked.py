"""Children of the nursery are as processes of Python."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests import forked


def test_code_has_arguments_an_environment_a_folder_and_an_end(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['A'], os.getcwd(), len(os.environ))"
    code += "; print(2, file=sys.stderr); sys.exit(7)"
    done = forked.run(["-c", code, "x", "y"], env={"A": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "2\n")
    assert done.stdout == f"['x', 'y'] 1 {tmp_path} 1\n"


def test_what_is_raised_is_told() -> None:
    done = forked.run(["-c", "import atexit; atexit.register(print, 'at the end'); 1 / 0"])
    assert done.returncode == 1 and done.stdout == "at the end\n"
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_nothing_of_ours_is_there_and_sources_come_from_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "fxquant.py").write_text("print('here')", encoding="utf-8")
    code = "import sys; print(sorted(name for name in sys.modules if name.startswith('fxquant'))); import fxquant"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert forked.run(["-c", code], env=env, cwd=tmp_path).stdout == "[]\nhere\n"


def test_a_script_and_a_module_are_main(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import beside, sys; print(__name__, sys.argv[1:], beside.ONE)", encoding="utf-8")
    (tmp_path / "beside.py").write_text("ONE = 1; print(__name__)", encoding="utf-8")
    assert forked.run([str(script), "a"]).stdout == "beside\n__main__ ['a'] 1\n"
    assert forked.run(["-m", "beside"], cwd=tmp_path).stdout == "__main__\n"


def test_warnings_can_be_errors() -> None:
    code = "import warnings; from fxquant.errors import NotQuantizedWarning as W; warnings.warn('lost', W)"
    arguments = ["-W", "error::fxquant.errors.NotQuantizedWarning", "-c", code]
    done = forked.run(arguments, env={**os.environ, "PYTHONPATH": str(forked.ROOT)})
    assert done.returncode == 1 and done.stderr.endswith("NotQuantizedWarning: lost\n")


def test_many_at_once_and_one_is_killed() -> None:
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(int(sys.argv[2]))"
    children = [forked.start(["-c", code, str(number), "600" if number == 1 else "0"]) for number in range(3)]
    children[1].kill()
    done = [child.wait() for child in children]
    assert [each.returncode for each in done] == [0, -signal.SIGKILL, 0]
    assert [each.stdout for each in done][::2] == ["0\n", "2\n"]
    assert len({child.pid for child in children} | {os.getpid()}) == 4


def test_threads_are_as_many_as_the_environment_says() -> None:
    code = "import torch; print(torch.get_num_threads())"
    assert forked.run(["-c", code], env={**os.environ, "OMP_NUM_THREADS": "3"}).stdout == "3\n"
