import pytest
import torch
from torch import nn

from fastddpm.utils.modules import forward_is_unmodified, is_unmodified


def set_forward(module):
    module.forward = module.forward


def set_attribute(value):
    return lambda module: setattr(module, "note", value)


CHANGES = {  # name: (what is done, forward_is_unmodified, is_unmodified)
    "none": (lambda module: None, True, True),
    "compiled": (lambda module: module.compile(), True, True),
    "a number": (set_attribute(3), True, True),
    "a buffer": (lambda module: module.register_buffer("mean", torch.zeros(2)), True, True),
    "a tensor": (set_attribute(torch.zeros(2)), True, False),
    "a function": (set_attribute(print), True, False),
    "state dict hook": (lambda module: module.register_state_dict_pre_hook(print), True, False),
    "forward": (set_forward, False, False),
    "forward hook": (lambda module: module.register_forward_hook(print), False, False),
    "forward pre-hook": (lambda module: module.register_forward_pre_hook(print), False, False),
    "backward hook": (lambda module: module.register_full_backward_hook(print), False, False),
    "backward pre-hook": (lambda module: module.register_full_backward_pre_hook(print), False, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modified_modules(change):
    module, (apply, forward, all_of_it) = nn.Linear(2, 2), CHANGES[change]
    apply(module)
    assert (forward_is_unmodified(module), is_unmodified(module)) == (forward, all_of_it)


def test_ignored_attributes():
    module = nn.Linear(2, 2)
    module.note = print
    assert is_unmodified(module, frozenset({"note"}))


@pytest.mark.parametrize("change", ["none", "forward hook"])
def test_forward_is_unmodified_compiles_without_graph_breaks(change):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(x) if forward_is_unmodified(self.layer) else -x

    model = Model()
    if change == "forward hook":
        model.layer.register_forward_hook(lambda *_: None)
    torch._dynamo.reset()
    x = torch.ones(2)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
