"""Clients: they take turns, and own states and slots, their last conversations by number."""

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path

from starlette.requests import Request

from rgexport.chat.model import Model
from rgexport.chat.prompts import PromptTokens
from rgexport.chat.reply import ModelReply
from rgexport.chat.state_file import SavedState
from rgexport.chat.template import Message

_NETWORK_BITS = 64
"""Prefix of an IPv6 address that one client has: it may choose the rest."""


@dataclass(frozen=True)
class Client:
    """The sender of a request, identified by address and key.

    Attributes:
        name: clients of different names take turns.
        owner: a hash of the key, or of the address if there is no key; owns slots and named
            states.
        is_sharing: whether all clients use the same states.
    """

    name: str
    owner: str
    is_sharing: bool = False

    @property
    def namespace(self) -> str:
        return "" if self.is_sharing else self.owner

    def folder(self, saved: Path) -> Path:
        return saved if self.is_sharing else saved / self.owner


def client_of(request: Request, api_key: str | None, *, is_sharing: bool) -> Client:
    """Returns the client of a request that has presented the key, if there is one."""
    address = request.client.host if request.client else ""
    identity = f"address\n{address}" if api_key is None else f"key\n{api_key}"
    owner = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return Client(network_of(address), owner, is_sharing)


def network_of(address: str) -> str:
    """Returns the network that counts as one client: an IPv4 address, or 64 bits of IPv6."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), _NETWORK_BITS), strict=False))


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
