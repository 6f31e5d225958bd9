"""The command line: `tinylora COMMAND --help` says what each command does to a model.

    training   finetune, pretrain
    models     generate, merge, quantize, convert
    costs      memory, paging
    papers     nf4, count, experiments, ranks, switch, figures

Exit status: 0, all is done. 1, `figures --check` found a difference. 2, one sentence on stderr says what was wrong: an expected error
(a missing file, a value out of range, no GPU), a standard output that could not be written, or a fault of tinylora's own, whose sentence
says so and names the error's type (--traceback shows where any error came from). 130 and 143, it was interrupted by Ctrl-C or by SIGTERM.
"""

import argparse
import difflib
import sys
import warnings

from .. import __version__
from . import costs, models, papers, terminal, together, training
from .options import FORMAT, Parser

#: Errors that are raised for what a user or a file did; any other is a fault of the program.
EXPECTED = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
FAULTS = (RecursionError, OverflowError, ZeroDivisionError)  # also where they belong to one of these


def main(argv=None):
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with terminal.signals():
        try:
            if together.asked(argv):
                return together.together(lambda: _attached(argv))
            return _attached(argv)
        except (KeyboardInterrupt, terminal.Terminated) as stop:  # once more, while the first was being said
            return _interrupted(stop)


def _attached(argv):
    """The exit status of a command at this terminal."""
    with terminal.attached() as out:
        return _run(argv, out)


def _run(argv, out):
    """The exit status of a command, after its errors are said, and that of its output; SystemExit from argparse."""
    args, leaving = argparse.Namespace(traceback=False), None
    try:
        args = parsed(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = args.run(args) or 0
    except SystemExit as left:  # --help, --version, or what argparse has refused
        leaving = left
    except terminal.Lost:
        status = 0
    except (KeyboardInterrupt, terminal.Terminated) as stop:
        word = "interrupted" if isinstance(stop, KeyboardInterrupt) else "terminated"
        kept = getattr(args, "kept", None)
        terminal.say(f"{word}; {kept}, and the same command goes on from there" if kept else word)
        status = _interrupted(stop)
    except BaseException as error:  # some libraries' own derive from nothing else
        if args.traceback:
            raise
        terminal.say(_sentence(error))
        status = 2
    if why := terminal.lost(out, _result_in_files(args)):
        terminal.say(why)
        return status if leaving is None and status else 2
    if leaving is not None:
        raise leaving
    return status


def _interrupted(stop):
    """The exit status that a shell gives a command which ended by this signal."""
    return 130 if isinstance(stop, KeyboardInterrupt) else 143


def _sentence(error):
    """What is said of an error."""
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    if isinstance(error, EXPECTED) and not isinstance(error, FAULTS) and str(error):
        return str(error)
    name = type(error).__name__
    return f"a fault of tinylora's own, which --traceback shows: {name}{f': {error}' if str(error) else ''}"


def _result_in_files(args):
    """Whether the command was to write what it found to a file or a folder."""
    return any(getattr(args, name, None) not in (None, "none") for name in ("out", "figure"))


def parsed(argv):
    """The Namespace of a command line; `given` in it are the options that stand there."""
    parser = _parser()
    commands = list(parser._subparsers._group_actions[0].choices)
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in commands:
        alike = difflib.get_close_matches(name, commands, 1)
        hint = f"did you mean {alike[0]}?" if alike else f"the commands are {', '.join(commands)}"
        parser.error(f"there is no command {name!r}; {hint}")
    args = parser.parse_args(argv)
    args.given = _given(argv)
    for name, option in args.given.items():
        if name in ("out", "figure") and not getattr(args, name):
            parser.error(f"argument {option}: expected a name, and it is empty")
    return args


def _given(argv):
    """{name in the namespace: option} of the options that stand on the command line, abbreviated or not."""
    parser, options = _parser(), {}
    for command in parser._subparsers._group_actions[0].choices.values():
        command._defaults.clear()
        for action in command._actions:
            action.default = argparse.SUPPRESS
            options[action.dest] = action.option_strings[-1] if action.option_strings else action.dest
    return {name: options[name] for name in vars(parser.parse_args(argv)) if name in options}


def _warn(message, category, *where, **more):
    """A warning as a sentence, in the place of Python's line with a path and a category.

    NumPy's, that a number overflowed, name neither file nor tensor: what comes of it, NaN or Inf, is found where it would be used.
    """
    if not (category is RuntimeWarning and " encountered in " in str(message)):
        terminal.say(message)


def _parser():
    parser = Parser(
        prog="tinylora",
        formatter_class=FORMAT,
        description="LoRA and QLoRA, small enough to read. Every default is embedded: `tinylora finetune` needs no file and no network.",
    )
    parser.add_argument("--version", action="version", version=f"tinylora {__version__}", help="print the version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        training.finetune_parser,
        models.generate_parser,
        models.merge_parser,
        models.quantize_parser,
        models.convert_parser,
        costs.memory_parser,
        costs.paging_parser,
        papers.switch_parser,
        papers.ranks_parser,
        papers.count_parser,
        papers.experiments_parser,
        papers.nf4_parser,
        papers.figures_parser,
        training.pretrain_parser,
    ):
        add(commands)
    return parser
