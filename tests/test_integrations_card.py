"""The card of a pushed mixture: readable by the hub client, complete, and silent about the author's machine."""

from typing import Any

import pytest
from huggingface_hub import ModelCard

from moelora.integrations.card import looks_like_hub_id, model_card

MIXTURE: dict[str, Any] = {
    "repo_id": "acme/mix",
    "base_model": "acme/base-7b",
    "experts": [
        {
            "name": "law",
            "source": {"kind": "hub", "location": "acme/law-lora", "subfolder": "best"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "sha256": "fe" * 32,
            "ranks": {"layers.0.q_proj": 8, "layers.1.q_proj": 16},
            "scales": [2.0, 2.0],
        },
        {"name": "tax", "source": "/home/alice/secret/tax", "ranks": 4, "scales": 0.5},
    ],
    "router": {"kind": "learned", "top_k": 2, "combine": "renormalised"},
    "sites": ["layers.0.q_proj", "layers.1.q_proj"],
    "package_version": "0.1.0",
}


def test_the_client_reads_the_card() -> None:
    """The metadata block parses to what was put in, and the text follows it."""
    card = ModelCard(model_card(MIXTURE))
    metadata = card.data.to_dict()

    assert metadata["library_name"] == "moelora"
    assert metadata["base_model"] == "acme/base-7b"
    assert "mixture-of-lora" in metadata["tags"]
    assert card.text.strip().startswith("# mix")


def test_experts_router_and_loading_are_described() -> None:
    """Names, sources, commits, ranks and scales stand in the table; the five lines load this repository."""
    text = model_card(MIXTURE)

    link = "[`acme/law-lora`](https://huggingface.co/acme/law-lora), folder `best`"
    assert f"| law | {link} | `0123456789ab` | 8 to 16 | 2 | `fefefefefefe` |" in text
    assert "| tax | local | not pinned | 4 | 0.5 |" in text
    assert "| top_k | 2 |" in text
    assert "at 2 linear projections" in text
    assert 'moelora.load(model, "acme/mix")' in text
    assert "No commit is recorded for tax," in text
    assert "the sources of law, tax to be there" in text


def test_results_stand_in_the_card_when_there_are_any() -> None:
    """Measured numbers are shown, and their absence is a limit."""
    measured = model_card({**MIXTURE, "metrics": {"accuracy": 0.9375}})

    assert "| accuracy | 0.9375 |" in measured
    assert "No measurements" not in measured
    assert "No measurements" in model_card(MIXTURE)


def test_included_experts_need_no_source() -> None:
    """What lies in the repository itself is not asked for elsewhere."""
    experts = [{**expert, "folder": f"experts/{index:03d}"} for index, expert in enumerate(MIXTURE["experts"])]
    text = model_card({**MIXTURE, "experts": experts})

    assert "Loading needs" not in text
    assert "No commit is recorded" not in text


PATHS = ["/home/alice/llama", "./out/model", "C:\\models\\llama", "~/llama", "out/checkpoint-500", "a/b/c", "", None]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_published(path: str | None) -> None:
    """What is not the id of a repository appears neither in the metadata nor in the text."""
    experts = [{"name": "one", "source": path}, {"name": "two", "source": {"kind": "folder", "location": "models/two"}}]
    text = model_card({"base_model": path, "experts": experts})

    assert not looks_like_hub_id(path)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "models/two" not in text
    assert not path or path not in text


def test_an_empty_mixture_has_a_card() -> None:
    """Every key may be missing."""
    assert ModelCard(model_card({})).data.to_dict()["library_name"] == "moelora"


def test_values_cannot_break_out_of_their_table() -> None:
    """Line ends, bars and HTML in a value stay one cell; a class name must be one."""
    text = model_card({"experts": [{"name": "a|b\n---\n<script>"}], "router": {"note": "x\n\n# Title | y"}})

    assert "| a b --- script |" in text
    assert "| note | x # Title y |" in text
    with pytest.raises(ValueError, match="auto_class"):
        model_card({"auto_class": "os; import x"})
