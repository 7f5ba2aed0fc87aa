"""Weights shared out over the processes, for models that outgrow one GPU: FSDP 2 on the layers that our views share.

    accelerate launch --config_file stkit/train/accelerate/fsdp.yaml -m stkit sft ...

    shard(model, "cuda:0", count=2)            # each process keeps its part of every parameter
    with whole(model):                         # all of it in each process: decoding takes any number of steps
        generate(model, ...)
    write(gathered(model.state_dict()))        # as in one process, in process 0

A process waits in every layer for the others, so all compute equally many pieces (:func:`idle_loss` fills up) and what
they do at their own pace stands within :func:`whole`. The head and the embeddings stay whole from the start of a piece
to the end of its backward pass, as the head has no forward pass of its own.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import distributed, nn

from ..runtime import BadUse, StkitError
from ..vlm.logps import tree_logps
from ..vlm.tree import Tree
from ..vlm.video import VideoInputs
from ..vlm.views import active, base_model
from .settings import Settings


def sharding_asked() -> bool:
    """Whether the launcher's file asks for it.

    Raises:
        StkitError: it asks for DeepSpeed, which wraps a model whole.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise StkitError(
            "distributed_type DEEPSPEED: this loop shards nothing under it: launch with "
            "stkit/train/accelerate/fsdp.yaml, which shards weights, gradients and the optimiser's states"
        )
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_shardable(settings: Settings, four_bit: bool) -> None:
    """Raise BadUse where the settings, or a model that is loaded already, ask for what cannot be shared out."""
    if settings.model.four_bit or four_bit:
        raise BadUse("4-bit weights cannot be sharded: set model.four_bit=false, or launch without FSDP")
    if settings.train.optimizer == "adamw_8bit":
        raise BadUse("train.optimizer=adamw_8bit cannot be sharded: use adamw, or launch without FSDP")


def shard(model, device: str, count: int) -> None:
    """Keep this process's part of every parameter on its device; the model's modules are altered in place.

    Args:
        model: of Transformers, or a peft model around it, the same in every process; where it lies it need not fit on
            the device, whose largest part is a layer. device: this process's. count: processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = base_model(model)
    mesh = init_device_mesh(torch.device(device).type, (count,))
    language, tower = active(base.model.language_model), active(base.model.visual)
    for part in (*language.layers, *tower.blocks):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # one group, as their weight may be one: it is whole from the embeddings' forward pass until backward passes end
    fully_shard([language.embed_tokens, base.lm_head], mesh=mesh, reshard_after_forward=True)
    for part in (language, tower, base):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in _shards(base):
        part.set_gradient_divide_factor(1.0)  # losses are shares of the update's: gradients are summed
        part.set_force_sum_reduction_for_comms(True)
    base._get_fsdp_state()._lazy_init()  # else the first part that computes is taken for the root


def _shards(module: nn.Module) -> list:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def whole(model, tower_only: bool = False) -> Iterator[None]:
    """All weights (or those of the vision tower) in every process; no process waits for another within."""
    base = base_model(model)
    part = active(base.model.visual) if tower_only else base
    part.set_reshard_after_forward(False)
    for one in _shards(part):
        one.unshard()
    try:
        yield
    finally:
        part.set_reshard_after_forward(True)
        base.reset_iter_state()


def gathered(value):
    """Sharded tensors within dictionaries and lists made whole, on the CPU of process 0 (None stands there in the
    others). Every process must call it."""
    from torch.distributed.tensor import DTensor

    made: dict[int, torch.Tensor | None] = {}  # one tensor under two names stays one

    def of(value):
        if isinstance(value, Mapping):
            return {name: of(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(of(part) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            plain = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
            made[id(value)] = plain.cpu() if distributed.get_rank() == 0 else None
        return made[id(value)]

    return of(value)


def part_of(value, like):
    """This process's part of a whole tensor, sharded as ``like`` is; anything else as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Write whole tensors into a model's own, sharded ones."""
    if missing := own.keys() ^ saved.keys():
        raise StkitError(f"the saved weights are of another model: {min(missing)} is in one of the two only")
    for name, value in own.items():
        value.copy_(part_of(saved[name], value))


def spread(state: Mapping, optimizer: torch.optim.Optimizer) -> dict:
    """An optimiser's whole state, with this process's part of what belongs to sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {k: {name: part_of(v, parameters[k]) for name, v in held.items()} for k, held in state["state"].items()}
    return {**state, "state": own}


def idle_loss(policy, reference: bool) -> torch.Tensor:
    """0, with a graph: what a process computes while others have a piece more; it meets them in the same layers.

    Args:
        policy: :class:`stkit.train.policy.Policy`. reference: a piece takes the reference's pass too.
    """
    base = base_model(policy.model)
    video, ids = None, (0,)
    if policy.tower:
        tower = active(base.model.visual)
        merge, columns = tower.spatial_merge_size, math.prod(tower.patch_embed.proj.weight.shape[1:])
        video = VideoInputs(torch.zeros(merge**2, columns), torch.tensor([1, merge, merge]), 1.0, np.zeros(1))
        ids = (base.config.video_token_id,)
    tree = Tree(ids)
    tree.branch((0,), 1.0)
    found = tree_logps(policy.model, tree, video, tokens="weighted")
    if reference:
        with policy.reference() as model:
            tree_logps(model, tree, video, tokens="weighted")
    return 0.0 * found.log_probs.sum()
