"""Bytes that training holds at once, by part, from a model's anatomy alone: what each phase of an update keeps alive.

    how = Compute(weight=2, compute=2, four_bit=True, autocast=True, cuda=True)
    load = Load(tokens=8192, learned=4096, patches=4096, prompt=1200, rollouts=8, answer=256)
    found = phases(anatomy, how, load, settings, "grpo")
    found["update"]                       # {"weights": ..., "adapter": ..., "activations": ..., ...}

The phases: "tower" (the video is encoded), "rollouts" (prompts and answers' keys and values), "update" (forward and
backward pass over one forest of ``train.max_tokens``, the reference's pass within it), "step" (the optimiser). Counted
is what torch allocates in the passes as they stand in :mod:`stkit.vlm` and ``stkit_kernels``: tensors that autograd
saves, and the temporary ones at the worst moment.
"""

from dataclasses import dataclass

from stkit_kernels.logprob_torch import PIECE_BYTES, ROWS

from .anatomy import Anatomy
from .settings import Settings

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # half a byte, a byte a block of 64, float32 a block of 256 of those
EIGHT_BIT = 2 + 8 / 256  # two states of a byte, two float32 for a block of 256


@dataclass(frozen=True)
class Compute:
    """What is computed with. weight: bytes of a weight that isn't in 4 bits; compute: bytes of what layers compute in
    (less than ``weight`` under autocast over float32 weights). autocast: whether it is on. cuda: a GPU, not a CPU."""

    weight: int
    compute: int
    four_bit: bool = False
    autocast: bool = False
    cuda: bool = False

    @property
    def mixed(self) -> bool:
        """Autocast makes a copy of what a layer is given."""
        return self.autocast and self.compute < self.weight


@dataclass(frozen=True)
class Load:
    """What is computed at once.

    tokens: of a forest; learned: those whose log-probs are wanted; patches: of a video; prompt: tokens of the prompts
    decoded from together; rollouts: decoded at once; answer: tokens of one; videos: of an update, whose features are
    there together; together: videos in a forest.
    """

    tokens: int
    learned: int
    patches: int
    prompt: int = 0
    rollouts: int = 0
    answer: int = 0
    videos: int = 1
    together: int = 1


def phases(a: Anatomy, how: Compute, load: Load, settings: Settings, stage: str) -> dict[str, dict[str, float]]:
    """Bytes by part in each phase of an update after the first (when the optimiser has its states)."""
    held = standing(a, how, settings, stage)
    learns = trainable(a, settings)
    gradients = {"gradients": learns * learned_bytes(how, settings)}
    features = {"vision": seen_bytes(a, how, load)}
    found = {"tower": held | {"vision": features["vision"] + encoding(a, how, load)}}
    if stage == "grpo":
        found["rollouts"] = held | features | rollout_parts(a, how, load)
    found["update"] = held | gradients | update_parts(a, how, load, settings, stage)
    found["update"]["vision"] += features["vision"]
    found["step"] = held | gradients | features | {"work": step_bytes(a, how, settings)}
    return found


def trainable(a: Anatomy, settings: Settings) -> int:
    """Weights that learn."""
    parts = [name for name in ("tower", "projector") if getattr(settings.train, name)]
    if not settings.lora.rank:
        return a.embeddings + sum(a.part(name) for name in ("language", *parts))
    wanted = [m for m in a.matrices if m.part in parts or (m.part == "language" and m.name in settings.lora.targets)]
    return sum(settings.lora.rank * (m.rows + m.columns) * m.count for m in wanted)


def learned_bytes(how: Compute, settings: Settings) -> int:
    """Bytes of a weight that learns: peft keeps adapters in float32."""
    return 4 if settings.lora.rank else how.weight


def weight_bytes(a: Anatomy, how: Compute) -> float:
    """Of the model without an adapter."""
    linear = sum(m.weights for m in a.matrices)
    return linear * (NF4 if how.four_bit else how.weight) + (a.parameters - linear) * how.weight


def standing(a: Anatomy, how: Compute, settings: Settings, stage: str) -> dict[str, float]:
    """What is there all the time."""
    learns, weights = trainable(a, settings), weight_bytes(a, how)
    found = {"weights": weights}
    if settings.lora.rank:
        found["adapter"] = learns * 4
    elif stage == "grpo" and settings.grpo.beta > 0:
        found["reference"] = weights
    states = EIGHT_BIT if settings.train.optimizer == "adamw_8bit" else 2 * learned_bytes(how, settings)
    return found | {"optimizer": learns * states}


def step_bytes(a: Anatomy, how: Compute, settings: Settings) -> float:
    """AdamW's temporary tensors: of one parameter after another on a CPU, of all at once on a GPU."""
    size = learned_bytes(how, settings)
    if how.cuda and settings.train.optimizer == "adamw":
        return trainable(a, settings) * size
    wanted = settings.lora.targets if settings.lora.rank else [m.name for m in a.matrices]
    rank = settings.lora.rank
    sizes = [rank * max(m.rows, m.columns) if rank else m.rows * m.columns for m in a.matrices if m.name in wanted]
    return 2 * size * max(sizes if rank else [*sizes, a.embedding])


def seen_bytes(a: Anatomy, how: Compute, load: Load) -> float:
    """A video's features, and on a CPU its pixels beside them."""
    tokens = load.patches / a.merge**2
    one = tokens * a.width * (1 + a.levels) * how.compute + (0 if how.cuda else load.patches * a.pixels * 4)
    return load.videos * one


def encoding(a: Anatomy, how: Compute, load: Load) -> float:
    """The tower's temporary tensors without a graph, at the worst moment of a block."""
    pixels = a.pixels * (4 if how.cuda else 5)  # on the GPU they are a copy; looked through for what isn't finite
    attention = a.tower_width * (6 * how.compute + 2 * 16)  # queries and keys are turned in float32
    feed = a.tower_inner * 3 * how.compute + a.tower_width * how.compute
    return load.patches * max(pixels, 2 * a.tower_width * how.weight + max(attention, feed))


def layer_saved(a: Anatomy, how: Compute, settings: Settings) -> float:
    """Bytes that autograd keeps of one layer of the language model for each token."""
    full, c = not settings.lora.rank, how.compute
    q, kv, width, inner = a.heads * a.head, a.kv_heads * a.head, a.width, a.inner
    normed = 4 + (how.weight if full else 0)  # float32 input of a norm; what its weight multiplies
    saved = 2 * width * normed + (2 * q + 2 * kv) * c + 4 * a.heads + 3 * inner * c
    if a.family == "qwen3_vl":
        saved += (q + kv) * normed
    if full:
        copies = (3, 2) if how.mixed else (1, 1)
        return saved + sum(copies) * width * c + inner * c
    return saved + adapter_inputs(a, how, settings)


def adapter_inputs(a: Anatomy, how: Compute, settings: Settings) -> float:
    """What adapters keep of their inputs for each token: shared where they have the dtype of the adapter already."""
    targets, rank = set(settings.lora.targets), settings.lora.rank
    sources = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    sizes = (a.width, a.heads * a.head, a.width, a.inner)
    shared = how.compute == 4 or (how.four_bit and how.autocast)
    each = how.compute if how.autocast or how.compute == 4 else 4
    saved = 0.0
    for names, size in zip(sources, sizes):
        there = len(targets & set(names))
        if names == ("o_proj",) and shared:
            there = 0  # attention keeps its output anyway
        saved += (min(there, 1) if shared else there) * size * each
    return saved + 4 * rank * len(targets)


def layer_work(a: Anatomy, how: Compute, settings: Settings) -> float:
    """Temporary bytes for each token at the worst moment of a layer's backward pass, in the gated unit."""
    kept = 2 if not settings.lora.rank or "down_proj" in settings.lora.targets else 3
    return a.width * how.weight + kept * a.inner * how.compute


def layer_forward(a: Anatomy, how: Compute) -> float:
    """Temporary bytes for each token at the worst moment of a layer's forward pass without a graph."""
    feed = 3 * a.inner * how.compute + 2 * a.width * how.weight
    attention = (3 * a.heads + 3 * a.kv_heads) * a.head * how.compute + 4 * a.heads * a.head + 2 * a.width * how.weight
    return max(feed, attention)


def head_parts(a: Anatomy, how: Compute, learned: int, settings: Settings) -> tuple[float, float, float]:
    """Bytes of the log-probs: kept for the backward pass, and beside it at the worst moment of each pass."""
    rows = min(learned, ROWS)
    chunk = min(a.vocabulary, max(64, PIECE_BYTES // (4 * (rows + a.width)) // 64 * 64))
    half, room = how.compute < 4, rows * chunk * 4
    more = 1 if chunk < a.vocabulary else 0  # one piece's results are there while those of the next are made
    wide = learned * a.width * 4 if half and not how.cuda else 0  # a CPU multiplies float32
    copy = chunk * a.width * 4 if half and not how.cuda else 0
    kept = learned * a.width * how.weight
    forward = (2 + more) * room + wide + (1 + more) * copy
    if settings.lora.rank:
        return kept + learned * a.width * 4, forward, learned * a.width * (4 + how.weight)
    own = (1 + more) * chunk * a.width * 4
    return kept, forward, room + wide + (1 + more) * copy + own + learned * a.width * 4


def update_parts(a: Anatomy, how: Compute, load: Load, settings: Settings, stage: str) -> dict[str, float]:
    """Activations, work and logits at the worst moment of a forward and backward pass over a forest."""
    full = not settings.lora.rank
    tokens, hidden = load.tokens, load.tokens * a.width * how.weight
    saved, inputs = layer_saved(a, how, settings) * tokens, a.layers * hidden
    last = tokens * (a.width * (4 + (how.weight if full else 0)) + 2 * a.head * how.weight)  # final norm, positions
    tower = tower_saved(a, how, load, settings)
    kept, forward, backward = head_parts(a, how, load.learned, settings)
    slope = a.embedding * how.weight if full else 0  # the head's gradient, held for a tied embedding until the end
    reference = 0.0
    if stage == "grpo" and settings.grpo.beta > 0:
        reference = tokens * layer_forward(a, how)
    cast = trainable(a, settings) * how.compute if how.mixed else 0
    unpacked = max(m.rows * m.columns for m in a.matrices) * how.compute if how.four_bit else 0
    work = tokens * layer_work(a, how, settings) + hidden + cast + unpacked
    whole = a.layers * saved if not settings.train.checkpointing else inputs
    again = saved if settings.train.checkpointing else 0
    moments = {
        "head": {"activations": whole + last, "logits": kept + max(forward + hidden, backward + slope)},
        "reference": {"activations": whole + last, "logits": kept, "work": reference + cast + unpacked},
        "layer": {"activations": whole + again, "work": work, "logits": slope if a.tied else 0},
        "end": {"activations": hidden, "logits": 2 * slope if a.tied else slope},
    }  # fmt: skip
    worst = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {"activations": 0.0, "work": 0.0, "logits": 0.0} | worst | {"vision": tower}


def tower_saved(a: Anatomy, how: Compute, load: Load, settings: Settings) -> float:
    """Bytes that autograd keeps of the tower and the projector, where they learn."""
    c, width, inner = how.compute, a.tower_width, a.tower_inner
    joined = width * (4 + 2 * c) * (1 + a.levels)  # norm, first matrix, activation
    if not settings.train.tower:
        return load.together * load.patches * joined if settings.train.projector else 0.0
    full = not settings.lora.rank
    copied = 4 if not full and c < 4 else c  # adapters in float32 take copies of their inputs
    gates = {"qwen2_vl": 3, "qwen2_5_vl": 4, "qwen3_vl": 2}[a.family]
    norms = 2 * width * 4 + (2 * width * how.weight if full and a.family == "qwen2_5_vl" else 0)
    block = norms + 2 * width * copied + (3 + 2 + 2) * width * c + gates * inner * copied
    blocks = a.tower_layers * (block if not settings.train.checkpointing else width * how.weight)
    return load.together * load.patches * (blocks + joined + (block if settings.train.checkpointing else 0))


def rollout_parts(a: Anatomy, how: Compute, load: Load) -> dict[str, float]:
    """Keys and values of prompts and rollouts, and the worst of computing the prompts and of choosing a token."""
    kv = a.layers * 2 * a.kv_heads * a.head * how.compute
    prefill = load.prompt * (layer_forward(a, how) + 2 * a.head * how.weight)
    logits = load.rollouts * a.vocabulary * (2 * how.compute + 4 * 4 + 8)
    scores = 2 * 4 * load.rollouts * a.heads * (load.prompt + load.answer)
    unpacked = max(m.rows * m.columns for m in a.matrices) * how.compute if how.four_bit else 0
    found = {"kv": kv * (load.prompt + load.rollouts * load.answer), "work": max(prefill, scores) + unpacked}
    return found | {"logits": max(0.0, logits - prefill)}
