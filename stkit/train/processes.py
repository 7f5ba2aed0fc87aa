"""The processes that train one model together, through Accelerate: ``accelerate launch -m stkit sft ...``.

Each computes every n-th clip of an update; gradients and numbers are summed, so that the result is that of one process
up to rounding. Accelerate wraps no module: a prefix tree runs Transformers' forward pass on views of the modules, which
a wrapper would not see. Under FSDP the weights are sharded by :mod:`stkit.train.sharding`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..runtime import StkitError
from ..vlm.processes import launched
from .settings import Settings
from .sharding import sharding_asked


class Processes:
    """This process among ``count``. ``first``: the one that writes and prints. ``sharded``: each has its part of the
    model.

    Args:
        settings: train.tracker, model.device.
        out: where a tracker's files go.
    """

    def __init__(self, settings: Settings, out: Path, config: Mapping | None = None):
        tracker = settings.train.tracker
        cpu = settings.model.device == "cpu" or (launched() and not torch.cuda.is_available())  # else it sees one only
        if tracker != "none" and find_spec(tracker) is None:  # Accelerate would go on without it
            raise StkitError(f"train.tracker={tracker}: it is not installed: pip install {tracker}, or use none")
        sharded = sharding_asked()
        self.accelerator = Accelerator(cpu=cpu, log_with=None if tracker == "none" else tracker, project_dir=str(out))
        self.count, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.first = self.rank == 0
        self.sharded = sharded and self.count > 1
        if tracker != "none":
            plain = {k: v for k, v in (config or {}).items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("stkit", plain)

    @property
    def device(self) -> str | None:
        """This process's own device; None for one process, which takes what the settings say."""
        own = self.accelerator.device
        return None if self.count == 1 else own.type if own.type == "cpu" else str(own)

    def share(self, items: Sequence) -> Sequence:
        """Every ``count``-th item, from this process's number on."""
        return items[self.rank :: self.count]

    def summed(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number summed over the processes."""
        if self.count == 1:
            return dict(numbers)
        found: dict[str, float] = {}
        for part in gather_object([dict(numbers)]):
            for name, value in part.items():
                found[name] = found.get(name, 0) + value
        return found

    def gathered(self, items: Sequence) -> list:
        """The items of all processes, those of process 0 first."""
        return list(items) if self.count == 1 else gather_object(list(items))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; one that no process has stays away, as the optimiser then leaves that
        parameter alone, and one that some have not counts as 0 there."""
        if self.count == 1:
            return
        have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.all_reduce(have)
        for parameter, some in zip(parameters, have.tolist(), strict=True):
            if not some:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return flag if self.count == 1 else any(gather_object([flag]))

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def track(self, row: Mapping) -> None:
        """Hand a row of metrics to the tracker, if there is one."""
        values = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        self.accelerator.log(values, step=row["step"])

    def end(self) -> None:
        """Close the tracker."""
        self.accelerator.end_training()
