"""Keys of LoRA state dicts: the same module under whatever prefix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelora.integrations.keys import parse_key, strip_wrappers

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}|[0-9]{1,2}", fullmatch=True).filter(lambda name: name != "module")
paths = st.lists(names, min_size=1, max_size=6).map(".".join).filter(lambda path: "orig_mod" not in path)
prefixes = st.lists(
    st.sampled_from(["base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module."]), max_size=4
).map("".join)
adapter_names = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True).filter(lambda name: "lora_" not in name)


@given(prefixes, paths, st.sampled_from(["A", "B"]), st.none() | adapter_names)
def test_any_prefix_gives_the_same_path(prefix: str, path: str, part: str, adapter: str | None):
    """Wrappers and the adapter's name come off in any combination, and nothing else does."""
    inside = "" if adapter is None else f"{adapter}."

    parsed = parse_key(f"{prefix}{path}.lora_{part}.{inside}weight")

    assert parsed.path == path
    assert parsed.part == part
    assert parsed.adapter == adapter
    assert parsed.foreign is None


@given(paths, st.integers(0, 5))
def test_a_wrapper_in_the_middle_is_taken_out(path: str, place: int):
    """A compiled or sharded block inside the model leaves no trace in the path."""
    segments = path.split(".")
    wrapped = [*segments[:place], "_orig_mod", *segments[place:], "_checkpoint_wrapped_module"]

    assert strip_wrappers(".".join(wrapped)) == path


@pytest.mark.parametrize(
    "path", ["model.layers.0.q_proj", "bert.module.0.query", "model.base_model.x", "model.model.q"]
)
def test_prefixes_of_models_stay(path: str):
    """`model.` is part of a path: whether it belongs there is decided against the model, not here."""
    assert parse_key(f"base_model.model.{path}.lora_A.weight").path == path


@given(st.text(max_size=40))
def test_any_text_is_a_key(key: str):
    """No key, however odd, is anything but a factor or a named foreigner."""
    parsed = parse_key(key)

    assert (parsed.part is None) == (parsed.foreign is not None)
