"""What attention over a paged cache shares: which cached tokens a query row sees, and rows kept at 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # values of a cached row that share a scale


@dataclass(frozen=True)
class PagedRows:
    """N query rows over B block tables. Row i sees the first length[i] tokens of request[i], none where it is 0.

    Token t of request b lies in cache row table[b, t // block_size] * block_size + t % block_size. A row's own
    token counts where its key is in the cache already, so a chunk's rows have lengths start + 1, start + 2, …
    """

    table: Tensor  # [B, blocks] int32
    request: Tensor  # [N] int32
    length: Tensor  # [N] int32
    block_size: int

    def slots(self, row: int) -> Tensor:
        """The cache rows that a query row sees, in order."""
        count = int(self.length[row])
        blocks = self.table[int(self.request[row]), : -(-count // self.block_size)].long()
        return (
            blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)
        ).flatten()[:count]


def row_bytes(width: int) -> int:
    """Bytes of a row of `width` values at 8 bits: the values and their half scales."""
    return width + 2 * -(-width // GROUP)


def round_rows(x: Tensor) -> Tensor:
    """x [*L, width] → uint8 [*L, row_bytes]: signed bytes, then one half scale for each GROUP of them."""
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(max=65504).half()  # rounded before it divides
    wide = scale.float()
    q = (groups / torch.where(wide > 0, wide, 1.0)).round().clamp(-127, 127).to(torch.int8)
    scales = scale.squeeze(-1).contiguous()
    return torch.cat(
        (q.flatten(-2)[..., :width].contiguous().view(torch.uint8), scales.view(torch.uint8)), -1
    )


def restore_rows(rows: Tensor, width: int) -> Tensor:
    """The reverse of `round_rows` → [*L, width] float32."""
    q = rows[..., :width].contiguous().view(torch.int8).float()
    scales = rows[..., width:].contiguous().view(torch.float16).float()
    return q * scales.repeat_interleave(GROUP, -1)[..., :width]


def cached_values(cache: Tensor, width: int) -> Tensor:
    """Cache rows of any kind as float32 [*L, width]."""
    return restore_rows(cache, width) if cache.dtype == torch.uint8 else cache.float()
