// Conversations in IndexedDB: what was said, and the model's state after it as a state file.

import type { Message } from "@huggingface/transformers";
import { openDB, type DBSchema, type IDBPDatabase } from "idb";
import { scoped } from "./site";

export interface Conversation {
  id: string;
  title: string;
  /** Milliseconds since 1970. */
  changed: number;
  messages: Message[];
}

interface Schema extends DBSchema {
  conversations: { key: string; value: Conversation };
  /** Apart, so that a list of conversations does not read them. */
  states: { key: string; value: Uint8Array };
}

const TITLE_LENGTH = 60;
/** Conversations whose states are kept: a 2B's state takes 34 MB. */
const STATES = 8;

export class Conversations {
  readonly #database: Promise<IDBPDatabase<Schema>>;
  readonly #others = new BroadcastChannel(scoped("conversations"));

  /** @param changed Called with the conversation that another tab changed or deleted. */
  constructor(changed: (id: string) => void) {
    this.#database = openDB<Schema>(scoped("conversations"), 1, {
      upgrade(database) {
        database.createObjectStore("conversations", { keyPath: "id" });
        database.createObjectStore("states");
      },
      blocking(_version, _blocked, event) {
        (event.target as IDBDatabase).close(); // a newer page in another tab needs it
      },
    });
    this.#others.onmessage = ({ data }: MessageEvent<string>) => changed(data);
  }

  /** All, the newest first. */
  async list(): Promise<Conversation[]> {
    const all = await (await this.#database).getAll("conversations");
    return all.sort((a, b) => b.changed - a.changed);
  }

  async get(id: string): Promise<Conversation | undefined> {
    return (await this.#database).get("conversations", id);
  }

  async state(id: string): Promise<Uint8Array | undefined> {
    return (await this.#database).get("states", id);
  }

  /** Stores both; where there is no room for the state, the model will read the messages again. */
  async put(conversation: Conversation, state: Uint8Array | null): Promise<void> {
    try {
      await this.#put(conversation, state);
    } catch (error) {
      if (!state || !(error instanceof DOMException)) throw error;
      await this.#put(conversation, null);
    }
    await this.#removeOldStates();
    this.#others.postMessage(conversation.id);
  }

  async #put(conversation: Conversation, state: Uint8Array | null): Promise<void> {
    const change = (await this.#database).transaction(["conversations", "states"], "readwrite");
    const states = change.objectStore("states");
    await Promise.all([
      change.objectStore("conversations").put(conversation),
      state ? states.put(state, conversation.id) : states.delete(conversation.id),
      change.done,
    ]);
  }

  async #removeOldStates(): Promise<void> {
    const old = (await this.list()).slice(STATES);
    const database = await this.#database;
    await Promise.all(old.map(({ id }) => database.delete("states", id)));
  }

  async delete(id: string): Promise<void> {
    const change = (await this.#database).transaction(["conversations", "states"], "readwrite");
    await Promise.all([
      change.objectStore("conversations").delete(id),
      change.objectStore("states").delete(id),
      change.done,
    ]);
    this.#others.postMessage(id);
  }
}

/** A conversation of these messages, titled by the first. */
export function conversationOf(messages: Message[], id: string = crypto.randomUUID()): Conversation {
  const first = textOf(messages[0]).replace(/\s+/g, " ").trim() || "Conversation";
  const title = first.length > TITLE_LENGTH ? `${first.slice(0, TITLE_LENGTH)}…` : first;
  return { id, title, changed: Date.now(), messages };
}

export function textOf(message: Message | undefined): string {
  return typeof message?.content === "string" ? message.content : "";
}
