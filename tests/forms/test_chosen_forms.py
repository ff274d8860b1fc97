"""What the forms that choose keys by groups, gists, policies, halves or none mean in small cases; their refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc import ops
from attnc.codegen.cpu_key_lists import Tables, _pieces
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.forms.selected import Selected
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, rule_of

CAUSAL, PLAIN = (AttentionRule.parse(f"score=0.5 * s{more}") for more in ("; keep=j - i <= 0", ""))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kept(spelling: str, given: Operands) -> Tensor:
    form = parse_form(spelling)
    assert isinstance(form, Selected)
    narrowed = form.narrowed(form.choose(given), given)
    return narrowed.tensor(narrowed.rule.keep).expand(*given.query.shape[:3], narrowed.key.shape[2])


def test_a_pooled_window_is_a_softmax_over_near_keys_and_means() -> None:
    torch.manual_seed(0)
    q, k, v = (drawn(1, 1, 18, 8) for _ in range(3))
    means = [t[:, :, :16].unflatten(2, (4, 4)).mean(3) for t in (k, v)]
    at = torch.arange(18)
    score = 0.5 * torch.cat([q @ k.mT, q @ means[0].mT], -1)
    near = (at[:, None] - at).abs() < 3
    for rule, back in ((PLAIN, torch.ones(18, 4)), (CAUSAL, 4 * torch.arange(4) + 3 <= at[:, None])):
        keep = torch.cat([near if rule is PLAIN else near.tril(), back.bool()], -1)
        expected = score.masked_fill(~keep, -torch.inf).softmax(-1) @ torch.cat([v, means[1]], 2)
        out, _ = ops.attention(q, k, v, [], [], f"pooled_window{{block=4,window=3}} | {rule.spell()}")
        torch.testing.assert_close(out, expected)


def test_counted_means_of_equal_keys_lose_nothing() -> None:
    q = drawn(1, 2, 32, 8)
    k, v = (drawn(1, 2, 8, 8).repeat_interleave(4, 2) for _ in range(2))
    given = Operands(q, k, v, [], [], PLAIN)
    form = "pooled_window{block=4,window=8,near=chunk,blocks=outside,weight=count}"
    torch.testing.assert_close(ops.attention(*given[:5], f"{form} | {PLAIN.spell()}")[0], reference(given)[0])


def test_tokens_of_one_group_see_each_other_and_no_others_but_near_ones() -> None:
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    score = torch.nn.functional.one_hot(group, 3).double().unsqueeze(0)
    x = drawn(1, 2, 9, 4)
    given = Operands(x, x, x, [score], [], CAUSAL)
    found = kept("token_groups{top_k=1,window=2,by=given}", given)
    apart = torch.arange(9)[:, None] - torch.arange(9)
    assert torch.equal(found[0, 0], ((group[:, None] == group) | (apart < 2)) & (apart >= 0))


def test_gists_stay_where_their_block_is_not_chosen() -> None:
    q, k = torch.zeros(1, 1, 16, 2), torch.zeros(1, 1, 16, 2)
    q[..., 0], k[:, :, 7, 0] = 1.0, 5.0  # the gist of the second block suits every query
    found = kept("gist_blocks{block=4,top_k=2}", Operands(q, k, k, [], [], CAUSAL))[0, 0]
    assert found[15].nonzero().squeeze(-1).tolist() == [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]


def test_each_head_takes_the_cheapest_policy_that_holds_enough() -> None:
    L = 40
    at = torch.arange(L, dtype=torch.float64)
    bias = torch.zeros(4, L, L, dtype=torch.float64)
    bias[0, :, :2] = 20.0  # looks at the first two keys
    bias[1] = -1.0 * (at[:, None] - at).abs()  # at near ones
    bias[2, :, 17] = 20.0  # at one key
    q = torch.zeros(1, 4, L, 4, dtype=torch.float64)
    rule = AttentionRule.parse("score=s + f0[h, i, j]; keep=j - i <= 0")
    form = parse_form("head_policies{sinks=2,window=4,heavy=3,last=8}")
    assert isinstance(form, Selected)
    chosen = form.choose(Operands(q, q, q, [bias], [], rule))
    assert chosen[0, :, 0].tolist() == [0, 1, 2, 3] and chosen[0, 2, 1] == 17


def test_halves_pair_by_chunks_and_samples_that_weigh_as_many_as_they_stand_for() -> None:
    torch.manual_seed(0)
    q, k, v = (drawn(1, 1, 64, 8) for _ in range(3))
    given = Operands(q, k, v, [], [], CAUSAL)
    found = kept("hash_halves{least=16,chunk=4,samples=4}", given)[0, 0]
    at = torch.arange(64)
    inside = at[:, None] // 16 == at // 16
    assert torch.equal(found & inside, inside.tril())
    quarter = found[32:, :32].sum(-1)  # four of a chunk, four of the sample, some of both
    assert int(quarter.min()) >= 4 and int(quarter.max()) == 8
    equal = given._replace(key=k[:, :, :1].expand_as(k))  # every key weighs alike: weights are counts
    form = parse_form("hash_halves{least=16,chunk=4,samples=4}")
    assert isinstance(form, Selected)
    lse = form.reference(equal)[1][0, 0] - 0.5 * (q @ k[:, :, :1].mT)[0, 0, :, 0]
    assert 26.0 < float(lse[31].exp()) < 40.0  # of 32 keys


def test_a_rule_of_many_parts_is_read_in_smaller_pieces() -> None:
    x = torch.zeros(1, 8, 512, 64)
    given, pieces = Operands(x, x, x, [], [], CAUSAL), []
    for spelling in ("hash_buckets{rounds=2}", "hash_buckets{rounds=1}"):
        form = parse_form(spelling)
        assert isinstance(form, Selected)
        laid, every = form.laid(form.choose(given), given)
        pieces.append(len(list(_pieces(every[0], Tables.of(laid, every[0].width)))))
    assert pieces[0] > 2 * pieces[1]


def region(spelling_weights: tuple = (), rule: str = "causal", L: int = 64, S: int = 64) -> AttentionRegion:
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", "weights": spelling_weights}
    return AttentionRegion("layer", "sdpa", rule_of(rule, Dims(L, S)), AttentionShape(1, 4, 2, L, S, 8, 8), **facts)


@pytest.mark.parametrize(
    ("spelling", "where", "says", "neighbour"),
    [
        ("pooled_window", region(rule="documents"), "a causal mask or none", region()),
        ("pooled_window", region(rule="alibi"), "scores the product alone", region()),
        ("token_groups", region(), "needs centroids (H, G, E)", region((("centroids", (2, 5, 8)),))),
        ("token_groups{by=given}", region(), "needs group_scores", region((("group_scores", (1, 64, 5)),))),
        ("gist_blocks{block=8,gists=0}", region(), "needs summaries", region((("summaries", (1, 2, 8, 8)),))),
        ("gist_blocks{block=8,gists=9}", region(), "use fewer", region()),
        ("head_policies", region(L=1), "serves prefill and training", region()),
        ("hash_halves", region(rule="plain"), "halves a causal mask", region()),
        ("hash_halves{buckets=12}", region(), "power of two", region()),
        ("z_order{width=20}", region(), "at most 16 channels", region()),
        (
            "hash_buckets{hash=given,rounds=2}",
            region((("buckets", (1, 2, 2, 64)),)),
            "(1, 4, 2, 64)",
            region((("buckets", (1, 4, 2, 64)),)),
        ),
    ],
)
def test_a_refusal_is_a_sentence_and_its_neighbour_applies(
    spelling: str, where: AttentionRegion, says: str, neighbour: AttentionRegion
) -> None:
    why = parse_form(spelling).refuse(where)
    assert why is not None and says in why and why.endswith(".")
    valid = {"gist_blocks{block=8,gists=9}": "gist_blocks", "hash_halves{buckets=12}": "hash_halves"}
    valid["z_order{width=20}"] = "z_order"
    assert parse_form(valid.get(spelling, spelling)).refuse(neighbour) is None


def test_buckets_of_another_shape_are_an_error_that_names_both() -> None:
    x = drawn(1, 2, 32, 4)
    with pytest.raises(UsageError, match=r"\(1, 1, 1, 32\).*allowed.*\(1, 2, 1, 32\)"):
        ops.attention(
            x, x, x, [torch.zeros(1, 1, 1, 32, dtype=torch.long)], [], f"hash_buckets{{hash=given}} | {PLAIN.spell()}"
        )
