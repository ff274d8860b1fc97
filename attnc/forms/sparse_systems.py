"""Which published sparse attention is which setting of a form, or which function: one row each.

`spelling` is a form with the knobs that the system's authors use or the nearest ones; `mixer` names the function of one
that is more than one attention; `around` says what is left out or what stands beside it. fidelity: "drop-in" changes
the function and needs no training; "calibration" needs sample data; "training" a model made for it, which is then
computed exactly. What is neither, and why, stands in REFUSED.

Source: systems.md, parts B and C; each row names its paper.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SparseSystem:
    """A named sparse attention.

    row: of the catalogue, "" where it has none. golden: folder of vectors computed by its authors' code, or "".
    spelling, mixer: one of them is "".
    """

    name: str
    row: str
    spelling: str
    fidelity: str
    source: str
    golden: str = ""
    around: str = ""
    mixer: str = ""


@dataclass(frozen=True)
class RefusedSystem:
    """A system of the catalogue that no form and no function computes, and the reason."""

    name: str
    row: str
    why: str


# fmt: off
SPARSE_SYSTEMS: tuple[SparseSystem, ...] = (
    SparseSystem("sliding window", "B1", "sliding_window{window=4096}", "training",
                 "Jiang et al. 2023, arXiv:2310.06825"),
    SparseSystem("StreamingLLM", "B2", "sinks_window{sinks=4,window=1024}", "drop-in",
                 "Xiao et al. 2023, arXiv:2309.17453", golden="streaming_llm",
                 around="positions are not counted anew"),
    SparseSystem("Sparse Transformer, strided", "B3", "strided{stride=128}", "training",
                 "Child et al. 2019, arXiv:1904.10509"),
    SparseSystem("Sparse Transformer, fixed", "B3", "strided{stride=128,mode=fixed,columns=8}", "training",
                 "Child et al. 2019, arXiv:1904.10509"),
    SparseSystem("LongT5, transient global", "B4", "pooled_window{block=16,window=128}", "training",
                 "Guo et al. 2021, arXiv:2112.07916",
                 around="the model norms sums of hidden states and projects them as tokens"),
    SparseSystem("BigBird", "B5", "bigbird{block=64,window=3,globals=1,random=3}", "training",
                 "Zaheer et al. 2020, arXiv:2007.14062", golden="bigbird_block_sparse",
                 around="random blocks of its own draw"),
    SparseSystem("LongNet", "B6", "dilated_segments", "training", "Ding et al. 2023, arXiv:2307.02486"),
    SparseSystem("axial attention", "B7", "axial{width=64,axis=row}", "training", "Ho et al. 2019, arXiv:1912.12180"),
    SparseSystem("Longformer", "B8", "longformer{window=256,globals=1}", "training",
                 "Beltagy et al. 2020, arXiv:2004.05150", golden="longformer",
                 around="one projection for local and global tokens"),
    SparseSystem("ETC", "B9", "longformer{window=128,globals=64}", "training",
                 "Ainslie et al. 2020, arXiv:2004.08483", around="relative labels are a bias of the rule"),
    SparseSystem("GMAT", "B10", "block_local{block=512,globals=16}", "training",
                 "Gupta and Berant 2020, arXiv:2006.03274"),
    SparseSystem("Star-Transformer", "B11", "longformer{window=2,globals=1}", "training",
                 "Guo et al. 2019, arXiv:1902.09113"),
    SparseSystem("BlockBERT", "B12", "block_local{block=512,shift=head}", "training",
                 "Qiu et al. 2020, arXiv:1911.02972"),
    SparseSystem("neighborhood attention", "B13", "neighborhood{grid=64x64,kernel=7x7}", "training",
                 "Hassani et al. 2023, arXiv:2204.07143", golden="neighborhood_attention"),
    SparseSystem("generalized neighborhood attention", "B14", "neighborhood{grid=64x64,kernel=16x16,stride=8x8}",
                 "drop-in", "Hassani et al. 2025, arXiv:2504.16922"),
    SparseSystem("Combiner, fixed", "B15", "pooled_window{block=64,window=64,near=chunk,blocks=outside}", "training",
                 "Ren et al. 2021, arXiv:2107.05768",
                 around="means of spans for largest channels and values weighed by a pooled query"),
    SparseSystem("mixture of attention spans", "B16", "spans", "calibration", "Fu et al. 2024, arXiv:2406.14909"),
    SparseSystem("SimLayerKV", "B17", "sinks_window{sinks=4,window=1024}", "drop-in",
                 "Zhang et al. 2024, arXiv:2410.13846", around="a layer is lazy where the plan says so"),
    SparseSystem("RAT+", "B18", "strided{stride=16}", "training", "Wei and Gulcehre 2026, arXiv:2602.18196",
                 around="keys and values are gated running means before it, a gate stands behind it"),
    SparseSystem("MoBA", "C1", "block_mixture{block=512,top_k=3}", "drop-in", "Lu et al. 2025, arXiv:2502.13189",
                 golden="moba"),
    SparseSystem("NSA, its chosen branch", "C2", "compressed_selection", "drop-in",
                 "Yuan et al. 2025, arXiv:2502.11089", golden="nsa",
                 around="mixers.native_sparse has all three branches and their gates"),
    SparseSystem("NSA", "C2", "", "training", "Yuan et al. 2025, arXiv:2502.11089", golden="nsa",
                 mixer="attnc.mixers.native_sparse.native_sparse"),
    SparseSystem("DSA", "C3", "token_top_k{scorer=indexer,top_k=2048}", "training",
                 "DeepSeek-AI 2025, arXiv:2512.02556", golden="dsa", around="keys of one score may be others"),
    SparseSystem("MISA", "C4", "token_top_k{scorer=indexer,heads=8}", "drop-in", "Zhou et al. 2026, arXiv:2605.07363",
                 around="statistic of the heads is ours"),
    SparseSystem("HISA", "C5", "token_top_k{scorer=indexer,blocks=64,block=128}", "drop-in",
                 "Xu et al. 2026, arXiv:2603.28458"),
    SparseSystem("MiTA", "C8", "", "training", "Wen et al. 2026, arXiv:2602.01219",
                 around="a key of two landmarks counts once", mixer="attnc.mixers.landmarks.landmark_experts"),
    SparseSystem("AB-Sparse", "C9", "head_blocks{sizes=16:32:64,budget=1024}", "calibration",
                 "Liu et al. 2026, arXiv:2605.12110", around="means are not quantised"),
    SparseSystem("UniPrefill", "C10",
                 "block_scores{pool=last,rows=128,block=64,top_k=999,mass=99,sinks=128,window=128}", "drop-in",
                 "Fan et al. 2026, arXiv:2605.06221", around="tokens are not dropped behind the attention"),
    SparseSystem("SSA, gists", "C11", "gist_blocks{block=17,top_k=8,gists=1}", "training",
                 "Mao et al. 2026, arXiv:2604.20920", around="one level of gists"),
    SparseSystem("Focus", "C12", "token_groups{top_k=2,window=512}", "calibration",
                 "Yao et al. 2026, arXiv:2604.03260", around="by=given takes the scores of hidden states"),
    SparseSystem("Quest", "C15", "page_bounds{block=16,top_k=16}", "drop-in", "Tang et al. 2024, arXiv:2406.10774",
                 golden="quest_decode", around="bounds are made anew at each call"),
    SparseSystem("InfLLM", "C16", "memory_blocks", "drop-in", "Xiao et al. 2024, arXiv:2402.04617"),
    SparseSystem("exact top keys", "C17", "token_top_k{scorer=exact}", "drop-in", "the largest scores themselves",
                 around="the oracle of selectors"),
    SparseSystem("H2O", "C18", "cache_eviction{policy=h2o}", "drop-in", "Zhang et al. 2023, arXiv:2306.14048",
                 golden="h2o_decode"),
    SparseSystem("TOVA", "C19", "cache_eviction{policy=tova}", "drop-in", "Oren et al. 2024, arXiv:2401.06104"),
    SparseSystem("FastGen", "C20", "head_policies{recover=95}", "drop-in", "Ge et al. 2023, arXiv:2310.01801",
                 around="no policy of punctuation; the last rows are profiled"),
    SparseSystem("SeerAttention", "C21", "gated_blocks{rows=64,block=64}", "training",
                 "Gao et al. 2024, arXiv:2410.13276"),
    SparseSystem("A-shape", "C22", "sinks_window{sinks=128,window=1024}", "calibration",
                 "Jiang et al. 2024, arXiv:2407.02490", golden="minference_a_shape"),
    SparseSystem("MInference, vertical and slash", "C22", "vertical_slash", "calibration",
                 "Jiang et al. 2024, arXiv:2407.02490", golden="minference_vertical_slash"),
    SparseSystem("MMInference, grid heads", "C23", "strided{stride=256}", "calibration",
                 "Li et al. 2025, arXiv:2504.16083",
                 around="the stride of frames is given; boundaries of modalities are masks of the rule"),
    SparseSystem("Reformer", "C25", "hash_buckets{hash=rotation,chunk=64,before=1,rounds=2,window=0}", "training",
                 "Kitaev et al. 2020, arXiv:2001.04451", golden="reformer_lsh",
                 around="hash=given takes the model's own buckets"),
    SparseSystem("Routing Transformer", "C26", "", "training", "Roy et al. 2021, arXiv:2003.05997",
                 golden="routing_attention", around="centroids move outside", mixer="attnc.mixers.routing.routing"),
    SparseSystem("Sinkhorn attention", "C27", "", "training", "Tay et al. 2020, arXiv:2002.11296",
                 around="the sorting network stands before it", mixer="attnc.mixers.sorted_blocks.sorted_blocks"),
    SparseSystem("Memorizing Transformer", "C28", "", "training", "Wu et al. 2022, arXiv:2203.08913",
                 around="filling the memory stands outside", mixer="attnc.mixers.memorizing.memorizing"),
    SparseSystem("LongHeads", "C30", "block_mixture{block=256,top_k=16,sinks=256,window=256}", "drop-in",
                 "Lu et al. 2024, arXiv:2402.10685", around="chunks are ranked by means; positions are not remapped"),
    SparseSystem("DHSA, fixed chunks", "C31", "block_scores{pool=mean}", "drop-in",
                 "Xiong et al. 2025, arXiv:2510.24606",
                 around="chunks of one length, no network that finds their ends"),
    SparseSystem("DMA", "C32", "key_importance", "training", "Shi et al. 2025, arXiv:2508.02124",
                 golden="dynamic_mask_attention"),
    SparseSystem("BiFormer", "C34", "block_scores{rows=64,block=64,sinks=0,window=0}", "training",
                 "Zhu et al. 2023, arXiv:2303.08810", around="no convolution of the values"),
    SparseSystem("Rectified SpaAttn", "C35", "rectified", "drop-in", "Liu et al. 2025, arXiv:2511.19835"),
    SparseSystem("VMoBA", "C36", "block_mixture{top_k=999,mass=25,pick=head}", "drop-in",
                 "Wu et al. 2025, arXiv:2506.23858", around="blocks of one axis"),
    SparseSystem("HyperAttention, no mask", "C37",
                 "hash_buckets{hash=bits,buckets=256,chunk=256,before=0,samples=256,window=0}", "drop-in",
                 "Han et al. 2023, arXiv:2310.05869"),
    SparseSystem("HyperAttention, causal", "C37", "hash_halves{least=2048,chunk=256,samples=256}", "drop-in",
                 "Han et al. 2023, arXiv:2310.05869", around="segments begin at multiples of their length"),
    SparseSystem("ZETA", "C38", "", "training", "Zeng et al. 2025, arXiv:2501.14577",
                 around="the form z_order; no mean of the past as one more key", mixer="attnc.mixers.cauchy.cauchy"),
    SparseSystem("Superlinear", "C39", "spans_search{block=256,top_k=4}", "drop-in", "Huang 2026, arXiv:2601.18401",
                 around="one softmax over the spans in place of a weighted sum of theirs"),
    SparseSystem("FlexPrefill, query-aware map", "", "block_scores{pool=mean,top_k=999,mass=95,pick=head}", "drop-in",
                 "Lai et al. 2025, arXiv:2502.20766"),
    SparseSystem("XAttention", "", "block_scores{pool=antidiagonal,stride=16,top_k=999,mass=90}", "drop-in",
                 "Xu et al. 2025, arXiv:2503.16428"),
    SparseSystem("MoSA", "", "", "training", "Piekos et al. 2025, arXiv:2505.00315", golden="mosa",
                 mixer="attnc.mixers.mosa.mixture_of_sparse"),
    SparseSystem("SLA", "", "", "training", "Zhang et al. 2025, arXiv:2509.24006",
                 mixer="attnc.mixers.sparse_linear.sparse_linear"),
)

REFUSED: tuple[RefusedSystem, ...] = (
    RefusedSystem("GVR", "C6",
                  "the same keys as an exact top-k, found sooner from those of the last step: a kernel that keeps "
                  "state between steps, no other attention"),
    RefusedSystem("Lighthouse attention", "C7",
                  "chooses queries too, and spreads what the chosen ones give over the others, in training alone: "
                  "the model it leaves is dense"),
    RefusedSystem("Fluxion", "C13",
                  "splits one attention between a GPU and a CPU by where keys are stored: a placement, no other "
                  "result"),
    RefusedSystem("AdaSpark", "C14",
                  "drops tokens from the feed-forward layers by what attention made of them: more than one region"),
    RefusedSystem("RetrievalAttention", "C24",
                  "looks keys up in an index that a host builds for each prompt: token_top_k gives what a perfect "
                  "index finds"),
    RefusedSystem("Unlimiformer", "C29",
                  "retrieves encoder states of another sequence from a store: token_top_k with every key is its "
                  "attention"),
    RefusedSystem("SEA", "C33",
                  "a network trained to estimate the whole map costs as much as what is saved: gated_blocks is "
                  "the trained gate here"),
    RefusedSystem("Flux Attention", "C40",
                  "a trained router sends whole layers to one attention or another at each call: a plan says it "
                  "for each layer, once"),
)
# fmt: on


def systems_of(form: str) -> tuple[SparseSystem, ...]:
    """The systems that are settings of the form `form`."""
    return tuple(s for s in SPARSE_SYSTEMS if s.spelling.partition("{")[0] == form)
