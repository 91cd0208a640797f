"""The command line: what it prints, its exit codes, and that an error is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapters_on_disk import peft_model

import moelora
from moelora.cli import main
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A good adapter, one that is refused, and a model's config."""
    folder = tmp_path_factory.mktemp("places")
    peft_model("gpt2", folder / "good", seed=1)
    peft_model("gpt2", folder / "bad", seed=2)
    config = json.loads((folder / "bad" / "adapter_config.json").read_text())
    (folder / "bad" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for family in ("gpt2", "mamba"):
        model = tiny.model(family)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / family)
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text('{"model_type": "nobody-knows"}')
    (folder / "remote").mkdir()
    (folder / "remote" / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}'
    )
    (folder / "remote" / "evil.py").write_text("raise SystemExit('this code was run')")
    return folder


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m moelora` in a process of its own."""
    path = {"PYTHONPATH": str(Path(moelora.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "moelora", *arguments],
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_inspect_describes_a_good_adapter(places, capsys):
    """Ranks, targets, scale and size; exit code 0."""
    assert main(["inspect", str(places / "good")]) == 0
    printed = capsys.readouterr()
    for text in (
        "rank        2, 4",
        "c_attn, c_proj (4 modules)",
        "scale       1.25, 2, 4",
        "parameters",
        "loads       yes",
    ):
        assert text in printed.out
    assert not printed.err


def test_inspect_names_problems(places, capsys):
    """An adapter that patch_model would refuse gives exit code 1, as text and as JSON."""
    assert main(["inspect", str(places / "bad")]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert main(["inspect", str(places / "bad"), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is False
    assert "use_dora" in values["problems"][0]
    assert main(["inspect", str(places / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().out


def test_inspect_a_sub_folder(places, capsys):
    """A folder inside the source, by an option."""
    assert main(["inspect", str(places), "--subfolder", "good"]) == 0
    assert "good" in capsys.readouterr().out


def test_inspect_asks_a_hub(places, tmp_path, capsys):
    """At a revision, with a token for a private repository; the weights are not downloaded, the token not printed."""
    with HubServer(tokens={"hf_secret": "acme"}) as hub:
        hub.add_repo("acme/good", places / "good", private=True)
        hub.repos["acme/good"].tag("v1")
        where = ["--endpoint", hub.endpoint, "--cache-dir", str(tmp_path)]
        assert main(["inspect", "acme/good", *where, "--revision", "v1", "--token", "hf_secret", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["source"]["commit"] == hub.repos["acme/good"].refs["main"]
        assert values["ranks"] == [2, 4]
        assert main(["inspect", "acme/good", *where]) == 1
        assert main(["inspect", "acme/good", *where, "--local-files-only"]) == 1
        assert "hf_secret" not in "".join(capsys.readouterr())


def test_resolve_prints_the_table(places, capsys):
    """The table of resolve_targets, from config.json alone; narrowed by targets and roles."""
    expected = str(moelora.resolve_targets(tiny.model("gpt2")))
    assert main(["resolve", str(places / "gpt2")]) == 0
    assert capsys.readouterr().out == f"GPT2LMHeadModel: 4 projections\n{expected}\n"

    assert main(["resolve", str(places / "gpt2" / "config.json"), "--targets", "mlp.c_fc", "c_attn", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [site["path"].rpartition(".")[2] for site in values["sites"]] == ["c_attn", "c_fc"] * 2
    assert values["model"] == "GPT2LMHeadModel"

    assert main(["resolve", str(places / "gpt2"), "--roles", "attn_out"]) == 0
    assert "2 projections" in capsys.readouterr().out
    assert main(["resolve", str(places / "mamba")]) == 0
    assert "MambaMixer reads dt_proj.weight directly" in capsys.readouterr().out


def test_resolve_asks_a_hub_for_the_config_alone(places, tmp_path, capsys):
    """No weights, no code."""
    with HubServer({"acme/base": places / "gpt2"}) as hub:
        arguments = ["resolve", "acme/base@main", "--endpoint", hub.endpoint, "--cache-dir", str(tmp_path)]
        assert main(arguments) == 0
        assert "GPT2LMHeadModel: 4 projections" in capsys.readouterr().out
        assert all("config.json" in line for line in hub.asked())
        assert main([*arguments[:1], "acme/none", *arguments[2:]]) == 2
        assert capsys.readouterr().err.startswith("moelora: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resolve", "gpt2", "--targets", "c_atn"], "matches no linear"),
        (["resolve", "gpt2", "--roles", "attention"], "unknown roles"),
        (["resolve", "good"], "no config.json"),
        (["resolve", "./nowhere"], "there is no folder './nowhere'"),
        (["resolve", "strange"], "makes no model"),
        (["resolve", "remote"], "makes no model"),
        (["resolve", "not//an/id"], "not the id of a hub repository"),
    ],
)
def test_an_error_is_one_line(places, arguments, message, monkeypatch, capsys):
    """On stderr, after "moelora:", with exit code 2; no code from a model's folder is run."""
    monkeypatch.chdir(places)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("moelora: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_as_a_program(places):
    """`python -m moelora`: version, help, a report, a table without advice on kernels, an error without a traceback."""
    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"moelora {moelora.__version__}\n")
    assert "inspect" in run().stdout
    assert run("inspect", str(places / "bad")).returncode == 1
    table = run("resolve", str(places / "mamba"))
    assert (table.returncode, table.stderr) == (0, "")
    wrong = run("resolve", str(places / "strange"))
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert run("inspekt").returncode == 2
