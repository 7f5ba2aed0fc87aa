"""The model that is trained, with what it is compared to: LoRA on a frozen base, or all weights beside a frozen copy.

policy = make_policy("tiny", settings, reference=True)
policy.trainable                       # the parameters that an optimiser gets
with policy.reference() as model:      # the adapter off, or the frozen copy
    tree_logps(model, trees, videos, features)
policy.save(folder); policy.restore(folder)
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stkit_kernels.backends import choose_backend
from torch import nn

from ..runs import replace_folder
from ..runtime import BadUse, StkitError, pick_dtype
from ..vlm.load import FAMILIES, Loaded, head_size, load_model, quiet
from ..vlm.views import base_model
from .settings import Settings
from .sharding import check_shardable, fill, gathered, shard, whole


@dataclass
class Policy:
    """A model in training.

    loaded: the model that learns (a peft model with LoRA), its processor and the record of what was loaded. frozen: a
    copy of the model as it was, None with LoRA or without a reference. lora: whether an adapter is trained. tower:
    whether the features of a video change while training. compared: whether there is a reference. sharded: whether each
    process has a part of every weight only.
    """

    loaded: Loaded
    frozen: Any
    lora: bool
    tower: bool
    compared: bool = False
    sharded: bool = False

    @property
    def model(self):
        """The model that learns."""
        return self.loaded.model

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The model as it was before training, without a graph."""
        with torch.no_grad():
            if not self.lora:
                if self.frozen is None:
                    raise StkitError("no copy of the model was kept: make the policy with reference=True")
                yield self.frozen
                return
            with self.model.disable_adapter():
                yield self.model

    def whole(self, tower_only: bool = False):
        """A context in which this process has all weights, or those of a tower that doesn't learn, and waits for no
        other; every process must enter it."""
        here = self.sharded and not (tower_only and self.tower)
        return whole(self.model, tower_only) if here else nullcontext()

    def writer(self) -> Callable[[Path], None]:
        """What one process writes the weights of this moment with; every process must ask for it."""
        if not self.sharded:
            return self.save
        state = self.model.state_dict(keep_vars=True)
        found = gathered({name: v for name, v in state.items() if v.requires_grad or not self.lora})
        return lambda folder: self.save(folder, found)

    def save(self, folder: Path, state: dict | None = None) -> None:
        """Write what was learned: the adapter, or a whole model folder that Transformers loads.

        Args:
            state: whole weights by name, where the model's own are sharded.
        """
        with quiet(progress=False):
            self.model.save_pretrained(folder, state_dict=state)
        if self.lora:
            for extra in folder.glob("README.md"):  # peft's empty model card
                extra.unlink()
        else:
            self.loaded.processor.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Take the weights that :meth:`save` wrote, bit for bit."""
        if self.lora:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict
            from safetensors.torch import load_file

            if self.sharded:
                fill(get_peft_model_state_dict(self.model), load_file(folder / "adapter_model.safetensors"))
                return
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            return
        with quiet(progress=False):
            kind = FAMILIES[self.loaded.record["family"]][0]
            saved = kind.from_pretrained(folder, dtype=self.model.dtype, local_files_only=True)
        if self.sharded:
            fill(self.model.state_dict(), saved.state_dict())
        else:
            self.model.load_state_dict(saved.state_dict())


def make_policy(
    model: str | Path | Loaded, settings: Settings, reference: bool, device: str | None = None, shards: int = 1
) -> Policy:
    """Load a model and make it ready to learn.

    Args:
        model: a name or folder for :func:`stkit.load_model`, or what it returned (it is altered).
        settings: model, lora, and train.tower, projector, checkpointing, precision.
        reference: keep what the KL needs.
        device: in place of settings.model.device, for one of several processes.
        shards: processes that the weights are shared out over; 1: each has them all.

    Raises:
        StkitError: the model cannot be loaded, or cannot be trained as asked.
    """
    loaded = _loaded(model, settings, device, shards > 1)
    if loaded.record["adapter"] is not None:
        loaded = _merged(loaded)
    lora = settings.lora.rank > 0
    if not lora:
        _refuse_full(loaded)
    frozen = None
    if reference and not lora:
        frozen = copy.deepcopy(loaded.model).requires_grad_(False).eval()
    net = _with_adapter(loaded, settings) if lora else _unfrozen(loaded.model, settings)
    if settings.train.checkpointing:
        base_model(net).gradient_checkpointing_enable({"use_reentrant": False})
    net.train()  # nothing drops out (that is refused); checkpoints are only taken in this mode
    tower = _tower_learns(net)
    for one in (net, frozen) if shards > 1 else ():
        if one is not None:
            shard(one, device, shards)
    return Policy(Loaded(net, loaded.processor, loaded.record), frozen, lora, tower, reference, shards > 1)


def _loaded(model, settings: Settings, device: str | None, sharded: bool) -> Loaded:
    wanted = asdict(settings.model) | ({"device": device} if device else {})
    if not isinstance(model, (str, Path)):
        found = Loaded(*model)
        if sharded:
            check_shardable(settings, found.record["four_bit"])
        return found
    if not sharded:
        return load_model(model, **wanted)
    check_shardable(settings, False)
    dtype = str(pick_dtype(wanted["dtype"], device)[0]).removeprefix("torch.")
    found = load_model(model, **wanted | {"device": "cpu", "dtype": dtype})  # whole it may not fit on its device
    tree = choose_backend(torch.device(device), found.model.dtype, head_size(found.model.config)).name
    return found._replace(record=found.record | {"device": device, "tree_attention": tree})


def _merged(loaded: Loaded) -> Loaded:
    """The start adapter becomes a part of the base, so that the reference is the model that training starts from."""
    if loaded.record["four_bit"]:
        raise StkitError(
            f"model.adapter={loaded.record['adapter']}: merging into 4-bit weights would round it: merge it with 'stkit "
            "merge' and give the merged folder as --model, or set model.four_bit=false"
        )
    merged = loaded.model.merge_and_unload()
    return Loaded(merged, loaded.processor, loaded.record)


def _refuse_full(loaded: Loaded) -> None:
    if loaded.record["four_bit"]:
        raise BadUse(
            "lora.rank=0 trains all weights, which 4-bit ones cannot be: set model.four_bit=false, or give a rank"
        )
    if loaded.record["dtype"] == "float16":
        raise BadUse("lora.rank=0 with float16 weights loses small steps: set model.dtype=float32 (or train LoRA)")


def _with_adapter(loaded: Loaded, settings: Settings):
    """A new LoRA adapter on the language model's targets, and on the tower and the projector where they are trained."""
    from peft import LoraConfig, get_peft_model

    s = settings.lora
    names = _targets(loaded.model, settings)
    config = LoraConfig(
        r=s.rank, lora_alpha=s.alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=rf"(.*\.)?({'|'.join(map(re.escape, names))})",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(settings.train.seed)
        net = get_peft_model(loaded.model, config)
    net.peft_config["default"].base_model_name_or_path = loaded.record["name"]
    return net


def _targets(model, settings: Settings) -> list[str]:
    """Names of the linear layers that get an adapter, as short as they are told apart."""
    found, wanted = [], settings.lora.targets
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if "visual" in name:
            part = "projector" if "merger" in name else "tower"
            if getattr(settings.train, part):
                found.append(name)
        elif "language_model" in name and name.rpartition(".")[2] in wanted:
            found.append(name)
    there = {
        name.rpartition(".")[2]
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "visual" not in name
    }
    if unknown := [t for t in wanted if t not in there]:
        raise BadUse(f"lora.targets has {unknown[0]!r}, this model has {', '.join(sorted(there - {'lm_head'}))}")
    return found


def _unfrozen(model, settings: Settings):
    """All weights learn, those of tower and projector where that is asked for."""
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "visual" in name:
            parameter.requires_grad_(getattr(settings.train, "projector" if "merger" in name else "tower"))
    return model


def _tower_learns(net) -> bool:
    return any(p.requires_grad for name, p in net.named_parameters() if "visual" in name)


def save_final(policy: Policy, out: Path, write: Callable[[Path], None]) -> Path:
    """Write RUN/adapter or RUN/model, whole or not at all."""
    target = out / ("adapter" if policy.lora else "model")
    return replace_folder(target, write)
