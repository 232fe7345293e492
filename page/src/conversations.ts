// Conversations in IndexedDB: what was said, and the model's state after it as a state file. What the
// browser cannot store stays in this tab, which goes on trying.

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

interface Unsaved {
  conversation: Conversation;
  state: Uint8Array | null;
}

interface Listener {
  /** Another tab has changed or deleted a conversation; what this tab had not saved of it is `copy`. */
  changed(id: string, copy?: string): void;
  /** Conversations could not be stored, for a reason; or all are stored again. */
  unsaved(count: number, reason: unknown): void;
}

const TITLE_LENGTH = 60;
/** Conversations whose states are kept: a 2B's state takes 34 MB. */
const STATES = 8;
/** Milliseconds between two attempts to store what could not be stored. */
const RETRY = 5000;

export class Conversations {
  readonly #database: Promise<IDBPDatabase<Schema>>;
  readonly #others = new BroadcastChannel(scoped("conversations"));
  readonly #listener: Listener;
  readonly #unsaved = new Map<string, Unsaved>();
  #retry: ReturnType<typeof setTimeout> | undefined;

  constructor(listener: Listener) {
    this.#listener = listener;
    this.#database = openDB<Schema>(scoped("conversations"), 1, {
      upgrade(database) {
        database.createObjectStore("conversations", { keyPath: "id" });
        database.createObjectStore("states");
      },
      blocking(_version, _blocked, event) {
        (event.target as IDBDatabase).close(); // a newer page in another tab needs it
      },
    });
    this.#database.catch(() => undefined); // whoever uses it hears of that
    this.#others.onmessage = ({ data }: MessageEvent<string>) => listener.changed(data, this.#copied(data));
  }

  /** All, the newest first. */
  async list(): Promise<Conversation[]> {
    const stored = await this.#read((database) => database.getAll("conversations"), []);
    const unsaved = [...this.#unsaved.values()].map(({ conversation }) => conversation);
    const all = [...unsaved, ...stored.filter(({ id }) => !this.#unsaved.has(id))];
    return all.sort((a, b) => b.changed - a.changed);
  }

  async get(id: string): Promise<Conversation | undefined> {
    const unsaved = this.#unsaved.get(id);
    return unsaved?.conversation ?? this.#read((database) => database.get("conversations", id), undefined);
  }

  async state(id: string): Promise<Uint8Array | undefined> {
    const unsaved = this.#unsaved.get(id);
    if (unsaved) return unsaved.state ?? undefined;
    return this.#read((database) => database.get("states", id), undefined);
  }

  /** Whether something would be lost with this tab. */
  get isUnsaved(): boolean {
    return this.#unsaved.size > 0;
  }

  /** Stores both; where there is no room for the state, the model will read the messages again. */
  async put(conversation: Conversation, state: Uint8Array | null): Promise<void> {
    for (const older of this.#unsaved.values()) older.state = null; // one in memory is enough
    this.#unsaved.set(conversation.id, { conversation, state });
    await this.#save();
  }

  async delete(id: string): Promise<void> {
    this.#unsaved.delete(id);
    const change = (await this.#database).transaction(["conversations", "states"], "readwrite");
    await completed(change, [
      change.objectStore("conversations").delete(id),
      change.objectStore("states").delete(id),
    ]);
    this.#others.postMessage(id);
    await this.#save();
  }

  /** Stores what is not stored yet; says what could not be. */
  async #save(): Promise<void> {
    let reason: unknown;
    for (const [id, unsaved] of [...this.#unsaved]) {
      try {
        await this.#store(unsaved);
        if (this.#unsaved.get(id) === unsaved) this.#unsaved.delete(id);
        this.#others.postMessage(id);
      } catch (error) {
        reason = error;
      }
    }
    this.#listener.unsaved(this.#unsaved.size, reason);
    clearTimeout(this.#retry);
    if (this.isUnsaved) this.#retry = setTimeout(() => void this.#save(), RETRY);
  }

  /** States make room for texts: the model can compute them again. */
  async #store({ conversation, state }: Unsaved): Promise<void> {
    const attempts = [
      () => this.#put(conversation, state),
      () => this.#removeStates(1).then(() => this.#put(conversation, state)),
      () => this.#put(conversation, null),
    ];
    await firstDone(attempts);
    await this.#removeStates(STATES).catch(() => undefined); // the next one tries again
  }

  async #put(conversation: Conversation, state: Uint8Array | null): Promise<void> {
    const change = (await this.#database).transaction(["conversations", "states"], "readwrite");
    const states = change.objectStore("states");
    await completed(change, [
      change.objectStore("conversations").put(conversation),
      state ? states.put(state, conversation.id) : states.delete(conversation.id),
    ]);
  }

  /** Removes the states of all but the newest conversations. */
  async #removeStates(except: number): Promise<void> {
    const old = (await this.list()).slice(except);
    const database = await this.#database;
    await Promise.all(old.map(({ id }) => database.delete("states", id)));
  }

  /** What this tab had not saved of a conversation that another tab has changed becomes one of its own. */
  #copied(id: string): string | undefined {
    const unsaved = this.#unsaved.get(id);
    if (!unsaved) return undefined;
    const conversation = { ...unsaved.conversation, id: crypto.randomUUID() };
    this.#unsaved.delete(id);
    this.#unsaved.set(conversation.id, { ...unsaved, conversation });
    return conversation.id;
  }

  /** Reads from the database; says so if that fails, and goes on with what this tab has. */
  async #read<T>(read: (database: IDBPDatabase<Schema>) => Promise<T>, otherwise: T): Promise<T> {
    try {
      return await read(await this.#database);
    } catch (error) {
      this.#listener.unsaved(this.#unsaved.size, error);
      return otherwise;
    }
  }
}

/** Does the first thing that does not fail. @throws The last one's error. */
async function firstDone([attempt, ...others]: (() => Promise<void>)[]): Promise<void> {
  await attempt!().catch((error: unknown) => {
    if (!others.length) throw error;
    return firstDone(others);
  });
}

/** Waits for a change and its parts. @throws The error with the reason: others say only that it was aborted. */
async function completed(change: { done: Promise<void> }, parts: Promise<unknown>[]): Promise<void> {
  const ended = await Promise.allSettled([...parts, change.done]);
  const errors = ended.flatMap((one) => (one.status === "rejected" ? [one.reason as Error] : []));
  if (errors.length) throw errors.find(({ name }) => name !== "AbortError") ?? errors[0];
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
