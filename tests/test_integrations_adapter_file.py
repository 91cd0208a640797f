"""Weight files that somebody else wrote: what is read, and what is refused before or after reading."""

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.integrations.adapter_file import parse_header, read_file
from moelora.integrations.adapter_report import inspect_adapter
from moelora.integrations.adapters import AdapterError, Limits, load_adapters

Q = "base_model.model.model.layers.0.self_attn.q_proj"
GPT2 = Path(__file__).parent / "data" / "adapter_gpt2_tigrinya"


def factors(rank: int = 4, width: int = 6, out: int = 5) -> dict[str, Tensor]:
    """One site's tensors as PEFT names them."""
    return {f"{Q}.lora_A.weight": torch.randn(rank, width), f"{Q}.lora_B.weight": torch.randn(out, rank)}


def folder(path: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A PEFT folder with these tensors."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt", "anything": "else"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


def raw_file(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    """A folder whose weight file has this header, however wrong."""
    folder(path, factors())
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


def test_a_real_adapter_loads_as_safetensors_reads_it():
    """The trained GPT-2 adapter: every tensor equals the library's own, B transposed without a copy, digest right."""
    (adapter,) = load_adapters([GPT2])
    tensors = load_file(GPT2 / "adapter_model.safetensors")

    assert adapter.name == "adapter_gpt2_tigrinya"
    assert adapter.base_model == "gpt2"
    assert adapter.source.sha256 == hashlib.sha256((GPT2 / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert len(adapter.factors) == len(tensors) // 2 == 36
    for path, site in adapter.factors.items():
        assert torch.equal(site.A_RD, tensors[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(site.B_RO.T, tensors[f"base_model.model.{path}.lora_B.weight"])
        assert site.B_RO.T.is_contiguous()
        assert site.scale == 32 / 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_float_kinds(tmp_path: Path, dtype: torch.dtype):
    """Factors keep the dtype and the values of the file, mixed dtypes too."""
    tensors = factors()
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].to(dtype)

    (adapter,) = load_adapters({"x": folder(tmp_path / "a", tensors)})
    (site,) = adapter.factors.values()

    assert torch.equal(site.A_RD, tensors[f"{Q}.lora_A.weight"])
    assert torch.equal(site.B_RO.T, tensors[f"{Q}.lora_B.weight"])


def test_the_bias_of_B(tmp_path: Path):
    """lora_bias is read; a config that does not announce it, or announces it in vain, is refused."""
    tensors = factors() | {f"{Q}.lora_B.bias": torch.randn(5)}

    (adapter,) = load_adapters([folder(tmp_path / "a", tensors, lora_bias=True)])

    (site,) = adapter.factors.values()
    assert site.bias_O is not None
    assert torch.equal(site.bias_O, tensors[f"{Q}.lora_B.bias"])
    with pytest.raises(AdapterError, match="lora_bias is False"):
        load_adapters([folder(tmp_path / "b", tensors)])
    with pytest.raises(AdapterError, match="lora_bias is True"):
        load_adapters([folder(tmp_path / "c", factors(), lora_bias=True)])


def test_mixed_ranks_and_scales(tmp_path: Path):
    """rank_pattern and alpha_pattern give every module its own rank and scale."""
    V = Q.replace("q_proj", "v_proj")
    tensors = factors() | {f"{V}.lora_A.weight": torch.randn(2, 6), f"{V}.lora_B.weight": torch.randn(5, 2)}

    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 3}}
    (adapter,) = load_adapters([folder(tmp_path / "a", tensors, **patterns)])

    assert [site.scale for site in adapter.factors.values()] == [8 / 4, 3 / 2]


def test_pickle_is_refused(tmp_path: Path):
    """A folder that has only adapter_model.bin is refused unread, and says what is needed."""
    path = folder(tmp_path / "a", factors())
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch /tmp/never'\ntR.")

    with pytest.raises(AdapterError, match=r"pickle.*adapter_model\.safetensors"):
        load_adapters([path])
    assert "pickle" in " ".join(inspect_adapter(path).problems)


HEADER = {
    f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]},
    f"{Q}.lora_B.weight": {"dtype": "F32", "shape": [5, 4], "data_offsets": [96, 176]},
}


def changed(**fields: object) -> dict:
    """The valid header with some fields of lora_B replaced."""
    return HEADER | {f"{Q}.lora_B.weight": HEADER[f"{Q}.lora_B.weight"] | fields}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed(shape=[50, 40]), "takes 8000 bytes"),
        (changed(shape=[2**62, 2**62]), "takes"),
        (changed(shape=[5, -4]), "malformed"),
        (changed(shape=[True, 20]), "malformed"),
        (changed(shape="54"), "malformed"),
        (changed(shape=[1] * 9), "malformed"),
        (changed(data_offsets=[96]), "malformed"),
        (changed(data_offsets=[0, 80]), "overlap"),
        (changed(data_offsets=[100, 180]), "hole"),
        (changed(data_offsets=[176, 96]), "give -80"),
        (changed(data_offsets=[96, 2**70]), "malformed"),
        (changed(dtype="F33"), "dtype"),
        (changed(dtype=["F32"]), "dtype"),
        (HEADER | {"x": 3}, "expected an object"),
        ([1, 2], "JSON object"),
        (b"{]", "JSON"),
        (b"[" * 100_000, "JSON"),
        (json.dumps(HEADER).encode().replace(b"lora_B", b"lora_A"), "twice"),
        ({f"{Q}.lora_A.weight": HEADER[f"{Q}.lora_A.weight"]}, "describes 96 bytes of data, the file holds 176"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, message: str):
    """A header that does not describe its file is refused before its tensors are read, and by a report."""
    path = raw_file(tmp_path / "a", header, bytes(176))

    with pytest.raises(AdapterError, match=message):
        load_adapters([path])
    assert re.search(message, " ".join(inspect_adapter(path).problems))


def test_the_valid_header_is_valid(tmp_path: Path):
    """The header that the table above spoils loads."""
    assert load_adapters([raw_file(tmp_path / "a", HEADER, bytes(176))])


@pytest.mark.parametrize("length", [10**6, 2**40, 2**64 - 1])
def test_oversized_headers(tmp_path: Path, length: int):
    """A header longer than its file, or than the bound, is refused without reserving memory for it."""
    with pytest.raises(AdapterError, match=f"claims {length} bytes"):
        load_adapters([raw_file(tmp_path / "a", HEADER, bytes(176), length)])


def test_limits(tmp_path: Path):
    """File size, header size, number of tensors, of elements, and rank are bounded."""
    path = folder(tmp_path / "a", factors())

    for limits, message in [
        (Limits(file_bytes=100), "weight file has"),
        (Limits(header_bytes=100), "header claims"),
        (Limits(tensors=0), "2 tensors"),
        (Limits(elements=43), "44 numbers"),
        (Limits(rank=3), "r=4"),
        (Limits(scale=1.5), "scale 2"),
        (Limits(config_bytes=10), "adapter_config.json has"),
    ]:
        with pytest.raises(AdapterError, match=message):
            load_adapters([path], limits=limits)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x80\x04pickle, not safetensors"])
def test_no_safetensors_file_at_all(tmp_path: Path, content: bytes):
    """Empty files, stumps and pickles under the wrong name are refused."""
    path = folder(tmp_path / "a", factors())
    (path / "adapter_model.safetensors").write_bytes(content)

    with pytest.raises(AdapterError, match="safetensors"):
        load_adapters([path])


@given(st.dictionaries(st.text(max_size=9), st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5), st.data())
def test_the_header_means_what_safetensors_says(shapes: dict, data: st.DataObject):
    """Whatever safetensors writes, in whatever order, is read to the same bytes."""
    import safetensors.torch

    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    tensors = {
        name: torch.randn(shape).to(data.draw(dtypes)) for name, shape in shapes.items() if name != "__metadata__"
    }
    content = safetensors.torch.save(tensors)
    (length,) = struct.unpack("<Q", content[:8])

    entries = parse_header(json.loads(content[8 : 8 + length]), Limits(), data_bytes=len(content) - 8 - length)

    assert set(entries) == set(tensors)
    for name, entry in entries.items():
        stored = content[8 + length + entry.start : 8 + length + entry.end]
        assert stored == bytes(tensors[name].contiguous().view(-1).view(torch.uint8).tolist())


def test_unaligned_tensors_are_copied(tmp_path: Path):
    """A file whose header leaves the data unaligned gives the same numbers."""
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for padding in range(4):
        path = tmp_path / f"{padding}.safetensors"
        text = header + b" " * padding
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(tensor.view(torch.uint8).flatten().tolist()))

        file = read_file(path, Limits())

        assert torch.equal(file.tensor("x"), tensor)
        assert file.is_finite(["x"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["A", "B"])
def test_nan_and_inf_are_refused(tmp_path: Path, value: float, part: str):
    """A single NaN or Inf anywhere refuses the adapter and names the tensor."""
    tensors = factors()
    tensors[f"{Q}.lora_{part}.weight"][-1, -1] = value

    with pytest.raises(AdapterError, match=rf"1 tensors hold NaN or Inf: .*lora_{part}\.weight"):
        load_adapters([folder(tmp_path / "a", tensors)])
    with pytest.raises(AdapterError, match=rf"1 tensors hold NaN or Inf: .*lora_{part}\.weight"):
        load_adapters([(tensors, {"peft_type": "LORA", "r": 4})])


def test_large_finite_numbers_are_not_refused(tmp_path: Path):
    """Numbers whose sum overflows are finite all the same."""
    tensors = {name: torch.full_like(tensor, 3e38) for name, tensor in factors().items()}

    assert load_adapters([folder(tmp_path / "a", tensors)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_B.weight": torch.ones(5, 3)}, "has rank 4, lora_B .* has rank 3"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 6), f"{Q}.lora_B.weight": torch.ones(5, 2)}, "have rank 2, r and rank"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 6, 3, 3)}, "expected two matrices"),
        ({f"{Q}.lora_A.weight": torch.ones(24)}, "expected two matrices"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 6), f"{Q}.lora_B.weight": torch.ones(5, 0)}, "gather sharded weights"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 6, dtype=torch.int8)}, "dtype I8"),
        ({f"{Q}.lora_A.default.weight": torch.ones(4, 6)}, "both name lora_A"),
        ({"model.layers.1.k_proj.lora_A.weight": torch.ones(4, 6)}, "no lora_B"),
        ({"model.layers.1.k_proj.lora_B.weight": torch.ones(5, 4)}, "no lora_A"),
        ({f"{'a.' * 600}lora_A.weight": torch.ones(4, 6)}, "has 1213 characters"),
        (
            {f"{Q}.lora_A.one.weight": torch.ones(4, 6), f"{Q}.lora_B.two.weight": torch.ones(5, 4)},
            "several adapters",
        ),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, change: dict, message: str):
    """Wrong shapes, ranks, dtypes and halves are refused with the module's name, strict or not."""
    path = folder(tmp_path / "a", factors() | change)

    for strict in (True, False):
        with pytest.raises(AdapterError, match=message):
            load_adapters([path], strict=strict)
    assert re.search(message, " ".join(inspect_adapter(path).problems))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.model.embed_tokens.weight", "overwrite the shared base"),
        ("base_model.model.model.layers.0.mlp.up_proj.weight", "overwrite the shared base"),
        (f"{Q}.base_layer.weight", "base_layer"),
        (f"{Q}.lora_magnitude_vector", "DoRA"),
        ("base_model.model.embed.lora_embedding_A", "embedding"),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta", "token rows"),
        ("base_model.model.score.modules_to_save.weight", "modules_to_save"),
        (f"{Q}.lora_A.bias", "not a LoRA factor"),
        (f"{Q}.lora_down.weight", "kohya"),
        ("\x1b[31mred\n", "not a LoRA factor"),
        ("lora_A.weight", "not a LoRA factor"),
    ],
)
def test_more_than_lora_factors(tmp_path: Path, key: str, message: str):
    """Any other tensor is refused by name when strict; otherwise it is noted and never loaded."""
    path = folder(tmp_path / "a", factors() | {key: torch.full((4, 4), math.nan)})

    with pytest.raises(AdapterError, match=message) as error:
        load_adapters([path])
    (adapter,) = load_adapters([path], strict=False)

    assert "\x1b" not in str(error.value)  # what a stranger wrote cannot steer the terminal
    assert list(adapter.factors) == ["model.layers.0.self_attn.q_proj"]
    assert any(message in note for note in adapter.notes)
    assert any(message in problem for problem in inspect_adapter(path).problems)


@pytest.mark.parametrize("config", [{"lora_alpha": 1e6}, {"lora_alpha": 1e30}, {"alpha_pattern": {"q_proj": 1e6}}])
def test_absurd_scales(tmp_path: Path, config: dict):
    """A scale beyond the bound is refused."""
    with pytest.raises(AdapterError, match=r"scale|alpha"):
        load_adapters([folder(tmp_path / "a", factors(), **config)])


def test_one_bad_adapter_among_good_ones(tmp_path: Path):
    """The error names the adapter that is bad and where it came from."""
    good, bad = folder(tmp_path / "good", factors()), folder(tmp_path / "bad", factors(), use_dora=True)

    with pytest.raises(AdapterError, match=rf"adapter 'bad' \({re.escape(str(bad))}\): use_dora=True"):
        load_adapters([good, bad, good])


def test_a_report_of_a_good_adapter():
    """A report reads the config and the header, and nothing is wrong with the real adapter."""
    report = inspect_adapter(str(GPT2))

    assert (report.ranks, report.targets, report.scales) == ((8,), ("c_attn", "c_proj"), (4.0,))
    assert (report.sites, report.parameters, report.bytes, report.dtype) == (36, 811_008, 3_253_104, "F32")
    assert report.ok
    assert "gpt2" in str(report)
    assert "c_attn, c_proj (36 modules)" in str(report)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "a/b/c/d", "../../etc", "", 3, None, {}, ({}, {}), ("a", "b"), "x@", "\0"]
)
def test_a_report_never_raises(source: object):
    """Whatever is asked about, the answer is a report with the problem in it."""
    report = inspect_adapter(source)

    assert report.problems
    assert not report.ok
    assert "PROBLEM" in str(report)
