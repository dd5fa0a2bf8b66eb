"""Memory at work, counted without numbers, against sums by hand."""

import torch
from torch import nn

from iet_sd.engine.sizes import peak_of


def test_a_chain_holds_what_is_read_and_what_is_written():
    """100 numbers a layer: in one operation the last layer and the next."""
    with torch.device("meta"):
        chain = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(5)))
        x = torch.empty(1, 100)
    assert peak_of(lambda: chain(x)) == 2 * 100 * 4
    assert peak_of(lambda: chain[:1](x)) == 100 * 4


def test_what_is_held_for_later_counts_all_the_time():
    """A residual: x + f(x), of 1000 numbers, while f works in 50 and 70."""
    with torch.device("meta"):
        narrow = nn.Sequential(nn.Linear(1000, 50, bias=False), nn.Linear(50, 70, bias=False))
        back, first = nn.Linear(70, 1000, bias=False), torch.empty(1, 1000)

    def call():
        x = first.clone()
        return x + back(narrow(x))

    # x, f(x) and their sum; not the first tensor, which was there before.
    assert peak_of(call) == 4 * 3 * 1000


def test_views_take_nothing_and_keep_what_they_are_of():
    with torch.device("meta"):
        given = torch.empty(10, 10)

    def call():
        view = given.clone()[:1].flatten()
        other = torch.empty(7, device="meta")
        return view, other

    assert peak_of(lambda: given[2:].T.reshape(2, -1)[0]) == 4 * 80  # reshape has to copy
    assert peak_of(call) == 4 * (100 + 7)
