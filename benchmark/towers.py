"""Two-sided encoders: an image tower and a text tower with one embedding space, from open_clip or trained from scratch.

A release's backbone is `open_clip/<name>`, where the name is any that open_clip knows (with `pretrained` in the backbone's
arguments), `hf-hub:org/repo` or `local-dir:/folder`; or `open_clip` with a `config` of one's own (open_clip's JSON: vision_cfg
and text_cfg), trained from scratch. Each release brings its own preprocessing and tokenizer: sharing one of them between
two models ruins one of the two in silence.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmark.errors import UserError, unknown
from benchmark.protocol import digest

if TYPE_CHECKING:
    from PIL.Image import Image

SIDES = ("image", "text")
OFFLINE = (
    "cannot be fetched ({}); download the model once where there is a network and name its folder (with "
    "open_clip_config.json and the weights) as local-dir:/path"
)


class TwoSided(nn.Module):
    """A network that embeds images and texts; outputs are raw, as those of every backbone."""

    logit_scale: nn.Parameter | Tensor  # log of 1 / temperature

    def image(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed -> (B, D)"""
        raise NotImplementedError

    def text(self, tokens: Tensor) -> Tensor:
        """(B, L) token numbers -> (B, D)"""
        raise NotImplementedError

    def forward(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeds the sides that `x` holds."""
        return {side: getattr(self, side)(x[side]) for side in SIDES if side in x}


class OpenClip(TwoSided):
    """A model of open_clip as it is."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self.model.logit_scale

    def image(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x)

    def text(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


@dataclass(frozen=True)
class Preprocess:
    """From a photo to an image tower's input: resize, centre crop, normalise, as open_clip's evaluation transform."""

    size: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, on the 0..1 scale
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"  # "squash": both sides to `size`, nothing cut (SigLIP)

    def __post_init__(self) -> None:
        if self.resize_mode not in ("shortest", "squash") or self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(
                f"preprocessing with resize_mode {self.resize_mode} and interpolation {self.interpolation} is not built in; "
                "known: shortest or squash, bicubic or bilinear"
            )

    @property
    def id(self) -> str:
        """Stored with every embedding."""
        return digest(asdict(self))[:16]

    def pixels(self, image: Image) -> Tensor:
        """(3, size, size) uint8 of an RGB image."""
        import numpy as np
        from PIL.Image import Resampling

        method, (width, height) = Resampling[self.interpolation.upper()], image.size
        if self.resize_mode == "squash":
            image = image.resize((self.size, self.size), method)
        else:
            short = min(width, height)
            wide, high = (int(self.size * side / short) for side in (width, height))
            image = image.resize((wide, high), method)
            left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Tokenizer:
    """Texts to token numbers (N, context), and a count of what did not fit.

    Args:
        encode: one text -> its tokens without marks; used to count.
        tokens: texts -> (N, context) int64, cut and padded.
        room: tokens of a text that fit into the context.
        name: what decides its tokens, for the id.
    """

    def __init__(
        self, encode: Callable[[str], Sequence[int]], tokens: Callable[[list[str]], Tensor], room: int, name: str
    ):
        self.encode, self.tokens, self.room, self.id = encode, tokens, room, digest([name, room])[:16]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.tokens(list(texts))

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than the context."""
        return sum(len(self.encode(text)) > self.room for text in texts)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def word_tokenizer(texts: Iterable[str], context: int) -> tuple[Tokenizer, int]:
    """A tokenizer by whole words of the given texts, for small models on small corpora, and the size of its vocabulary.

    Numbers: 0 padding, 1 unknown word, 2 start, then the words in alphabetical order, then the end mark, which has the
    highest number because open_clip pools a text at its highest token.
    """
    vocabulary = sorted({word for text in texts for word in words(text)})
    number = {word: i for i, word in enumerate(vocabulary, 3)}
    end = len(vocabulary) + 3

    def encode(text: str) -> list[int]:
        return [number.get(word, 1) for word in words(text)]

    def tokens(batch: list[str]) -> Tensor:
        rows = torch.zeros(len(batch), context, dtype=torch.int64)
        for row, text in zip(rows, batch):
            line = [2, *encode(text)[: context - 2], end]
            row[: len(line)] = torch.tensor(line)
        return rows

    return Tokenizer(encode, tokens, context - 2, digest(vocabulary)), end + 1


@dataclass(frozen=True)
class Spec:
    """A release's two-sided backbone by name, before anything is built."""

    name: str  # "" = config of one's own
    args: Mapping[str, Any]
    dim: int

    @classmethod
    def of(cls, backbone: str, args: Mapping[str, Any], dim: int) -> Spec:
        """Raises UserError: not open_clip, an argument unknown, a config that is no file or lacks its parts."""
        family, _, name = backbone.partition("/")
        if family != "open_clip":
            raise UserError(
                f"backbone '{backbone}' has no text tower; two-sided ones are open_clip or open_clip/<name>"
            )
        known = ("pretrained", "force_quick_gelu") if name else ("config", "mean", "std")
        for key in args:
            if key not in known:
                raise unknown(f"argument of backbone {backbone}", key, known)
        if not name:
            config = args.get("config")
            if isinstance(config, str):
                try:
                    config = json.loads(Path(config).read_bytes())
                except (OSError, ValueError) as error:
                    raise UserError(f"config {args['config']} of backbone {backbone} cannot be read: {error}") from None
            if not isinstance(config, Mapping) or not {"vision_cfg", "text_cfg"} <= {*config}:
                raise UserError(f"backbone {backbone} needs a config with vision_cfg and text_cfg (open_clip's JSON)")
            args = {**args, "config": config}
        return cls(name, args, dim)

    @property
    def pretrained(self) -> bool:
        """Whether it comes with weights, so that there is nothing to train."""
        return bool(self.args.get("pretrained")) or self.name.startswith(("hf-hub:", "local-dir:"))

    @cached_property
    def preprocess(self) -> Preprocess:
        if not self.name:
            given: dict[str, Any] = {key: tuple(self.args[key]) for key in ("mean", "std") if key in self.args}
            return Preprocess(int(self.args["config"]["vision_cfg"].get("image_size", 224)), **given)
        cfg = self._model[1]
        size = cfg.get("size", 224)
        given = {key: cfg[key] for key in ("interpolation", "resize_mode") if key in cfg}
        given |= {key: tuple(cfg[key]) for key in ("mean", "std") if key in cfg}
        return Preprocess(size if isinstance(size, int) else min(size), **given)

    def tokenizer(self, corpus: Iterable[str]) -> Tokenizer:
        """Of the release; one by words has the words of `corpus`, its training captions."""
        if not self.name:
            text = self.args["config"]["text_cfg"]
            if text.get("tokenizer", "words") == "words":
                return word_tokenizer(corpus, text.get("context_length", 77))[0]
        import open_clip

        context = None if self.name else self.args["config"]["text_cfg"].get("context_length", 77)
        found = open_clip.get_tokenizer(self.name, context_length=context) if self.name else _bpe(context)
        length = getattr(found, "context_length", None) or 77
        if hasattr(found, "encode"):
            return Tokenizer(found.encode, found, length - 2, self.name or "bpe")
        inner = found.tokenizer  # of transformers: marks are part of what it counts
        return Tokenizer(lambda text: inner(text)["input_ids"], found, length, self.name)

    def build(self, corpus: Iterable[str]) -> OpenClip:
        """The network; weights drawn anew for a config of one's own, open_clip's otherwise."""
        if self.name:
            return OpenClip(copy.deepcopy(self._model[0]))
        import open_clip

        config = dict(self.args["config"])
        text = dict(config.pop("text_cfg"))
        if text.pop("tokenizer", "words") == "words":
            text["vocab_size"] = word_tokenizer(corpus, 77)[1]
        config.pop("embed_dim", None)  # the protocol's dim decides
        try:
            return OpenClip(open_clip.CLIP(embed_dim=self.dim, text_cfg=text, **config))
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"backbone open_clip: its config is not one of open_clip's: {error}") from None

    @cached_property
    def _model(self) -> tuple[nn.Module, dict[str, Any]]:
        """Model and preprocessing configuration of a named model."""
        import open_clip

        tag, forced = self.args.get("pretrained"), bool(self.args.get("force_quick_gelu"))
        schema, _, place = self.name.partition(":")
        if schema == "local-dir" and not (Path(place) / "open_clip_config.json").is_file():
            raise UserError(f"{self.name}: there is no open_clip_config.json in {place}")
        if not place and self.name not in open_clip.list_models():
            raise unknown("model of open_clip", self.name, open_clip.list_models())
        if tag and not Path(str(tag)).is_file():
            tags = open_clip.list_pretrained_tags_by_model(self.name)
            if tag not in tags:
                raise unknown(f"pretrained weights of {self.name}", str(tag), tags)
            check_activation(self.name, str(tag), forced)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say is an error above
                model = open_clip.create_model(self.name, pretrained=tag, force_quick_gelu=forced)
        except Exception as error:  # hub, network, file: each has exceptions of its own
            reason = str(error).splitlines()[0][:200]
            if schema == "local-dir" or (tag and Path(str(tag)).is_file()):
                raise UserError(f"{self.name}: cannot be loaded: {reason}") from None
            raise UserError(f"{self.name}: {OFFLINE.format(reason)}") from None
        cfg = open_clip.get_model_preprocess_cfg(model)
        found = getattr(getattr(model, "visual", None), "output_dim", self.dim)
        if found != self.dim:
            raise UserError(
                f"{self.name} embeds into {found} dims, the protocol's release says {self.dim}; set dim: {found}"
            )
        return model, cfg


def check_activation(name: str, tag: str, forced: bool = False) -> None:
    """Refuse weights trained with QuickGELU in a model without, and the reverse: open_clip only warns, and loses points.

    Raises:
        UserError: names the model to take.
    """
    import open_clip

    trained = bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
    used = forced or bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if trained and not used:
        raise UserError(f"{name}: weights '{tag}' were trained with QuickGELU; take the model {name}-quickgelu")
    if used and not trained:
        plain = name.removesuffix("-quickgelu")
        raise UserError(f"{name}: weights '{tag}' were trained without QuickGELU; take the model {plain}")


def _bpe(context: int | None) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context or 77)
