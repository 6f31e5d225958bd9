"""From a text and a model to an adapter on disk.

finetune    the main job: QLoRA, LoRA or full fine-tuning, with every byte accounted for
compare     the same job by every method and for several seeds
train       the loop: batches, accumulation, clipping, evaluation, checkpoints, resuming
schedule    the learning rate over the steps
corpus      running text, and questions with answers, of which a conversation is a chain
datafiles   what a file of training data holds: text, or records in the usual JSON forms
distributed  several processes, on one machine or many: the same bytes from a step whose shards are dealt out
pretrain    how the embedded model was made
adamw8bit   AdamW with 8-bit states, as bitsandbytes rounds them
"""

import importlib


def __getattr__(name):
    """A file of this room is imported when it is asked for: tinylora.training.adamw8bit."""
    file = f"{__name__}.{name}"
    try:
        return importlib.import_module(file)
    except ModuleNotFoundError as error:
        if error.name != file:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
