"""What one run asks of memory, and in how many tokens at a time its prompt goes through the model.

Each chunk of a prompt costs a sweep over all weights, so there are as few as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMALLEST_CHUNK = 32


@dataclass(frozen=True)
class Work:
    """One generation, or one forward, as far as memory is concerned.

    Attributes
    ----------
    length, batch
        Tokens of the longest sequence, answer included, and sequences at once.
    prompt
        New tokens of the largest forward, if the prompt is not cut.
    logits
        Positions a sequence that get logits in a forward; ``None``: all of its tokens.
    loss
        Whether those get a loss too.
    masked
        Attention gets a mask: sequences are padded, or there is a cache in front of several new tokens.
    states, attentions
        Whether those of all layers are returned.
    chunk
        Tokens at a time that the caller asks for.
    whole
        Why the prompt cannot be cut; empty if it can.
    remedy
        What else the caller can do if it does not fit.
    """

    length: int
    batch: int
    prompt: int
    logits: int | None = 1
    loss: bool = False
    masked: bool = False
    states: bool = False
    attentions: bool = False
    chunk: int | None = None
    whole: str = ""
    remedy: str = ""

    @property
    def sizes(self) -> list[int]:
        """Tokens at a time that come into question, the best first: the whole prompt, then powers of two."""
        if self.chunk:
            return [min(self.chunk, self.prompt)]
        powers = [] if self.whole else [1 << bit for bit in reversed(range(self.prompt.bit_length()))]
        return [self.prompt, *(size for size in powers if SMALLEST_CHUNK <= size < self.prompt)]


def choose_chunk(sizes: Sequence[int], cost: Callable[[int], int], room: int, arenas: Sequence[int]) -> int | None:
    """How many tokens of a prompt go through the model at a time.

    Parameters
    ----------
    sizes
        Tokens at a time, the best first.
    cost
        Bytes that so many tokens need, beside streamed weights.
    room
        Bytes there are.
    arenas
        Bytes to leave for streamed weights, the most comfortable first; a smaller arena comes after smaller chunks.

    Returns
    -------
    int or None
        ``None`` if nothing fits.
    """
    return next((size for arena in arenas for size in sizes if cost(size) + arena <= room), None)
