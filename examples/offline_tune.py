"""Tune the kernels of a model for a GPU that is not here, and write the plan to a file.

On a machine without a GPU: settings are ranked by closed formulas, the best are compiled ahead of time for the named
GPU, and what the compiler says (registers, spills, shared memory, instructions) decides. About a minute.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import attnc


class WindowAttention(nn.Module):
    """Grouped heads under a causal window of 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(512, 768), nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).split([512, 128, 128], -1)
        query, key, value = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (query, key, value))
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        window = (distance >= 0) & (distance < 1024)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=window, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(-2))


device = sys.argv[1] if len(sys.argv) > 1 else "h100"
model, x = WindowAttention().bfloat16().eval(), torch.randn(1, 8192, 512, dtype=torch.bfloat16)
with torch.no_grad(), tempfile.TemporaryDirectory() as store:
    plan = attnc.autotune(model, x, device=device, trials=20, options={"store": store})

for where, choice in plan.choices.items():
    print(f"{where or 'the attention'} on {plan.device}: {choice.form}\n  {choice.reason}")
file = Path(tempfile.gettempdir()) / "plan.json"
file.write_text(plan.to_json())
print(f"{file} written. On the GPU: torch.compile(model, backend='attnc', options={{'plan': Plan.from_json(text)}})")
