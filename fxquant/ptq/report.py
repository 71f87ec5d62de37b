"""What a method did: site by site, with what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.errors import InvalidArgument
from fxquant.support.table import table


@dataclass(frozen=True, kw_only=True)
class PtqRow:
    """One weight, or one tensor between layers, that a method changed.

    Attributes:
        key: the site's key in the plan; of what has no site, the operator's name.
        before, after: its error, as the report's ``measure`` says.
        note: what was done to it, in a few words.
    """

    key: str
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PtqReport:
    """What a method of `fxquant.ptq` changed; prints as a table.

    Attributes:
        method: its name.
        measure: what the errors of the rows are.
        rows: what was changed, in the order in which it runs.
        declined: what was left alone, and why: (key or operator, reason).
    """

    method: str
    measure: str
    rows: tuple[PtqRow, ...]
    declined: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "rows": [asdict(row) for row in self.rows], "declined": list(map(list, self.declined))}

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.rows)} changed; before and after: {self.measure}"]
        if self.rows:
            cells = [(row.key, f"{row.before:.4g}", f"{row.after:.4g}", row.note) for row in self.rows]
            lines.append(table(("what", "before", "after", "how"), cells))
        if self.declined:
            lines += [f"\nleft alone: {len(self.declined)}", table(("what", "why"), self.declined)]
        return "\n".join(lines)


def require_some(caller: str, found: Iterable[object], what: str, declined: Iterable[tuple[str, str]]) -> None:
    """Raises InvalidArgument where a method has found nothing that it could change."""
    if any(True for _ in found):
        return
    reasons = "; ".join(f"{key}: {why}" for key, why in list(declined)[:3]) or "the data ran no such operator"
    raise InvalidArgument(
        f"{caller} must be given a model with {what}: got none that it can use ({reasons}). "
        "fxquant.explain(model) shows every site."
    )
