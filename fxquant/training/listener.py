"""What modules return, written down by hooks that are traced with the model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fxquant.errors import InvalidArgument


class Listener:
    """Hooks on modules of a model that write down, while they listen, what each returned last."""

    def __init__(self, model: nn.Module, paths: Iterable[str], whose: str) -> None:
        self._found: dict[str, Tensor] = {}
        self._listens = False
        self._whose = whose
        self._hooks = [_Hook(self, path) for path in dict.fromkeys(paths)]
        modules = dict(model.named_modules())
        for hook in self._hooks:
            if hook.path not in modules or not hook.path:
                near = difflib.get_close_matches(hook.path, modules, n=3, cutoff=0.5) or [p for p in modules if p][:6]
                raise InvalidArgument(
                    f"features must be paths of modules of the {whose}: got {hook.path!r}. Modules: {', '.join(near)}."
                )
        self._handles = [modules[hook.path].register_forward_hook(hook) for hook in self._hooks]

    @contextlib.contextmanager
    def listening(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the model is called once; its features are in the result behind the block."""
        self._found.clear()
        self._listens = True
        seen: dict[str, Tensor] = {}
        try:
            yield seen
            for hook in self._hooks:
                seen[hook.path] = self._tensor(hook.path)
        finally:
            self._listens = False
            self._found.clear()

    def _tensor(self, path: str) -> Tensor:
        found: Any = self._found.get(path)
        if found is None:
            raise InvalidArgument(
                f"features must be of modules that run: got nothing of {path!r} of the {self._whose}. It was not "
                "called, or the model was compiled before: make the loss first, or call torch._dynamo.reset()."
            )
        if not isinstance(found, Tensor):
            raise InvalidArgument(
                f"features must be of modules that return a tensor: got {type(found).__name__} of {path!r} of the "
                f"{self._whose}."
            )
        return found

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


class _Hook:
    """A forward hook."""

    def __init__(self, listener: Listener, path: str) -> None:
        self.listener, self.path = listener, path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.listener._listens:
            self.listener._found[self.path] = output
