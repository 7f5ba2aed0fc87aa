"""Views of modules: shallow copies in which a part is replaced, while weights and hooks are shared.

A view lets Transformers' own forward pass run with an attention of ours without altering the model: nothing has to be
restored after an exception, two threads don't meet, and a checkpointed layer is computed again with what it had.
"""

import functools

from torch import nn

from ..runtime import StkitError


def base_model(model):
    """The Transformers model: inside of a peft one, or itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(getattr(base, "model", None), "language_model"):
        raise StkitError(f"{type(base).__name__} is no Qwen-VL: give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    return base


def view(module: nn.Module, forward=None, *bound, **children: nn.Module) -> nn.Module:
    """A shallow copy of a module: weights and hooks are shared, ``children`` replace its own of that name.

    ``forward``: what runs in place of its class's, with the view and ``bound`` as its first arguments.
    """
    seen = object.__new__(type(module))  # a sharded module's class makes another of a copy
    vars(seen).update(vars(module))
    seen._modules = module._modules | children
    if "_old_forward" in vars(module):  # accelerate's hooks hold the module itself
        seen._old_forward = functools.partial(forward or type(module).forward, seen, *bound)
        seen.forward = functools.partial(module.forward.func, seen)
    elif forward is not None:
        seen.forward = functools.partial(forward, seen, *bound)
    return seen


def active(module):
    """What a module stands for, where peft trains a whole copy of it (``modules_to_save``)."""
    if not hasattr(module, "modules_to_save"):
        return module
    own = module.disable_adapters or not module.active_adapters
    return module.original_module if own else module.modules_to_save[module.active_adapters[0]]
