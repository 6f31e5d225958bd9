"""The command line: `tinylora COMMAND --help` says what each command does to a model.

    training   finetune, pretrain
    models     generate, merge, quantize, convert
    costs      memory, paging
    papers     nf4, count, experiments, ranks, switch

Expected errors (a missing file, a value out of range, no GPU) are one sentence on stderr and exit status 2.
"""

import argparse
import os
import sys
import warnings

from . import costs, models, papers, training
from .options import FORMAT


def main(argv=None):
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.given = _given(argv)
    for stream in (sys.stdout, sys.stderr):  # a model may write any byte; a terminal may not know the character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint is kept, and the same command goes on from it", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tinylora … | head`: whoever read has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the flush at exit)
        return 0
    except (ValueError, OSError, RuntimeError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"tinylora: {error.args[0] if isinstance(error, KeyError) and error.args else error}", file=sys.stderr)
        return 2


def _given(argv):
    """{name in the namespace: option} of the options that stand on the command line, abbreviated or not."""
    parser, options = _parser(), {}
    for command in parser._subparsers._group_actions[0].choices.values():
        command._defaults.clear()
        for action in command._actions:
            action.default = argparse.SUPPRESS
            options[action.dest] = action.option_strings[-1] if action.option_strings else action.dest
    return {name: options[name] for name in vars(parser.parse_args(argv)) if name in options}


def _say(message, category, *where, **more):
    """A warning as a sentence, in the place of Python's line with a path and a category."""
    print(f"tinylora: {message}", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(
        prog="tinylora",
        formatter_class=FORMAT,
        description="LoRA and QLoRA, small enough to read. Every default is embedded: `tinylora finetune` needs no file and no network.",
    )
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
        training.pretrain_parser,
    ):
        add(commands)
    return parser
