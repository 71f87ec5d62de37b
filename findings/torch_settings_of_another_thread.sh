#!/usr/bin/env bash
# torch 2.13.0: what is set on torch.compiler.config or torch._inductor.config in one thread is not set in another.
#
# A program that sets `torch._inductor.config.freezing = True` and then compiles in a worker thread (a trainer that
# evaluates beside training, a server, a notebook's executor) compiles there with the defaults, and without a word. A
# `cache_key_tag` that is to keep two builds of a compiler plugin apart in torch's caches is missing from the keys of
# graphs that other threads compile. Seen: the thread reads '' and False where the main thread reads 'mine' and True.
#
# Exits 0 while that is so, non-zero when it changes. Needs Python 3.10 to 3.13 and pip; installs into a folder of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import sys
import threading

import torch
import torch._inductor.config as inductor
import torch.compiler.config as compiler

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__


def settings() -> tuple[str, bool]:
    return compiler.cache_key_tag, inductor.freezing


before = settings()
compiler.cache_key_tag, inductor.freezing = "mine", True
seen = []
thread = threading.Thread(target=lambda: seen.append(settings()))
thread.start()
thread.join()
print(f"torch {torch.__version__}: main thread {settings()}, another thread {seen[0]}")
sys.exit(0 if settings() == ("mine", True) and seen == [before] == [("", False)] else 1)
PYTHON
