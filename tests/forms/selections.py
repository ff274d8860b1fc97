"""The settings of the selected family that its tests run: one line each, with the knobs that keep every key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A spelling; whole: the same form with knobs that keep all keys of up to 200, "" where none do.

    rules: names of tests.forms.rules that it serves. lengths: query and key lengths, as many queries as keys.
    wider: the same form with more budget, whose keys must include the others; "" where the definition implies none.
    """

    spelling: str
    whole: str = ""
    wider: str = ""
    rules: tuple[str, ...] = ("plain", "causal", "softcap", "sink", "documents")
    trains: bool = True


SETTINGS = (
    Setting("block_mixture{block=16,top_k=3}", "block_mixture{block=16,top_k=16}", "block_mixture{block=16,top_k=4}"),
    Setting("block_mixture{block=8,top_k=4,sinks=8,window=12,share=group}", "block_mixture{block=64,top_k=4}"),
)
