"""Make a model that needs neither peft nor stkit of a training run: weights, processor, generation config, model card.

    merge("runs/grpo", "runs/grpo-merged")["difference"]
    load_model("runs/grpo-merged")                                      # plain Transformers loads it as well

An adapter that was trained on NF4 weights is added to those very weights, dequantised, and not to the 16-bit ones that
they were made of: it has learned to make up for what quantisation did. What either way changes is measured.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..bench.schema import Question
from ..runs import explain, read_json, read_yaml, refuse_other, write_json, write_text
from ..runtime import BadUse, StkitError, versions
from ..vlm import load
from ..vlm.adapter import check_folder, load_adapter
from ..vlm.cache import content_hash
from ..vlm.choose import one_line
from ..vlm.logps import tree_logps
from ..vlm.prompts import Prompt, build_prompt
from ..vlm.tree import Tree
from ..vlm.video import Frames, VideoInputs, prepare, video_spec
from ..vlm.views import base_model
from .card import model_card, read_scores
from .checkpoint import latest, sync, sync_folder

SOURCES = ("final", "best", "latest")
RECORD = "merge.json"
FACTS = (  # in the record, beside what tells one merge from another
    "method", "base", "family", "dtype", "four_bit", "adapter", "layers", "difference", "original_difference",
    "versions", "command",
)  # fmt: skip
PROBE = Question(
    "probe", "probe", "probe.mp4", "probe", "direction", "forward", "Which way did the camera wearer turn?",
    ("left, then right", "right, then left"), 0, "test",
)  # fmt: skip


class Trained(NamedTuple):
    """Where a run's weights are. ``kind``: "lora" (an adapter) or "full" (a whole model). ``config``: config.yaml."""

    run: Path
    config: dict
    folder: Path
    kind: str


def merge(run: str | Path, out: str | Path, source: str = "final", scores: Sequence[str | Path] = ()) -> dict:
    """Write a run's weights as a model folder of its own.

    Args:
        run: folder of a training run.
        out: folder to write, under a temporary name until it is whole. If it holds the same merge already, the weights
            stay and the card is written anew.
        source: "final", "best" (by the score while training) or "latest" (checkpoint of a run that is not finished).
        scores: folders of evaluations whose figures go on the card.

    Returns:
        merged_from, method ("lora" or "full"), base, family, dtype, four_bit, adapter (rank, alpha, scaling, ...),
        layers (that got something added), difference and original_difference (of log-probabilities in nats between the
        trained model and the merged one, or the adapter on the original 16-bit base: max, mean, tokens), versions,
        command, out and reused (True where the weights were there already). What does not apply is None.

    Raises:
        StkitError: no such run, one that has no such weights, an adapter of another base, a base that is not there,
            an output folder of something else, a full disk. BadUse: an unknown source.
    """
    trained, out = find_trained(Path(run).expanduser(), source), Path(out).expanduser().absolute()
    told = read_scores(scores)
    origin = {
        "run": str(trained.run.resolve()), "source": source, "weights": str(trained.folder.relative_to(trained.run)),
        "sha256": [content_hash(file) for file in sorted(trained.folder.glob("*.safetensors"))],
    }  # fmt: skip
    reused = refuse_other(out, {"merged_from": origin}, RECORD, beside=FACTS)
    try:
        facts = read_json(out / RECORD) if reused else _write(trained, out, origin, told)
        if reused:
            write_text(out / "README.md", model_card(trained.run, facts, told))
    except OSError as error:
        raise StkitError(explain(error)) from error
    return facts | {"out": str(out), "reused": reused}


def find_trained(run: Path, source: str) -> Trained:
    """The weights of a run.

    Raises:
        StkitError: no run there, or none of these weights in it. BadUse: an unknown source.
    """
    if source not in SOURCES:
        raise BadUse(f"source {source!r} is unknown: use {', '.join(SOURCES)}")
    config = read_run(run)
    if source == "final":
        places = [run / "adapter", run / "model"]
    elif source == "best":
        places = [run / "best" / "weights", run / "best"]
    else:
        newest = latest(run / "checkpoints")
        places = [newest / "weights"] if newest else []
    for folder in places:
        for kind, name in (("lora", "adapter_config.json"), ("full", "config.json")):
            if (folder / name).is_file():
                return Trained(run, config, folder, kind)
    fix = {
        "final": "it is not finished: run the same command again, or take its newest checkpoint with --from latest",
        "best": "it kept no best weights (no score while training): leave --from out, or use --from latest",
        "latest": "it has no whole checkpoint yet: run the same command again",
    }
    raise StkitError(f"{run}: {fix[source]}")


def read_run(run: Path) -> dict:
    """A run's config.yaml, with what a merge needs of it."""
    path, how = run / "config.yaml", "give the folder that 'stkit sft' or 'stkit grpo' wrote"
    if not run.is_dir():
        raise StkitError(f"{run}: no such run: {how}")
    if not path.is_file():
        raise StkitError(f"{run}: no config.yaml in it, it is no training run: {how}")
    config = read_yaml(path)
    model = config.get("model") if isinstance(config, dict) else None
    missing = [k for k in ("name", "dtype", "four_bit") if not isinstance(model, dict) or k not in model]
    if missing:
        raise StkitError(f"{path}: model.{missing[0]} is missing, it is no training run: {how}")
    return config


def _write(trained: Trained, out: Path, origin: dict, told: dict) -> dict:
    """All files under a temporary name, then renamed: a killed merge leaves nothing that looks whole."""
    from safetensors import SafetensorError

    temporary = out.with_name(f".{out.name}.merging")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        facts = {"merged_from": origin} | (_copied if trained.kind == "full" else _added)(trained, temporary)
        facts |= {"versions": versions(), "command": shlex.join(sys.argv)}
        write_json(temporary / RECORD, facts)
        write_text(temporary / "README.md", model_card(trained.run, facts, told))
        sync(temporary)
        os.replace(temporary, out)
        sync_folder(out.parent)
    except SafetensorError as error:
        raise StkitError(f"{out}: the weights were not written ({one_line(error)}): is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _copied(trained: Trained, folder: Path) -> dict:
    """The weights of full training, which are a model folder already: copied once it is known to be whole."""
    source, record = load.Source(str(trained.folder), trained.folder), trained.config["model"]
    config = load.read_config(source)
    load.count_parameters(source)
    load.load_processor(source, config.model_type)
    for file in trained.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    found = {"method": "full", "base": record["name"], "family": config.model_type}
    found["dtype"] = str(config.dtype or record["dtype"]).removeprefix("torch.")
    return found | dict.fromkeys(("four_bit", "adapter", "layers", "difference", "original_difference"))


def _added(trained: Trained, folder: Path) -> dict:
    """The base with the adapter added, saved."""
    record = trained.config["model"]
    four_bit = bool(record["four_bit"])
    check_folder(trained.folder)
    loaded = _load_base(trained, four_bit)
    with load.quiet(progress=False):
        adapted = load_adapter(loaded.model, record["name"], trained.folder, loaded.record["device"])
    told = _check_adapter(adapted, trained.folder)
    _keep_layout(adapted)
    before, original = probe(adapted, loaded), None
    if four_bit:
        plain = _load_base(trained, four_bit=False).model
        _fill(plain, adapted, quantised=False)
        original = _difference(before, probe(plain, loaded))
        layers = _fill(plain, adapted, quantised=True)
    else:
        layers = _fill(None, adapted, quantised=False)
        plain = adapted.unload()
    after = probe(plain, loaded)
    plain.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    facts = {"method": "lora", "base": record["name"], "family": loaded.record["family"], "dtype": record["dtype"]}
    facts |= {"four_bit": four_bit, "adapter": told, "layers": layers}
    return facts | {"difference": _difference(before, after), "original_difference": original}


def _load_base(trained: Trained, four_bit: bool) -> load.Loaded:
    """The base as it was trained on: in the run's dtype, with the adapter that training had started from in it."""
    record = trained.config["model"]
    start = record.get("adapter")
    if start and four_bit:
        raise StkitError(f"{trained.run}: it started from {start} on a 4-bit base: only one of 16 bits can be merged")
    try:
        loaded = load.load_model(record["name"], four_bit=four_bit, dtype=record["dtype"], adapter=start)
    except StkitError as error:
        second = record["four_bit"] and not four_bit and torch.cuda.is_available()  # beside the 4-bit one on the GPU
        hint = ", or set CUDA_VISIBLE_DEVICES= to merge in the machine's memory" if second else ""
        raise StkitError(f"{trained.run} needs its base: {error}{hint}") from error
    if start and loaded.record["adapter_sha256"] != record.get("adapter_sha256"):
        raise StkitError(f"{start} changed since {trained.run} started from it: put the adapter back as it was")
    return loaded._replace(model=loaded.model.merge_and_unload()) if start else loaded


def _check_adapter(adapted, folder: Path) -> dict:
    """What the adapter is; a kind that is more than B A times a factor is refused."""
    from peft.tuners.lora import LoraLayer

    config = adapted.peft_config[adapted.active_adapter]
    for name, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
        if (value := getattr(config, name, plain)) != plain:
            raise StkitError(f"adapter {folder}: {name}={value!r} cannot be merged: train with {name}={plain!r}")
    names = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    return {
        "rank": config.r, "alpha": config.lora_alpha, "rslora": bool(config.use_rslora),
        "targets": sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in names}),
        "saved_whole": sorted(config.modules_to_save or []),
    }  # fmt: skip


def _keep_layout(model) -> None:
    """Let 4-bit layers compute as in training: from the dequantised weights.

    In evaluation bitsandbytes packs them for the CPU's own kernel at the first forward pass, in place: that computes in
    bfloat16, and dequantize_4bit would read the packed bytes as if they were not.
    """
    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.training = True  # the layer's own flag only: nothing else asks for it


@torch.no_grad()
def _fill(plain, adapted, quantised: bool) -> int:
    """Write the weights with the adapter added into ``plain``, or into the adapted model's own base where it is None.

    ``quantised``: 4-bit weights are dequantised; else those in ``plain`` are taken in their place.

    Returns:
        How many weights got something added.
    """
    layers = 0
    for name, parameter, layer in list(_weights(adapted)):
        target = parameter if plain is None else plain.get_parameter(_plain_name(name))
        value = _dense(parameter) if quantised or not hasattr(parameter, "quant_state") else target.data
        if layer is not None:
            value = (value.float() + _delta(layer).to(value.device)).to(target.dtype)
            layers += 1
        if not torch.isfinite(value).all():
            what = f"{_plain_name(name)} is not finite with the adapter added"
            raise StkitError(f"{what}, in {target.dtype}: take --from best, or train in another dtype")
        if value is not target.data:
            target.data.copy_(value)
    return layers


def _weights(adapted) -> Iterator[tuple[str, torch.nn.Parameter, object]]:
    """Each weight of the base by its name in the adapted model, with the LoRA layer around it (None without one)."""
    from peft.tuners.lora import LoraLayer

    model = base_model(adapted)
    around = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".original_module." not in name:
            yield name, parameter, around.get(name.removesuffix(".base_layer.weight"))


def _plain_name(name: str) -> str:
    return re.sub(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)", "", name)


def _dense(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A weight as numbers: NF4 is dequantised, in the dtype that it is computed in."""
    if not hasattr(parameter, "quant_state"):
        return parameter.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def _delta(layer) -> torch.Tensor:
    """Scale times B A in float32, of the weight's shape (peft's own would compute it in the adapter's dtype)."""
    (name,) = layer.active_adapters
    return layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())


def probe(model, loaded: load.Loaded) -> torch.Tensor:
    """Log-probabilities ``(n,)`` float32 of the text tokens of a fixed prompt after a fixed video of noise."""
    prompt, video = probe_inputs(loaded)
    with torch.no_grad():
        found = tree_logps(model, Tree(prompt.ids), video).log_probs.float().cpu()
    text = torch.tensor(prompt.mm_token_type_ids) == 0
    text[0] = False  # nothing predicts it
    return found[text]


def probe_inputs(loaded: load.Loaded) -> tuple[Prompt, VideoInputs]:
    """What :func:`probe` asks."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    frames = Frames(pixels, np.arange(4.0), "probe", "uniform", 1.0, 4, np.arange(4))
    video = prepare(frames, video_spec(loaded.processor), min_pixels=56 * 84, max_pixels=96 * 128)
    return build_prompt(PROBE, loaded.processor, loaded.record["family"], video, think=True), video


def _difference(before: torch.Tensor, after: torch.Tensor) -> dict:
    gap = (before - after).abs()
    return {"max": gap.max().item(), "mean": gap.mean().item(), "tokens": len(gap)}
