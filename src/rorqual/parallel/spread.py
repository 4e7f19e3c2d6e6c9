"""From a whole model to this process's part of it, and from many processes' gradients to one step's."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from rorqual.model.memory import NgramTable
from rorqual.model.moe import MoE
from rorqual.model.mtp import MTP
from rorqual.model.transformer import Transformer
from rorqual.parallel.config import Parallel
from rorqual.parallel.experts import SpreadExperts
from rorqual.parallel.heads import divide_heads
from rorqual.parallel.layout import Layout, Piece, layout, local
from rorqual.parallel.mesh import Kind, Mesh

BUCKET = 1 << 24  # elements summed at a time


def spread(model: Transformer, mesh: Mesh, parallel: Parallel) -> Layout:
    """Keep this process's part of a model that every process has built alike."""
    found = layout(model, mesh, parallel)
    if mesh.world == 1:
        return found
    for module in model.modules():
        if isinstance(module, NgramTable):
            module.sparse = False
        if isinstance(module, MoE):
            module.data_size, module.sum_counts = mesh.data.size, mesh.data.sum_
            if mesh.expert > 1:
                module.experts = SpreadExperts(module.experts, mesh.teams["expert"])
    if mesh.tensor > 1:
        divide_heads(model, found)
    if parallel.shard:
        _shard(model, mesh)
    return found


def _shard(model: Transformer, mesh: Mesh) -> None:
    """FSDP2: a layer's weights are gathered when they are used, and its gradients are sums cut into parts."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    device = model.embed_tokens.weight.device.type
    world = DeviceMesh(device, list(range(mesh.world)))
    copies = mesh.teams["copies"]
    alone: set[nn.Parameter] = set()  # experts that nobody else holds
    units: list[nn.Module] = []
    for block in [*model.layers, *(m.block for m in model.mtp if isinstance(m, MTP))]:
        experts = block.mlp.experts if isinstance(block.mlp, MoE) else None
        if experts is not None and mesh.expert > 1:
            if copies.size == 1:
                alone |= set(experts.parameters())
            else:
                fully_shard(
                    experts, mesh=DeviceMesh.from_group(copies.group, device, mesh=list(copies.ranks))
                )
                units.append(experts)
        fully_shard(block, mesh=world, ignored_params=alone)
        units.append(block)
    fully_shard(model, mesh=world, ignored_params=alone, reshard_after_forward=False)
    for unit in (*units, model):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)  # sums: the loss is already divided by all targets
        unit.set_force_sum_reduction_for_comms(True)


def fold(model: nn.Module) -> None:
    """Give back the weights that FSDP2 has gathered for a pass without gradients: it keeps them for the backward pass
    that follows a forward one in training."""
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()


def sum_gradients(model: nn.Module, found: Layout) -> None:
    """Add up what processes found on their own rows and tokens; sharded gradients have been added up already."""
    buckets: dict[tuple[Kind, torch.dtype], list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        placement = found.of(name)
        if p.grad is not None and not placement.sharded and found.team(placement.reduce).size > 1:
            buckets[placement.reduce, p.grad.dtype].append(p.grad)
    for (kind, _), grads in buckets.items():
        for some in _buckets(grads):
            flat = found.team(kind).sum_(torch.cat([g.flatten() for g in some]))
            parts = flat.split([g.numel() for g in some])
            torch._foreach_copy_(some, [f.view_as(g) for f, g in zip(parts, some, strict=True)])


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[]]
    size = 0
    for g in grads:
        if size and size + g.numel() > BUCKET:
            found, size = [*found, []], 0
        found[-1].append(g)
        size += g.numel()
    return found


def gradient_norm(model: nn.Module, found: Layout) -> Tensor:
    """The norm of all gradients of all processes, each part counted once."""
    square = torch.zeros((), dtype=torch.float64)
    for name, p in model.named_parameters():
        if p.grad is not None:
            norm = torch.linalg.vector_norm(local(p.grad), dtype=torch.float64).cpu()
            square += norm.square() / found.of(name).holders(found.mesh)
    return found.team("world").sum_(square).sqrt()


def joined(parts: list[Tensor], name: str, found: Layout) -> Tensor:
    """Parts of n tensors that are placed as `name` is → all of them whole [n, *shape]."""
    mesh, placement = found.mesh, found.of(name)
    pieces: list[Piece] = [placement.piece(mesh, r) for r in range(mesh.world)]
    longest = max(torch.Size(p.size).numel() for p in pieces)
    flat = parts[0].new_zeros(len(parts), longest)
    for row, part in zip(flat, parts, strict=True):
        row[: part.numel()] = part.flatten()
    everyone = found.team("world").gather(flat)
    out = parts[0].new_empty(len(parts), *placement.shape)
    for piece, theirs in zip(pieces, everyone, strict=True):
        n = torch.Size(piece.size).numel()
        out[(slice(None), *piece.slices)] = theirs[:, :n].view(len(parts), *piece.size)
    return out
