"""A user's inputs of a model as arguments and keywords: one at a time, each with a digest to know it again by."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attnc.errors import UsageError

Batch = tuple[tuple[Any, ...], dict[str, Any]]
ALLOWED = "a tensor, a tuple of arguments, or a dict of keyword arguments"
PLAIN = (bool, int, float, complex, str, bytes, type(None))  # inputs whose text says what they are


def stream_of(data: object, verb: str) -> Iterator[Batch]:
    """The inputs that `data` holds, each when it is asked for.

    verb: what is done with them, as errors put it. Raises: UsageError where `data` is no iterable, holds none, or holds
    what is no input.
    """
    if isinstance(data, torch.Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise UsageError(
            f"{verb} data: found {type(data).__name__}, allowed is an iterable of inputs, each {ALLOWED}. "
            "Use data=[x] for one input."
        )
    return _streamed(data, verb)


def _streamed(data: Iterable[object], verb: str) -> Iterator[Batch]:
    number = 0
    for item in data:
        yield _batch(number, item, verb)
        del item  # the next one is made without this one in memory
        number += 1  # enumerate would hold on to the item
    if not number:
        raise UsageError(
            f"{verb} data: found no inputs in it, at least one is needed. A generator that was read before is empty: "
            "make it anew, or leave data out for the inputs themselves."
        )


def batches_of(data: object, verb: str = "autotune") -> list[Batch]:
    """All of `stream_of`."""
    return list(stream_of(data, verb))


def _batch(number: int, item: object, verb: str) -> Batch:
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, tuple | list):
        return tuple(item), {}
    if isinstance(item, Mapping) and all(isinstance(name, str) for name in item):
        return (), dict(item)
    raise UsageError(f"{verb} data: found {type(item).__name__} as input {number}, allowed is {ALLOWED}. Convert it.")


def copied(batch: Batch) -> Batch:
    """A batch of its own: caches among the inputs are filled, and tensors may be changed in place."""
    leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    known = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in leaves}
    return copy.deepcopy(batch, known)


def digest_of(batch: Batch) -> str:
    """16 hexadecimal digits that follow from the values of tensors, numbers and texts in `batch`, and other types."""
    leaves, spec = pytree.tree_flatten(batch)
    found = sha256(str(spec).encode("utf-8", "replace"))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
            values = leaf.detach().cpu().contiguous()
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(values.reshape(-1).view(torch.uint8).numpy().data)
        else:
            text = repr(leaf) if isinstance(leaf, PLAIN) else type(leaf).__qualname__
            found.update(text.encode("utf-8", "replace"))
    return found.hexdigest()[:16]
