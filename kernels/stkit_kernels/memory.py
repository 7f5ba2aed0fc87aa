"""How many bytes a call keeps alive at its worst: torch has no such counter on a CPU.

    peak_bytes(lambda: torch.ones(1000).exp())    # 8000: the ones and their exponentials, float32
"""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until the last tensor that uses them is gone.

    What was there before (inputs, and views of them) does not count. Not seen: scratch memory inside of an operator.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive after any operator.
        largest: bytes of the largest storage made.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._sizes: dict[weakref.ref, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {weakref.ref(s) for s in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages((result, args, kwargs)):  # the arguments too: an out= may have grown
            self._note(storage, before)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, storage: torch.UntypedStorage, before: set[weakref.ref]) -> None:
        known = weakref.ref(storage, self._freed)
        if known not in self._sizes and known in before:
            return  # an input's
        size = storage.nbytes()
        self.live += size - self._sizes.pop(known, 0)
        self._sizes[known] = size
        self.largest = max(self.largest, size)

    def _freed(self, known: weakref.ref) -> None:
        self.live -= self._sizes.pop(known, 0)


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that a call holds at once, above what was alive before it.

    Args:
        call: takes nothing; a backward pass inside it is counted too. What it returns counts until it ends.

    Returns:
        bytes.
    """
    with LiveStorages() as storages:
        call()
    return storages.peak
