"""Whether somebody looks at what passes through modules. What nobody sees may go in pieces, or be written over."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _torch

#: Hooks of one module, and those of all modules.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
#: Packages whose modules are known to keep nothing of what they are given.
_DISCREET = ("flash_reformer", "torch", "transformers", "peft")


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return "forward" in vars(module) or any(getattr(module, name, None) for name in _HOOKS)


def _all_are_hooked() -> bool:
    return any(getattr(_torch, name, None) for name in _GLOBAL_HOOKS)


def is_watched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has hooks, or a ``forward`` other than that of ``kind``."""
    return type(module).forward is not kind.forward or is_hooked(module) or _all_are_hooked()


def keeps_to_itself(module: nn.Module) -> bool:
    """Whether nothing inside a module has hooks, or may keep what it is given for other reasons."""
    return not _all_are_hooked() and all(
        type(part).__module__.split(".")[0] in _DISCREET and not is_hooked(part) for part in module.modules()
    )
