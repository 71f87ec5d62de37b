"""What the CPU has for integer kernels, read from what the kernel lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.targets.cpu import cpu_name, integer_dot_support, sums_saturate


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n", None),
        ("flags\t: avx_vnni", None),
        ("flags\t: fpu avx2 avx512f", "neither avx512_vnni nor avx_vnni"),
        ("Features\t: fp asimd asimddp", None),
        ("Features\t: fp asimd", "no asimddp"),
        ("cpu : POWER9", "lists none"),
    ],
)
def test_integer_dot_support_reads_the_features(tmp_path: Path, text: str, said: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    found = integer_dot_support(tmp_path / "cpuinfo")
    assert found is None if said is None else said in (found or "")
    assert sums_saturate(tmp_path / "cpuinfo") == ("flags" in text and said is not None)


def test_integer_dot_support_without_a_file_is_unknown(tmp_path: Path) -> None:
    found = integer_dot_support(tmp_path / "none")
    assert found is not None and found.startswith("Unknown CPU features")
    assert isinstance(integer_dot_support(), str | None) and not sums_saturate(tmp_path / "none")


def test_the_name_of_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert cpu_name(tmp_path / "cpuinfo") == cpu_name(tmp_path / "none") != ""
