"""Site lists by their digest: how a compiled graph names the sites of an owner."""

from __future__ import annotations

import hashlib
import json

from fxquant.plan.plan import LocalSite


def digest(sites: tuple[LocalSite, ...], target: str) -> str:
    """The name of a site list in compiled graphs: equal lists for one target share it, whatever model they are in."""
    lines = [edge.lines for site in sites for edge in site.edges]
    told = [lines] if any(map(any, lines)) else []  # of a plan that was loaded, and of torch's own modules, none are
    text = json.dumps([target, *told, *(site.to_dict() for site in sites)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_SITE_LISTS: dict[str, tuple[tuple[LocalSite, ...], str]] = {}


def register(sites: tuple[LocalSite, ...], target: str) -> str:
    """Makes a site list and its target known to this process's backends under their digest, which is returned."""
    key = digest(sites, target)
    _SITE_LISTS[key] = sites, target
    return key


def registered(key: str) -> tuple[LocalSite, ...]:
    """The site list of a digest."""
    return _SITE_LISTS[key][0]


def target_of(key: str) -> str:
    """The target that the site list of a digest is for."""
    return _SITE_LISTS[key][1]
