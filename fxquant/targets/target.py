"""What fxquant knows about a deployment runtime, in one object; a file beside this one defines it as ``TARGET``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from fxquant.targets.document import Feeds, ModelPath
from fxquant.targets.expected import Forecast
from fxquant.targets.lint_reader import Lint
from fxquant.targets.profile import Profile

if TYPE_CHECKING:
    import numpy as np


# The ops of a file whose kernels are reported.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "Attention")


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """What one exported node became.

    ``name`` is the exported node's name, or its first output where it has none. ``kernel`` is the op in the
    optimized model, ``"none"`` where no node is left. ``integer``: it multiplies codes, integers or those of one small
    float. ``reason`` is ``None`` exactly when ``integer``.
    """

    name: str
    op_type: str
    kernel: str
    integer: bool
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a runtime made of a file.

    Attributes:
        runtime: its name, and its version where that is worth a word, as reports print them.
        rows: a row per node of `WEIGHTED`.
        outputs: in the graph's order; None where the file was compiled and no kernel could run.
        integer_dot: None, or why integer speed is not to be expected on this machine.
        exact_by: where its sums can saturate on this machine, the setting that sums exactly, in words; else None.
        exact_outputs: the outputs with that setting; None where the file does not load with it.
    """

    runtime: str
    rows: tuple[KernelRow, ...]
    outputs: list[np.ndarray] | None
    integer_dot: str | None = None
    exact_outputs: list[np.ndarray] | None = None
    exact_by: str | None = None


class Latency(Protocol):
    """Median seconds of one run of each file, interleaved."""

    def __call__(self, paths: Mapping[str, ModelPath], feeds: Feeds, *, rounds: int) -> dict[str, float]: ...


class CodesOf(Protocol):
    """Codes of a file's activation QuantizeLinears, of one run for each `shown_codes.Part`: what it judges, and all."""

    def __call__(
        self, path: ModelPath, feeds: Feeds, *, also: Collection[str]
    ) -> list[tuple[frozenset[str], dict[str, np.ndarray]]]: ...


class Samples(Protocol):
    """Seconds of each round's run of each file on its own inputs, interleaved."""

    def __call__(
        self, cases: Mapping[str, tuple[ModelPath, Feeds]], *, rounds: int, threads: int
    ) -> dict[str, list[float]]: ...


@dataclass(frozen=True, kw_only=True)
class Package:
    """What holds a runtime.

    Attributes:
        module: as it is imported.
        extra: of fxquant, which installs it.
        oldest, newest: versions by major and minor that files were tried in.
    """

    module: str
    extra: str
    oldest: str
    newest: str


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a file is run on this machine; the functions import the runtime's package when they are called.

    Attributes:
        require: imports that package; MissingDependency, with the command that installs it, where it is not there.
        run: file and inputs → what it made of them. Raises ExportError where the file does not load or run.
        kernels: a file → the rows of ``run``, without inputs.
        latency: how runs are timed; None where they are not.
        samples: the same with the times of all rounds, which say how much of a difference is noise; None likewise.
        codes: how its own codes are read; None where they are not, as in the reference, which is read anyway.
        rules_do: where the package is not installed, the target's rules are verified by instead, unless the runtime
            was asked for by name.
        capabilities: of devices that a file can be compiled for: ``run`` and ``kernels`` then take ``capability``.
        has_timeout: they compile in a process of their own and take ``timeout``, the seconds after which it is ended.
        package: what holds it; None where that is nothing to install.
    """

    require: Callable[[], ModuleType]
    run: Callable[..., Ran]
    kernels: Callable[..., tuple[KernelRow, ...]]
    latency: Latency | None = None
    samples: Samples | None = None
    codes: CodesOf | None = None
    rules_do: bool = False
    capabilities: tuple[str, ...] = ()
    has_timeout: bool = False
    package: Package | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A deployment runtime. Facts are measured where it can be installed, else taken from its documents and sources.

    Attributes:
        profile: what it runs as integers, for placement, the passes and export; it holds the name and the opsets.
        forecast: what it is expected to make of the operators.
        lint: the rules that it has beside those for every target.
        runtime: how it is run here; None where it cannot be, and the rules are all there is to verify by.
    """

    profile: Profile
    forecast: Forecast = field(default_factory=Forecast)
    lint: Lint = field(default_factory=Lint)
    runtime: Runtime | None = None

    @property
    def name(self) -> str:
        return self.profile.name
