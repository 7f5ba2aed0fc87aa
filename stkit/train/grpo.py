"""GRPO and its variants on prefix trees: rollouts, rewards, one tree for the policy and one for the reference.

    run = grpo("runs/walks", model="runs/sft/model", preset="tiny", out="runs/grpo", steps=30)
    run.metrics[["step", "reward", "kl"]], run.rollouts

A video is encoded once for all rollouts on it, its questions' prompts once for a group, and the same packed batch serves
the policy's pass and the reference's. Groups of equal reward teach nothing: they are skipped and counted (the KL's pull
on their tokens is left out with them).
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..runs import append_jsonl
from ..runtime import OutOfMemory, StkitError, StkitWarning, child_seed
from ..vlm.load import Loaded
from ..vlm.logps import tree_logps
from .data import Item, Seen
from .forest import Line, Plant, plant
from .losses import kl_penalty, normaliser, policy_loss, reduced, rows_of
from .plugins import find_rewards
from .reading import load_settings
from .rewards import REWARDS
from .rollouts import Group, Recorded, sample, score
from .run import Run, open_run
from .served import Served
from .sft import clip_moments
from .start import Job, begin, with_named

Reward = Callable[[list], Sequence[float]]


@dataclass
class Shot:
    """A clip of a batch: what was shown, and the groups that were drawn on it."""

    item: Item
    seen: Seen
    features: object
    groups: list[Group]


@dataclass
class Batch:
    """Rollouts to learn from. learned: the groups with an advantage, by number of the shot. facts: sums over all
    processes. divisor: what the losses are divided by."""

    shots: list[Shot]
    learned: list[list[Group]]
    facts: dict
    divisor: float


def grpo(
    bench: str | Path,
    model: str | Path | Loaded = "tiny",
    preset: str | Path = "tiny",
    out: str | Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    eval_every: int | None = None,
    overrides: Mapping[str, object] | None = None,
    rewards: Mapping[str, Reward] | None = None,
    progress: bool = True,
) -> Run:
    """Train on rewarded rollouts; run again in the same folder, it goes on where it was stopped.

    Args:
        bench, model, preset, out, steps, seed, eval_every, overrides, progress: as in :func:`stkit.train.sft.sft`.
        rewards: functions of your own by name; each gets the rollouts of a clip (see
            :class:`stkit.train.rewards.Answered`) and returns a number for each. Weights stand in ``rewards.NAME`` (1
            where none is given).

    Returns:
        :class:`stkit.train.run.Run`.

    Raises:
        BadUse: a setting that makes no sense.
        StkitError: as :func:`stkit.train.sft.sft`; a reward function that fails; a KL over grpo.max_kl.
    """
    functions = dict(rewards or {})
    chosen = {f"rewards.{name}": 1.0 for name in functions} | with_named(overrides, steps, seed, eval_every)
    used = find_rewards(load_settings(preset, "grpo", chosen).rewards, REWARDS, functions)
    beside = {"functions": {name: _source(function) for name, (function, _) in used.items() if name not in REWARDS}}
    job = begin("grpo", bench, model, preset, out, chosen, progress, beside)
    source = source_of(job)
    with job.loop.guarded():
        while job.loop.step < job.loop.steps:
            batch = draw(job, functions, source)
            for update in range(min(job.settings.grpo.updates, job.loop.steps - job.loop.step)):
                _learn(job, batch, update)
            job.loop.save_if_due(job.cursor)
        job.loop.finish()
    job.processes.end()
    return open_run(job.out)


def source_of(job: Job) -> Recorded | Served | None:
    """Where rollouts come from: a file, a server, or None for the policy itself."""
    how = job.settings.grpo
    if how.endpoint:
        return Served(job.settings, job.watcher)
    return Recorded(how.recorded, job.course.questions) if how.recorded else None


def _source(function: Reward) -> str:
    """What a reward function does, so that a run is not resumed with another one."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return getattr(function, "__qualname__", repr(type(function)))


def draw(job: Job, functions: Mapping[str, Reward], source: Recorded | Served | None = None) -> Batch:
    """The rollouts of a batch, rewarded; with dapo drawn anew for groups of equal reward, ``grpo.refills`` times."""
    how, step = job.settings.grpo, job.loop.step + 1
    if isinstance(source, Recorded):
        items = job.processes.share(source.clips(step, job.course.questions))
        with job.policy.whole(tower_only=True):
            shots, rounds = [_shoot(job, item, functions, step, source) for item in items], 0
    else:
        shots = _next(job, functions, step, source)
        rounds, wanted = 0, int(job.processes.summed({"groups": sum(len(shot.groups) for shot in shots)})["groups"])
        while how.variant == "dapo" and rounds < how.refills and len(_places(job, shots)) < wanted:
            shots, rounds = [*shots, *_next(job, functions, step, source)], rounds + 1
    kept = _places(job, shots)
    if how.variant == "dapo" and rounds:
        kept = kept[:wanted]
    batch = _batch(job, shots, set(kept), rounds)
    rows = [(shot.item.place, k, row) for shot in shots for k, g in enumerate(shot.groups) for row in g.rows(step)]
    rows = sorted(job.processes.gathered(rows), key=lambda row: row[:2])
    if job.processes.first:
        for _, _, row in rows:
            append_jsonl(job.out / "rollouts.jsonl", row)
    _watch_rewards(job, batch.facts)
    return batch


def _next(job: Job, functions, step: int, source: Served | None) -> list[Shot]:
    """This process's share of the next clips, with rollouts."""
    items = job.items(job.cursor, job.clips)
    job.cursor += job.clips
    with job.policy.whole():
        return [_shoot(job, item, functions, step, source) for item in items]


def _shoot(job: Job, item: Item, functions, step: int, source: Recorded | Served | None) -> Shot:
    how, loaded, style = job.settings.grpo, job.policy.loaded, job.settings.data.prompt
    seen = job.watcher.watch(item)
    features = job.features(seen)
    if source is not None:
        groups = source.groups(step, loaded, item, seen, style, how.max_new_tokens)
    else:
        seed = child_seed(job.settings.train.seed, "rollouts", step, item.place)
        try:
            groups = _sampled(job, item, seen, features, seed)
        except OutOfMemory as error:
            if not job.loop.halve(str(error)):
                raise
            groups = _sampled(job, item, seen, features, seed)
    score(groups, how, job.settings.rewards, functions, clip_moments(job.benchmark, item, seen))
    return Shot(item, seen, features, groups)


def _sampled(job: Job, item: Item, seen: Seen, features, seed: int) -> list[Group]:
    s = job.settings
    with job.loop.autocast():
        return sample(job.policy.loaded, item, seen, features, s.grpo, s.data.prompt, seed, job.loop.max_tokens)


def _places(job: Job, shots: Sequence[Shot]) -> list[tuple[int, int]]:
    """Which groups have an advantage, of all processes, in the order of the course."""
    own = [(shot.item.place, k) for shot in shots for k, group in enumerate(shot.groups) if not group.flat]
    return sorted(job.processes.gathered(own))


def _batch(job: Job, shots: list[Shot], kept: set, rounds: int) -> Batch:
    """What of the shots is learned from, and what all processes drew together."""
    how = job.settings.grpo
    learned = [[g for k, g in enumerate(shot.groups) if (shot.item.place, k) in kept] for shot in shots]
    groups = [group for shot in shots for group in shot.groups]
    facts: dict[str, float] = {
        "clips": len(shots),
        "groups": len(groups),
        "skipped_groups": sum(g.flat for g in groups),
    }
    facts |= {"rollouts": 0, "reward": 0.0, "squares": 0.0, "length": 0, "finished": 0}
    for group in groups:
        facts["rollouts"] += len(group.rollouts)
        facts["reward"] += sum(group.rewards)
        facts["squares"] += sum(r * r for r in group.rewards)
        facts["length"] += sum(len(r.ids) for r in group.rollouts)
        facts["finished"] += sum(r.finished for r in group.rollouts)
        for name, value in ((n, v) for parts in group.parts for n, v in parts.items() if v is not None):
            facts[f"reward_{name}"] = facts.get(f"reward_{name}", 0.0) + value
            facts[f"count_{name}"] = facts.get(f"count_{name}", 0) + 1
    counted = groups if how.variant != "dapo" else [group for clip in learned for group in clip]
    facts["divisor"] = normaliser(
        how.variant, [n for group in counted for n in group.learned()], how.max_new_tokens
    ) * bool(counted)
    facts = job.processes.summed(facts)
    return Batch(shots, learned, facts | {"refills": rounds}, max(1.0, facts["divisor"]))


def _watch_rewards(job: Job, facts: Mapping) -> None:
    """Warn when all rewards were equal for ``grpo.patience`` batches: nothing was learned from them."""
    state, patience = job.loop.state, job.settings.grpo.patience
    state["flat"] = state.get("flat", 0) + 1 if facts["skipped_groups"] == facts["groups"] else 0
    if state["flat"] and state["flat"] % patience == 0 and job.processes.first:
        mean = facts["reward"] / max(1, facts["rollouts"])
        fix = (
            "no rollout is ever rewarded: start from a model that SFT taught the form, raise grpo.group or "
            "grpo.max_new_tokens, or give rewards.format a weight" if mean <= 0
            else "all are rewarded alike: the questions may be too easy, raise grpo.temperature or grpo.group, or choose others"
        )  # fmt: skip
        warnings.warn(
            f"all rewards of a group were equal (mean {mean:.3g}) in the last {state['flat']} batches, nothing was learned "
            f"from them: {fix}", StkitWarning, stacklevel=2,
        )  # fmt: skip


def lines_of(groups: Sequence[Group]) -> tuple[list[Line], list[tuple[Group, int]]]:
    """The rollouts of a clip's groups as lines of a tree, with the group and the number of each."""
    found, known = [], []
    for group in groups:
        for k, rollout in enumerate(group.rollouts):
            weight = tuple(0.0 if forced else 1.0 for forced in rollout.forced)
            found.append(Line(group.prompt.ids, rollout.ids, weight, group.question.id))
            known.append((group, k))
    return found, known


def _learn(job: Job, batch: Batch, update: int) -> None:
    """One optimiser step on a batch of rollouts."""
    lined = [lines_of(groups) for groups in batch.learned]

    def plants(max_tokens: int) -> list[Plant]:
        return [one for k, (lines, _) in enumerate(lined) for one in plant(k, lines, max_tokens)]

    if update == 0:
        _fill_old(job, batch, lined, plants(job.loop.max_tokens))

    def loss_of(forest: Sequence[Plant]) -> tuple[torch.Tensor, dict]:
        return loss_on(job, batch, lined, forest)

    told = job.loop.learn(plants, loss_of, lambda sums: _refuse_far(job, sums))
    job.loop.log(_row(job, batch, told, update))
    job.score_if_due()


def _rows(lined, forest: Sequence[Plant], packed, device) -> tuple[list[slice], list, torch.Tensor]:
    """Where each rollout of a forest lies in the packed tree, which it is, and the mask of its learned tokens."""
    place = {id(node): piece for node, piece in zip(packed.nodes, packed.slices)}
    pieces = [place[id(leaf)] for one in forest for leaf in one.leaves]
    known = [lined[one.clip][1][k] for one in forest for k in one.numbers]
    return pieces, known, rows_of(packed.weight.to(device), pieces) > 0


def _forward(job: Job, batch: Batch, forest: Sequence[Plant], model, entropy: bool = False):
    trees = [one.tree for one in forest]
    encoded = None if job.policy.tower else [batch.shots[one.clip].features for one in forest]
    videos = [batch.shots[one.clip].seen.inputs for one in forest]
    temperature = job.settings.grpo.temperature
    return tree_logps(model, trees, videos, encoded, temperature=temperature, entropy=entropy, tokens="weighted")


def loss_on(job: Job, batch: Batch, lined, forest: Sequence[Plant]) -> tuple[torch.Tensor, dict]:
    """A forest's share of the loss: the clipped surrogate and beta times the KL, over the batch's divisor."""
    how = job.settings.grpo
    found = _forward(job, batch, forest, job.policy.model, entropy=True)
    pieces, known, mask = _rows(lined, forest, found.packed, found.log_probs.device)
    new = rows_of(found.log_probs, pieces)
    old = torch.nn.utils.rnn.pad_sequence([g.rollouts[k].log_probs for g, k in known], batch_first=True).to(new)
    gains = torch.tensor([g.advantages[k] for g, k in known], dtype=new.dtype, device=new.device)
    surrogate = policy_loss(new, old, mask, gains, how.variant, how.clip_low, how.clip_high)
    total, held = surrogate.total, mask.to(new.dtype)
    ratios = float((surrogate.log_ratio.exp() * held).sum())
    sums = {"clipped": surrogate.clipped, "learned": surrogate.tokens, "ratio": ratios}
    sums["entropy"] = float((rows_of(found.entropy.detach(), pieces) * held).sum())
    if how.beta > 0:
        with job.policy.reference() as model:
            reference = rows_of(_forward(job, batch, forest, model).log_probs, pieces).to(new)
        penalty = kl_penalty(new, reference, how.kl)
        total = total + how.beta * reduced(penalty, held, held.sum(1).clamp(min=1), how.variant)
        sums["kl"] = float((kl_penalty(new.detach(), reference, "k3") * held).sum())
    return total / batch.divisor, sums


def _fill_old(job: Job, batch: Batch, lined, plants: Sequence[Plant]) -> None:
    """For recorded rollouts whose log-probs are not known: the policy's own before the update."""
    missing = [one for one in plants if any(g.rollouts[k].log_probs.isnan().any() for g, k in lined[one.clip][1])]
    if not (job.processes.any(bool(missing)) if job.policy.sharded else missing):
        return
    with job.policy.whole():
        for one in missing:
            with torch.no_grad(), job.loop.autocast():
                found = _forward(job, batch, [one], job.policy.model)
            pieces, known, _ = _rows(lined, [one], found.packed, found.log_probs.device)
            for piece, (group, k) in zip(pieces, known):
                if group.rollouts[k].log_probs.isnan().any():
                    group.rollouts[k] = group.rollouts[k]._replace(log_probs=found.log_probs[piece].float().cpu())


def _refuse_far(job: Job, sums: Mapping) -> None:
    """Stop a run that has gone off, before its step is made."""
    bound, tokens = job.settings.grpo.max_kl, sums.get("learned", 0)
    if bound is not None and tokens and sums.get("kl", 0.0) / tokens > bound:
        raise StkitError(
            f"the KL to the reference is {sums['kl'] / tokens:.4g}, over grpo.max_kl={bound}: the policy has gone off; lower "
            "train.lr, raise grpo.beta, or start anew from the last checkpoint"
        )


def _row(job: Job, batch: Batch, told: Mapping, update: int) -> dict:
    """One row of metrics.jsonl. kl, entropy and ratio are means over the learned tokens (kl by k3 whatever is learned)."""
    facts, tokens = batch.facts, told.get("learned", 0)

    def mean_of(name: str) -> float | None:
        """Over the learned tokens; None where nothing was learned."""
        return told[name] / tokens if tokens and name in told else None

    mean = facts["reward"] / max(1, facts["rollouts"])
    spread = max(0.0, facts["squares"] / max(1, facts["rollouts"]) - mean * mean) ** 0.5
    parts = {
        name: facts[name] / facts[name.replace("reward_", "count_", 1)]
        for name in sorted(facts)
        if name.startswith("reward_")
    }
    return {
        "loss": told["loss"], "reward": mean, "kl": mean_of("kl"), "entropy": mean_of("entropy"), "lr": told["lr"],
        "grad_norm": told["grad_norm"], "clip_fraction": mean_of("clipped"), "tokens": int(told["tokens"]),
        "learned_tokens": int(tokens), "ratio": mean_of("ratio"),
        "reward_std": spread, **parts, "length": facts["length"] / max(1, facts["rollouts"]),
        "finished": facts["finished"] / max(1, facts["rollouts"]), "groups": int(facts["groups"]),
        "skipped_groups": int(facts["skipped_groups"]), "refills": facts["refills"], "rollouts": int(facts["rollouts"]),
        "clips": int(facts["clips"]), "update": update, "epoch": job.cursor / len(job.course),
    }  # fmt: skip
