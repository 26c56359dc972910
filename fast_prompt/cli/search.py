"""``fast-prompt search``: the blocks to skip, or the prompts' layer, found as a file says."""

import argparse
from pathlib import Path
from typing import Any

from fast_prompt.cli.output import emit_json, emit_table, note
from fast_prompt.search.plan import Plan

DIVERGED, WRONG_INPUT = 1, 2
CONFIG_DIRECTORY, ADAPTER_DIRECTORY, PICTURE = "found", "adapter", "search.png"

EXAMPLES = """\
examples:
  fast-prompt search search.toml            searches, or goes on with a search that was interrupted
  fast-prompt search search.toml --json     what was found, for a program

search.toml, with paths relative to it:

  model = "models/roberta"            # a directory of transformers: config.json and weights
  model_class = "RobertaForSequenceClassification"   # when config.json names no architecture with a loss
  examples = "train.safetensors"      # the model's keyword arguments, [N, ...] each, labels included
  output = "runs/search"              # checkpoints, search.png, found/ and adapter/

  [das]                               # fast_prompt.DASConfig; [dvp] for the prompts' layer instead
  num_skipped = 4
  modules_to_save = ["classifier"]

  [search]                            # fast_prompt.search.DASSettings, or SearchSettings for [dvp]
  steps = 3000
  learning_rate = 1e-4

  [training]                          # fast_prompt.search.TrainingSettings: train anew; leave it out to search only
  steps = 3000

[apt] and, beside [das], [dvp] join in: one adapter of several methods. Rewards are measured on a tenth of the
examples, which the search does not train on; keep the data to be tested on elsewhere.
"""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "search",
        help="find the blocks to skip or the layer to prompt, and train anew with them",
        description="Searches an architecture as a TOML file says, and trains anew with what it finds.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="FILE", help="TOML: model, data, method and settings")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Searches, trains anew if the file says so, and prints what was found.

    Wrong input gives 2 and one line, a training whose numbers are no longer finite 1 and one line.
    """
    try:
        plan = Plan.read(args.config)
        search = plan.prepare()
        found = search.run()
        search.plot(plan.output / PICTURE)
        found.save_pretrained(plan.output / CONFIG_DIRECTORY)
        if plan.training is not None:
            search.train_anew(plan.training).save_pretrained(plan.output / ADAPTER_DIRECTORY)
    except (OSError, ValueError, FloatingPointError) as error:
        note(f"fast-prompt search: error: {error}")
        return DIVERGED if isinstance(error, FloatingPointError) else WRONG_INPUT
    names, chosen = search.arm_names, search.chosen
    shares = search.bandit.probabilities.tolist()
    if args.json:
        facts = {"found": found.to_dict(), "preferences": dict(zip(names, shares, strict=True))}
        emit_json(facts | {"rewards_skipped": search.bandit.skipped})
        return 0
    marks = [
        [name, f"{share:.3f}", "found" if name in chosen else ""] for name, share in zip(names, shares, strict=True)
    ]
    emit_table((search.arm, "probability", ""), marks)
    if search.bandit.skipped:
        print(f"not finite, and left out: {search.bandit.skipped} rewards")
    written = [PICTURE, CONFIG_DIRECTORY] + [ADAPTER_DIRECTORY] * (plan.training is not None)
    print(f"wrote {', '.join(str(plan.output / name) for name in written)}")
    return 0
