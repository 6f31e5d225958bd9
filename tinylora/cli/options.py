"""What several commands share: their frame, sizes and recipes on the command line."""

import argparse
import math
import os
import re
from dataclasses import fields, replace

from ..costs.tables import in_units, printable
from . import terminal

FORMAT = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """Argparse's, which repeats in its errors what was typed: here made printable."""

    def error(self, message):
        super().error(printable(message))


def command(commands, name, run, summary, description, epilog=None, device=True, seed=True):
    """A subcommand with what most have: --device, --seed and --traceback."""
    p = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=FORMAT)
    p.set_defaults(run=run)
    if device:
        p.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where arrays live: cpu (NumPy) or cuda (CuPy)"
        )
    if seed:
        p.add_argument(
            "--seed", type=any_seed, default=0, help="decides batches, dropout, initial adapters and drawn text (0)"
        )
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")
    return p


def disagreement(contradictions):
    """The exit status of an audit: 1, and each contradiction as a sentence on standard error, if there are any."""
    for contradiction in contradictions:
        terminal.say(f"the paper map disagrees: {contradiction}")
    return 1 if contradictions else 0


# ------------------------------------------------------------------------------------------------------------------ numbers
#: Digits as they stand in a program: no spaces, no _, no digits of other scripts, no nan and no inf.
_WHOLE = re.compile(r"[+-]?[0-9]{1,400}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _number(kind, form, what, fine, most=math.inf):
    """An argparse type: text as this kind of number if it is `fine`, else a sentence, before which argparse names the option."""

    def read(text):
        value = kind(text) if form.fullmatch(text) else math.nan
        if not fine(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is too large: at most {most:,}")
        return value

    return read


def whole(least, most=10**9):
    """An argparse type: a whole number from `least` to `most`. What takes memory, threads or time by itself has a `most` of its own."""
    return _number(int, _WHOLE, f"a whole number, {least} or more", lambda n: n >= least, most)


positive = whole(1)
natural = whole(0)
any_seed = whole(0, 2**63 - 1)
rank = whole(1, 1 << 16)
block_size = whole(1, 1 << 20)
new_tokens = whole(1, 10**7)
finite = _number(float, _DECIMAL, "a finite number", math.isfinite)
rate = _number(float, _DECIMAL, "a finite number, 0 or more", lambda x: math.isfinite(x) and x >= 0)
more_than_0 = _number(float, _DECIMAL, "a finite number, more than 0", lambda x: math.isfinite(x) and x > 0, 10**6)
share = _number(float, _DECIMAL, "a number, more than 0 and at most 1", lambda x: 0 < x <= 1)


def size(text):
    """A number of bytes, or a number with k, M or G (powers of 1024); at most 2^50."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    if (_WHOLE if unit == 1 else _DECIMAL).fullmatch(number):
        value = int(number) if unit == 1 else float(number) * unit
        if 1 <= value <= 1 << 50:
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not a size: expected a number such as 1048576, 64k, 1M")


def budget(text):
    """A size, or "none"."""
    return None if text.lower() == "none" else size(text)


def recipe_options(p, defaults):
    from ..training.schedule import SCHEDULES

    g = p.add_argument_group("recipe")
    for name, kind, text in (
        ("steps", positive, "optimizer steps"),
        ("batch_size", whole(1, 10**6), "sequences a micro-batch"),
        ("accumulate", whole(1, 10**6), "micro-batches added up before a step"),
        ("seq_len", positive, "tokens a sequence"),
        ("lr", rate, "learning rate"),
        ("warmup", natural, "steps of linear warm-up"),
        ("weight_decay", rate, "weight decay, on matrices only"),
        ("clip", rate, "largest norm of the gradient, 0 for no limit"),
        ("shards", whole(1, 256), "parts of a micro-batch that run in threads; sums are ordered by it"),
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


# -------------------------------------------------------------------------------------------------- what is asked for too much
def check_memory(need, what):
    """ValueError if `need` bytes are many times what this machine has; a sentence if they are more than that.

    The need is that of full sequences; data of short ones take less, and so what is merely too much is tried.
    """
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return
    found = f"{what} takes about {in_units(need)}, and this machine has {in_units(have)} of memory"
    if need > 16 * have:
        raise ValueError(found)
    if need > have > 0:
        terminal.say(f"{found}; it may run out")


# ------------------------------------------------------------------------------------------------------------- files and figures
def check_figure(path):
    """An error before the work where no figure can be drawn at `path`: no matplotlib, no format of that name, no place for a file."""
    from ..figures import style
    from ..models import files

    style.check_format(path)
    files.check_target(path, folder=False)


def can_draw():
    """Whether matplotlib is there; says how to get it if not."""
    from ..figures import style

    try:
        style.require_matplotlib()
    except (RuntimeError, OSError) as error:  # not installed; no folder for its caches
        print(f"no figure: {printable(error)}")
        return False
    return True


def draw(figure, path, asked=False, mode=None):
    """Save what figure() gives at `path` and say so. One that no option asked for, and that cannot be drawn or written, is no failure."""
    from ..figures import style

    try:
        with style.one_column():
            style.save(figure(), path, mode)
    except Exception as error:
        if asked:
            raise
        terminal.say(f"no figure: {error}")
    else:
        print(f"figure: {path}")
