"""Which published mixer is which setting of the recurrent family: one row each.

`rule` is what the operator `attnc::recurrence` is spelled with (lengths, heads, scale and epsilons left out); `around`
is what stands beside it, where that is more: a function of attnc, or a word on the operands. FoX and PaTH are
softmax attentions with a learned decay: rules of the masked family, as is Linformer, attention over few keys.

Source: systems.md, part D; each row names its paper.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A named mixer.

    row: of the catalogue. rule: fields of RecurrenceRule; "" where no recurrence is in it. golden: folder of vectors
    computed by its authors' code, or "".
    """

    name: str
    row: str
    rule: str
    source: str
    golden: str = ""
    around: str = ""


CHANNEL, TOKEN, HEAD = "decay='channel'", "decay='token'", "decay='head'"
DELTA = "delta=True; gate='write'"

# fmt: off
SYSTEMS: tuple[System, ...] = (
    System("linear attention", "D1", "normaliser='sum'", "Katharopoulos et al. 2020, arXiv:2006.16236",
           "linear_attention", "phi = elu + 1, or relu, before it"),
    System("linear attention, both directions", "D1", "", "Katharopoulos et al. 2020, arXiv:2006.16236",
           "linear_attention_elu_bidirectional", "two products, no order of tokens"),
    System("TransNormer", "D3", "", "Qin et al. 2022, arXiv:2210.10340", "",
           "linear attention without normaliser, a norm behind it"),
    System("lightning attention", "D4", HEAD, "Qin et al. 2024, arXiv:2405.17381", "lightning_attention"),
    System("retention", "D5", HEAD, "Sun et al. 2023, arXiv:2307.08621", "retention", "xPos before it"),
    System("gated retention, simple GLA", "D6", TOKEN, "Sun et al. 2024, arXiv:2405.05254", "simple_gla"),
    System("GLA", "D7", CHANNEL, "Yang et al. 2023, arXiv:2312.06635", "gla"),
    System("Mamba", "D8", "decay='state'; gate='write'", "Gu and Dao 2023, arXiv:2312.00752", "mamba1_selective_scan"),
    System("Mamba-2", "D9", f"{TOKEN}; gate='write'", "Dao and Gu 2024, arXiv:2405.21060", "mamba2_scan",
           "q, k = C, B by groups of heads"),
    System("SSD", "D9", TOKEN, "Dao and Gu 2024, arXiv:2405.21060", "ssd_minimal"),
    System("mLSTM", "D10", f"{TOKEN}; gate='exp'; normaliser='max1'", "Beck et al. 2024, arXiv:2405.04517"),
    System("HGRN", "D11", TOKEN, "Qin et al. 2023, arXiv:2311.04823", "hgrn", "a head of one state for each channel"),
    System("HGRN2", "D11", CHANNEL, "Qin et al. 2024, arXiv:2404.07904", "hgrn2", "k = 1 - exp(g)"),
    System("GSA", "", CHANNEL, "Zhang et al. 2024, arXiv:2409.07146", "gsa", "mixers.linear.gated_slots"),
    System("Based", "D12", "normaliser='sum'", "Arora et al. 2024, arXiv:2402.18668", "based",
           "codegen.feature_maps.taylor"),
    System("ReBased", "D12", "normaliser='sum'", "Aksenov et al. 2024, arXiv:2402.10644", "rebased",
           "codegen.feature_maps.squares"),
    System("DeltaNet", "D13", DELTA, "Yang et al. 2024, arXiv:2406.06484", "deltanet"),
    System("gated DeltaNet", "D14", f"{TOKEN}; {DELTA}; qk_norm=1e-06", "Yang et al. 2024, arXiv:2412.06464",
           "gated_deltanet"),
    System("gated DeltaProduct", "", f"{TOKEN}; {DELTA}", "Siems et al. 2025, arXiv:2502.10297", "gated_delta_product",
           "mixers.linear.delta_product"),
    System("KDA", "D15", f"{CHANNEL}; {DELTA}; qk_norm=1e-06", "Kimi Team 2025, arXiv:2510.26692", "kda"),
    System("Comba", "", f"{TOKEN}; low_rank=True; gate='write'", "Hu et al. 2025, arXiv:2506.02475", "comba",
           "mixers.linear.comba"),
    System("TTT-linear", "D16", "", "Sun et al. 2024, arXiv:2407.04620", "ttt_linear", "mixers.test_time.ttt_linear"),
    System("Titans, linear memory", "D17", "", "Behrouz et al. 2024, arXiv:2501.00663", "titans_linear",
           "mixers.test_time.titans_linear"),
    System("Titans, neural memory", "D17", "", "Behrouz et al. 2024, arXiv:2501.00663", "titans_neural_memory",
           "mixers.test_time.neural_memory"),
    System("RWKV-4", "D18", f"{HEAD}; gate='exp'; normaliser='sum'; read='before'",
           "Peng et al. 2023, arXiv:2305.13048", "", "a head of one state for each channel, bonus"),
    System("RWKV-6", "D19", f"{CHANNEL}; read='before'", "Peng et al. 2024, arXiv:2404.05892", "rwkv6", "bonus"),
    System("RWKV-7", "D20", f"{CHANNEL}; low_rank=True", "Peng et al. 2025, arXiv:2503.14456", "rwkv7_time_mixing",
           "a = -kk, b = kk * a"),
    System("DPLR delta rule", "D20", f"{CHANNEL}; low_rank=True", "Peng et al. 2025, arXiv:2503.14456",
           "dplr_delta_rule"),
    System("JetBlock", "D22", f"{TOKEN}; {DELTA}; qk_norm=1e-06", "Gu et al. 2025, arXiv:2508.15884", "",
           "mixers.linear.dynamic_convolution on v"),
    System("MoM", "D23", f"{TOKEN}; {DELTA}; packed=True", "Du et al. 2025, arXiv:2502.13685", "",
           "mixers.linear.mixture_of_memories"),
    System("Performer", "D25", "normaliser='sum'", "Choromanski et al. 2021, arXiv:2009.14794", "",
           "codegen.feature_maps.favor"),
    System("Flow-Attention", "D27", "", "Wu et al. 2022, arXiv:2202.06258", "flow_attention",
           "mixers.linear.flow_attention"),
    System("Hedgehog", "D32", "normaliser='sum'", "Zhang et al. 2024, arXiv:2402.04347", "hedgehog",
           "codegen.feature_maps.hedgehog"),
    System("LoLCATs", "D32", "", "Zhang et al. 2024, arXiv:2410.10254", "lolcats_hybrid",
           "codegen.linear_attention.window_and_linear"),
    System("log-linear attention", "", "", "Guo et al. 2025, arXiv:2506.04761", "log_linear_attention",
           "mixers.log_linear.log_linear_attention"),
)
# fmt: on
