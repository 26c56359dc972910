"""``fast-prompt info``: versions, devices, CPU features, which backends exist here and why the others do not."""

import argparse
from typing import Any

from fast_prompt.backends import BACKENDS, native
from fast_prompt.bench import machine
from fast_prompt.cli.output import emit_json
from fast_prompt.models import contract

EXAMPLES = """\
examples:
  fast-prompt info
  fast-prompt info --json
  TRITON_INTERPRET=1 fast-prompt info       with Triton in its interpreter, where there is no GPU
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "info",
        help="what runs here, and what does not and why",
        description="Versions, devices, CPU features, backends, and how the compiled library was built.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what is here; always 0."""
    facts = {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "cpu": machine.cpu(),
        "backends": {name: _availability(name) for name in BACKENDS},
        "build": native.build_info(),
        "transformers": contract.describe_range(),
    }
    if args.json:
        emit_json(facts)
    else:
        _print(facts)
    return 0


def _availability(name: str) -> dict[str, Any]:
    reason = BACKENDS[name].unavailable()
    return {"available": reason is None, "reason": reason}


def _print(facts: dict[str, Any]) -> None:
    _section("versions", {name: version or "none" for name, version in facts["versions"].items()})
    if not facts["transformers"]["tested"]:
        print(f"  {facts['transformers']['note']}")
    _section("devices", {device["device"]: device["name"] for device in facts["devices"]})
    _section("cpu", facts["cpu"])
    _section("backends", {name: entry["reason"] or "available" for name, entry in facts["backends"].items()})
    _section("compiled library", facts["build"])


def _section(title: str, lines: dict[str, Any]) -> None:
    print(title)
    for name, value in lines.items():
        # A dictionary's keys are enough for a person; --json has it all.
        print(f"  {name:<16} {' '.join(map(str, value)) if isinstance(value, (list, dict)) else value}")
