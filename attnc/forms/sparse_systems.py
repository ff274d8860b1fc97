"""Which published sparse attention is which setting of a form: one row each.

`spelling` is a form with the knobs that the system's authors use or the nearest ones; `around` says what it leaves out
or what stands beside it. fidelity: "drop-in" changes the function and needs no training; "calibration" needs sample
data; "training" a model made for it, which is then computed exactly.

Source: systems.md, parts B and C; each row names its paper.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparseSystem:
    """A named sparse attention.

    row: of the catalogue, "" where it has none. golden: folder of vectors computed by its authors' code, or "".
    """

    name: str
    row: str
    spelling: str
    fidelity: str
    source: str
    golden: str = ""
    around: str = ""


SPARSE_SYSTEMS: tuple[SparseSystem, ...] = (
    SparseSystem(
        "sliding window", "B1", "sliding_window{window=4096}", "training", "Jiang et al. 2023, arXiv:2310.06825"
    ),
    SparseSystem(
        "StreamingLLM",
        "B2",
        "sinks_window{sinks=4,window=1024}",
        "drop-in",
        "Xiao et al. 2023, arXiv:2309.17453",
        "streaming_llm",
        "positions are not counted anew",
    ),
    SparseSystem(
        "A-shape",
        "C22",
        "sinks_window{sinks=128,window=1024}",
        "calibration",
        "Jiang et al. 2024, arXiv:2407.02490",
        "minference_a_shape",
    ),
    SparseSystem(
        "SimLayerKV",
        "B17",
        "sinks_window{sinks=4,window=1024}",
        "drop-in",
        "Zhang et al. 2024, arXiv:2410.13846",
        around="a layer is lazy where the plan says so",
    ),
    SparseSystem(
        "Sparse Transformer, strided", "B3", "strided{stride=128}", "training", "Child et al. 2019, arXiv:1904.10509"
    ),
    SparseSystem(
        "Sparse Transformer, fixed",
        "B3",
        "strided{stride=128,mode=fixed,columns=8}",
        "training",
        "Child et al. 2019, arXiv:1904.10509",
    ),
    SparseSystem(
        "BigBird",
        "B5",
        "bigbird{block=64,window=3,globals=1,random=3}",
        "training",
        "Zaheer et al. 2020, arXiv:2007.14062",
        "bigbird_block_sparse",
        "random blocks of its own draw",
    ),
    SparseSystem("LongNet", "B6", "dilated_segments", "training", "Ding et al. 2023, arXiv:2307.02486"),
    SparseSystem("axial attention", "B7", "axial{width=64,axis=row}", "training", "Ho et al. 2019, arXiv:1912.12180"),
    SparseSystem(
        "Longformer",
        "B8",
        "longformer{window=256,globals=1}",
        "training",
        "Beltagy et al. 2020, arXiv:2004.05150",
        "longformer",
        "one projection for local and global tokens",
    ),
    SparseSystem(
        "ETC",
        "B9",
        "longformer{window=128,globals=64}",
        "training",
        "Ainslie et al. 2020, arXiv:2004.08483",
        around="relative labels are a bias of the rule",
    ),
    SparseSystem(
        "GMAT", "B10", "block_local{block=512,globals=16}", "training", "Gupta and Berant 2020, arXiv:2006.03274"
    ),
    SparseSystem(
        "Star-Transformer", "B11", "longformer{window=2,globals=1}", "training", "Guo et al. 2019, arXiv:1902.09113"
    ),
    SparseSystem(
        "BlockBERT", "B12", "block_local{block=512,shift=head}", "training", "Qiu et al. 2020, arXiv:1911.02972"
    ),
    SparseSystem(
        "neighborhood attention",
        "B13",
        "neighborhood{grid=64x64,kernel=7x7}",
        "training",
        "Hassani et al. 2023, arXiv:2204.07143",
        "neighborhood_attention",
    ),
    SparseSystem(
        "generalized neighborhood attention",
        "B14",
        "neighborhood{grid=64x64,kernel=16x16,stride=8x8}",
        "drop-in",
        "Hassani et al. 2025, arXiv:2504.16922",
    ),
    SparseSystem("mixture of attention spans", "B16", "spans", "calibration", "Fu et al. 2024, arXiv:2406.14909"),
    SparseSystem(
        "MoBA", "C1", "block_mixture{block=512,top_k=3}", "drop-in", "Lu et al. 2025, arXiv:2502.13189", "moba"
    ),
    SparseSystem(
        "NSA, its chosen branch",
        "C2",
        "compressed_selection",
        "drop-in",
        "Yuan et al. 2025, arXiv:2502.11089",
        "nsa",
        "mixers.native_sparse has all three branches and their gates",
    ),
    SparseSystem(
        "UniPrefill",
        "C10",
        "block_scores{pool=last,rows=128,block=64,top_k=999,mass=99,sinks=128,window=128}",
        "drop-in",
        "systems.md, C10",
        around="tokens are not dropped behind the attention",
    ),
    SparseSystem(
        "Quest",
        "C15",
        "page_bounds{block=16,top_k=16}",
        "drop-in",
        "Tang et al. 2024, arXiv:2406.10774",
        "quest_decode",
        "bounds are made anew at each call",
    ),
    SparseSystem("InfLLM", "C16", "memory_blocks", "drop-in", "Xiao et al. 2024, arXiv:2402.04617"),
    SparseSystem(
        "SeerAttention", "C21", "gated_blocks{rows=64,block=64}", "training", "Gao et al. 2024, arXiv:2410.13276"
    ),
    SparseSystem(
        "MInference, vertical and slash",
        "C22",
        "vertical_slash",
        "calibration",
        "Jiang et al. 2024, arXiv:2407.02490",
        "minference_vertical_slash",
    ),
    SparseSystem(
        "FlexPrefill, query-aware map",
        "",
        "block_scores{pool=mean,top_k=999,mass=95,pick=head}",
        "drop-in",
        "Lai et al. 2025, arXiv:2502.20766",
    ),
    SparseSystem(
        "XAttention",
        "",
        "block_scores{pool=antidiagonal,stride=16,top_k=999,mass=90}",
        "drop-in",
        "Xu et al. 2025, arXiv:2503.16428",
    ),
    SparseSystem(
        "DHSA, fixed chunks",
        "C31",
        "block_scores{pool=mean}",
        "drop-in",
        "systems.md, C31",
        around="chunks of one length, no network that finds their ends",
    ),
    SparseSystem(
        "BiFormer",
        "C34",
        "block_scores{rows=64,block=64,sinks=0,window=0}",
        "training",
        "Zhu et al. 2023, arXiv:2303.08810",
        around="no convolution of the values",
    ),
    SparseSystem("Rectified SpaAttn", "C35", "rectified", "drop-in", "Liu et al. 2025, arXiv:2511.19835"),
    SparseSystem(
        "Reformer",
        "C25",
        "hash_buckets{hash=rotation,chunk=64,before=1,rounds=2,window=0}",
        "training",
        "Kitaev et al. 2020, arXiv:2001.04451",
        "reformer_lsh",
        "hash=given takes the model's own buckets",
    ),
    SparseSystem(
        "HyperAttention, no mask",
        "C37",
        "hash_buckets{hash=bits,buckets=256,chunk=256,before=0,samples=256,window=0}",
        "drop-in",
        "Han et al. 2023, arXiv:2310.05869",
    ),
    SparseSystem(
        "Superlinear",
        "C39",
        "spans_search{block=256,top_k=4}",
        "drop-in",
        "concavity-ai/superlinear, model card",
        around="one softmax over the spans in place of a weighted sum of theirs",
    ),
    SparseSystem(
        "VMoBA",
        "C36",
        "block_mixture{top_k=999,mass=25,pick=head}",
        "drop-in",
        "Wu et al. 2025, arXiv:2506.23858",
        around="blocks of one axis",
    ),
    SparseSystem(
        "DSA",
        "C3",
        "token_top_k{scorer=indexer,top_k=2048}",
        "training",
        "DeepSeek-AI 2025, arXiv:2512.02556",
        "dsa",
        around="keys of one score may be others",
    ),
    SparseSystem(
        "MISA",
        "C4",
        "token_top_k{scorer=indexer,heads=8}",
        "drop-in",
        "Zhou et al. 2026, arXiv:2605.07363",
        around="statistic of the heads is ours",
    ),
    SparseSystem(
        "HISA", "C5", "token_top_k{scorer=indexer,blocks=64,block=128}", "drop-in", "Xu et al. 2026, arXiv:2603.28458"
    ),
    SparseSystem(
        "exact top keys",
        "C17",
        "token_top_k{scorer=exact}",
        "drop-in",
        "systems.md, C17",
        around="the oracle of selectors",
    ),
    SparseSystem(
        "H2O", "C18", "cache_eviction{policy=h2o}", "drop-in", "Zhang et al. 2023, arXiv:2306.14048", "h2o_decode"
    ),
    SparseSystem("TOVA", "C19", "cache_eviction{policy=tova}", "drop-in", "Oren et al. 2024, arXiv:2401.06104"),
    SparseSystem(
        "DMA", "C32", "key_importance", "training", "Shi et al. 2025, arXiv:2508.02124", "dynamic_mask_attention"
    ),
)
