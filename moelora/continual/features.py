"""What a detector looks at: features of prompts, from a model's own hidden states. Begin with HiddenStates.

    features = HiddenStates(model)
    request = Windows.join([features(batch) for batch in prompts_of_the_request])
    detector = Mahalanobis().fit(request.features_WSD, request.row_W)
    scores_B = features(batch).score(detector)

Axes: B prompts, L tokens, W windows, S layers, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.continual.detectors.base import Detector
from moelora.hooks import argument_names
from moelora.mixture import disabled, is_patched, root_of
from moelora.prefill import masked_mean
from moelora.site_inputs import evaluating

LAYERS = 5
"""How many layers are taken by default."""

TEXT = ("input_ids", "token_type_ids")
NOT_READ = ("attention_mask", "labels", "position_ids")


class Windows(NamedTuple):
    """Features of a batch of prompts, one row for each window; a short prompt is one window.

    Attributes:
        features_WSD: fp32.
        row_W: the prompt that each window is from.
        num_rows: how many prompts there are, B.
    """

    features_WSD: Float[Tensor, "W S D"]
    row_W: Int[Tensor, " W"]
    num_rows: int

    def lowest(self, scores_W: Float[Tensor, " W"]) -> Float[Tensor, " B"]:
        """The least score of each prompt's windows: a prompt is as near to a request as its nearest part.

        Raises:
            ValueError: if there is not one score for each window.
        """
        if scores_W.shape != self.row_W.shape:
            raise ValueError(f"expected {len(self.row_W)} scores, one for each window, got {tuple(scores_W.shape)}")
        lowest_B = scores_W.new_full((self.num_rows,), torch.inf)
        return lowest_B.scatter_reduce_(0, self.row_W.to(scores_W.device), scores_W, "amin")

    def score(self, detector: Detector) -> Float[Tensor, " B"]:
        """The detector's distance of each prompt: the least one of its windows."""
        return self.lowest(detector.score(self.features_WSD))

    @classmethod
    def join(cls, batches: "Sequence[Windows]") -> "Windows":
        """Several batches as one, in order.

        Raises:
            ValueError: for no batch.
        """
        if not batches:
            raise ValueError("there is no batch to join; is the list of prompts empty?")
        starts = [sum(batch.num_rows for batch in batches[:number]) for number in range(len(batches))]
        return cls(
            torch.cat([batch.features_WSD for batch in batches]),
            torch.cat([batch.row_W + start for batch, start in zip(batches, starts, strict=True)]),
            sum(batch.num_rows for batch in batches),
        )


@final
class HiddenStates:
    """Features of prompts from a model's own hidden states: the mean over a prompt's tokens, at unit length, per layer.

    They are the base model's: a patched model runs as under `moelora.disabled`, without dropout and without gradient.
    Decoders and encoders give the output of their blocks, encoder-decoders that of their encoder; the last layer's
    comes after the final norm, as in `output_hidden_states`. Only the backbone runs, no head.

    A long prompt is read in windows that overlap, each run by itself, so that text before and behind a question neither
    dilutes it nor hides it, and an encoder's greatest length is no limit. Any `window - stride` tokens that follow one
    another are together in some window.

    Args:
        model: a Hugging Face model, patched or not, or any module with a `config` that takes `input_ids` and
            `attention_mask` and returns `hidden_states`.
        layers: which blocks, counted from 1; by default five, spread evenly, the last included.
        window: how many tokens a window has.
        stride: how many tokens further the next one begins; the last one ends with the prompt.
        windows_at_once: how many are run in one forward.

    Raises:
        ValueError: for layers that the model does not have, or a stride that would leave tokens out.
    """

    model: nn.Module
    layers: tuple[int, ...]
    window: int
    stride: int
    windows_at_once: int

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        *,
        window: int = 256,
        stride: int = 128,
        windows_at_once: int = 32,
    ) -> None:
        if not 1 <= stride <= window:
            raise ValueError(f"stride must lie between 1 and window={window}, or tokens are left out; got {stride}")
        if windows_at_once < 1:
            raise ValueError(f"windows_at_once must be at least 1, got {windows_at_once}")
        self.model, self.window, self.stride, self.windows_at_once = model, window, stride, windows_at_once
        depth = _depth(root_of(model))
        if layers is None and depth is None:
            raise ValueError(
                f"the config of {type(model).__name__} does not say how many layers there are; pass layers="
            )
        self.layers = spread(depth, LAYERS) if layers is None and depth is not None else tuple(layers or ())
        if not self.layers or min(self.layers) < 1 or (depth is not None and max(self.layers) > depth):
            raise ValueError(
                f"layers must be numbers from 1 (the first block's output) to {depth or 'the depth'}, got {self.layers}"
            )

    def __call__(self, batch: Mapping[str, Tensor]) -> Windows:
        """Unit-length features of a batch of prompts, on the model's device.

        Padding on either side changes nothing: only the tokens of `attention_mask` are run.

        Args:
            batch: `input_ids`, and if there are `attention_mask` (without it all tokens count) and `token_type_ids`;
                prompts only, not their answers. `labels` and `position_ids` are not read.

        Raises:
            ValueError: for a prompt without tokens, and for inputs that are no text.
        """
        means = self.means(batch)
        return means._replace(features_WSD=F.normalize(means.features_WSD, dim=-1))

    @torch.no_grad()
    def means(self, batch: Mapping[str, Tensor]) -> Windows:
        """The same, not normalised: what O3 looks at."""
        texts, mask_BL = _texts(batch)
        windows = cut(mask_BL, window=self.window, stride=self.stride)
        root = root_of(self.model)
        device = next(root.parameters()).device
        texts = {name: tokens_BL.to(device) for name, tokens_BL in texts.items()}

        # windows of similar length run together, or short prompts would be padded to the longest
        order = sorted(range(len(windows)), key=lambda number: len(windows[number][1]))
        chunks = [order[start : start + self.windows_at_once] for start in range(0, len(order), self.windows_at_once)]
        base_mode = disabled(root) if is_patched(root) else nullcontext()
        with base_mode, evaluating(root):
            parts = [self._run(root, texts, [windows[number] for number in chunk]) for chunk in chunks]
        place_W = torch.tensor(order, device=device).argsort()
        return Windows(
            torch.cat(parts)[place_W], torch.tensor([row for row, _ in windows], device=device), mask_BL.shape[0]
        )

    # --- inside ---------------------------------------------------------------------------------------------------

    def _run(self, root: nn.Module, texts: Mapping[str, Tensor], windows: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Means of some windows, (W, S, D)."""
        device = texts["input_ids"].device
        row_W = torch.tensor([row for row, _ in windows], device=device)
        position_WL = nn.utils.rnn.pad_sequence([position_L for _, position_L in windows], True, -1).to(device)
        valid_WL = position_WL >= 0
        inputs: dict[str, Any] = {
            name: torch.where(valid_WL, tokens_BL[row_W[:, None], position_WL.clamp(min=0)], 0)
            for name, tokens_BL in texts.items()
        }
        backbone = _backbone(root)
        if "use_cache" in argument_names(type(backbone)):
            inputs["use_cache"] = False
        states = backbone(**inputs, attention_mask=valid_WL.long(), output_hidden_states=True).hidden_states
        if states is None or len(states) <= max(self.layers):
            raise ValueError(
                f"{type(backbone).__name__} returned {0 if states is None else len(states)} hidden states, the "
                f"embeddings included; layers={self.layers} need {max(self.layers) + 1}"
            )
        return torch.stack([masked_mean(states[layer], valid_WL).to(device) for layer in self.layers], dim=1)


@final
class ExternalEncoder:
    """Features from any other encoder, at unit length; one window for each row.

    Args:
        encode: texts, or a batch, to features (B, S, D), with S = 1 for an encoder with one vector a text. It sees to
            windows itself, if its inputs can be long: what it does not see, no detector will.
    """

    encode: Callable[[Any], Tensor]

    def __init__(self, encode: Callable[[Any], Tensor]) -> None:
        self.encode = encode

    @torch.no_grad()
    def __call__(self, batch: Any) -> Windows:
        """Features of a batch.

        Raises:
            ValueError: if the encoder does not return floating-point numbers of three axes.
        """
        features_BSD = self.encode(batch)
        if features_BSD.ndim != 3 or not features_BSD.is_floating_point():
            raise ValueError(
                "an encoder must return floating-point features of shape (rows, layers, width), got "
                f"{features_BSD.dtype} {tuple(features_BSD.shape)}; add an axis for its one layer"
            )
        rows = len(features_BSD)
        return Windows(F.normalize(features_BSD.float(), dim=-1), torch.arange(rows, device=features_BSD.device), rows)


def spread(depth: int, count: int) -> tuple[int, ...]:
    """Up to `count` layers of `depth`, numbered from 1, evenly spread, the last included."""
    return tuple(sorted({max(1, round(depth * step / count)) for step in range(1, count + 1)}))


def cut(mask_BL: Bool[Tensor, "B L"], *, window: int, stride: int) -> list[tuple[int, Tensor]]:
    """The windows of each row: its number and the positions of the window's tokens, padding left out.

    Raises:
        ValueError: for a row without tokens.
    """
    windows = []
    for row, mask_L in enumerate(mask_BL.cpu()):
        position_N = mask_L.nonzero()[:, 0]
        if not len(position_N):
            raise ValueError(f"row {row} of the batch has no tokens, so it has no features; leave it out")
        last = max(len(position_N) - window, 0)
        starts = [*range(0, last, stride), last]
        windows += [(row, position_N[start : start + window]) for start in starts]
    return windows


def text_config(root: nn.Module) -> Any:
    """The config of what gives a model's hidden states: its text part, of that the encoder; None without one."""
    config: Any = getattr(root, "config", None)
    if hasattr(config, "get_text_config"):
        return config.get_text_config(encoder=True) if config.is_encoder_decoder else config.get_text_config()
    return config


def _texts(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs that have one number a token, and which tokens count."""
    unknown = [name for name in batch if name not in (*TEXT, *NOT_READ)]
    if "input_ids" not in batch or unknown:
        raise ValueError(
            f"HiddenStates reads text: input_ids, attention_mask, token_type_ids; got {sorted(batch)}. For other "
            "inputs hand an ExternalEncoder a function that knows them"
        )
    ids_BL = batch["input_ids"]
    texts = {name: batch[name] for name in TEXT if name in batch}
    mask = batch.get("attention_mask")
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask is None else mask != 0
    for name, tensor in {**texts, "attention_mask": mask_BL}.items():
        if tensor.ndim != 2 or tensor.shape != ids_BL.shape or not len(tensor):
            raise ValueError(
                f"{name} must have the shape (rows, tokens) of input_ids with a row at least, got {tuple(tensor.shape)}"
            )
    return texts, mask_BL


def _backbone(root: nn.Module) -> nn.Module:
    """What returns hidden states without the cost of a head."""
    model: Any = root
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", root)


def _depth(root: nn.Module) -> int | None:
    """How many blocks the backbone has, by its config."""
    return getattr(text_config(root), "num_hidden_layers", None)
