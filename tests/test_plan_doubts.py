"""What fits but may be wrong is said: an adapter of another base by name, a revision that moves."""

import logging

import pytest
import torch

import moelora
from moelora.integrations.adapters import Adapter, AdapterSource, SiteFactors
from moelora.plan import doubts
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _adapter(base_model=None, **source):
    factors = {"q_proj": SiteFactors(A_RD=torch.zeros(1, 2), B_RO=torch.zeros(1, 2), scale=1.0)}
    place = AdapterSource(kind="hub", location="org/law", commit=COMMIT, **source)
    return Adapter(name="law", source=place, base_model=base_model, factors=factors)


@pytest.mark.parametrize(
    ("base_model", "own", "said"),
    [
        ("meta/llama-3", "mistral/mistral-7b", True),
        ("meta/llama-3", "somebody/Llama-3", False),
        ("/home/me/llama", "mistral/mistral-7b", False),
        ("meta/llama-3", "/home/me/mistral", False),
        (None, "mistral/mistral-7b", False),
    ],
)
def test_another_base_is_said_where_both_have_names(base_model, own, said):
    """A path on somebody's disk names nothing."""
    model = tiny.model("llama")
    model.name_or_path = own

    found = doubts(_adapter(base_model, revision=COMMIT), model)

    assert any("trained on 'meta/llama-3'" in note for note in found) == said


@pytest.mark.parametrize(("revision", "said"), [(None, True), ("main", True), ("v1", True), (COMMIT, False)])
def test_a_revision_that_may_move_is_said(revision, said):
    """With the commit that pins what was loaded."""
    found = doubts(_adapter(revision=revision), tiny.model("llama"))

    assert [f"org/law@{COMMIT}" in note for note in found] == [True] * said


def test_the_front_door_logs_it(tmp_path, caplog):
    """Once, as a warning of the package's logger; the plan's notes hold it too."""
    tiny.adapter(tiny.model("llama"), tmp_path / "law")
    with HubServer({"org/law": tmp_path / "law"}) as hub, caplog.at_level(logging.WARNING, logger="moelora"):
        options = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
        plan = moelora.patch_model(tiny.model("llama"), ["org/law"], top_k=1, dry_run=True, **options)

    assert "'main' may move" in caplog.text
    assert any("'main' may move" in note for note in plan.notes)
