"""``fast-prompt cost``: multiply-adds and parameters of every method in a model, without weights."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fast_prompt import cost
from fast_prompt.cli.output import emit_json, emit_table, note
from fast_prompt.cost import chart

EXAMPLES = """\
examples:
  fast-prompt cost --model meter                                 every method that fits
  fast-prompt cost --model meter --method das --num-skipped 4 --text-length 50
  fast-prompt cost --model meter --method apt deep_prompts --prompts 200
  fast-prompt cost --model bert --method dvp                     against all visual tokens before the text
  fast-prompt cost --model DIRECTORY --method apt lora --json    a model by its config.json
  fast-prompt cost --model vilt --chart cost.png

The modules are built as they are, on tensors without memory, and torch's counter counts their products and
convolutions: no weights are needed, and a model of any size fits. MACs are those of one forward pass, per sample.
Trained parameters are the method's own; each method also trains a task's head. deep_prompts is counted by each
convention of what a prompt takes part in.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "cost",
        help="count multiply-adds and parameters of every method in a model",
        description="Multiply-adds and parameters, total and added, of each method in a model of real size.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults = parser.add_argument, cost.Settings()
    models, methods = ", ".join(cost.COUNTED), list(cost.counted_methods())
    add("--model", required=True, help=f"{models}, or a directory with a transformers config.json")
    add(
        "--method",
        nargs="+",
        action="extend",
        choices=methods,
        metavar="NAME",
        help=f"of {', '.join(methods)}",
    )
    add("--image-size", type=_number, help="pixels of a side (default: the model's)")
    add("--text-length", type=_number, help="tokens of a text (default: the usual for the model)")
    add("--batch", type=_number, default=1, help="samples that share what is computed once (default %(default)s)")
    helps = {
        "prompts": "p, of apt and deep_prompts",
        "num_skipped": "k, blocks that das skips",
        "width": "of adapters, das's of kept blocks included (default: as published)",
        "skip_width": "of das's adapters in the place of skipped blocks (default: as published)",
        "rank": "r of lora",
        "layer": "the block before which dvp's prompt enters",
        "visual_tokens": "of an image, for dvp",
        "visual_width": "their width",
    }
    for name, text in helps.items():
        default = getattr(defaults, name)
        shown = "" if default is None else " (default %(default)s)"
        add(f"--{name.replace('_', '-')}", type=_number, default=default, help=text + shown)
    add("--json", action="store_true", help="print the rows as JSON")
    add("--chart", type=Path, metavar="FILE", help="also draw the rows, as PNG, PDF or SVG")
    parser.set_defaults(fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Counts, prints, and returns 1 if the chart cannot be written."""
    try:
        settings = cost.Settings(**{each.name: getattr(args, each.name) for each in dataclasses.fields(cost.Settings)})
        sizes = {"image_size": args.image_size, "text_length": args.text_length, "batch": args.batch}
        subject = cost.find_subject(args.model, **sizes)
        methods = tqdm(
            args.method or cost.methods_for(subject), unit=" method", file=sys.stderr, disable=None, leave=False
        )
        rows = list(cost.count(subject, methods, settings))
    except ValueError as error:
        args.fail(str(error))
    if args.json:
        emit_json({"rows": [dataclasses.asdict(row) for row in rows]})
    else:
        _print(rows, cost.comparisons(subject, rows))
    return 0 if args.chart is None else _draw(rows, args.chart)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _print(rows: Sequence[cost.Row], sentences: Sequence[str]) -> None:
    """One line a row, then what the rows say of each other."""
    headers = ["method", "settings", "MACs, G", "added, G", "added", "params, M", "trained, M"]
    table = [
        [
            row.method,
            row.own_settings,
            f"{row.macs / 1e9:.3f}",
            f"{row.added_macs / 1e9:+.3f}",
            f"{row.share:+.2%}",
            f"{row.params / 1e6:.2f}",
            f"{row.trainable_params / 1e6:.3f}",
        ]
        for row in rows
    ]
    print(f"{rows[0].model}: {rows[0].base_macs / 1e9:.3f} G MACs a sample ({rows[0].sizes})\n")
    emit_table(headers, table)
    if sentences:
        print()
    for sentence in sentences:
        print(sentence)


def _draw(rows: Sequence[cost.Row], path: Path) -> int:
    try:
        chart.draw(rows, path)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        note(f"fast-prompt cost: cannot write {path}: {error}")
        return 1
    note(f"wrote {path}")
    return 0
