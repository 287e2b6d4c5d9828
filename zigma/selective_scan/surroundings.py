"""What surrounds a call, kept away from what outlives it: self-tests, and tensors that later calls use again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["autograd_of_its_own", "beyond_this_call"]


@contextmanager
def beyond_this_call() -> Iterator[None]:
    """Where tensors are made that later calls use again: plain ones, whatever surrounds this one: inference mode, a
    transform of torch.func, which would wrap them, or a mode such as torch.export's, in which they have no values.
    """
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.inference_mode(False):
        yield


@contextmanager
def autograd_of_its_own(device_type: str) -> Iterator[None]:
    """Where a self-test takes gradients, whatever surrounds the first use of a kernel: all of the above, autocast, or a
    checkpointed block, whose hooks on saved tensors would run that block, and so the self-test, again.
    """
    hooks = nullcontext()
    may_hook = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
    if may_hook():  # under torch.func.grad nobody may
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with beyond_this_call(), torch.enable_grad(), torch.autocast(device_type, enabled=False), hooks:
        yield
