"""What a Qwen-VL is made of, read off its configuration: every matrix with its shape, and the weights of the rest.

    anatomy, source = read_anatomy("Qwen/Qwen2.5-VL-7B-Instruct")     # no network: its numbers ship
    anatomy.parameters                                                # 8292166656

Published models' numbers lie in ``stkit/data/configs``, each with its source.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from ..runs import read_json
from ..runtime import StkitError
from ..vlm import tiny
from ..vlm.load import FAMILIES, HUB_NAME, Source, head_size, read_config


class Matrix(NamedTuple):
    """A linear layer. part: "language", "tower" or "projector". rows: of its output. bias: whether it has one. count:
    how often it stands in the model."""

    part: str
    name: str
    rows: int
    columns: int
    bias: bool
    count: int

    @property
    def weights(self) -> int:
        """Of all of them, without biases."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a model. The language model has ``layers`` of ``width`` with ``heads`` of ``head`` and ``kv_heads``, an
    inner width ``inner`` and ``vocabulary``; the tower has ``tower_layers`` of ``tower_width`` and ``tower_inner``.

    patch: pixels of a patch's side; merge: patches of a token's side; temporal: frames of a temporal patch; pixels:
    numbers of a patch. levels: features that DeepStack adds. vectors: weights that are no matrix of a linear layer nor
    an embedding, by part (norms, the patches' convolution and positions). tied: the head is the embedding.
    """

    family: str
    tied: bool
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tower_width: int
    tower_inner: int
    tower_layers: int
    patch: int
    merge: int
    temporal: int
    pixels: int
    levels: int
    matrices: tuple[Matrix, ...]
    vectors: dict[str, int]

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many of its own if it isn't tied."""
        return self.vocabulary * self.width

    @property
    def embeddings(self) -> int:
        """Weights of embedding and head together."""
        return self.embedding * (1 if self.tied else 2)

    def part(self, name: str) -> int:
        """Weights of a part, embeddings apart."""
        biases = sum(m.rows * m.count for m in self.matrices if m.part == name and m.bias)
        return sum(m.weights for m in self.matrices if m.part == name) + biases + self.vectors[name]

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.embeddings + sum(map(self.part, self.vectors))


def config_names() -> list[str]:
    """Published models whose numbers ship."""
    return sorted(path.name.removesuffix(".json") for path in _configs().glob("*.json"))


def published(name: str) -> str | None:
    """The config that ships for a published name, with or without "Qwen/" and "-Instruct"; None for other names."""
    short = name.removeprefix("Qwen/")
    return next((known for known in config_names() if known in (short, f"{short}-Instruct")), None)


def _configs() -> Path:
    return Path(str(resources.files("stkit"))) / "data" / "configs"


def read_anatomy(model) -> tuple[Anatomy, str]:
    """What a model is made of, and where that was read.

    Args:
        model: "tiny" or another that ships, a folder, a published name with or without "Qwen/" and "-Instruct", a name
            in the hub's cache, or a configuration of Transformers.

    Raises:
        StkitError: none of these.
    """
    if hasattr(model, "get_text_config"):
        return anatomy_of(model), "a configuration"
    name, folder = str(model), Path(str(model)).expanduser()
    if tiny.is_own(name) or folder.is_dir():
        source = Source(name, tiny.find_folder(name) if tiny.is_own(name) else folder)
        return anatomy_of(read_config(source)), str(source.folder / "config.json")
    short = published(name)
    if short is None:
        if cached := _cached(name):
            return anatomy_of(read_config(Source(name, cached.parent))), str(cached)
        raise StkitError(
            f"model {name!r}: no such folder, not in the hub's cache, and no published model whose numbers are known: "
            f"give a folder with a config.json, 'tiny', or one of {', '.join(config_names())}"
        )
    raw = read_json(_configs() / f"{short}.json")
    origin = raw.pop("source")
    return anatomy_of(FAMILIES[raw["model_type"]][0].config_class.from_dict(raw)), origin["url"]


def _cached(name: str) -> Path | None:
    """The config.json of a hub model that was downloaded before."""
    if not HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    found = try_to_load_from_cache(name, "config.json", cache_dir=HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else None


def anatomy_of(config) -> Anatomy:
    """What a configuration of Transformers says."""
    family, text, vision = config.model_type, config.get_text_config(), config.vision_config
    tower = vision.embed_dim if family == "qwen2_vl" else vision.hidden_size
    inner = tower * vision.mlp_ratio if family == "qwen2_vl" else vision.intermediate_size
    levels = len(vision.deepstack_visual_indexes) if family == "qwen3_vl" else 0
    head, pixels = head_size(config), vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    out = vision.hidden_size if family == "qwen2_vl" else vision.out_hidden_size
    return Anatomy(
        family=family, tied=config.tie_word_embeddings, width=text.hidden_size, inner=text.intermediate_size,
        layers=text.num_hidden_layers, heads=text.num_attention_heads, kv_heads=text.num_key_value_heads, head=head,
        vocabulary=text.vocab_size, tower_width=tower, tower_inner=inner, tower_layers=vision.depth,
        patch=vision.patch_size, merge=vision.spatial_merge_size, temporal=vision.temporal_patch_size, pixels=pixels,
        levels=levels, matrices=(*_language(text, family, head), *_tower(vision, family, tower, inner, out, levels)),
        vectors=_vectors(text, vision, family, head, tower, pixels, levels),
    )  # fmt: skip


def _language(text, family: str, head: int) -> list[Matrix]:
    width, inner, count = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    bias = text.attention_bias if family == "qwen3_vl" else True
    last = bias and family == "qwen3_vl"
    rows = [("q_proj", q, width, bias), ("k_proj", kv, width, bias), ("v_proj", kv, width, bias)]
    rows += [("o_proj", width, q, last), ("gate_proj", inner, width, False), ("up_proj", inner, width, False)]
    rows += [("down_proj", width, inner, False)]
    return [Matrix("language", *row, count) for row in rows]


def _tower(vision, family: str, tower: int, inner: int, out: int, levels: int) -> list[Matrix]:
    count, wide = vision.depth, tower * vision.spatial_merge_size**2
    rows = [("qkv", 3 * tower, tower), ("proj", tower, tower), ("up", inner, tower), ("down", tower, inner)]
    rows += [("gate", inner, tower)] * (family == "qwen2_5_vl")
    found = [Matrix("tower", *row, True, count) for row in rows]
    merger = (("merger 0", wide, wide), ("merger 1", out, wide))
    return found + [Matrix("projector", *row, True, 1 + levels) for row in merger]


def _vectors(text, vision, family: str, head: int, tower: int, pixels: int, levels: int) -> dict[str, int]:
    """Weights of norms (two a layer, and the last), of the patches' convolution and of learned positions."""
    norm = 1 if family == "qwen2_5_vl" else 2  # RMSNorm has a weight, LayerNorm a bias too
    language = text.hidden_size * (2 * text.num_hidden_layers + 1)
    patches = pixels * tower
    if family == "qwen3_vl":
        language += 2 * head * text.num_hidden_layers
        patches += tower + vision.num_position_embeddings * tower
    wide = tower * vision.spatial_merge_size**2
    return {
        "language": language,
        "tower": 2 * norm * tower * vision.depth + patches,
        "projector": norm * tower + 2 * wide * levels,
    }
