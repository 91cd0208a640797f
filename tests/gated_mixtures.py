"""Mixtures behind gates, gates that say what a test wants, and bytes, for the tests of gates."""

import hashlib

import torch
from generating import prompt

import moelora
from moelora import Gated, MoELoRAConfig
from moelora.continual.features import HiddenStates
from moelora.testing import tiny

CLOSED, FIRST, BOTH = [0.0, 0.0], [1.0, 0.0], [1.0, 0.5]


def patched(family="llama", base=None, *, combine="sum", fill=None):
    """A tiny mixture of two random experts, or of experts full of one number, behind gates that are still to come."""
    config = MoELoRAConfig(router=Gated(combine=combine))
    model = moelora.patch_model(base or tiny.model(family), num_experts=2, rank=2, config=config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.2, generator=generator)
            if fill is not None:
                parameter.data.fill_(fill)
    return model


class Say:
    """Gates that say the same for every row, or a row each, and remember what they were shown."""

    def __init__(self, *rows):
        self.rows, self.seen = list(rows), []

    def __call__(self, inputs):
        self.seen.append(inputs)
        names = ("input_features", "input_ids", "decoder_input_ids", "inputs_embeds")
        return self.weights(len(next(inputs[name] for name in names if inputs.get(name) is not None)))

    def weights(self, count):
        """What they say to so many rows."""
        return torch.tensor(self.rows).repeat_interleave(count // len(self.rows), 0)


class Told(Say):
    """The same, which may be told means of hidden states, and remember these."""

    def __init__(self, *rows, layers=(1, 2), window=16):
        super().__init__(*rows)
        self.layers, self.window, self.means = layers, window, []

    def of_means(self, means_BSD):
        """From the means to weights."""
        self.means.append(means_BSD)
        return self.weights(len(means_BSD))


def plain_means(model, gates, inputs):
    """The means that such gates would find by themselves."""
    states = HiddenStates(model, gates.layers, window=gates.window, stride=gates.window)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return states.means({name: inputs[name] for name in names if name in inputs}).features_WSD


def call(model, gates=None, **inputs):
    """What a prompt is answered with, cache and hidden states included."""
    if gates is not None:
        moelora.set_gates(model, gates)
    with torch.no_grad():
        return model(**({"input_ids": prompt(3)} | inputs), use_cache=True, output_hidden_states=True)


def tensors(output):
    """Logits, hidden states, keys and values: (B, ...) each."""
    layers = output.past_key_values.layers
    return [output.logits, *output.hidden_states, *(part for layer in layers for part in (layer.keys, layer.values))]


def fixed(model, rows, **inputs):
    """The same by a fixed mixture."""
    with moelora.use_experts(model, [dict(zip(("expert0", "expert1"), row, strict=True)) for row in rows]):
        return call(model, **inputs)


def bits(tensor):
    """A tensor's bytes, in which -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8)


def same_bits(left, right):
    """Whether two lists of tensors are equal by the byte."""
    return all(torch.equal(bits(one), bits(other)) for one, other in zip(left, right, strict=True))


def digest(state):
    """SHA-256 of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + bits(tensor.detach().reshape(-1)).numpy().tobytes())
    return found.hexdigest()


def whole_state(model):
    """All parameters and buffers, those too that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def base_state(model):
    """Everything that the model has besides experts and routers."""
    own = (".bank.", ".router.")
    return {name: value for name, value in whole_state(model).items() if not any(part in name for part in own)}


def stop(error):
    """A hook that raises."""

    def raise_it(*_):
        raise error

    return raise_it


def hooks(model):
    """Every forward hook there is."""
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]
