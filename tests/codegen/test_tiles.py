"""Tile classes never contradict the mask; groups visit every kept tile; for any predicate program."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.cpu_groups import grouped
from attnc.codegen.tiles import classify, static_tiles, visited
from attnc.expr import Expr
from attnc.expr_text import parse, spell
from attnc.operands import Operands
from attnc.predicate import logical_not
from attnc.reading import read
from attnc.rule_attention import AttentionRule

B, Hq, L, S = 2, 3, 21, 26
numbers = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["i", "j", "h", "b", "n0", "t0[b, j]", "t0[b, i]", "t1[j]"]),
        st.integers(-9, 30).map(str),
        st.tuples(numbers, st.sampled_from(["+", "-"]), numbers).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(st.integers(-3, 3), numbers).map(lambda p: f"({p[0]} * {p[1]})"),
        st.tuples(numbers, st.sampled_from(["//", "%"]), st.integers(1, 9)).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), numbers, numbers).map(lambda p: f"{p[0]}({p[1]}, {p[2]})"),
        numbers.map(lambda e: f"abs({e})"),
        st.tuples(predicates, numbers, numbers).map(lambda p: f"where({p[0]}, {p[1]}, {p[2]})"),
    )
)
predicates: st.SearchStrategy[str] = st.deferred(
    lambda: st.one_of(
        st.tuples(numbers, st.sampled_from(["<=", "<", "==", "!="]), numbers).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(predicates, st.sampled_from(["and", "or"]), predicates).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        predicates.map(lambda e: f"(not {e})"),
        st.just("p2[b, j]"),
    )
)


def tables() -> list[torch.Tensor]:
    n = max(L, S)
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 4, (B, n), generator=draw).sort(-1).values,
        torch.randint(-5, 5, (n,), generator=draw),
        torch.rand(B, n, generator=draw) > 0.4,
    ]


AXES = Operands(torch.empty(B, Hq, L, 1), *[torch.empty(B, Hq, S, 1)] * 2, (), (), AttentionRule()).axes
SIZES = [4]


def evaluated(text: str) -> torch.Tensor:
    """`text` by Python's own rules, without attnc's expressions."""
    b, h, i, j = (AXES[name].index for name in "bhij")
    t0, t1, p2 = tables()

    def as_int(x):
        return x.long() if isinstance(x, torch.Tensor) else int(x)

    scope = {
        "b": b,
        "h": h,
        "i": i,
        "j": j,
        "n0": SIZES[0],
        "t0": t0,
        "t1": t1,
        "p2": p2,
        "abs": lambda x: abs(as_int(x)),
        "min": lambda x, y: torch.minimum(*both(x, y)),
        "max": lambda x, y: torch.maximum(*both(x, y)),
        "where": lambda p, x, y: torch.where(truth(p), *both(x, y)),
    }
    return truth(eval(python(text), {"__builtins__": {}}, scope)).expand(B, Hq, L, S)


def both(x, y):
    return torch.as_tensor(x), torch.as_tensor(y)


def truth(x) -> torch.Tensor:
    return torch.as_tensor(x).bool()


def python(text: str) -> str:
    """The same text with tensor logic: `and`, `or`, `not` are not defined on tensors."""
    return text.replace(" and ", " & ").replace(" or ", " | ").replace("(not ", "(True ^ ")


def dense(e: Expr) -> torch.Tensor:
    return torch.as_tensor(read(e, AXES, tables(), SIZES)).expand(B, Hq, L, S)


@settings(max_examples=100, deadline=None)
@given(predicates)
def test_an_expression_means_what_its_text_says(text: str) -> None:
    e = parse(text)
    want = evaluated(text)
    assert torch.equal(dense(e), want), spell(e)
    assert torch.equal(dense(logical_not(e)), ~want), spell(e)
    assert parse(spell(e)) == e


@settings(max_examples=80, deadline=None)
@given(predicates, st.sampled_from([(4, 4), (8, 5), (7, 13), (32, 32)]))
def test_tiles_never_contradict_the_mask(text: str, block: tuple[int, int]) -> None:
    e = parse(text)
    mask = dense(e)
    m, n = block
    for tiles in (
        classify(e, L, S, m, n, B=B, Hq=Hq, captured=tables(), sizes=SIZES),
        classify(e, L, S, m, n, B=B, Hq=Hq, sizes=SIZES),
    ):
        for a in range(tiles.may.shape[2]):
            for c in range(tiles.may.shape[3]):
                tile = mask[:, :, a * m : (a + 1) * m, c * n : (c + 1) * n]
                per = (*tiles.may.shape[:2], 1, 1)
                kept = tile.any(3, True).any(2, True)
                whole = tile.all(3, True).all(2, True)
                may, must = (t[:, :, a, c].view(per) for t in (tiles.may, tiles.must))
                assert not (kept & ~may).any() and not (must & may & ~whole).any(), (spell(e), a, c)


@settings(max_examples=50, deadline=None)
@given(predicates, st.sampled_from([(4, 4), (8, 4)]), st.integers(1, 6))
def test_groups_visit_every_kept_tile_once(text: str, block: tuple[int, int], limit: int) -> None:
    m, n = block
    visits = visited(parse(text), L, S, m, n, B=B, Hq=Hq, sizes=tuple(SIZES))
    ragged = S // n if S % n else None
    groups = grouped(visits, bool(L % m), ragged, limit)
    rows = [row for group in groups for row in group.rows]
    assert sorted(rows) == list(range(len(visits)))
    for group in groups:
        for at, row in enumerate(group.rows):
            cols = [c for c in group.cols[0 if group.shared else at] if c >= 0]
            assert len(set(cols)) == len(cols) and {c for c, _ in visits[row]} <= set(cols)
            full = dict(visits[row])
            for c, whole in zip(group.cols[0 if group.shared else at], group.full, strict=True):
                assert not whole or full[c]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("j <= i", 4096 * (4096 + 128) / 2),
        ("j <= i and i - j <= 511", (10 + 28 * 5) * 128 * 128),
        ("i // 512 == j // 512", 4096 * 512),
    ],
)
def test_linear_masks_are_classified_exactly(text: str, pairs: float) -> None:
    assert static_tiles(parse(text), 4096, 4096, 128, 128).pairs(4096, 4096) == pairs


def test_documents_are_classified_from_their_ids() -> None:
    ids = torch.tensor([[0] * 16 + [1] * 32 + [2] * 16])
    tiles = classify(parse("t0[b, i] == t0[b, j]"), 64, 64, 16, 16, B=1, captured=[ids])
    assert tiles.may[0, 0].tolist() == tiles.must[0, 0].tolist()
    assert tiles.may[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_a_nan_makes_no_tile_look_empty() -> None:
    table = torch.tensor([float("nan"), 0.0, 1.0, 1.0])
    tiles = classify(parse("f0[j] <= 0.5"), 4, 4, 2, 2, captured=[table])
    assert tiles.may[0, 0, 0].tolist() == [True, False] and not tiles.must.any()
