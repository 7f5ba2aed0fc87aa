"""The paper's questions in miniature: arms trained and scored one after another, and what they say.

    found = run_study("runs/paper", model="runs/tiny/tell/model")
    found["arms"]["sft-reverse"]["test"]["accuracy"], found["contrasts"][0]["p_holm"]

    python -m stkit.tiny.ablations --model runs/tiny/tell/model --out runs/paper --cards data_cards

Three benchmarks are built once: walks to learn from (split "train"), walks to score (split "test") and walks out of
distribution (split "test" too). An arm and seed that is done has a ``result.json`` and is not run again; one that was
stopped goes on where it was. Seeds are the outer loop, so that after a third of the time every arm has a first answer.

The same command twice, or with other seeds, shares the work: an arm that another process is at is left to it. Each
process writes down at its end what all of them have finished, so the last one writes it all.
"""

import argparse
import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..bench.build import build_benchmark
from ..bench.schema import Benchmark, load_benchmark, row_of
from ..evaluation import evaluate
from ..reporting.judge import load_run
from ..runs import claim, explain, read_json, refuse_other, to_json, write_json, write_jsonl
from ..runtime import BadUse, StkitError, commit, versions
from ..train.grpo import grpo
from ..train.run import open_run
from ..train.sft import sft
from ..vlm.cache import content_hash
from ..vlm.sight import choose_sampling
from .ablation_page import write_page
from .findings import ON, UNKNOWN, clusters, marks, seeds_of, summarise, unsure
from .study import Arm, Study, load_study, settings_of, told
from .thoughts import both_orders, write_lessons

Say = Callable[[str], None]
PAUSE_S = 5  # between looks at what another process is at


class Bench(NamedTuple):
    """What all arms share: the folder, the study, the start (folder and SHA-256 of its weights), the benchmarks.

    made: command and commit of this process, as it was when its code was loaded.
    """

    out: Path
    study: Study
    model: Path
    sha256: str
    walks: dict[str, Benchmark]
    made: dict
    progress: bool

    def folder(self, arm: Arm, seed: int) -> Path:
        """Of one run; an arm that trains nothing has one for all seeds."""
        return self.out / "arms" / arm.name / (f"seed-{seed}" if arm.stage else "once")

    def told(self, arm: Arm, seed: int) -> dict:
        """What must be equal for a run's folder to be this one's."""
        return told(self.study, arm.name) | {"start": self.sha256} | ({"seed": seed} if arm.stage else {})


def run_study(
    out: str | Path, model: str | Path, study: str | Path = "paper", seeds: Sequence[int] | None = None,
    cards: str | Path | None = None, progress: bool = True,
) -> dict:  # fmt: skip
    """Run the arms of a study that are not done yet, and write down what all of them say.

    Args:
        out: folder of benchmarks, arms and results; ``ablations.json`` and ``ablations.md`` are written there.
        model: the folder from which every arm starts (the end of the recipe's stage "tell").
        study: see :func:`stkit.tiny.study.load_study`.
        seeds: of training, in place of the study's. What is written down is of all seeds that are finished there,
            these and earlier ones.
        cards: a folder into which ``ablations.json`` and ``ablations.md`` are written too.
        progress: bars, what is running and the time left, on stderr.

    Returns:
        What ``ablations.json`` holds, see :func:`stkit.tiny.findings.summarise`.

    Raises:
        BadUse: an unknown study or setting. StkitError: another study's folder, a full disk, no memory.
    """
    out, plan, say = Path(out), load_study(study), _speaker(progress)
    if seeds is not None:
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise BadUse(f"seeds={list(seeds)}: give at least one, none twice, none below 0")
        plan = replace(plan, seeds=tuple(seeds))
    try:
        shared = _prepare(out, plan, Path(model), say, progress)
        _run_all(shared, say)
        with _locked(out):
            rows, unfinished = finished(shared)
            done = replace(plan, seeds=tuple(seeds_of(rows)))
            found = summarise(_facts(shared, rows) | {"unfinished": unfinished}, done, rows)
            for folder in filter(None, (out, cards and Path(cards))):
                write_json(folder / "ablations.json", found)
                write_page(folder)
    except OSError as error:
        raise StkitError(explain(error)) from error
    return found


def _speaker(progress: bool) -> Say:
    return lambda text: tqdm.write(text, file=sys.stderr) if progress else None


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock, which the system takes back however the process ends; False: another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _prepare(out: Path, study: Study, model: Path, say: Say, progress: bool) -> Bench:
    """The folder claimed, the three benchmarks built; one process does it, the others wait."""
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise StkitError(f"{model}: no model.safetensors in it: give the folder that a recipe's stage wrote")
    sha256, walks = content_hash(weights), {}
    called = Path(sys.argv[0])
    program = ["python", "-m", "stkit.tiny.ablations"] if called.stem == "ablations" else [called.name]
    made = {"command": shlex.join([*program, *sys.argv[1:]]), "commit": commit() or UNKNOWN}
    if unsure(made["commit"]):
        say(f"the code that runs is in no commit ({made['commit']}): the page will say so; commit first to avoid it")
    with _locked(out):
        settings = {"study": study.name, "start": sha256, "walks": study.walks}
        claim(out, settings, name="study.json", beside={"versions": versions()})
        for name, how in study.walks.items():
            if not (out / name / "benchmark.json").exists():  # written last
                split = "train" if name == "train" else "test"
                ood = name == "ood"
                build_benchmark(out / name, how["clips"], how["seed"], ood=ood, split=split, progress=progress)
            walks[name] = load_benchmark(out / name)
            if name in ON:
                walks[name] = choices(walks[name])
    return Bench(out, study, model, sha256, walks, made, progress)


def choices(benchmark: Benchmark) -> Benchmark:
    """Its multiple-choice questions alone, of which the paper gives figures: a route takes twice as long to write."""
    asked, path = tuple(q for q in benchmark.questions if not q.is_open), benchmark.path / "choices.jsonl"
    write_jsonl(path, map(row_of, asked))
    return replace(benchmark, path=path, questions=asked)


def _run_all(shared: Bench, say: Say) -> None:
    """Run every arm with every seed; what another process is at is left to it, and waited for."""
    study, clock = shared.study, Clock()
    jobs = [(arm, seed) for seed in study.seeds for arm in study.arms.values() if arm.stage or seed == study.seeds[0]]
    left, waiting = list(jobs), False

    def tell(arm: Arm, seed: int) -> None:
        say(f"[{len(jobs) - len(left) + 1}/{len(jobs)}] {arm.name}, seed {seed}: running; {clock.left(left)}")

    while left:
        for arm, seed in left:
            if (row := _run_one(shared, arm, seed, tell)) is not None:
                clock.took(arm, row["seconds"])
                left.remove((arm, seed))
                waiting = False
                break
        else:
            if not waiting:
                rest = ", ".join(f"{arm.name}, seed {seed}" for arm, seed in left)
                say(f"waiting for {rest}: another process is at it")
            waiting = True
            time.sleep(PAUSE_S)


def _run_one(shared: Bench, arm: Arm, seed: int, tell: Callable[[Arm, int], None]) -> dict | None:
    """The result of one run; None as long as another process is at it or the arm before it is not done."""
    folder = shared.folder(arm, seed)
    if arm.after and not (shared.folder(shared.study.arms[arm.after], seed) / "result.json").exists():
        return None
    with _locked(folder, wait=False) as mine:
        if mine and not (folder / "result.json").exists():
            tell(arm, seed)
        return run_arm(shared, arm, seed) if mine else None


def finished(shared: Bench) -> tuple[dict[str, dict[int, dict]], list[int]]:
    """The results of every arm by seed, of the seeds that all arms have, whoever ran them; and the seeds left out.

    Raises:
        StkitError: a result of other settings is among them.
    """
    arms = shared.study.arms.values()
    there = {a.name: _seeds_there(shared.out / "arms" / a.name) for a in arms if a.stage}
    whole = sorted(set.intersection(*there.values()))
    rows: dict[str, dict[int, dict]] = {}
    for arm in arms:
        rows[arm.name] = {}
        for seed in whole if arm.stage else whole[:1]:
            folder = shared.folder(arm, seed)
            refuse_other(folder, shared.told(arm, seed), name="arm.json", beside=("made",))
            rows[arm.name][seed] = read_json(folder / "result.json")
    return rows, sorted(set.union(*there.values()) - set(whole))


def _seeds_there(folder: Path) -> set[int]:
    return {int(found.parent.name.removeprefix("seed-")) for found in folder.glob("seed-*/result.json")}


class Clock:
    """How long arms took, and how long those that are left will."""

    def __init__(self):
        self.known: list[tuple[Arm, float]] = []

    def took(self, arm: Arm, seconds: float | None) -> None:
        """An arm is done; None: it was stopped on the way, so that its time is not known."""
        if seconds is not None:
            self.known.append((arm, seconds))

    def left(self, jobs: Sequence[tuple[Arm, int]]) -> str:
        """In words: the mean of the same arm's other seeds, else of the same stage's arms, else of all."""
        if not self.known:
            return f"{len(jobs)} left, the first one tells how long they take"
        minutes = sum(self._expected(arm) for arm, _ in jobs) / 60
        return f"about {minutes:.0f} minutes left" if minutes < 90 else f"about {minutes / 60:.1f} hours left"

    def _expected(self, arm: Arm) -> float:
        for alike in (lambda a: a.name == arm.name, lambda a: a.stage == arm.stage, lambda a: True):
            if found := [seconds for known, seconds in self.known if alike(known)]:
                return sum(found) / len(found)
        raise AssertionError("nothing is known")


def run_arm(shared: Bench, arm: Arm, seed: int) -> dict:
    """Train one arm with one seed and score it; read from its ``result.json`` where that is there.

    Returns:
        ``seconds`` (of training and scoring; None where it was stopped on the way), ``command`` and ``commit`` (two of
        them where it went on at another one), ``updates``, and for "test" and "ood" what
        :func:`stkit.tiny.findings.marks` gives.

    Raises:
        StkitError: the folder holds an arm of other settings; a question could not be asked.
    """
    folder, made = shared.folder(arm, seed), shared.made
    stopped = claim(folder, shared.told(arm, seed), name="arm.json", beside={"made": made})
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    begin = time.monotonic()
    model, updates = _trained(shared, arm, seed, folder)
    row = {}
    for name in ON:
        asked, bench = folder / name, shared.walks[name]
        how = choose_sampling(bench.info, arm.sampling, None, None)
        evaluate(
            bench.path, model=model, out=asked, mode="generate", sampling=how["sampling"], frames=how["frames"],
            max_new_tokens=shared.study.max_new_tokens, progress=shared.progress,
        )  # fmt: skip
        row[name] = marks(load_run(asked))
        if row[name]["failed"]:
            raise StkitError(
                f"{asked}: {row[name]['failed']} questions could not be asked (predictions.jsonl says why): mend it, "
                "delete that folder and run the same command again"
            )
    begun = read_json(folder / "arm.json")["made"]["commit"]
    at = " to ".join(dict.fromkeys([begun, made["commit"]]))
    seconds = None if stopped else round(time.monotonic() - begin, 1)
    row = {"seconds": seconds, "command": made["command"], "commit": at, "updates": updates} | row
    write_json(folder / "result.json", row)
    return row


def _trained(shared: Bench, arm: Arm, seed: int, folder: Path) -> tuple[Path, int]:
    """The model of an arm, and how many updates it took from the model before it."""
    if arm.stage is None:
        return shared.model, 0
    start = shared.model
    if arm.after:
        start = open_run(shared.folder(shared.study.arms[arm.after], seed) / "run").model
    walks, study = shared.walks["train"], shared.study
    how = choose_sampling(walks.info, arm.sampling, None, None)
    overrides = settings_of(study, arm) | {"video.sampling": how["sampling"], "video.frames": how["frames"]}
    common = {"model": start, "preset": "tiny", "out": folder / "run", "seed": seed, "progress": shared.progress}
    if arm.stage == "sft":
        lessons = write_lessons(walks, arm.thinking, arm.clips or len(walks.clips), how)
        run = sft(lessons, overrides=overrides | {"sft.form": "solution"}, **common)
    elif arm.thinking == "reverse":
        overrides |= {"rewards.both_orders": study.both_orders}
        run = grpo(walks.path, overrides=overrides, rewards={"both_orders": both_orders}, **common)
    else:
        run = grpo(walks.path, overrides=overrides, **common)
    return run.model, len(run.metrics)


def _facts(shared: Bench, rows: dict[str, dict[int, dict]]) -> dict:
    """What a reader must know to run it again."""
    walks = {
        name: {**shared.study.walks[name], "hash": bench.info["hash"], "questions": len(bench.questions)}
        | ({"clusters": clusters(bench)} if name in ON else {})
        for name, bench in shared.walks.items()
    }
    commands = dict.fromkeys(row["command"] for runs in rows.values() for row in runs.values())
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return {
        "commands": list(commands), "machine": machine | versions(),
        "start": {"model": str(shared.model), "sha256": shared.sha256}, "walks": walks,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stkit.tiny.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the folder from which every arm starts")
    parser.add_argument("--out", required=True, help="folder of benchmarks, arms and results")
    parser.add_argument("--study", default="paper", help="a study that ships, or a YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", help="of training, in place of the study's")
    parser.add_argument("--cards", help="a folder into which ablations.json and ablations.md are written too")
    chosen = parser.parse_args(arguments)
    try:
        found = run_study(chosen.out, chosen.model, chosen.study, chosen.seeds, chosen.cards)
    except StkitError as error:
        sys.exit(f"error: {error}")
    print(
        to_json(
            [{k: one[k] for k in ("name", "on", "difference", "p_holm", "outcome")} for one in found["contrasts"]], 2
        )
    )


if __name__ == "__main__":
    main()
