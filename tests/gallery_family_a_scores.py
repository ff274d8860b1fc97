"""Family A, rows that change scores, weights or values: biases, decay, shared weights, pieces merged by their sums."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.gallery_entry import NEG, any_of, given, ids, qkv, spell

L = 33


def causal(L):
    i, j = ids(L)
    return torch.where(j <= i, 0.0, NEG)


def row_bound(q, k, v):
    """VFA: the row's maximum is replaced by a bound from key blocks; any shift of a row gives the same weights."""
    scores = q @ k.mT * 0.25
    bound = (q.norm(dim=-1) * 0.25)[..., None] * k.norm(dim=-1).amax(-1)[..., None, None]
    weights = torch.exp(scores - bound)
    return weights / weights.sum(-1, keepdim=True) @ v


def relative_with_convolution(q, k, v, conv_q, conv_k, conv_v, position, u, w):
    """RCMHA: a depthwise convolution on q, k and v, then Transformer-XL's relative scores."""
    q, k, v = (F.conv1d(F.pad(x.flatten(0, 1).mT, (2, 0)), c.expand(16, 1, 3), groups=16).mT.view(x.shape)
               for x, c in ((q, conv_q), (k, conv_k), (v, conv_v)))
    rows = q.shape[-2]
    content = torch.einsum("bhld,bhsd->bhls", q + u, k)
    moving = torch.einsum("bhld,hsd->bhls", q + w, position)
    moving = torch.cat([moving.new_zeros(*moving.shape[:3], 1), moving], -1)
    moving = moving.view(*moving.shape[:2], rows + 1, rows)[:, :, 1:].view(content.shape)
    return ((content + moving) * 0.25 + causal(rows)).softmax(-1) @ v


def shift_by_slices(q, k, v, position, u, w):
    """XLNet: positions run over 2 L places; pad-free shift, then index_select of the first L."""
    rows = q.shape[-2]
    content, moving = (q + u) @ k.mT, (q + w) @ position.mT
    B, H, I, J = moving.shape
    moving = moving.reshape(B, H, J, I)[:, :, 1:, :].reshape(B, H, I, J - 1)
    moving = torch.index_select(moving, 3, torch.arange(rows))
    return ((content + moving) * 0.25).softmax(-1) @ v


def disentangled(q, k, v, pos_q, pos_k):
    """DeBERTa: content to position and position to content, gathered by the clipped distance."""
    rows, span = q.shape[-2], pos_q.shape[-2] // 2
    i, j = ids(rows)
    at = (i - j + span).clamp(0, 2 * span - 1)
    scores = q @ k.mT
    to_position = torch.gather(q @ pos_k.mT, -1, at.expand(*scores.shape))
    from_position = torch.gather(k @ pos_q.mT, -1, at.mT.expand(*scores.shape)).mT
    return ((scores + to_position + from_position) * 48 ** -0.5).softmax(-1) @ v


def shaw(q, k, v, table):
    """Shaw et al.: each pair has its own key, looked up by distance."""
    rows = q.shape[-2]
    i, j = ids(rows)
    keys = table[(j - i).clamp(-8, 8) + 8]
    scores = q @ k.mT + torch.einsum("bhld,lsd->bhls", q, keys)
    return (scores * 0.25).softmax(-1) @ v


def forgetting(q, k, v, gate):
    """FoX: the logits fall by the log forget gates between the key and the query."""
    decay = F.logsigmoid(gate).cumsum(-1)
    scores = q @ k.mT * 0.25 + (decay[..., :, None] - decay[..., None, :])
    i, j = ids(q.shape[-2])
    return scores.masked_fill(j > i, -torch.inf).softmax(-1) @ v


def weights_shared(q, k, v, other):
    """EchoAtt: a second layer's values meet the weights of the first."""
    weights = (q @ k.mT * 0.25 + causal(q.shape[-2])).softmax(-1)
    return weights @ v, weights @ other


def weights_shared_in_sequence(q, k, v, project):
    """The second value is made from the first output, as in consecutive layers."""
    weights = (q @ k.mT * 0.25 + causal(q.shape[-2])).softmax(-1, dtype=torch.float32).to(q.dtype)
    first = weights @ v
    return weights @ torch.tanh(first @ project)


def weights_shared_and_returned(q, k, v, other):
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights @ v, weights @ other, weights


def pieces_merged_by_sums(q, k, v, q_far):
    """STRING: near and far pairs have queries at other positions; the two pieces are merged by their log-sum-exp."""
    i, j = ids(q.shape[-2])
    near = (q @ k.mT * 0.25).masked_fill((j > i) | (i - j >= 12), NEG)
    far = (q_far @ k.mT * 0.25).masked_fill(i - j < 12, NEG)
    lse_near, lse_far = near.logsumexp(-1, keepdim=True), far.logsumexp(-1, keepdim=True)
    share = torch.sigmoid(lse_near - lse_far)
    return share * (near.softmax(-1) @ v) + (1 - share) * (far.softmax(-1) @ v)


def lucid(q, k, v):
    """LUCID: the values are first freed of what earlier keys share, by a triangular system over exp(k . k)."""
    unit = F.normalize(k, dim=-1) * 4.0
    kernel = torch.exp(unit @ unit.mT * 0.25 - 4.0).tril()
    y = torch.linalg.solve_triangular(kernel, v, upper=False)
    return (q @ k.mT * 0.25 + causal(q.shape[-2])).softmax(-1) @ y


def householder(q, k, v, w, beta):
    """PaTH: the scores pass the product of the reflections between key and query; q.k and q.w beside one solve."""
    size = q.shape[-2]
    i, j = ids(size)
    ww, qw, wk = ((a @ b.mT) for a, b in ((w, w), (q, w), (w, k)))
    system = torch.eye(size) + (beta[..., None] * ww).tril(-1)
    inverse = torch.linalg.solve_triangular(system, torch.eye(size).expand_as(system), upper=False, unitriangular=True)
    reflected = qw.tril() @ inverse @ (beta[..., None] * wk).tril(-1)
    return ((q @ k.mT - reflected) * 0.25).masked_fill(j > i, -torch.inf).softmax(-1) @ v


def pages(q, k_pages, v_pages, table, length):
    """Keys and values gathered from pages by a block table."""
    k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k_pages, v_pages))
    mask = torch.where(torch.arange(k.shape[2]) < length[:, None], 0.0, NEG)[:, None, None]
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


def always_kept_prefix(q, k, v):
    """A window that never drops the first four tokens."""
    i, j = ids(q.shape[-2])
    keep = (j <= i) & ((i - j < 12) | (j < 4))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def paged():
    table = torch.tensor([[3, 1, 0], [2, 5, 4]])
    return torch.randn(2, 4, 1, 16), torch.randn(6, 11, 4, 16), torch.randn(6, 11, 4, 16), table, torch.tensor([33, 20])


def draw(*shape):
    return lambda: torch.randn(shape)


RELATIVE = {"u": draw(4, 1, 16), "w": draw(4, 1, 16)}
TAPS = {f"conv_{name}": draw(16, 1, 3) for name in "qkv"}
CAUSAL = {"scale": 0.25, "mask": "causal"}
OTHER = given(qkv(), draw(2, 4, L, 24))
ENTRIES = (
    spell(row_bound, {"scale": 0.25, "mask": "none"}),
    spell(relative_with_convolution,
          {**CAUSAL, "bias": True, "score": "0.25 * f0[b, h, i, j - i + 32] + 0.25 * s"},
          parameters={**TAPS, "position": draw(4, L, 16), **RELATIVE}),
    spell(shift_by_slices,
          {"scale": 0.25, "mask": "none", "score": "0.25 * s + 0.25 * f0[b, h, i, j - i + 33]"},
          given(qkv(), draw(1, 4, 2 * L, 16)), parameters=RELATIVE),
    spell(disentangled, {"scale": 48 ** -0.5, "mask": "none", "bias": True},
          parameters={"pos_q": draw(4, 24, 16), "pos_k": draw(4, 24, 16)}),
    spell(shaw, {"scale": 0.25, "mask": "none", "bias": True}, parameters={"table": draw(17, 16)}),
    spell(forgetting, {**CAUSAL, "score": "0.25 * s + f0[b, h, i] - f0[b, h, j]"}, given(qkv(), draw(2, 4, L))),
    spell(lucid, CAUSAL),
    spell(householder, CAUSAL, given(qkv(), lambda: F.normalize(torch.randn(2, 4, L, 16), dim=-1),
                                     lambda: torch.rand(2, 4, L))),
    spell(weights_shared, CAUSAL, OTHER, regions=2),
    spell(weights_shared_in_sequence, CAUSAL, parameters={"project": draw(16, 16)}, regions=2),
    spell(weights_shared_and_returned, {}, OTHER, regions=None, expect="refused"),
    spell(pieces_merged_by_sums, {"scale": 0.25}, given(qkv(), draw(2, 4, L, 16)), regions=2),
    spell(pages, {"scale": 0.25, "mask": any_of("padding", "tensor")}, paged, train=False),
    spell(always_kept_prefix, {"scale": 0.25, "mask": "predicate"}),
)
