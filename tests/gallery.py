"""The gallery: one small module per spelling of attention, each with the facts it must lift to."""
from __future__ import annotations

from tests import (
    gallery_architectures,
    gallery_chosen,
    gallery_family_a,
    gallery_heads,
    gallery_masks,
    gallery_modules,
    gallery_products,
)
from tests.gallery_entry import AnyOf, Entry

GALLERY: tuple[Entry, ...] = (
    *gallery_products.ENTRIES,
    *gallery_masks.ENTRIES,
    *gallery_heads.ENTRIES,
    *gallery_modules.ENTRIES,
    *gallery_architectures.ENTRIES,
    *gallery_family_a.ENTRIES,
    *gallery_chosen.ENTRIES,
)
BY_NAME = {entry.name: entry for entry in GALLERY}
assert len(BY_NAME) == len(GALLERY), "two entries of the gallery share a name"


def disagreements(entry: Entry, facts) -> list[str]:
    """One sentence per fact of a region that differs from what the entry states."""
    found = []
    for key, wanted in entry.facts.items():
        value = facts[key]
        if not _agrees(value, wanted):
            found.append(f"{entry.name}: {key} is {value!r}, stated {getattr(wanted, 'values', wanted)!r}")
    return found


def _agrees(value, wanted) -> bool:
    if isinstance(wanted, AnyOf):
        return any(_agrees(value, one) for one in wanted.values)
    if isinstance(wanted, float) and isinstance(value, (int, float)):
        return abs(value - wanted) <= 1e-5 * max(1.0, abs(wanted))
    return value == wanted
