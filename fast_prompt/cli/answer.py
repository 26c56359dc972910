"""``fast-prompt answer``: one question about one image, for an adapter that ``fast-prompt demo`` saved."""

import argparse
from pathlib import Path
from typing import Any

from fast_prompt import demo
from fast_prompt.cli.output import emit_json, emit_table, note

WRONG_INPUT = 2
SHOWN = 5

EXAMPLES = """\
examples:
  fast-prompt answer --adapter runs/digits-vqa/adapter --image runs/digits-vqa/images/0.png \\
      --question "which digit is the largest?"
  fast-prompt answer ... --json         every answer with its probability, for a program

The adapter knows the kind of image it was trained on: three handwritten digits side by side, about three times as
wide as high; other sizes are scaled to 24 x 8 pixels.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "answer",
        help="ask an adapter one question about one image",
        description="Answers one English question about one image, with the probabilities of the answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="directory that the demo saved")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="PNG or any other format of Pillow")
    parser.add_argument("--question", required=True, metavar="TEXT", help="in English, lower or upper case")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=demo.MOST_PIXELS,
        metavar="N",
        help="refuse a larger image before decoding it (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the likeliest answers; 2 and one line on stderr where image, question or adapter cannot be used."""
    try:
        probabilities = demo.answer(args.adapter, args.image, args.question, args.max_pixels)
    except (OSError, ValueError) as error:
        note(f"fast-prompt answer: error: {error}")
        return WRONG_INPUT
    if args.json:
        emit_json(
            {
                "image": str(args.image),
                "question": args.question,
                "answer": next(iter(probabilities)),
                "probabilities": probabilities,
            }
        )
    else:
        emit_table(("answer", "probability"), [[name, f"{value:.1%}"] for name, value in probabilities.items()][:SHOWN])
    return 0
