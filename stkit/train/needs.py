"""What is planned for: a model with settings on a device, and what is taken for granted about the data.

    request.prompt, request.least, request.load(), request.peak()
    request.changed("train", checkpointing=True).peak()

See :mod:`stkit.train.plan`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..runs import read_json
from ..runtime import BadUse, pick_dtype
from ..vlm import tiny
from ..vlm.choose import FOUR_BIT_FROM, memory_gb
from ..vlm.video import PUBLISHED_MAX_PIXELS
from .anatomy import Anatomy
from .memory import Compute, Load, phases
from .settings import Settings

CUDA_BYTES = 0.6e9  # a GPU's context, kernels and workspaces
TIME_TOKENS = 12  # of the time that Qwen3-VL is told before each temporal patch


@dataclass(frozen=True)
class Request:
    """What is planned for: a model, settings, and what is taken for granted about the data.

    video: tokens of a video, None for what the settings say; text: of a question; answer: of an answer; questions: of a
    clip, None if that isn't known. limit: bytes there are. gpu: the limit is that of a whole GPU.
    """

    model: str
    anatomy: Anatomy
    source: str
    settings: Settings
    stage: str
    how: Compute
    limit: float
    gpu: bool
    most_pixels: int
    text: int
    answer: int
    video: int | None = None
    questions: int | None = None

    @property
    def frames(self) -> int:
        """Frames of a clip: what is set, else what is usual."""
        video = self.settings.video
        return video.frames or (8 if video.sampling == "published" else 32)

    @property
    def max_pixels(self) -> int:
        """Pixels of a frame."""
        return self.settings.video.max_pixels or self.most_pixels

    @property
    def video_tokens(self) -> int:
        """Of a clip."""
        if self.video is not None:
            return self.video
        a = self.anatomy
        return -(-self.frames // a.temporal) * max(1, self.max_pixels // (a.patch * a.merge) ** 2)

    @property
    def prompt(self) -> int:
        """Tokens of a video with one question."""
        times = TIME_TOKENS * -(-self.frames // self.anatomy.temporal) if self.anatomy.family == "qwen3_vl" else 0
        return self.video_tokens + self.text + (times if self.video is None else 0)

    @property
    def answers(self) -> int:
        """Tokens of all answers to one question."""
        return self.answer * (self.settings.grpo.group if self.stage == "grpo" else 1)

    @property
    def least(self) -> int:
        """Tokens under which the run would refuse to start: a prompt with its answers."""
        return self.prompt + self.answers

    def load(self) -> Load:
        """What is computed at once."""
        train = self.settings.train
        clips, limit = train.batch * train.accumulation, train.max_tokens
        each = self.text + self.answers
        most = 1 + max(0, limit - self.least) // each  # questions whose groups are decoded together
        if self.questions is not None:
            most = min(most, self.questions)
            limit = min(limit, clips * (self.prompt - self.text + self.questions * each))
        return Load(
            tokens=limit, learned=max(1, limit - self.prompt), patches=self.video_tokens * self.anatomy.merge**2,
            prompt=self.prompt + (most - 1) * self.text, answer=self.answer, videos=clips,
            rollouts=most * self.settings.grpo.group, together=max(1, min(clips, limit // self.least)),
        )  # fmt: skip

    def phases(self) -> dict[str, dict[str, float]]:
        """Bytes by phase and part."""
        found = phases(self.anatomy, self.how, self.load(), self.settings, self.stage)
        return {name: parts | ({"cuda": CUDA_BYTES} if self.gpu else {}) for name, parts in found.items()}

    def peak(self) -> float:
        """Bytes at the worst moment."""
        return max(sum(parts.values()) for parts in self.phases().values())

    def changed(self, section: str, **values) -> "Request":
        """The same with other settings of a section."""
        new = replace(getattr(self.settings, section), **values)
        return replace(self, settings=replace(self.settings, **{section: new}))


def compute_of(anatomy: Anatomy, settings: Settings, device: str, real: bool = True) -> Compute:
    """What a run computes with, as it is chosen when the model is loaded.

    Args:
        real: the device is this machine's; else it is a GPU that is only spoken of, which computes in 16 bits.
    """
    cuda, wanted = device.startswith("cuda"), settings.model
    four_bit = wanted.four_bit if wanted.four_bit is not None else cuda and anatomy.parameters >= FOUR_BIT_FROM
    if four_bit and not settings.lora.rank:
        raise BadUse("lora.rank=0 trains all weights, 4-bit ones cannot be: set model.four_bit=false, or give a rank")
    if wanted.dtype == "auto" and not (real and cuda):
        dtype = torch.bfloat16 if cuda or four_bit else pick_dtype("auto", device)[0]
    else:
        dtype = pick_dtype(wanted.dtype, device)[0]
    autocast = cuda if settings.train.precision == "auto" else settings.train.precision != "no"
    return Compute(dtype.itemsize, 2 if autocast else dtype.itemsize, four_bit, autocast, cuda)


def free_bytes(device: str) -> float:
    """What can be had on a device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return memory_gb(device) * 1e9


def most_pixels(model) -> int:
    """Pixels of a frame where nothing is set: the published ones, or a folder's own where it takes less."""
    folder = tiny.folder(model) if tiny.is_own(model) else Path(str(model)).expanduser()
    path = folder / "processor_config.json"
    if not isinstance(model, (str, Path)) or not path.is_file():
        return PUBLISHED_MAX_PIXELS
    return min(PUBLISHED_MAX_PIXELS, read_json(path)["video_processor"]["size"]["longest_edge"])
