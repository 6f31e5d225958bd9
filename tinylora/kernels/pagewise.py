"""A step over an optimizer's pages, in which two threads share the pages that fit the budget together.

    over_pages(update, pager, numbers) = update(k, pager.page(numbers[k]), 0) for k = 0, 1, …

Asking the other thread takes longer than the work on a page of 256 kB. So large pages are brought until they have four million elements,
or as many as the budget surely holds, and then the two threads take pieces of them. One thread calls the pager, for the same pages in the
same order as a plain loop: the same pages are evicted. No element depends on another, and so no bit changes. Only where memory runs out
before the budget does are some pages brought twice, and from there on each is brought by itself.

With half of the state of 10M parameters resident, a step of AdamW in 8 bits takes 0.67 of one thread's time (two cores, AVX-512). AdamW's
pages of 256 kB come one by one: they hold 32K elements, and pieces of so few gain nothing.
"""

from itertools import chain

import numpy as np

from .threads import side_by_side, width

_PIECE = 1 << 17  # elements, which stay in the cache; a multiple of the blocks of states in 8 bits
_LEAST = 1 << 16  # elements of a page that is brought beside others
_TOGETHER = 1 << 22  # elements of the pages that are brought together
_WORTH = 1 << 18  # elements from which on the other thread is asked


def over_pages(update, pager, numbers):
    """update(k, page, 0) for each page numbers[k] of a `paging.Pager`. On NumPy a page comes in pieces, each from its element `first` on:
    update(k, piece, first). It changes the piece in place and knows no other."""
    places = list(zip(range(len(numbers)), numbers, [*numbers[1:], None], strict=False))
    if pager.xp is not np:
        for k, number, after in places:
            update(k, pager.page(number, then=after), 0)
        return
    groups = _groups(pager, places)
    for group in groups:
        _bring(pager, group)
        if all(pager.frame(number) is not None for _, number, _ in group):
            _share(update, pager, group)
            continue
        for place in [*group, *chain.from_iterable(groups)]:  # memory ran out, and pages went for others of their group
            _bring(pager, [place])
            _share(update, pager, [place])


def _groups(pager, places):
    """Lists of places whose pages may be resident together. A pager that brings the next page beside the work gets one at a time."""
    alone, budget = pager.prefetch or width() < 2, float("inf") if pager.budget is None else pager.budget
    group, elements = [], 0
    for place in places:
        rows, n = pager.shape(place[1])
        most = 4 * rows * (elements + n)  # bytes, if none of the elements takes more than float32
        if group and (alone or n < _LEAST or elements + n > _TOGETHER or most > budget):
            yield group
            group, elements = [], 0
        group.append(place)
        elements += n
    if group:
        yield group


def _bring(pager, group):
    for _, number, after in group:
        pager.page(number, then=after)  # a frame that were held here could not give way to the next


def _share(update, pager, group):
    """update each page of a group that is resident, in pieces."""
    frames = ((k, pager.frame(number)) for k, number, _ in group)
    pieces = [(k, page[:, i : i + _PIECE], i) for k, page in frames for i in range(0, page.shape[1], _PIECE)]
    if sum(piece.shape[1] for _, piece, _ in pieces) >= _WORTH:
        side_by_side(lambda piece: update(*piece), pieces)
        return
    for piece in pieces:
        update(*piece)
