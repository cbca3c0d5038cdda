"""The command line: `vlmoe train|evaluate|predict|check-data|config|demo`."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmoe import __version__
from vlmoe.errors import UserError

if TYPE_CHECKING:
    from vlmoe.use import Model


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 2: something the user can mend, said in one line; 130: stopped before the end, and saved."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings that stand behind options
        args.overrides += rest
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        return args.run(args)
    except UserError as error:
        print(f"vlmoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlmoe", description=__import__("vlmoe").__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train a recipe, or go on where its run stopped")
    _add_recipe(train)
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", help="score a run on its held-out shards")
    evaluate.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, or of one of its checkpoints")
    _add_overrides(evaluate)
    evaluate.set_defaults(run=_evaluate)

    predict = verbs.add_parser("predict", help="answer, caption or search with a run")
    predict.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, or of one of its checkpoints")
    wish = predict.add_mutually_exclusive_group(required=True)
    wish.add_argument("--question", metavar="TEXT", help="answer it about each picture")
    wish.add_argument("--caption", action="store_true", help="write a caption for each picture")
    wish.add_argument("--search", nargs=2, metavar=("TEXT", "FOLDER"), help="find the pictures below a folder that fit")
    predict.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    predict.add_argument("--top-k", type=int, help="answers, or pictures found, to show (5; 10)")
    predict.add_argument("--device", default="auto", help="cpu, cuda or auto")
    _add_overrides(predict)
    predict.set_defaults(run=_predict)

    check = verbs.add_parser(
        "check-data", help="read all that a fine-tuning recipe reads, and name the first wrong row"
    )
    _add_recipe(check)
    check.set_defaults(run=_check_data)

    config = verbs.add_parser("config", help="print a recipe with every default spelled out")
    _add_recipe(config)
    config.set_defaults(run=_config)

    demo = verbs.add_parser("demo", help="build the data, train, evaluate and draw: ten minutes on two cores")
    demo.set_defaults(run=_demo)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="path of a YAML file")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")


# Imports stand in the functions so that `config` and `--help` need no torch.


def _train(args: argparse.Namespace) -> int:
    from vlmoe.config import load
    from vlmoe.train.trainer import train

    outcome = train(load(args.recipe, args.overrides))
    for name, value in outcome.metrics.items():
        print(f"{name:<50} {value:.4f}")
    return 130 if outcome.was_interrupted else 0


def _evaluate(args: argparse.Namespace) -> int:
    from vlmoe.train.trainer import evaluate

    print(json.dumps(evaluate(args.folder, args.overrides), indent=1))
    return 0


def _predict(args: argparse.Namespace) -> int:
    from vlmoe.use import load

    if bool(args.search) == bool(args.image):
        raise UserError("name pictures with --image; --search takes a text and a folder, and no --image")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}; it must be at least 1")
    model = load(args.folder, args.device, overrides=args.overrides)
    if args.search:
        text, folder = args.search
        _print_found(model, text, Path(folder), args.top_k or 10)
    elif args.caption:
        for image, caption in zip(args.image, model.caption(args.image), strict=True):
            print(f"{image}: {caption}")
    else:
        for image, answers in zip(args.image, model.answer(args.image, args.question, args.top_k or 5), strict=True):
            print(f"{image}: {', '.join(f'{answer.text} ({answer.score:.2f})' for answer in answers)}")
    return 0


def _print_found(model: "Model", text: str, folder: Path, top_k: int) -> None:
    from vlmoe.search import as_text, contact_sheet, index_folder, index_path

    query, index = model.embed_text(text), index_folder(model, folder)
    for line in index.unreadable:
        print(f"left out: {line}", file=sys.stderr)
    found = index.search(query, top_k)
    for path, score in found:
        print(f"{score:.3f}  {path}")
    sheet, path = contact_sheet([path for path, _ in found]), index_path(model, folder).with_name("found.png")
    sheet.save(path)
    if sys.stdout.isatty():
        print(as_text(sheet, width=min(80, sheet.width // 4)))
    print(f"contact sheet: {path}")


def _check_data(args: argparse.Namespace) -> int:
    from vlmoe.config import load
    from vlmoe.tasks.check import check_data

    for line in check_data(load(args.recipe, args.overrides)):
        print(line)
    return 0


def _config(args: argparse.Namespace) -> int:
    from vlmoe.config import load, to_yaml

    print(to_yaml(load(args.recipe, args.overrides)), end="")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from vlmoe.demo import demo

    demo()
    return 0


if __name__ == "__main__":
    sys.exit(main())
