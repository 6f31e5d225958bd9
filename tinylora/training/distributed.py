"""More than one process, on one machine or on several: the shards of a step are dealt out over MPI (mpi4py), and no bit changes.

A step has n shards in a fixed order, micro-batch by micro-batch. Of N processes (ranks), rank k computes the consecutive ones
from ⌈k n/N⌉ to ⌈(k + 1) n/N⌉, and their gradients are added in the order in which one process adds them:

    G = (((g₁ + g₂) + g₃) + …) + gₙ

The sum goes up the chain of ranks. Rank k receives the sum of all shards before its own, adds its own one by one, and sends it to rank
k + 1; the last rank's is G, which comes down the chain again. It goes in pieces, so that all ranks of a chain work at a time. For |Θ|
trained numbers in float32

    sent a step     4 |Θ| bytes by the first rank and by the last, 2 · 4 |Θ| by the others; 2 (N − 1) 4 |Θ| by all
    at most         4 |Θ| · min(N − 1, 2) by a rank; a ring's all-reduce sends 2 (N − 1)/N · 4 |Θ|, as much for two and nearly for many

So N is no part of the recipe: one rank, two and four end with the bytes of one process without MPI. MPI's Allreduce sends as little, but
the order in which it adds depends on N and on the MPI.

Every rank holds all parameters, gradients and optimizer state, and makes the same update, clipped by the norm that rank 0 finds. (Sharding
them, as ZeRO does, is left out.) Until the sum reaches it, a rank other than the first holds the gradients of each of its shards. Rank 0
reads and writes the run's folder; what it has read goes to the others. What differs between ranks is said: another text or model, other
options, or machines whose BLAS kernels round otherwise.
"""

import functools
import hashlib
import os
import socket
import time

import numpy as np

from ..backend import array_module, move

PIECE = 1 << 20  # bytes of a message of the chain, at most
#: Where mpirun says how many processes it has started: Open MPI, then MPICH and Intel MPI.
_STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def sent_bytes(trained, ranks):
    """(4 |Θ| min(N − 1, 2), 2 (N − 1) 4 |Θ|): the bytes of gradients that a rank sends at most in a step, and all ranks together."""
    return 4 * trained * min(ranks - 1, 2), 2 * (ranks - 1) * 4 * trained


class Ranks:
    """The processes that train together, as one of them sees them: number `rank` of `size`.

    comm    an mpi4py communicator, or whatever has its allgather, Bcast, Send and Recv; None: one process, alone
    sent    bytes of gradients that this rank has sent so far, counted at the calls
    """

    def __init__(self, comm=None):
        self.comm, self.sent = comm, 0
        self.rank, self.size = (0, 1) if comm is None else (comm.Get_rank(), comm.Get_size())
        self.leaving = None  # a copy of `comm` for the end alone, so that no other call is met there

    def own(self, n):
        """The range of those of n parts that are this rank's."""
        return range(-(-self.rank * n // self.size), -(-(self.rank + 1) * n // self.size))

    # ------------------------------------------------------------------------------------------------------------- together
    def gathered(self, f):
        """[what f() gives on rank 0, on rank 1, …], on every rank. If it fails on one, all raise the first error, which names the rank."""
        if self.size == 1:
            return [f()]
        value = error = told = None
        try:
            value = f()
        except Exception as caught:
            error, told = caught, (type(caught), str(caught))
        answers = self.comm.allgather((told, value))
        for rank, (failed, _) in enumerate(answers):
            if failed is not None:
                raise error if rank == self.rank else _again(*failed, rank)
        return [value for _, value in answers]

    def each(self, f):
        """f() of this rank, when no rank's has failed."""
        kept = []
        self.gathered(lambda: kept.append(f()))
        return kept[0]

    def first(self, f):
        """f() of rank 0, on every rank; the others only wait for it."""
        return self.gathered(f if self.rank == 0 else lambda: None)[0]

    def of_one_run(self, identity):
        """ValueError if a rank was given another run: other options, another text, another model."""
        every = self.gathered(lambda: _named(identity))
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"rank {rank} was given another run than rank 0: its {name} is {theirs.get(name)!r}, rank 0's is {value!r}; "
                        "give every machine the same files and options"
                    )

    def check_equal(self, trainable):
        """RuntimeError if a rank no longer holds rank 0's values of the (name, parameter) pairs."""
        if self.size > 1:
            digests = self.gathered(lambda: [_digest(p) for _, p in trainable])
            for rank, theirs in enumerate(digests):
                for (name, _), a, b in zip(trainable, digests[0], theirs, strict=True):
                    if a != b:
                        raise RuntimeError(
                            f"rank {rank} no longer holds rank 0's {name}: the machines' BLAS kernels round differently; set "
                            "OPENBLAS_CORETYPE to the same value on all of them"
                        )

    def spread(self, arrays):
        """Overwrite arrays of this rank with those of rank 0, which has the same ones in this order."""
        if self.size > 1:
            for piece in _pieces(arrays, PIECE):
                self.comm.Bcast(piece.view(np.uint8), root=0)

    def spread_state(self, trainable, optimizer=None):
        """Give every rank rank 0's values of the (name, parameter) pairs, and of an optimizer's state."""
        if self.size == 1:
            return
        host = [np.array(move(p.data, "cpu"), order="C") for _, p in trainable]
        self.spread(host)
        for (_, p), values in zip(trainable, host, strict=True):
            p.data = move(values, array_module(p.data))
        if optimizer is not None:
            state = {name: np.array(a, order="C") for name, a in optimizer.state_dict().items()}
            self.spread(state.values())
            optimizer.load_state_dict(state)

    # -------------------------------------------------------------------------------------------------------- the ordered sum
    def summed(self, shards, parameters):
        """({parameter: Σ gradients}, [what was told]): over the shards of all ranks, in their order.

        shards        yields a pair for each of this rank's: {parameter: gradient}, and what all ranks are to be told of it
        """
        mine = []  # the gradients of each shard; on the first rank their sum, since nothing comes before them

        def compute():
            told = []
            for gradients, about in shards:
                told.append(about)
                if self.rank == 0 and mine:
                    _add(mine[0], gradients)
                else:
                    mine.append(gradients)
            return told, {i for i, p in enumerate(parameters) if any(p in g for g in mine)}

        answers = self.gathered(compute)
        told = [about for each, _ in answers for about in each]
        if self.size == 1:
            return next(iter(mine), {}), told
        return self._chained(mine, parameters, [have for _, have in answers]), told

    def _chained(self, mine, parameters, have):
        """The sum over all ranks of the {parameter: gradient} in `mine`. have: for each rank, which parameters have one in its shards."""
        before, every, sums = set().union(*have[: self.rank]), sorted(set().union(*have)), {}
        for i in every:  # upwards
            p = parameters[i]
            own = [_flat(g[p]) for g in mine if p in g]
            sums[i] = own.pop(0) if own else np.zeros(p.size, np.float32)
            received = np.empty(min(PIECE // 4, p.size), np.float32)
            for start in range(0, p.size, PIECE // 4):
                place = slice(start, start + PIECE // 4)
                part = sums[i][place]
                if self.rank > 0:
                    came = received[: part.size]
                    self.comm.Recv(came, source=self.rank - 1)
                    if i in before and i in have[self.rank]:
                        np.add(came, part, out=part)
                    elif i in before:
                        part[:] = came
                for g in own:
                    part += g[place]
                if self.rank < self.size - 1:
                    self._send(part, self.rank + 1)
        for part in _pieces(sums.values(), PIECE):  # downwards
            if self.rank < self.size - 1:
                self.comm.Recv(part, source=self.rank + 1)
            if self.rank > 0:
                self._send(part, self.rank - 1)
        return {p: move(sums[i].reshape(p.shape), array_module(p.data)) for i in every for p in [parameters[i]]}

    def _send(self, part, rank):
        self.comm.Send(part, dest=rank)
        self.sent += part.nbytes

    # -------------------------------------------------------------------------------------------------------------- what it cost
    def traffic(self, trained, base, steps):
        """{what: number} for a report: the bytes of gradients a step, by the busiest rank and by all, predicted and sent.

        trained, base    |Θ|; how many numbers the base has, |Φ₀|, which full fine-tuning would train
        steps            how many steps this process has made
        """
        every = self.gathered(lambda: (self.sent, socket.gethostname()))
        predicted, sent = sent_bytes(trained, self.size), [n for n, _ in every]
        return {
            "ranks": self.size,
            "machines": len({host for _, host in every}),
            "trained": trained,
            "base": base,
            "steps": steps,
            "a rank, predicted": predicted[0],
            "a rank, sent": max(sent) / max(steps, 1),
            "all, predicted": predicted[1],
            "all, sent": sum(sent) / max(steps, 1),
            "a rank, full fine-tuning": sent_bytes(base, self.size)[0],
        }


#: One process.
ALONE = Ranks()


def describe_traffic(traffic):
    """[(what, text)]: what `Ranks.traffic` found, for a table; nothing for a run of one process."""
    if not traffic:
        return []
    t = traffic
    if t["ranks"] == 1:
        return [("ranks", "1, which sends nothing")]
    rows = [
        ("ranks (machines)", f"{t['ranks']} ({t['machines']})"),
        ("gradients sent a step, by a rank at most", f"{t['a rank, sent']:,.0f} bytes"),
        ("... predicted, 4 |Θ| min(N - 1, 2)", f"{t['a rank, predicted']:,} bytes"),
        ("gradients sent a step, by all ranks", f"{t['all, sent']:,.0f} bytes"),
        ("... predicted, 2 (N - 1) 4 |Θ|", f"{t['all, predicted']:,} bytes"),
    ]
    if t["trained"] != t["base"]:
        share = f"{t['base'] / t['trained']:.2f} times as many"
        rows.append(("... by a rank in full fine-tuning", f"{t['a rank, full fine-tuning']:,} bytes, {share}"))
    return rows


def _add(total, gradients):
    """total[p] ← total[p] + gradients[p], in place; a parameter that has none yet takes the array itself."""
    for p, g in gradients.items():
        if p in total:
            total[p] += g
        else:
            total[p] = g


def _flat(array):
    """A float32 array on the host as a vector."""
    return np.ascontiguousarray(move(array, "cpu")).reshape(-1)


def _pieces(arrays, nbytes):
    """Contiguous arrays as vectors of at most so many bytes, one after the other."""
    for array in arrays:
        flat, step = array.reshape(-1), nbytes // array.itemsize
        for start in range(0, flat.size, step):
            yield flat[start : start + step]


def _named(identity):
    """{"recipe.steps": 3, "data": …} of a run's identity."""
    named = {}
    for key, value in identity.items():
        named |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return named


def _digest(p):
    return hashlib.sha256(np.ascontiguousarray(move(p.data, "cpu"))).digest()


def _again(kind, text, rank):
    """Another rank's error."""
    try:
        return kind(f"rank {rank}: {text}")
    except TypeError:  # one that is made of something else than a sentence
        return RuntimeError(f"rank {rank}: {kind.__name__}: {text}")


# -------------------------------------------------------------------------------------------------------------------------- MPI
@functools.cache
def world():
    """The Ranks that mpirun has started; one where it has not. RuntimeError with a sentence where MPI is not installed."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py is missing; or the library that it loads is
        raise RuntimeError(
            "--distributed needs mpi4py and an MPI; `pip install 'tinylora[mpi]'`, or in the clone `pip install -e '.[mpi]'`, "
            f"installs both ({str(error).splitlines()[0]})"
        ) from None
    comm = MPI.COMM_WORLD
    started = next((int(os.environ[name]) for name in _STARTED if os.environ.get(name, "").isdigit()), 1)
    if comm.Get_size() == 1 < started:
        library = MPI.Get_library_version().split(",")[0].strip()
        raise RuntimeError(
            f"{started} processes were started, and mpi4py sees one: it runs on {library}, and mpirun is of another MPI; use the mpirun "
            "beside this Python"
        )
    ranks = Ranks(comm)
    ranks.leaving = comm.Dup() if ranks.size > 1 else None
    return ranks


def ends_alone(ranks, status, patience=3.0):
    """Whether this rank, which ends with an error, has to say why: not all others have ended so too, and no lower rank says it.

    Where they have not within some seconds, MPI ends all of them with this status when this process ends.
    """
    from mpi4py import run

    comm, note, size = ranks.leaving, np.zeros(1, np.uint8), ranks.size
    notes = [comm.Isend(note, dest=rank) for rank in range(ranks.rank + 1, size)]
    everyone, until = comm.Ibarrier(), time.monotonic() + patience
    try:
        while not everyone.Test():
            if (late := time.monotonic() - until) > 0:
                told = comm.Iprobe()  # by a lower rank
                if not told or late > patience:
                    run.set_abort_status(status)
                    return not told
            time.sleep(0.01)
    except BaseException:  # a second signal
        run.set_abort_status(status)
        raise
    for rank in range(ranks.rank):
        comm.Recv(note, source=rank)
    for sent in notes:
        sent.Wait()
    return False
