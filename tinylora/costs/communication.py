"""What N machines send when they train one model together, and how long that takes: data parallelism as in `training.distributed`.

    trained numbers     |Θ| = Σ r (d_in + d_out) over the adapted matrices; in full fine-tuning all of the model's, |Φ₀|
    a machine sends     4 |Θ| min(N − 1, 2) bytes a step
    all machines send   2 (N − 1) 4 |Θ|
    time                t = 2 · 8 · 4 |Θ| / B seconds with B bits a second each way, whatever N ≥ 2 is: the sum goes up the chain, then down
    tokens              T = t F / f a machine and step compute as long as that takes, at F FLOP/s and f FLOPs a token

4 |Θ| bytes pass each link of the chain in each direction. They go in pieces of at most 1 MiB; that the last machine waits for the first
piece, N − 2 pieces long, and every message's latency are left out of t. f counts the products with matrices, forward and backward
(`flops`); attention's scores are left out. Memory is that of one machine that computes one part of a step, and no less with more of
them: each holds the whole model. Each further part of a machine other than the first holds 4 |Θ| bytes of gradients more.
"""

from ..backend import whole
from ..training.distributed import sent_bytes
from . import flops
from .memory import MATRICES, config_of, parameters, predict
from .parameters import llama_shapes, lora_on
from .tables import aligned, in_units

METHODS = ("full", "lora", "qlora")
GBITS = (1, 10, 100, 400)
FLOPS = 1e14


def trained(config, method="qlora", r=64, targets=MATRICES):
    """|Θ|, or |Φ₀| for "full"."""
    return parameters(config) if method == "full" else lora_on(llama_shapes(config, targets), r)


def flops_a_token(config, method="qlora", r=64, targets=MATRICES):
    """FLOPs of the products with matrices, forward and backward, for one token; the head is frozen, but in full fine-tuning."""
    full = method == "full"
    head = config.vocab_size * config.hidden_size * (3 if full else 2)
    if full:
        return 2 * (head + sum(flops.full(i, o) for o, i in llama_shapes(config)))
    frozen = sum(2 * o * i for o, i in llama_shapes(config))
    return 2 * (head + frozen + 3 * r * sum(o + i for o, i in llama_shapes(config, targets)))


def seconds(numbers, gbit, machines=2):
    """2 · 8 · 4 |Θ| / (10⁹ gbit) seconds to sum |Θ| float32 gradients over two machines or more; 0 for one."""
    return 0.0 if machines == 1 else 2 * 8 * 4 * numbers / (1e9 * gbit)


def describe(config, machines, r=64, target_modules="all-linear", rate=FLOPS, **options):
    """Three tables, as text: what a machine holds and sends by each method, how long that takes, and how much computing it is worth.

    options    others of `memory.predict`
    """
    config, n = config_of(config), whole("communication: machines", machines)
    targets = MATRICES if target_modules == "all-linear" else tuple(target_modules)
    names = [f"{gbit} Gbit/s" for gbit in GBITS]
    costs = [("", "memory of each", "trained numbers", "each sends a step", "all send a step")]
    times = [("", *names)]
    worth = [("", "FLOPs a token", *names)]
    for method in METHODS:
        account = predict(config, method, r=r, target_modules=target_modules, **options)
        numbers, work = trained(config, method, r, targets), flops_a_token(config, method, r, targets)
        waits = [seconds(numbers, gbit, n) for gbit in GBITS]
        costs.append((method, in_units(account.total), f"{numbers:,}", *map(in_units, sent_bytes(numbers, n))))
        times.append((method, *(f"{t:,.2f} s" for t in waits)))
        worth.append((method, f"{work:.2e}", *(f"{t * rate / work:,.0f}" for t in waits)))
    heads = (
        f"{parameters(config):,} parameters on {n} machines, each of which holds all of it",
        "to send it takes, each step",
        f"tokens a machine and step that compute as long as the sending takes, at {rate:.0e} FLOP/s a machine",
    )
    return "\n\n".join(f"{head}\n\n{aligned(table)}" for head, table in zip(heads, (costs, times, worth), strict=True))
