"""What a recording cannot have is refused before; what a record was made of is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from airllm_nb.decode.made_of import MadeOf, has_foreign_hooks, is_watched
from airllm_nb.decode.recording import HostWaitError, NoHostWaits, NumbersOnDevice, recorder

X = torch.arange(6.0)
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "a branch": lambda: 1 if X.sum() > 3 else 0,
    "an index": lambda: [1, 2, 3][X[1].long()],
    "nonzero": lambda: X.nonzero(),
    "a mask": lambda: X[X > 2],
    "masked select": lambda: X.masked_select(X > 2),
    "put by a mask": lambda: X.clone().index_put_((X > 2,), torch.tensor(0.0)),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X + 0),
    "repeats": lambda: X.repeat_interleave(torch.tensor([1, 0, 2, 1, 1, 1])),
}
GOES: dict[str, Callable[[], Any]] = {
    "where": lambda: torch.where(X > 2, X, 0),
    "index": lambda: X[torch.tensor([1, 2])],
    "copy": lambda: X.clone().copy_(X),
    "repeats of a number": lambda: X.repeat_interleave(2),
    "put": lambda: X.clone().index_copy_(0, torch.tensor([1]), X[:1]),
    "cast": lambda: X.to(torch.float64),
    "attention": lambda: nn.functional.scaled_dot_product_attention(*[X.view(1, 1, 3, 2)] * 3),
}


@pytest.mark.parametrize("run", WAITS.values(), ids=WAITS)
def test_what_waits_for_the_device_is_refused(run: Callable[[], Any]) -> None:
    with pytest.raises(HostWaitError), NoHostWaits():
        run()
    run()


@pytest.mark.parametrize("run", GOES.values(), ids=GOES)
def test_what_does_not_goes_on(run: Callable[[], Any]) -> None:
    with NoHostWaits(), NumbersOnDevice():
        run()


def test_numbers_are_filled_in_and_the_same() -> None:
    for number, how in ((1.5, {}), (2, {}), (True, {}), (0.0, {"dtype": torch.float16, "device": "cpu"})):
        with NumbersOnDevice():
            found = torch.tensor(number, **how)
            assert torch.tensor([1, 2]).tolist() == [1, 2]
        expected = torch.tensor(number, **how)
        assert found.dtype == expected.dtype and found.shape == () and torch.equal(found, expected)


def test_a_cpu_records_nothing() -> None:
    assert recorder(torch.device("cpu")) is None


def model() -> Any:
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    made.config = nn.Identity()  # anything with attributes
    return made.eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach())),
    "its memory": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "a buffer": lambda m: setattr(m[1], "running_mean", m[1].running_mean + 0),
    "one more": lambda m: m[2].register_buffer("extra", torch.zeros(1)),
    "a part": lambda m: m.append(nn.Identity()), "another part": lambda m: m.__setitem__(2, nn.Dropout()),
    "a hook": lambda m: m[2].register_forward_hook(print), "training": lambda m: m[2].train(),
}  # fmt: skip
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "a number": lambda m: setattr(m[2], "p", 0.1), "a new one": lambda m: setattr(m[0], "mode", "fast"),
    "an entry": lambda m: m[0].scaling.update(default=3.0), "a function": lambda m: setattr(m[0], "forward", print),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_two_steps_is_seen(change: Callable[[Any], Any]) -> None:
    made = model()
    state = MadeOf(made)
    with torch.no_grad():
        made[0].weight.mul_(2)  # in place: where a record reads it
    assert state.still() and state.still_all()
    change(made)
    assert not state.still() and not state.still_all()


@pytest.mark.parametrize("change", SWITCHES.values(), ids=SWITCHES)
def test_switches_are_seen_by_the_next_generation(change: Callable[[Any], Any]) -> None:
    made = model()
    made[0].scaling = {"default": 2.0}
    state = MadeOf(made)
    assert state.still_all()
    change(made)
    assert not state.still_all()


def test_who_looks_on_is_known() -> None:
    made = model()
    assert not has_foreign_hooks(made) and not is_watched()
    made.register_forward_hook(print)
    assert not has_foreign_hooks(made), "it is called around the forward"
    made[1].register_forward_pre_hook(lambda *_: None)
    assert has_foreign_hooks(made)
    with torch.device("cpu"):
        assert not is_watched()
    with NoHostWaits():
        assert is_watched()
    with torch.autocast("cpu"):
        assert is_watched()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert is_watched()
    handle.remove()
    assert not is_watched()
