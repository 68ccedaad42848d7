"""The key/value cache of a generation as a value: made, asked how long it is, cut back, given on.

The cache itself is transformers'. What is kept of a conversation is its cache and the tokens that it was made from:
:meth:`Cache.reuse` then cuts it back to what a new prompt begins with as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Cache:
    """A cache that a call is given, or none.

    Attributes
    ----------
    held
        What transformers calls ``past_key_values``; ``None``: there is none, or one is made on the way.
    """

    held: Any = None

    @classmethod
    def given(cls, kwargs: Mapping[str, Any]) -> Cache:
        """That among the arguments of a ``generate`` or a forward."""
        return cls(kwargs.get("past_key_values"))

    @classmethod
    def make(cls, native: Any, offloaded: bool = False) -> Cache:
        """An empty one for ``native``; ``offloaded``: in host memory but for the layer that computes and the next.

        Raises
        ------
        OptionError
            If the architecture has a cache of its own kind.
        """
        from transformers import DynamicCache

        if not native._supports_default_dynamic_cache():
            raise OptionError(f"the architecture {native.config.model_type} has a cache of its own kind; leave it to "
                              "generate to make one")  # fmt: skip
        return cls(DynamicCache(config=native.config.get_text_config(decoder=True), offloading=offloaded))

    @property
    def length(self) -> int:
        """Tokens a sequence that are in it."""
        return int(self.held.get_seq_length()) if hasattr(self.held, "get_seq_length") else 0

    def crop(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens; ``False``, and nothing done, where it cannot be cut there.

        States of recurrent layers, and windows that have moved on, cannot be.
        """
        surplus = self.length - length
        if surplus <= 0:
            return not surplus
        layers = getattr(self.held, "layers", ())
        if not layers or any(not hasattr(layer, "keys") or _has_moved_on(layer) for layer in layers):
            return False
        self.held.crop(-surplus)
        return True

    def reuse(self, seen: Sequence[int], wanted: Sequence[int]) -> int:
        """How many tokens of ``wanted`` it serves, once cut back to them; ``seen`` are those that it was made from.

        At least one is left to compute, as a forward needs one; 0 where the cache cannot be cut.
        """
        most = max(min(self.length, len(seen), len(wanted) - 1), 0)
        shared = next((at for at in range(most) if seen[at] != wanted[at]), most)
        return shared if self.crop(shared) else 0


def _has_moved_on(layer: Any) -> bool:
    window = getattr(layer, "sliding_window", None)
    is_recurrent = hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states")
    return is_recurrent or (window is not None and layer.get_seq_length() >= window)
