"""Verdicts that outlive a process: one small JSON file per key, written atomically.

A key names the region and everything a verdict depends on (attnc's own sources, torch's version); a file that cannot
be read is treated as absent, so a kill at any moment loses one verdict at most.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from attnc import __version__
from attnc.atomic_file import private_folder, replace_file

log = logging.getLogger("attnc.store")


@cache
def source_version() -> str:
    """A digest of attnc's own sources and torch's version; a change of either makes every stored verdict stale."""
    digest = sha256(f"{__version__} {torch.__version__}".encode())
    root = Path(__file__).parent
    for folder in [root, *(Path(p) for name in ("passes", "codegen") for p in _folder(root, name))]:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _folder(root: Path, name: str) -> list[Path]:
    """A machinery package: beside `attnc/` in a checkout, inside it in a wheel (then the walk of attnc finds it)."""
    beside = root.parent / name
    return [beside] if not (root / name).exists() and beside.is_dir() else []


class Store:
    """A folder of verdicts. Raises nothing on a missing or read-only folder: a verdict is then made again."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def _file(self, key: str) -> Path:
        digest = sha256(f"{source_version()} {key}".encode()).hexdigest()
        return self.directory / f"{digest[:32]}.json"

    def get(self, key: str) -> dict[str, object] | None:
        try:
            found = json.loads(self._file(key).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def put(self, key: str, verdict: dict[str, object]) -> None:
        target = self._file(key)
        try:
            private_folder(self.directory)
            replace_file(target, json.dumps({**verdict, "key": key}).encode())
        except OSError as exc:
            log.info("verdict not stored in %s: %s", self.directory, exc)
