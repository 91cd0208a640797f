"""The command line: look at an adapter or a model before anything is loaded. Begin with main.

moelora inspect org/math-lora            ranks, targets, scale, size, and what would keep it from being loaded
moelora resolve org/base-model           which projections would be patched, from config.json alone
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moelora

PROBLEMS, FAILED = 1, 2
"""Exit codes: the adapter has problems; the question could not be answered (also argparse's own code)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for an adapter with problems, 2 for an error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    # a table is asked for, not advice on faster kernels
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return {"inspect": inspect, "resolve": resolve}[options.command](options)
    except (ValueError, OSError) as error:
        print(f"moelora: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def inspect(options: argparse.Namespace) -> int:
    """Print a report on one adapter; 1 if patch_model would refuse it."""
    source = options.source
    if options.subfolder:
        local = Path(source).expanduser().is_dir()
        source = str(Path(source) / options.subfolder) if local else f"{source}:{options.subfolder}"
    report = moelora.inspect_adapter(source, **_hub(options))
    print(json.dumps(asdict(report) | {"ok": report.ok}, indent=2) if options.json else report)
    return 0 if report.ok else PROBLEMS


def resolve(options: argparse.Namespace) -> int:
    """Print which projections of a model would be patched. Weights are neither read nor made."""
    from moelora.integrations.skeleton import cheap_projections, skeleton

    model = skeleton(options.model, **_hub(options))
    with cheap_projections():
        resolution = moelora.resolve_targets(model, targets=options.targets or "auto", roles=options.roles)
    if options.json:
        values = {"model": type(model).__name__, **asdict(resolution)}
        print(json.dumps(values, indent=2))
    else:
        print(f"{type(model).__name__}: {len(resolution.sites)} projections\n{resolution}")
    return 0


def _hub(options: argparse.Namespace) -> dict[str, Any]:
    names = ("revision", "token", "endpoint", "cache_dir", "local_files_only")
    return {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moelora", description="Mixtures of LoRA experts: look at adapters and models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"moelora {moelora.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")

    hub = argparse.ArgumentParser(add_help=False)
    group = hub.add_argument_group("hub")
    group.add_argument("--revision", help="branch, tag or commit")
    group.add_argument("--token", help="access token; by default the one of `hf auth login`, or HF_TOKEN")
    group.add_argument("--endpoint", help="address of the hub")
    group.add_argument("--cache-dir", help="folder for downloads")
    group.add_argument("--local-files-only", action="store_true", help="ask nobody; use what is in the cache")

    command = commands.add_parser(
        "inspect",
        parents=[hub],
        help="describe an adapter: ranks, targets, scale, size, problems",
        description="Describe a LoRA adapter from its config and the header of its weights. "
        "The exit code is 1 if it has problems for which it would be refused.",
    )
    command.add_argument("source", help="a folder, org/name, org/name@revision, org/name:subfolder")
    command.add_argument("--subfolder", help="folder inside the source")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = commands.add_parser(
        "resolve",
        parents=[hub],
        help="list the projections of a model that would be patched",
        description="List the projections of a model that would be patched, and why others are not. Only config.json "
        "is read: the model is built with weights that take no memory, and tried on a few tokens. Models whose code "
        "is not in transformers cannot be resolved, and which experts of the model's own get tokens is not known.",
    )
    command.add_argument("model", help="a folder with config.json, org/name, or org/name@revision")
    command.add_argument("--targets", nargs="+", metavar="NAME", help="name endings, such as q_proj v_proj")
    command.add_argument("--roles", nargs="+", metavar="ROLE", help="roles, such as attn_in ssm_in mlp_out")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser
