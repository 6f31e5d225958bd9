"""Conversations with a model: to learn from, and to have.

    turns(tokenizer, messages)      what is read and what is learned of a conversation, in turn
    ends(model)                     the tokens at which an answer stops
    converse(model, read, write)    a conversation; read() gives what the user says, write(text) takes what is shown

Messages are [{"role": "user", "content": "hi"}, ...]; `templates` says how they become a text.
"""

from datetime import datetime

import numpy as np

from . import templates
from .llama import KVCache
from .tokenizers import checked

#: What Llama 3's template says where there is no clock.
DAY = datetime(2024, 7, 26)


# ---------------------------------------------------------------------------------------------------------------- to learn from
def turns(tokenizer, messages, first=0, unlearned=(), **more):
    """[(read, learned, read, learned, ...)], lists of ids: what a model with turns reads of a conversation, and what it learns.

    Learned is what the assistant says, from behind the words that ask it to speak (add_generation_prompt) up to and with the
    token that ends its turn; or what the template itself marks by {% generation %}, and that token.

    Such a stretch is found by rendering the conversation up to it. A template may write earlier turns otherwise than the last
    one (Qwen3 leaves out what was thought): then each answer is an example of its own, with the conversation before it as it
    stood when it was given. So it is where a template writes no token behind an answer; the end of a text is then put there.

    A template that asks for today's date is told DAY, so that a run that goes on tomorrow reads the same.

    first        answers from this message on are learned
    unlearned    the places of answers that are read all the same
    more         further variables of the template: tools, documents, ...
    """
    more = {"strftime_now": DAY.strftime, **more}
    messages = [_without_end(message, tokenizer.end_marks) for message in messages]
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in said if i >= first and i not in unlearned]
    if not wanted:
        return []
    messages, said = (
        messages[: wanted[-1] + 1],
        [i for i in said if i <= wanted[-1]],
    )  # behind it there is nothing to learn
    ending = tokenizer.ending
    mark = ending[0]
    before = [messages[:i] for i in wanted]
    asked = [(messages, False), *((m, True) for m in before if m), *((messages[: i + 1], False) for i in wanted[:-1])]
    whole, *others = tokenizer.renderings(asked, **more)
    text, spans = templates.said(whole)
    if spans:
        if len(spans) != len(said) and len(wanted) != len(said):
            raise ValueError(f"the chat template marks {len(spans)} answers where {len(said)} are given")
        ended = [(a, b + len(mark) * text.startswith(mark, b)) for a, b in spans]
        if len(spans) == len(said):
            ended = [span for i, span in zip(said, ended, strict=True) if i in wanted]
        return [tokenizer.segments(text, ended)]
    others = iter([templates.said(other)[0] for other in others])
    asking, upto = [next(others) if m else "" for m in before], [*others, text]
    parts = [_part(tokenizer, messages, *part, ending, more) for part in zip(wanted, asking, upto, strict=True)]
    if mark and all(text.startswith(upto) for _, upto in parts):
        return [tokenizer.segments(text, [(start, len(upto)) for start, upto in parts])]
    end = [] if mark or tokenizer.end_id is None else [tokenizer.end_id]
    apart = [tokenizer.segments(upto, [(start, len(upto))]) for start, upto in parts]
    return [(*rest, [*learned, *end]) for *rest, learned in apart]


def _without_end(message, marks):
    """A message of the assistant's without the mark of its end that some data write out; the template writes one."""
    content = message.get("content")
    if message["role"] == "assistant" and isinstance(content, str):
        end, mark = len(content), ""
        while mark is not None:
            end -= len(mark)
            spoken = end  # up to here, without white space
            while spoken and content[spoken - 1].isspace():
                spoken -= 1
            mark = next((mark for mark in marks if mark and content.endswith(mark, 0, spoken)), None)
            end = end if mark is None else spoken
        message = {**message, "content": content[:end]}
    return message


def _part(tokenizer, messages, i, asked, upto, ending, more):
    """(where answer i begins, the conversation up to its end), as text.

    asked, upto    what the template writes to ask for the answer, and up to it
    ending         what it writes behind an answer
    """
    mark, rest = ending
    upto = upto[: upto.rindex(mark) + len(mark)] if mark and mark in upto else upto.removesuffix(rest)
    if asked and upto.startswith(asked):
        return len(asked), upto
    # The words that ask for an answer are not those before one that was given: it begins where two answers differ.
    one, other = (tokenizer.render([*messages[:i], {**messages[i], "content": word}], **more) for word in ("A", "B"))
    if one == other:
        raise ValueError(
            f"the chat template ({tokenizer.where}) does not write what the assistant says in message {i + 1}"
        )
    return _alike(one, other), upto


def _alike(a, b):
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------------------------------------------------------------- to have
def ends(model):
    """The ids at which an answer ends: what the tokenizer ends a turn with, and the config's eos_token_id (one or several)."""
    stop = model.config.eos_token_id
    stops = () if stop is None else (stop,) if isinstance(stop, (int, np.integer)) else stop
    return tuple(dict.fromkeys((*model.tokenizer.end_ids, *map(int, stops))))


def converse(model, read, write, system=None, max_new_tokens=400, seed=0, **options):
    """Talk with a model that knows turns until the user has had enough; returns the messages, [{"role", "content"}, ...].

    read       () -> what the user says next. EOFError, KeyboardInterrupt or "/exit" end the conversation, "/reset" forgets
               all but the system's words. An empty line is asked for again
    write      text -> None: takes the answer, piece by piece as it grows, and then its "\\n"; sentences about the conversation
               itself stand in [brackets]
    system     the system's words; None leaves them to the model's template
    options    of Llama.stream: temperature, top_k, top_p

    Keys and values of what both have said are kept, so that each turn costs its new tokens only, as far as the template writes
    earlier turns as they were. When prompt and answer no longer fit into max_position_embeddings, the oldest turns are
    dropped, which is said. KeyboardInterrupt while the model speaks ends its answer there. The first answer draws with
    `seed`, as a single `stream` would; each later one differently.
    """
    if not model.tokenizer.chats:
        raise ValueError(
            "chat: the model knows no turns (it has no chat template, and its vocabulary no <|im_start|> and <|im_end|>)"
        )
    start = [] if system is None else [{"role": "system", "content": system}]
    messages, memory, turn = list(start), _Memory(model), 0
    while True:
        try:
            said = read()
        except (EOFError, KeyboardInterrupt):
            return messages
        if said.strip() == "/exit":
            return messages
        if said.strip() == "/reset":
            messages = list(start)
            write("[the conversation begins anew]\n")
            continue
        if not said.strip():
            continue
        try:
            checked(said)
        except ValueError as error:
            write(f"[{error}]\n")
            continue
        asked = [*messages, {"role": "user", "content": said}]
        asked, ids = _fitting(model, asked, len(start), max_new_tokens, write)
        if ids is None:
            continue
        drawn = memory.answer(ids, max_new_tokens, seed=[seed, turn] if turn else seed, **options)
        tokens = []
        try:
            for piece in _shown(model.tokenizer, drawn, tokens):
                write(piece)
        except KeyboardInterrupt:
            pass  # what was said stays said
        write("\n")
        messages = [*asked, {"role": "assistant", "content": model.tokenizer.decode(tokens)}]
        turn += 1


def _shown(tokenizer, drawn, tokens):
    """Yield the pieces of an answer as `decode` writes them: without the space with which SentencePiece begins a text.

    tokens    a list to which the tokens are added as they are drawn
    """
    begun = False
    for piece in tokenizer.pieces(tokens.append(token) or token for token in drawn):
        if piece and not begun:
            begun = True
            piece = piece[piece == " " + tokenizer.decode(tokens) :]
        yield piece


def _fitting(model, messages, kept, max_new_tokens, write):
    """(messages, prompt ids) without the oldest turns, as many as leave room for an answer; (…, None) if the last is too long.

    kept    so many messages at the front (the system's) stay
    """
    window = model.config.max_position_embeddings
    room, dropped = min(max_new_tokens, window // 2), 0
    while len(ids := model.tokenizer.chat_prompt(messages)) + room > window:
        later = [i for i, m in enumerate(messages) if i > kept and m["role"] == "user"]
        if not later:
            write(f"[this message takes {len(ids)} tokens, and {window - room} fit; shorten it]\n")
            return messages, None
        dropped += later[0] - kept
        messages = [*messages[:kept], *messages[later[0] :]]
    if dropped:
        write(f"[the oldest {dropped} messages were dropped: the model reads {window} tokens at a time]\n")
    return messages, ids


class _Memory:
    """The keys and values of a conversation's tokens so far, for the tokens that the next prompt begins with as well."""

    def __init__(self, model):
        self.model, self.seen, self.cache = model, [], KVCache(0)

    def answer(self, ids, max_new_tokens, **options):
        """Yield the tokens of an answer to `ids`, as `stream` does, never beyond the window."""
        window = self.model.config.max_position_embeddings
        most = min(max_new_tokens, window - len(ids))
        if len(ids) + most > self.cache.capacity:  # all is read again, but seldom
            self.seen, self.cache = [], KVCache(min(2 * (len(ids) + most) + 1000, window))
        self.cache.length = min(_alike(self.seen, ids), self.cache.length, len(ids) - 1)  # at least one token is read
        self.seen = list(ids)
        for token in self.model.stream(ids, most, stop=ends(self.model), cache=self.cache, **options):
            self.seen.append(token)
            yield token
