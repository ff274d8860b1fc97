"""The settings of the selected family that its tests run: one line each, with the knobs that keep every key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.forms.rules import Dims


def _none(dims: Dims) -> dict[str, tuple[int, ...]]:
    return {}


def _gate(dims: Dims) -> dict[str, tuple[int, ...]]:
    return {"gate_query": (dims.Hq, dims.E, 4), "gate_key": (dims.H, 3 * dims.E, 4)}


def _centroids(dims: Dims) -> dict[str, tuple[int, ...]]:
    return {"centroids": (dims.H, 5, dims.E)}


def _group_scores(dims: Dims) -> dict[str, tuple[int, ...]]:
    return {"group_scores": (dims.B, dims.S, 5)}


def _summaries(dims: Dims) -> dict[str, tuple[int, ...]]:
    return {"summaries": (dims.B, dims.H, -(-dims.S // 8), dims.E)}


def _indexer(dims: Dims) -> dict[str, tuple[int, ...]]:
    """An indexer of three heads of width 4."""
    return {
        "index_query": (dims.B, 3, dims.L, 4),
        "index_key": (dims.B, dims.S, 4),
        "index_weight": (dims.B, dims.L, 3),
    }


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
    looks_ahead: bool = False  # whether the published choice reads later rows: earlier outputs then depend on them
    repeats: bool = False  # whether a pair may be in several tiles, its weight divided among them
    weights: Callable[[Dims], dict[str, tuple[int, ...]]] = _none  # what the user supplies: names and shapes


SETTINGS = (
    Setting("block_mixture{block=16,top_k=3}", "block_mixture{block=16,top_k=16}", "block_mixture{block=16,top_k=4}"),
    Setting("block_mixture{block=8,top_k=4,sinks=8,window=12,share=group}", "block_mixture{block=64,top_k=4}"),
    Setting(
        "block_mixture{block=8,top_k=99,mass=40}",
        "block_mixture{block=8,top_k=99,mass=100}",
        "block_mixture{block=8,top_k=99,mass=60}",
    ),
    Setting(
        "block_mixture{block=16,top_k=99,mass=40,pick=head}",
        "block_mixture{block=16,top_k=99,mass=100,pick=head}",
        "block_mixture{block=16,top_k=99,mass=70,pick=head}",
        looks_ahead=True,
    ),
    *(
        Setting(
            f"gist_blocks{{block=8,top_k=3,{more}}}",
            f"gist_blocks{{block=8,top_k=25,{more}}}",
            f"gist_blocks{{block=8,top_k=4,{more}}}",
            rules,
            weights=weights,
            repeats=True,
        )
        for more, weights, rules in (
            ("gists=2,sinks=4", _none, ("plain", "causal", "documents")),
            ("gists=0,share=group", _summaries, ("causal",)),
        )
    ),
    Setting(
        "head_blocks{sizes=8:16,budget=32,sinks=4}",
        "head_blocks{sizes=8:16,budget=256}",
        "head_blocks{sizes=8:16,budget=48,sinks=4}",
        ("plain", "causal"),
    ),
    *(
        Setting(
            f"block_scores{{rows=16,block=8,top_k=5,{more}}}",
            f"block_scores{{rows=16,block=8,top_k=99,{more}}}",
            f"block_scores{{rows=16,block=8,top_k=6,{more}}}",
            looks_ahead=True,
        )
        for more in ("share=head", "pool=antidiagonal,stride=4,share=group", "pool=last,sinks=8,window=9,share=all")
    ),
    *(
        Setting(
            f"block_scores{{rows=16,block=8,top_k=99,mass=50,{more}}}",
            f"block_scores{{rows=16,block=8,top_k=99,mass=100,{more}}}",
            f"block_scores{{rows=16,block=8,top_k=99,mass=80,{more}}}",
            looks_ahead=True,
        )
        for more in ("pick=head,share=group", "pool=antidiagonal,stride=8", "pool=last,share=all")
    ),
    Setting("block_scores{rows=8,block=8,top_k=3,sinks=0,window=0}", rules=("plain",)),  # regions of BiFormer
    *(
        Setting(
            f"gated_blocks{{rows={rows},block=16,top_k=99,floor={floor},share={share}}}",
            f"gated_blocks{{rows={rows},block=16,top_k=99,share={share}}}",
            f"gated_blocks{{rows={rows},block=16,top_k=99,floor={floor // 4},share={share}}}",
            looks_ahead=rows > 1,
            weights=_gate,
        )
        for rows, floor, share in ((16, 2500, "head"), (1, 1500, "group"))
    ),
    Setting(
        "rectified{rows=16,block=8,top_k=4}",
        "rectified{rows=16,block=8,top_k=99}",
        "rectified{rows=16,block=8,top_k=6}",
        rules=("plain", "causal"),
        looks_ahead=True,
    ),
    Setting("rectified{rows=1,block=8,top_k=3,share=group}", "rectified{rows=1,block=8,top_k=99}", rules=("causal",)),
    *(
        Setting(
            f"pooled_window{{block=8,window=12,{more}}}",
            f"pooled_window{{block=256,window=200,{more}}}",
            f"pooled_window{{block=8,window=24,{more}}}",
            rules=("plain", "causal"),
        )
        for more in ("", "near=chunk,blocks=outside,weight=count")
    ),
    *(
        Setting(
            f"page_bounds{{block=8,{more}}}",
            "page_bounds{block=8,top_k=9}",
            rules=("plain", "causal"),
            trains=False,
        )
        for more in ("top_k=3", "top_k=4,sinks=4,window=5,share=group")
    ),
    *(
        Setting(
            f"memory_blocks{{block=8,keys=2,sinks=8,window=16,{more}}}",
            "memory_blocks{block=8,keys=2,sinks=8,window=16,top_k=99}",
        )
        for more in ("top_k=6", "top_k=5,share=group")
    ),
    *(
        Setting(
            f"compressed_selection{{block=8,window=17,{more}top_k=5}}",
            f"compressed_selection{{block=8,window=17,{more}top_k=99}}",
            f"compressed_selection{{block=8,window=17,{more}top_k=6}}",
        )
        for more in ("", "sinks=0,", "length=4,stride=2,")
    ),
    Setting(
        "spans_search{block=8,top_k=4,window=9}",
        "spans_search{block=16,top_k=13}",
        "spans_search{block=8,top_k=6,window=9}",
    ),
    Setting("hash_buckets{buckets=4,chunk=16}", "hash_buckets{buckets=4,chunk=256}", looks_ahead=True, repeats=True),
    Setting(
        "hash_buckets{buckets=4,chunk=8,rounds=2,samples=7,sinks=2,window=21}",
        "hash_buckets{buckets=4,chunk=256,rounds=2,sinks=2,window=21}",
        looks_ahead=True,
        repeats=True,
    ),
    Setting(
        "hash_buckets{hash=bits,buckets=16,chunk=16,before=0,samples=9,window=0}",
        "hash_buckets{hash=bits,buckets=16,chunk=16,before=0,samples=256,window=0}",
        "hash_buckets{hash=bits,buckets=16,chunk=16,before=0,samples=20,window=0}",
        rules=("plain",),
        looks_ahead=True,
    ),
    Setting(
        "hash_halves{least=16,chunk=8,samples=5,buckets=16,sinks=2,window=5}",
        "hash_halves{least=16,chunk=8,samples=256,buckets=16}",
        "hash_halves{least=16,chunk=8,samples=9,buckets=16,sinks=2,window=5}",
        ("causal", "documents"),
        looks_ahead=True,
        repeats=True,
    ),
    Setting(
        "z_order{top_k=6,chunk=8,window=9,sinks=2}",
        "z_order{top_k=256,chunk=8,window=8}",
        "z_order{top_k=10,chunk=8,window=9,sinks=2}",
        ("plain", "causal", "documents"),
    ),
    *(
        Setting(
            f"token_groups{{top_k={top_k},window={window},{more}}}",
            f"token_groups{{top_k={top_k},window=256,{more}}}",
            f"token_groups{{top_k={top_k + 1},window={window},{more}}}",
            rules,
            weights=weights,
            repeats=True,
        )
        for top_k, window, more, weights, rules in (
            (2, 9, "sinks=3", _centroids, ("plain", "documents")),
            (1, 0, "by=given", _group_scores, ("causal",)),
        )
    ),
    *(
        Setting(
            f"vertical_slash{{columns=9,diagonals=12,last=16,sinks=2,window=4,share={share}}}",
            f"vertical_slash{{columns={whole},diagonals={400 - whole},share={share}}}",
            f"vertical_slash{{columns=12,diagonals=20,last=16,sinks=2,window=4,share={share}}}",
            looks_ahead=True,
        )
        for share, whole in (("head", 200), ("group", 1))
    ),
    *(
        Setting(
            f"token_top_k{{top_k=24,{more}}}", f"token_top_k{{top_k=256,{more}}}", f"token_top_k{{top_k=32,{more}}}"
        )
        for more in ("share=head", "sinks=3,window=5,share=group", "share=all")
    ),
    *(
        Setting(
            f"token_top_k{{scorer=indexer,top_k=24,{more}}}",
            f"token_top_k{{scorer=indexer,top_k=256,{whole}}}",
            f"token_top_k{{scorer=indexer,top_k=32,{more}}}",
            weights=_indexer,
        )
        for more, whole in (
            ("sinks=2,window=4", ""),
            ("blocks=5,block=8,window=9", "blocks=25,block=8"),
            ("heads=2,block=8", "heads=1,block=8"),
        )
    ),
    *(
        Setting(
            f"cache_eviction{{policy={policy},heavy=8,recent=7}}",
            f"cache_eviction{{policy={policy},heavy=150,recent=50}}",
            rules=("causal", "softcap", "sink", "documents"),
        )
        for policy in ("h2o", "tova", "h2o_local")
    ),
    Setting(
        "head_policies{recover=55,sinks=2,window=9,heavy=12,last=20}",
        "head_policies{recover=100}",
        "head_policies{recover=70,sinks=2,window=9,heavy=12,last=20}",
        ("plain", "causal", "documents"),
        looks_ahead=True,
    ),
    *(
        Setting(
            f"key_importance{{top_k=12,{more}}}",
            "key_importance{top_k=256}",
            f"key_importance{{top_k=20,{more}}}",
            rules,
        )
        for more, rules in (("", ("bias", "alibi")), ("sinks=2,window=5,share=head", ("bias",)))
    ),
)
