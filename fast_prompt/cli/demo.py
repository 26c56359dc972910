"""``fast-prompt demo``: a whole run on real data, end to end, with a table and a picture."""

import argparse
from pathlib import Path
from typing import Any

from fast_prompt import demo
from fast_prompt.cli.output import emit_json, emit_table, note
from fast_prompt.demo.report import Results, headers, standard_error, table

INTERRUPTED = 130  # as shells report a command ended by Ctrl-C

EXAMPLES = """\
examples:
  fast-prompt demo                          a language model learns to answer questions about images
  fast-prompt demo --search                 the same, and finds the best layer for the visual prompts
  fast-prompt demo --task digits-skip       finds the blocks that the questions do not need, and skips them
  fast-prompt demo --task digits-transfer   a vision model learns new digits by prompts, LoRA and APT
  fast-prompt demo --seed 1                 other splits and weights
  fast-prompt demo --json > demo.json       the results for a program

Writes results.json, pictures, the frozen base or encoder, and an adapter to OUTPUT/TASK. The next run finds its base
there; `fast-prompt answer` asks the adapter of digits-vqa.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="adapt a pretrained model to new data by several methods, and compare them",
        description="digits-vqa: a pretrained language model that has never seen an image answers English questions "
        "about handwritten digits, by dynamic visual prompts and by what they are compared with. digits-skip: the same "
        "model, less the blocks that a search finds it can do without. digits-transfer: a small frozen vision "
        "transformer learns digits it has never seen. Shows what each method gains and costs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=list(demo.TASKS), default=next(iter(demo.TASKS)), help="default: %(default)s")
    parser.add_argument("--search", action="store_true", help=f"also find the layer ({', '.join(demo.SEARCHES)} only)")
    parser.add_argument("--seed", type=_seed, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="directory to write to (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the task, prints the table, and returns 1 if the adapter did not come back from disk bit for bit."""
    directory = args.output / args.task
    if args.search and args.task not in demo.SEARCHES:
        note(f"fast-prompt demo: error: --search: only {', '.join(demo.SEARCHES)} has something to search")
        return 2
    try:
        results = demo.run(args.task, directory, args.seed, **({"search": True} if args.search else {}))
    except KeyboardInterrupt:
        note(f"\nstopped; the next run goes on from what is pretrained, if that is finished (it lies in {directory})")
        return INTERRUPTED
    except OSError as error:
        note(f"fast-prompt demo: cannot write to {directory}: {error}")
        return 1
    if args.json:
        emit_json(results.to_dict())
    else:
        _print(results, directory)
    return 0 if results.reload.exact else 1


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2**63 - 1, got {text}")
    return seed


def _print(results: Results, directory: Path) -> None:
    reload = results.reload
    emit_table(headers(results), table(results.rows))
    error = max(standard_error(row.accuracy, reload.tests) for row in results.rows)
    print(f"\nOne standard error of an accuracy on {reload.tests} tests: up to {error:.1%}")
    print(
        f"The adapter of {reload.method}, saved and loaded into a fresh base: {reload.equal_predictions} of "
        f"{reload.tests} predictions equal, largest difference of a logit {reload.max_logit_difference:g}"
    )
    for sentence in results.notes:
        print(sentence)
    print(f"wrote {directory / 'results.json'}, {', '.join(results.pictures)}")
