"""What several commands share: their frame, sizes and recipes on the command line."""

import argparse
import math
from dataclasses import fields, replace

FORMAT = argparse.RawDescriptionHelpFormatter


def command(commands, name, run, summary, description, epilog, device=True, seed=True):
    """A subcommand with what most have: --device, --seed and --traceback."""
    p = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=FORMAT)
    p.set_defaults(run=run)
    if device:
        p.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where arrays live: cpu (NumPy) or cuda (CuPy)"
        )
    if seed:
        p.add_argument(
            "--seed", type=natural, default=0, help="decides batches, dropout, initial adapters and drawn text (0)"
        )
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")
    return p


def _number(kind, what, fine):
    """An argparse type: text as this kind of number if it is `fine`, else a sentence, before which argparse names the option."""

    def read(text):
        try:
            if fine(value := kind(text)):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return read


positive = _number(int, "a whole number, 1 or more", lambda n: n >= 1)
natural = _number(int, "a whole number, 0 or more", lambda n: n >= 0)
finite = _number(float, "a finite number", math.isfinite)
rate = _number(float, "a finite number, 0 or more", lambda x: math.isfinite(x) and x >= 0)
more_than_0 = _number(float, "a finite number, more than 0", lambda x: math.isfinite(x) and x > 0)
share = _number(float, "a number, more than 0 and at most 1", lambda x: 0 < x <= 1)


def size(text):
    """A number of bytes, or a number with k, M or G (powers of 1024)."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    try:
        value = int(float(text[:-1]) * units[text[-1].lower()]) if text[-1:].lower() in units else int(text)
        if value >= 1:
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a size: expected a number such as 1048576, 64k, 1M")


def budget(text):
    """A size, or "none"."""
    return None if text.lower() == "none" else size(text)


def recipe_options(p, defaults):
    from ..training.schedule import SCHEDULES

    g = p.add_argument_group("recipe")
    for name, kind, text in (
        ("steps", positive, "optimizer steps"),
        ("batch_size", positive, "sequences a micro-batch"),
        ("accumulate", positive, "micro-batches added up before a step"),
        ("seq_len", positive, "tokens a sequence"),
        ("lr", rate, "learning rate"),
        ("warmup", natural, "steps of linear warm-up"),
        ("weight_decay", rate, "weight decay, on matrices only"),
        ("clip", rate, "largest norm of the gradient, 0 for no limit"),
        ("shards", positive, "parts of a micro-batch that run in threads; sums are ordered by it"),
    ):
        default = getattr(defaults, name)
        g.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=f"{text} ({default:g})")
    g.add_argument(
        "--epochs",
        type=more_than_0,
        default=defaults.epochs,
        metavar="N",
        help="passes over the data instead of --steps: every sequence once a pass, in an order of its own (off)",
    )
    g.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=defaults.schedule,
        help=f"of the learning rate ({defaults.schedule})",
    )


def recipe(args, defaults):
    names = {f.name for f in fields(defaults)}
    return replace(defaults, **{k: v for k, v in vars(args).items() if k in names})


def can_draw():
    """Whether matplotlib is there; says how to get it if not."""
    from ..figures import style

    try:
        style.require_matplotlib()
    except RuntimeError as error:
        print(f"no figure: {error}")
        return False
    return True
