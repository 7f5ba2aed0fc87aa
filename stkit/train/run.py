"""A training run's folder: started, refused where it is another's, and read back as tables.

RUN/config.yaml       stage, settings, model, versions, benchmark: complete; a folder with others is refused
RUN/files.json        SHA-256 of every question and video
RUN/metrics.jsonl     one row an update          RUN/rollouts.jsonl   one row a rollout
RUN/scores.jsonl      scores while training      RUN/checkpoints, RUN/best, RUN/adapter or RUN/model

run = open_run("runs/sft")
run.metrics.plot("step", "loss")
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..runs import explain, read_yaml
from ..runtime import StkitError
from .settings import STAGES

CONFIG = "config.yaml"
BESIDE = ("command", "commit", "why", "platform", "plan", "threads", "steps")  # not compared on resumption


@dataclass(frozen=True)
class Run:
    """A training run. The tables are DataFrames; rollouts is empty after SFT, scores without ``--eval-every``."""

    out: Path
    config: dict = field(repr=False)
    metrics: pd.DataFrame = field(repr=False)
    rollouts: pd.DataFrame = field(repr=False)
    scores: pd.DataFrame = field(repr=False)

    @property
    def model(self) -> Path | None:
        """The folder of the end result: RUN/model, or RUN/adapter with LoRA; None while the run isn't done."""
        return next((self.out / name for name in ("model", "adapter") if (self.out / name).is_dir()), None)

    def summary(self) -> dict:
        """What became of it: steps, the first and last loss (and reward), the best score, where the result is."""
        found: dict = {"out": str(self.out), "stage": self.config.get("stage"), "steps": len(self.metrics)}
        for name in ("loss", "reward", "kl"):
            values = self.metrics[name].dropna() if name in self.metrics else ()
            if len(values):
                found[name] = {"first": float(values.iloc[0]), "last": float(values.iloc[-1])}
        scored = self.scores.dropna(subset=["accuracy"]) if len(self.scores) else self.scores
        if len(scored):
            found["best"] = scored.loc[scored["accuracy"].idxmax()].to_dict()
        return found | {"result": str(self.model) if self.model else None}

    def text(self) -> str:
        """The summary for a terminal."""
        told = self.summary()
        lines = [f"{told['stage']}: {told['steps']} steps are in {self.out}"]
        lines += [
            f"  {n} {told[n]['first']:.3f} -> {told[n]['last']:.3f}" for n in ("loss", "reward", "kl") if n in told
        ]
        if best := told.get("best"):
            within = f"{_share(best['low'])} to {_share(best['high'])}"
            beside = f"blind {_share(best['blind'])}, chance {_share(best['chance'])}"
            counted = f"{best['n']:.0f} questions, {best['clusters']:.0f} clusters"
            lines.append(
                f"  best score {_share(best['accuracy'])} at step {best['step']:.0f} ({within}; {beside}; {counted})"
            )
        return "\n".join([*lines, f"  the result is in {told['result']}" if told["result"] else "  not finished"])


def _share(value: float | None) -> str:
    """A share for people, "–" where there is none."""
    return "–" if value is None or value != value else f"{value:.1%}"


def open_run(out: str | Path) -> Run:
    """A training run that is on disk, finished or not.

    Raises:
        StkitError: there is none.
    """
    out = Path(out)
    if not (out / CONFIG).exists():
        raise StkitError(f"{out}: no {CONFIG} in it: give the folder that 'stkit sft' or 'stkit grpo' wrote")
    config = read_yaml(out / CONFIG)
    if not isinstance(config, dict) or config.get("stage") not in STAGES:
        raise StkitError(f"{out / CONFIG}: no stage in it: give the folder that 'stkit sft' or 'stkit grpo' wrote")
    return Run(out, config, *(pd.DataFrame(read_rows(out / f"{name}.jsonl")) for name in ("metrics", "rollouts", "scores")))


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a run's JSONL, none where there is no such file; a half-written last line is for later.

    Raises:
        StkitError: a line that is no row with a step, by its number.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    except OSError as error:
        raise StkitError(explain(error)) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append(row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise StkitError(f"{path}:{number}: not a row with a step ({error!r:.80}): delete that line") from error
    return found
