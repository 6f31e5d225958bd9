"""A step over an optimizer's pages, in which two threads share the pages that fit the budget together.

    over_pages(update, pager, numbers) = update(k, pager.page(numbers[k]), 0) for k = 0, 1, …

Asking the other thread takes longer than the work on a page of 256 kB. So pages are brought until they have a million elements or fill the
budget, and then the two threads take pieces of them. One thread calls the pager, for the same pages in the same order as a plain loop: the
same pages are evicted. No element depends on another, and so no bit changes.

With half of the state of 10M parameters resident, a step of AdamW in 8 bits takes 0.67 of one thread's time (two cores, AVX-512). One of
AdamW gains nothing there: a page of 256 kB holds 32K of its elements.
"""

import numpy as np

from .threads import side_by_side, width

_PIECE = 1 << 17  # elements, which stay in the cache; a multiple of the blocks of states in 8 bits
_TOGETHER = 1 << 20  # elements of the pages that are brought together
_WORTH = 1 << 18  # elements from which on the other thread is asked


def over_pages(update, pager, numbers):
    """update(k, page, 0) for each page numbers[k] of a `paging.Pager`. On NumPy a page comes in pieces, each from its element `first` on:
    update(k, piece, first). It changes the piece in place and knows no other."""
    places = list(zip(range(len(numbers)), numbers, [*numbers[1:], None], strict=False))
    if pager.xp is not np:
        for k, number, after in places:
            update(k, pager.page(number, then=after), 0)
        return
    for group in _groups(pager, places):
        pieces = _pieces(pager, group)
        if pieces is None:
            for place in group:
                _in_turn(update, _pieces(pager, [place]))
        elif sum(piece.shape[1] for _, piece, _ in pieces) < _WORTH:
            _in_turn(update, pieces)
        else:
            side_by_side(lambda piece: update(*piece), pieces)


def _groups(pager, places):
    """Lists of places whose pages may be resident together. A pager that brings the next page beside the work gets one at a time."""
    alone, budget = pager.prefetch or width() < 2, float("inf") if pager.budget is None else pager.budget
    group, elements = [], 0
    for place in places:
        rows, n = pager.shape(place[1])
        if group and (
            alone or elements + n > _TOGETHER or 4 * rows * (elements + n) > budget
        ):  # 4 bytes an element, or 1
            yield group
            group, elements = [], 0
        group.append(place)
        elements += n
    if group:
        yield group


def _pieces(pager, group):
    """(k, piece, first) of the pages of a group, which are brought one after the other; None if memory ran out and one went for another."""
    found = []
    for k, number, after in group:
        page = pager.page(number, then=after)
        found += [(k, page[:, first : first + _PIECE], first) for first in range(0, page.shape[1], _PIECE)]
    return found if all(pager.resident(number) for _, number, _ in group) else None


def _in_turn(update, pieces):
    for piece in pieces:
        update(*piece)
