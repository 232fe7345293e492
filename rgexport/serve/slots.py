"""Slots of llama-server: the last conversations of each client, by number."""

import threading
from collections import Counter
from dataclasses import dataclass

from rgexport.chat.model import Model
from rgexport.chat.prompts import PromptTokens
from rgexport.chat.reply import ModelReply
from rgexport.chat.state_file import SavedState
from rgexport.chat.template import Message

_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Slot:
    """A conversation with its last reply, or a text; `known` are tokens that need no rendering."""

    count: int
    messages: tuple[Message, ...] | None
    known: tuple[int, ...] = ()

    def ids(self, model: Model) -> list[int]:
        return [*self.known] if self.known else model.conversation_ids(self.messages or ())


def slot_after(prompt: PromptTokens, reply: ModelReply) -> Slot:
    count = reply.prompt_tokens + reply.new_tokens
    if prompt.messages is None:
        return Slot(count, None, (*prompt.ids, *reply.ids))
    return Slot(count, (*prompt.messages, {"role": "assistant", "content": reply.text}))


def slot_from(saved: SavedState) -> Slot | None:
    """Returns the slot of a saved state, None if the file has no text."""
    if saved.tokens is None:
        return None
    messages = None if saved.messages is None else (*saved.messages,)
    return Slot(saved.count, messages, (*saved.tokens.tolist(),))


class ClientSlots:
    """The slots of all clients. Above the maximum, the client with most slots loses its oldest."""

    def __init__(self, most: int = _MOST_SLOTS) -> None:
        self._most, self._lock = most, threading.Lock()
        self._slots: dict[tuple[str, str, int], Slot] = {}

    def get(self, owner: str, model: str, number: int) -> Slot | None:
        with self._lock:
            return self._slots.get((owner, model, number))

    def put(self, owner: str, model: str, number: int, slot: Slot) -> None:
        with self._lock:
            self._slots.pop((owner, model, number), None)
            self._slots[owner, model, number] = slot
            while len(self._slots) > self._most:
                ((most, _),) = Counter(key[0] for key in self._slots).most_common(1)
                self._slots.pop(next(key for key in self._slots if key[0] == most))

    def pop(self, owner: str, model: str, number: int) -> Slot | None:
        with self._lock:
            return self._slots.pop((owner, model, number), None)

    def of(self, owner: str) -> list[tuple[str, int, Slot]]:
        with self._lock:
            return [(*key[1:], slot) for key, slot in self._slots.items() if key[0] == owner]
