"""What adapter configs mean: 36 real ones, and what hostile ones may not do."""

import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelora.integrations.adapter_config import config_problems, interpret_config, read_config
from moelora.integrations.adapter_types import AdapterError, Limits
from moelora.integrations.path_patterns import PathPatterns

REAL = {
    entry["source"]: entry["config"]
    for entry in json.loads((Path(__file__).parent / "data" / "adapter_configs.json").read_text())
}
PEFT = "huggingface/peft:method_comparison"

# source -> the scale of a module without a pattern, as lora_alpha / r of the file
UNDERSTOOD = {
    "Elyorcode/SPEECH-TO-TEXT-MODEL:adapter_config.json": 2.0,
    "HCBlackFox/LLamaModel:adapter_config.json": 4.0,
    "MaxZabarka/qlora-out-3:adapter_config.json": 0.5,
    "elisagdelope/ESM2-bindingsites:adapter_config.json (history)": 0.5,
    "1350562074/LLM:adapter_config.json": 2.0,
    "DreamVu/Cosmos-Reason2-2B-Retail-Grocery-EgoExo:adapter_config.json": 2.0,
    "EDLlyc/kangya-glm4-lora:adapter_config.json": 2.0,
    "EPlus-LLM/Model:adapter_config.json": 100.0,
    "Electrosquib/LLM-Based-Predictive-Text-Compression-Ham-Radio:adapter_config.json": 2.0,
    "abrhaleyarefaine1997/gpt2-tigrinya-lora:adapter_config.json": 4.0,
    "D3voz/joy-caption-alpha-two-gui-mod:adapter_config.json": 0.25,
    "GeorgeRudenko/memetic-capstone:adapter_config.json": 2.0,
    "GowthamNats/MicrosoftPhi1_5_finetuned-:adapter_config.json": 1.0,
    "eardage/Fine-Tuning-PaliGemma-With-RISC-Dataset:adapters/adapter_config.json": 2.0,
    # MiCA trains A alone from a B it leaves fixed: saved, it is a plain LoRA on an unchanged base
    f"{PEFT}/MetaMathQA/experiments/lora/llama-3.2-3B-rank32-mica/adapter_config.json": 2.0,
    "GQ131/-fine-tuned-Llama-2-model-on-IMDB-sentiment-analysis-dataset:adapter_config.json": 0.25,
    f"{PEFT}/MetaMathQA/experiments/lora/llama-3.2-3B-rank32/adapter_config.json": 2.0,
    "AnHuanAo/qwythos-9b-math-sft:adapter_config.json": 2.0,
    "anirudh-ak/peft-gpt2:model/lora_model/adapter_config.json": 1.0,
    "KyleScic/KyleSciclunaThesis:adapter_config.json": 2.0,
    "DigitalIntelligenceCenter-of-ICMM/Baize-Traditional-Chinese-Medicine-Large-Language-Model:"
    "adapter_config.json": 1.0,
    f"{PEFT}/image-gen/experiments/lora/flux2-klein-default/adapter_config.json": 1.0,
}

# source -> what the refusal must name
REFUSED = {
    "kilojoules/REDKWEEN:adapters/adapter_config.json": "MLX format",
    f"{PEFT}/MetaMathQA/experiments/lora/llama-3.2-3B-rank14-target-mlp-bdlora/adapter_config.json": "use_bdlora=",
    "Ch3nOff/dual-loop-controller:adapter_config.json": "no peft_type: not a PEFT adapter",
    "tech4iddev/COLAB_GEMMA_4:adapters/adapter_config.json": "MLX format",
    f"{PEFT}/MetaMathQA/experiments/lora/llama-3.2-3B-rank32-kasa/adapter_config.json": "kasa_config=",
    "searlion/mlx-finetuning:adapters/adapter_config.json": "MLX format",
    f"{PEFT}/MetaMathQA/experiments/miss/llama-3.2-3B-default/adapter_config.json": "peft_type='MISS'",
    f"{PEFT}/MetaMathQA/experiments/loha/llama-3.2-3B-rank32/adapter_config.json": "peft_type='LOHA'",
    f"{PEFT}/MetaMathQA/experiments/prompt_tuning/llama-3.2-3B-default/adapter_config.json": "'PROMPT_TUNING'",
    f"{PEFT}/MetaMathQA/experiments/trainable_tokens/llama-3.2-3B-sos+eos/adapter_config.json": "'TRAINABLE_TOKENS'",
    f"{PEFT}/MetaMathQA/experiments/vera/llama-3.2-3B-default/adapter_config.json": "peft_type='VERA'",
    f"{PEFT}/MetaMathQA/experiments/ia3/llama-3.2-3B-default/adapter_config.json": "peft_type='IA3'",
}

# refused when strict, because of whole weights beside the LoRA; understood without them otherwise
REFUSED_WHEN_STRICT = {
    "dayanidhi04/emotion-classification-distilbert-lora:adapter_config.json": 2.0,
    "Tashu014/lora-imdb-distilbert:adapter_config.json": 2.0,
}


def test_the_tables_cover_all_real_configs():
    """Every real config has an expected outcome, and only one."""
    assert [*sorted([*UNDERSTOOD, *REFUSED, *REFUSED_WHEN_STRICT])] == sorted(REAL)
    assert len(REAL) == 36


@pytest.mark.parametrize("source", UNDERSTOOD)
def test_understood(source: str):
    """A plain LoRA config gives its scale, and its base model is taken as it stands."""
    config = interpret_config(REAL[source], limits=Limits())

    assert config.scale("model.layers.0.self_attn.q_proj", REAL[source]["r"]) == UNDERSTOOD[source]
    assert config.rank("model.layers.0.self_attn.q_proj") == REAL[source]["r"]
    assert config.base_model == REAL[source]["base_model_name_or_path"]


@pytest.mark.parametrize("source", REFUSED)
def test_refused(source: str):
    """What is no plain LoRA is refused, strict or not, with the field's name."""
    for strict in (True, False):
        with pytest.raises(AdapterError, match=re.escape(REFUSED[source])):
            interpret_config(REAL[source], strict=strict, limits=Limits())


@pytest.mark.parametrize("source", REFUSED_WHEN_STRICT)
def test_refused_when_strict(source: str):
    """modules_to_save is refused; with strict=False it is left out and said."""
    with pytest.raises(AdapterError, match="modules_to_save="):
        interpret_config(REAL[source], limits=Limits())

    config = interpret_config(REAL[source], strict=False, limits=Limits())

    assert config.scale("any", 8) == REFUSED_WHEN_STRICT[source]
    assert any("modules_to_save" in note for note in config.notes)


def plain(**fields: object) -> dict[str, object]:
    """A small valid config with some fields replaced."""
    return {"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "never heard of"},
        {"init_lora_weights": 3},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1}},
        {"velora_config": {"num_groups": 1}},
        {"monteclora_config": {"num_samples": 2}},
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 3}},
        {"megatron_config": {"hidden_size": 8}},
        {"enable_lora": [True, False, True]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["score"]},
        {"trainable_token_indices": [1]},
        {"r": 0},
        {"r": 1_000_000},
        {"r": 10**400},
        {"r": True},
        {"r": "8"},
        {"r": 8.5},
        {"lora_alpha": 1e30},
        {"lora_alpha": 10**400},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": "16"},
        {"use_rslora": "yes"},
        {"rank_pattern": {"q_proj": 10**6}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": math.inf}},
        {"alpha_pattern": {"q_proj": None}},
        {"use_a_later_invention": True},
        {"later_config": {"a": 1}},
    ],
)
def test_a_refusal_names_its_field(fields: dict):
    """Everything that changes the formula, the base or the bounds is refused under its own name."""
    (name,) = fields

    with pytest.raises(AdapterError, match=name):
        interpret_config(plain(**fields), limits=Limits())


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": False, "layer_replication": None, "loftq_config": {}, "target_parameters": None},
        {"fan_in_fan_out": None},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"bias": None},
        {"merge_weights": True, "peft_version": "0.18.0", "task_type": "WRONG", "inference_mode": False},
        {"qalora_group_size": 16, "use_qalora": False},
    ],
)
def test_harmless_fields_are_read_over(fields: dict):
    """Fields that are off, or that do not touch the factors, change nothing."""
    config = interpret_config(plain(**fields), limits=Limits())

    assert config.scale("q_proj", 8) == 2.0


def test_unknown_fields_are_told():
    """A field of a later PEFT is refused when strict and noted otherwise; other unknown fields are noted."""
    config = interpret_config(plain(use_a_later_invention=True), strict=False, limits=Limits())
    other = interpret_config(plain(my_note="hello"), limits=Limits())

    assert any("use_a_later_invention" in note for note in config.notes)
    assert any("my_note" in note for note in other.notes)


def test_all_problems_are_named_at_once():
    """A config with three faults is refused once, with three reasons."""
    problems = config_problems(plain(use_dora=True, r=0, bias="all"), limits=Limits())

    assert len(problems) == 3


def test_rank_stabilised_scale():
    """rsLoRA divides by the square root of the rank, with the module's own alpha."""
    config = interpret_config(plain(use_rslora=True, alpha_pattern={"v_proj": 6}), limits=Limits())

    assert config.scale("layers.0.q_proj", 16) == 16 / 4
    assert config.scale("layers.0.v_proj", 9) == 6 / 3


def test_patterns_match_as_in_peft():
    """Rank and alpha patterns give what PEFT's own lookup gives, for names, tails, paths and expressions."""
    from peft.utils.other import get_pattern_key

    patterns = {
        "^model.layers.0.self_attn.q_proj": 1,
        "layers.1.self_attn.q_proj": 2,
        "q_proj": 3,
        r"layers\.(1[0-9]|2\d)\..*k_proj": 4,
        ".*decoder.*v_proj": 5,
        "model.layers.3.mlp.up_proj": 6,
        r"layers\.[24]\.(?:mlp\.)?down_proj$": 7,
    }
    matcher = PathPatterns(patterns)
    paths = [
        f"{prefix}layers.{layer}.{block}.{leaf}"
        for prefix in ("", "model.", "decoder.", "model.decoder.")
        for layer in (0, 1, 2, 3, 4, 12, 25, 31)
        for block in ("self_attn", "mlp")
        for leaf in ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "xq_proj")
    ]

    for path in paths:
        expected = get_pattern_key(list(patterns), path)
        assert matcher.first_match(path) == (expected if expected in patterns else None), path


alphabet = st.sampled_from("ab.")
atoms = st.one_of(
    alphabet, st.sampled_from([r"\.", "[ab]", "[^a]", "[a-c]", "(a|b)", "(?:ab|b)", "(a*b)", r"\w", "(a|)", "^", "$"])
)
quantified = st.tuples(atoms.filter(lambda atom: atom not in "^$"), st.sampled_from(["", "*", "+", "?", "*?"])).map(
    "".join
)


@given(st.lists(st.one_of(atoms, quantified), max_size=6).map("".join), st.text("abc.", max_size=12))
def test_expressions_mean_what_they_mean_in_python(pattern: str, path: str):
    """On any pattern of the supported subset our automaton agrees with Python's engine."""
    # a plain name is looked up as a name, so its dot is only a dot
    if re.fullmatch(r"[ab.\\]*", pattern):
        pattern = f"(?:{pattern})"

    ours = PathPatterns([pattern]).first_match(path) is not None

    assert ours == (re.match(rf"(.*\.)?({pattern})$", path) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*.*.*.*)*x", "(a*)*(a*)*(a*)*c", "((a?){20}){20}"])
def test_hostile_expressions_take_no_time(pattern: str):
    """Patterns that hang a backtracking engine are matched or refused within a second."""
    start = time.perf_counter()
    try:
        config = interpret_config(plain(rank_pattern={pattern: 4}), limits=Limits())
        config.rank("a" * 400)
    except AdapterError as error:
        assert "rank_pattern" in str(error)  # noqa: PT017  (either outcome is right, hanging is not)

    assert time.perf_counter() - start < 1


def test_too_much_matching_is_refused():
    """A config whose expressions cost too much in all is refused, within seconds."""
    matcher = PathPatterns(["(.*a.*|.*b.*)*" * 12 + "x" for _ in range(40)], budget=500_000)

    def match_many() -> None:
        for index in range(10_000):
            matcher.first_match("ab." * 60 + str(index))

    start = time.perf_counter()
    with pytest.raises(AdapterError, match="take too long"):
        match_many()
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", r"(a)\1", "a{3}", "(?P<n>a)", "(a", "a)", "*a", "a**", r"\bq", "[ab", "a" * 300]
)
def test_unsupported_expressions_are_refused(pattern: str):
    """What the subset lacks is named, never matched as something else."""
    pattern = pattern if "a" * 9 not in pattern else f"({pattern})"

    with pytest.raises(AdapterError, match="pattern"):
        PathPatterns([pattern])


def test_target_modules_are_never_matched():
    """A hostile expression in target_modules is only shown: the keys of the file decide what is loaded."""
    start = time.perf_counter()
    config = interpret_config(plain(target_modules="(a+)+$" * 50, exclude_modules="(b+)+$"), limits=Limits())

    assert config.targets == ("(a+)+$" * 50,)
    assert time.perf_counter() - start < 1


def test_nothing_is_imported_from_a_config():
    """auto_mapping names a module to import; it is not imported."""
    before = set(sys.modules)
    mapping = {"base_model_class": "System", "parent_library": "this"}  # `import this` would show in sys.modules

    interpret_config(plain(auto_mapping=mapping), limits=Limits())

    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'"LORA"', b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 9000 + b"}"]
)
def test_a_config_that_is_no_json_object(tmp_path: Path, content: bytes):
    """Broken, deeply nested and absurd JSON is an AdapterError that names the file."""
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)

    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_config(path, Limits())


def test_a_huge_config(tmp_path: Path):
    """A config file beyond the bound is refused before it is read."""
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b" " * 2000)

    with pytest.raises(AdapterError, match="2000 bytes"):
        read_config(path, Limits(config_bytes=1000))
