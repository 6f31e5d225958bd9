"""What a model knows of its adapters: one Module on it, which moves to a device with the model and hides from its weights."""

from ..nn import Module, move_tensor


class AdapterState(Module):
    """The adapters of one model.

    configs   {name: LoRAConfig} of the adapters on the model, in the order in which they came
    active    the names of those that compute
    copies    {(name, path): Tensor} of parameters that an adapter trains whole; (BASE, path) is the base's own meanwhile
    kept      what `unmerge` needs after merge(model, keep=True), else None
    """

    def __init__(self):
        self.configs, self.active, self.copies, self.kept = {}, (), {}, None

    def named_modules(self, prefix=""):
        """Nothing: what waits here is no weight of the model."""
        return iter(())

    def to(self, device, memo=None):
        """Move the copies, and the layers that `unmerge` would put back."""
        kept_layers, kept_copies = (self.kept.layers, self.kept.copies) if self.kept else ([], {})
        for tensor in (*self.copies.values(), *kept_copies.values()):
            move_tensor(tensor, device)
        for _, layer in kept_layers:
            layer.to(device, memo)
        return self


def state(model):
    """The AdapterState of a model; an empty one is put on it if it has none."""
    return vars(model).setdefault("adapter_state", AdapterState())


def configs(model):
    """{name: LoRAConfig} of the adapters on the model, in the order in which they came."""
    return state(model).configs


def active_adapters(model):
    """The names of the adapters that compute."""
    return state(model).active
