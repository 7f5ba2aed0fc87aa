"""The loop: an update from many small pieces, exact resumption, checkpoints, and everything written down as it happens.

    loop = Loop(out, policy, settings, steps=60)
    cursor = loop.resume()                            # the place in the data, 0 for a new run
    told = loop.learn(plants, loss_of)                # one optimiser step over all pieces
    loop.log({"loss": told["loss"]})
    loop.save(cursor)

Losses of pieces are summed, never averaged: who calls divides by what the whole update has, so that the gradient depends
neither on how it is cut (``train.max_tokens``) nor on how many processes share it.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..runs import append_jsonl, explain, read_partial_jsonl, write_jsonl
from ..runtime import OutOfMemory, StkitError, explain_memory
from . import checkpoint
from .forest import Plant, forests
from .policy import Policy, replace_folder, save_final
from .processes import Processes
from .settings import Settings
from .sharding import gathered, idle_loss, spread

LOGS = ("metrics.jsonl", "rollouts.jsonl", "scores.jsonl")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def rate_factor(schedule: str, step: int, steps: int, warm: int) -> float:
    """What the learning rate is multiplied by at an update, counted from 0; it rises over ``warm`` updates, then falls."""
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done)))}[schedule]


def pick_precision(precision: str, device: str) -> tuple[str, str]:
    """What is computed in beside float32 weights: "no", "bf16" or "fp16", and why."""
    if precision != "auto":
        return precision, "asked for"
    if not device.startswith("cuda"):
        return "no", f"on {device} the weights' own dtype is used"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16", "this GPU computes in bfloat16"
    return "fp16", "this GPU (compute capability under 8, as a T4) has no bfloat16; a scaler guards small gradients"


def make_optimizer(parameters: Sequence[torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, in 8 bits where asked; matrices decay, vectors don't."""
    train = settings.train
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    kind = torch.optim.AdamW
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise StkitError(
                f"train.optimizer=adamw_8bit: bitsandbytes cannot be used here ({error}): use adamw"
            ) from error
    return kind(groups, lr=train.lr, betas=train.betas)


class Loop:
    """A run under way.

    Args:
        out: the run's folder, claimed already.
        policy: what learns.
        steps: updates in all.
        processes: those that share the work.
        progress: a bar on stderr.

    ``step``: updates done. ``max_tokens``: of a piece; halved once when memory runs out. ``state``: plain values of the
    caller's that are kept in checkpoints.
    """

    def __init__(
        self, out: Path, policy: Policy, settings: Settings, steps: int, processes: Processes, progress: bool = True
    ):
        train = settings.train
        self.out, self.policy, self.settings, self.steps, self.processes = out, policy, settings, steps, processes
        self.device = next(policy.model.parameters()).device
        self.precision, self.why = pick_precision(train.precision, self.device.type)
        self.parameters = policy.trainable
        self.optimizer = make_optimizer(self.parameters, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step, self.saved, self.max_tokens, self.halved = 0, 0, train.max_tokens, False
        self.state: dict = {"best": None}
        self.resumed: int | None = None
        self.asked_to_stop = False
        self.bar = tqdm(total=steps, unit="step", disable=not (progress and processes.first), file=sys.stderr)
        self.begin = time.monotonic()

    def resume(self) -> int:
        """Go on from the newest checkpoint; rows written after it are cut off, they come again.

        Returns:
            The place in the data.
        """
        cursor, started = 0, (self.out / LOGS[0]).exists()
        found = checkpoint.latest(self.out / "checkpoints")
        if found is not None:
            state = checkpoint.read_state(found)
            self.policy.restore(found / "weights")
            kept = checkpoint.load_tensors(found / "optimizer.pt")
            state_of = kept["optimizer"]
            self.optimizer.load_state_dict(spread(state_of, self.optimizer) if self.policy.sharded else state_of)
            self.scaler.load_state_dict(kept["scaler"])
            checkpoint.restore_generators(checkpoint.load_tensors(found / "generators.pt"))
            self.step = self.saved = state["step"]
            self.max_tokens, self.halved = state["max_tokens"], state["halved"]
            self.state, cursor = state["state"], state["cursor"]
        if started:
            self.resumed = self.step
            if self.processes.first:
                self._cut_logs()
                print(f"resumed from step {self.step} of {self.steps} in {self.out}", file=sys.stderr)
        self.bar.update(self.step)
        self.processes.wait()
        return cursor

    def _cut_logs(self) -> None:
        for name in LOGS:
            rows = read_partial_jsonl(self.out / name)
            kept = [row for row in rows if row["step"] <= self.step]
            if len(kept) < len(rows):
                write_jsonl(self.out / name, kept)

    def autocast(self):
        """The precision of a forward pass."""
        if self.precision == "no":
            return contextlib.nullcontext()
        # its cache would keep a copy of every weight that was gathered
        return torch.autocast(self.device.type, FLOATS[self.precision], cache_enabled=not self.policy.sharded)

    def learn(
        self, plants: Callable[[int], Sequence[Plant]], loss_of: Callable[[list[Plant]], tuple],
        check: Callable[[dict], None] | None = None,
    ) -> dict:  # fmt: skip
        """One optimiser step.

        Args:
            plants: the update's trees, each of at most so many tokens as it is given.
            loss_of: of a forest: its share of the loss (a scalar with a graph), and numbers that add up over forests.
            check: sees those sums before the step is made, and may raise.

        Returns:
            The sums of those numbers over all processes, with loss, lr, grad_norm and tokens.

        Raises:
            StkitError: a loss or gradient that is not finite (no step is made), or no memory even with half the tokens.
        """
        try:
            return self._learn(plants(self.max_tokens), loss_of, check)
        except OutOfMemory as error:
            if not self.halve(str(error)):
                raise
        return self._learn(plants(self.max_tokens), loss_of, check)

    def halve(self, why: str) -> bool:
        """Compute half as many tokens at once from now on; False when that was done before."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.halved or self.processes.count > 1:
            return False
        self.max_tokens, self.halved = self.max_tokens // 2, True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"memory ran out: going on with train.max_tokens={self.max_tokens} ({why})", file=sys.stderr)
        return True

    def _learn(self, plants: Sequence[Plant], loss_of: Callable, check: Callable | None) -> dict:
        told: dict[str, float] = {"loss": 0.0, "tokens": 0, "pieces": 0}
        for forest in self._pieces(plants):
            with explain_memory(f"a piece of {sum(p.tokens for p in forest)} tokens", "lower train.max_tokens"):
                with self.autocast():
                    loss, sums = loss_of(forest) if forest else (idle_loss(self.policy, self.policy.compared), {})
                if not torch.isfinite(loss):
                    raise StkitError(f"the loss is {float(loss.detach())} on {_names(forest)}")
                self.scaler.scale(loss).backward()
            size = sum(p.tokens for p in forest)
            sums = {"loss": float(loss.detach()), "tokens": size, "pieces": bool(forest)} | sums
            for name, value in sums.items():
                told[name] = told.get(name, 0) + value
        told = self.processes.summed(told)
        if check is not None:
            check(told)
        told["lr"] = self.set_rate()
        told["grad_norm"] = self._advance() if told["pieces"] else 0.0
        return told

    def _pieces(self, plants: Sequence[Plant]) -> list[list[Plant]]:
        """What is computed at once. With sharded weights every process has as many, if need be empty ones, and each has
        one video where the tower learns, as that runs once for each."""
        if not self.policy.sharded:
            return list(forests(plants, self.max_tokens))
        found = [[one] for one in plants] if self.policy.tower else list(forests(plants, self.max_tokens))
        most = max(self.processes.gathered([len(found)]))
        return found + [[] for _ in range(most - len(found))]

    def set_rate(self) -> float:
        """The learning rate of the next update, a function of its number alone."""
        train = self.settings.train
        factor = rate_factor(train.schedule, self.step, self.steps, math.ceil(train.warmup * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * factor
        return train.lr * factor

    def _advance(self) -> float:
        """The optimiser's step, from the gradients of all processes; returns their norm before it was clipped."""
        if not self.policy.sharded:  # else they were summed layer by layer
            self.processes.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.train.clip_norm)
        norm = float(norm.full_tensor() if self.policy.sharded else norm)
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise StkitError(f"the gradient's norm is {norm}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, row: Mapping) -> dict:
        """Write one row of metrics.jsonl; the update it tells of is done then."""
        self.step += 1
        row = {"step": self.step, **row, "seconds": round(time.monotonic() - self.begin, 3)}
        self.begin = time.monotonic()
        if self.resumed is not None:
            row, self.resumed = row | {"resumed_from_step": self.resumed}, None
        if self.halved:
            row["max_tokens"] = self.max_tokens
        if self.scaler.is_enabled():  # a step whose gradients overflow float16 is left out, and the scale falls
            row["scale"] = self.scaler.get_scale()
        if self.processes.first:
            append_jsonl(self.out / LOGS[0], row)
            self.processes.track(row)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "reward", "kl") if row.get(name) is not None}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        return row

    def save(self, cursor: int) -> None:
        """A checkpoint of this moment."""
        write, optimizer = self.policy.writer(), self.optimizer.state_dict()
        optimizer = gathered(optimizer) if self.policy.sharded else optimizer
        if self.processes.first:
            kept = {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
            tensors = {"optimizer": kept, "generators": checkpoint.generators()}
            state = {"cursor": cursor, "max_tokens": self.max_tokens, "halved": self.halved, "state": self.state}
            folder, keep = self.out / "checkpoints", self.settings.train.keep
            checkpoint.save(folder, self.step, write, tensors, state, keep)
        self.saved = self.step
        self.processes.wait()

    def save_if_due(self, cursor: int) -> None:
        """A checkpoint where one is due, or where the run was asked to stop."""
        stop = self.processes.any(self.asked_to_stop)
        if stop or self.step - self.saved >= self.settings.train.save_every or self.step >= self.steps:
            self.save(cursor)
        if stop:
            self.bar.close()
            raise KeyboardInterrupt

    def keep_best(self, accuracy: float) -> bool:
        """Keep the weights apart if no score before was as good."""
        best = self.state["best"]
        if not math.isfinite(accuracy) or (best is not None and accuracy <= best["accuracy"]):
            return False
        write = self.policy.writer()
        if self.processes.first:
            replace_folder(self.out / "best", write)
        self.state["best"] = {"step": self.step, "accuracy": accuracy}
        return True

    def finish(self) -> None:
        """Write the end result."""
        self.bar.close()
        write = self.policy.writer()
        if self.processes.first:
            save_final(self.policy, self.out, write)
        self.processes.wait()

    @contextlib.contextmanager
    def guarded(self):
        """Ctrl-C ends the run after the update under way, with a checkpoint; a second one ends it at once. What goes
        wrong is told with the step it went wrong at and what is safe."""

        def stop(number, frame):
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True
            print("\nstopping after this update (Ctrl-C again: at once)", file=sys.stderr)

        ours = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, stop) if ours else None
        try:
            yield
        except (StkitError, OSError) as error:
            last = checkpoint.latest(self.out / "checkpoints")
            safe = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            kind, text = (StkitError, explain(error)) if isinstance(error, OSError) else (type(error), str(error))
            raise kind(f"step {self.step + 1} of {self.steps}: {text} ({safe})") from error
        finally:
            self.bar.close()
            if ours:
                signal.signal(signal.SIGINT, before)


def _names(forest: Sequence[Plant]) -> str:
    names = list(dict.fromkeys(leaf.name for one in forest for leaf in one.leaves))
    return f"question {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
