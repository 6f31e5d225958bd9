"""A command that mpirun runs in several processes: one of them speaks, and when one cannot go on, none does.

    rank 0         prints, and says what was wrong
    the others     print nothing. What they say on standard error is kept; the last sentence of it is said if rank 0 knew of nothing wrong

Where all ranks meet the same error, or are told of one, they end together with the same status. Where one ends alone (a fault, a
signal), it waits some seconds for the others, and then MPI ends them.
"""

import contextlib
import io
import os

from .terminal import say

OPTION = "--distributed"
#: Where a process that mpirun has started finds its number, before MPI is there.
_NUMBER = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def asked(argv):
    """Whether the option stands on a command line, abbreviated or not."""
    return any(OPTION.startswith(word) for word in argv if word.startswith(OPTION[:4]))


def number():
    """The number of this process among those that were started together; 0 where there is only one."""
    return next((int(os.environ[name]) for name in _NUMBER if os.environ.get(name, "").isdigit()), 0)


def together(run):
    """The exit status of run() on this rank, or the SystemExit that it raises."""
    from ..training.distributed import ends_alone, world

    try:
        ranks = world()
    except RuntimeError as error:  # no MPI
        if number() == 0:
            say(error)
        return 2
    if ranks.size == 1:
        return run()
    left, status = None, 2
    with _silent(ranks.rank > 0) as kept:
        try:
            status = run()
        except SystemExit as leaving:  # --help, --version, or what argparse has refused
            left, status = leaving, 0 if leaving.code is None else leaving.code
        finally:  # a traceback that was asked for is on its way, too
            alone = status and ends_alone(ranks, status)
    if alone and (said := kept.getvalue().strip()):
        say(f"rank {ranks.rank}: {said.splitlines()[-1].removeprefix('tinylora: ')}")
    if left is not None:
        raise left
    return status


@contextlib.contextmanager
def _silent(silent):
    """Print nothing, where so; gives what was said on standard error."""
    kept = io.StringIO()
    if not silent:
        yield kept
        return
    with (
        contextlib.redirect_stderr(kept),
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
    ):
        yield kept
