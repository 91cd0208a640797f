"""The classifier of a mixture that a classifier routes. Begin with set_classifier.

    moelora.set_classifier(model, moelora.by_estimator(svm, lambda inputs: inputs["input_features"].mean(-1)))

It is asked when a call of the model begins, and what it said is kept with the call's key-value cache: a generated token
has the expert of its prompt.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from moelora.call_settings import GivenIds
from moelora.hooks import CACHES, CONVERSATIONS, INPUTS, TOKENS, cached_length
from moelora.mixture import Mixture, find_mixture, given_tensor
from moelora.routers.classifier import Classifier
from moelora.tape import in_backward

Classify = Callable[[Mapping[str, Any]], Any]
"""From the arguments of a call to ids: (B,) for each row or (B, L) for each token, or a name or id for each row."""


def set_classifier(model: nn.Module, classify: Any) -> None:
    """Let a function choose the experts, for a model that was patched with `router="classifier"`.

    The function is called once for each call of the model, with the arguments by name (`input_ids`, `attention_mask`,
    `input_features`, ...). In `generate` that is once for each prompt: the steps behind it take over the ids of their
    row, or of its last token where there is one id for each; an encoder's ids go on to its decoder. Ids that are given
    by hand (`moelora.given_experts`, `expert_ids`) come first. Neither a saved mixture nor a copy of the model holds
    the function.

    Args:
        model: a patched model.
        classify: a function that returns an id or a name for each row, or a tensor of ids (B, L); -1 is the base
            model. None takes the classifier away.

    Raises:
        ValueError: if the model has another router; in a call, if the answer does not fit the batch, or a cache comes
            from a call that the classifier has not seen.
    """
    _, mixture = find_mixture(model)
    if not isinstance(mixture.config.router, Classifier):
        raise ValueError(
            f"this model's router would not ask a classifier: it is {mixture.config.router}; "
            'patch with router="classifier"'
        )
    if classify is not None and not callable(classify):
        raise ValueError(
            f"expected a function of the call's arguments, got {classify!r}; for an estimator or a module, "
            "say with moelora.by_estimator or moelora.by_module which features it reads"
        )
    mixture.tape.classifier = None if classify is None else _Classified(classify, mixture)


def by_estimator(estimator: Any, features: Callable[[Mapping[str, Any]], Any]) -> Classify:
    """A classifier from a scikit-learn estimator: `estimator.predict(features(inputs))`.

    Args:
        estimator: trained to predict ids or names of experts.
        features: from the arguments of a call to an array with one row for each row of the batch. Tensors are moved to
            the CPU.

    Raises:
        ValueError: if the estimator has no `predict`.
    """
    if not callable(getattr(estimator, "predict", None)):
        raise ValueError(f"expected a scikit-learn estimator with a method `predict`, got {estimator!r}")

    def classify(inputs: Mapping[str, Any]) -> Any:
        found = features(inputs)
        return estimator.predict(found.detach().float().cpu().numpy() if isinstance(found, Tensor) else found)

    return classify


def by_module(module: nn.Module, features: Callable[[Mapping[str, Any]], Tensor]) -> Classify:
    """A classifier from a torch module: the expert with the highest score in `module(features(inputs))`.

    Args:
        module: gives scores (B, E), or (B, L, E) for an expert for each token. Call its `eval` first.
        features: from the arguments of a call to the module's input.
    """

    @torch.no_grad()
    def classify(inputs: Mapping[str, Any]) -> Tensor:
        return module(features(inputs)).argmax(dim=-1)

    return classify


# --- inside -----------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """Ids of an earlier call, as long as the object lives that carries its state."""

    owner: "weakref.ref[Any]"
    ids: Tensor


@final
class _Classified:
    """Asks the classifier when a call begins, and keeps the answer with what the call hands on.

    What is handed on is a key-value cache, or the output of an encoder. Both are held weakly.
    """

    def __init__(self, classify: Classify, mixture: Mixture) -> None:
        self.classify = classify
        self.mixture: weakref.ref[Mixture] = weakref.ref(mixture)
        self.kept: dict[int, _Kept] = {}
        self.running: Tensor | None = None

    def begin(self, values: Mapping[str, Any]) -> GivenIds | None:
        """The ids of a call with these arguments; None if nobody will ask for them, or they were given by hand."""
        self.running = None
        mixture = self.mixture()
        if mixture is None or in_backward():
            return None
        settings = mixture.tape.settings
        if settings.disabled or settings.fixed is not None or settings.given is not None:
            return None

        # a call that goes on takes over, from its cache or from its encoder
        rows, length = size_of(values)
        caches = [values[name] for name in CONVERSATIONS if values.get(name) is not None]
        start = cached_tokens(caches[0]) if caches else 0
        before = values.get("encoder_outputs") if start == 0 else caches[0]
        if before is None:
            ids = asked(self.classify(values), mixture, rows, length)
        else:
            ids = self.ids_of(before)
            if before is values.get("encoder_outputs") and ids.ndim == 2:
                raise ValueError(
                    f"the classifier gave ids of shape {tuple(ids.shape)} for the tokens of an encoder; the decoder's "
                    "are others, so give an id for each row"
                )
        self.running = ids
        for cache in caches:
            self.keep(cache, ids)
        if start is None and ids.ndim == 2:
            ids = ids[:, -1]
        return GivenIds(ids=spread(ids, rows, (start or 0) + (length or 0)))

    def end(self, output: Any) -> None:
        """A call is over, and what it hands on knows its ids."""
        ids, self.running = self.running, None
        if ids is not None and output is not None:
            for owner in (output, *(getattr(output, name, None) for name in CONVERSATIONS)):
                self.keep(owner, ids)

    def ids_of(self, owner: Any) -> Tensor:
        """What was kept with this object."""
        known = self.kept.get(id(owner))
        if known is None or known.owner() is not owner:
            raise ValueError(
                f"this call goes on from a {type(owner).__name__} of a call that the classifier has not seen, so "
                "nobody knows which experts it had; begin with the prompt, or give the ids by hand: "
                "with moelora.given_experts(model, ids)"
            )
        return known.ids

    def keep(self, owner: Any, ids: Tensor) -> None:
        """Remember ids as long as this object lives."""
        key = id(owner)
        try:
            self.kept[key] = _Kept(weakref.ref(owner, lambda _: self.kept.pop(key, None)), ids)
        except TypeError:  # None, tuples and the like: no later call can name them
            return


def size_of(values: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """How many rows a call has, and how many tokens each, as far as its arguments say."""
    name = next((name for name in INPUTS if isinstance(values.get(name), Tensor)), None)
    if name is None:
        return None, None
    return values[name].shape[0], values[name].shape[1] if name in TOKENS else None


def cached_tokens(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it is a state that holds some and does not count them."""
    has_state = getattr(cache, "has_previous_state", False)
    try:
        count = cached_length({CACHES[0]: cache})
        return count or (None if not callable(has_state) and has_state else 0)
    except ValueError:  # transformers' answer for a cache of states alone
        return None if callable(has_state) and has_state() else 0


def asked(answer: Any, mixture: Mixture, rows: int | None, length: int | None) -> Tensor:
    """A classifier's answer as ids of rows (B,) or of tokens (B, L), checked."""
    if not isinstance(answer, Tensor) and hasattr(answer, "tolist"):
        answer = answer.tolist()
    ids = given_tensor(mixture.names, answer)
    if ids.ndim == 0:
        ids = ids.expand(rows or 1)
    fits = rows is None or ids.shape[0] == rows
    if ids.ndim > 2 or not fits or (ids.ndim == 2 and ids.shape[1] != length):
        raise ValueError(
            f"the classifier gave ids of shape {tuple(ids.shape)} for {rows} rows of {length} tokens; "
            "expected one for each row, or one for each token"
        )
    return ids


def spread(ids: Tensor, rows: int | None, stop: int) -> Tensor:
    """Kept ids for as many rows and tokens as a call has got to.

    Beams and several return sequences repeat a row, one after the other. Tokens behind those that the classifier saw
    have the id of the last of these.
    """
    if rows is not None and rows != ids.shape[0]:
        if rows % ids.shape[0]:
            raise ValueError(
                f"this call of {rows} rows goes on from one of {ids.shape[0]}, and nobody knows which is whose"
            )
        ids = ids.repeat_interleave(rows // ids.shape[0], dim=0)
    if ids.ndim == 2 and stop > ids.shape[1]:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, stop - ids.shape[1])], dim=1)
    return ids
