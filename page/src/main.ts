// The page: what is on the screen, and what its buttons do. The model is in worker.ts.

import type { Message } from "@huggingface/transformers";
import { proxy, wrap, type Remote } from "comlink";
import { chooseModel, megabytes, type Choice, type Model } from "./catalog";
import { conversationOf, Conversations, type Conversation } from "./conversations";
import { sentence } from "./errors";
import { addMessage, beginReply, showMessages } from "./messages";
import { control, settings } from "./settings";
import { scoped } from "./site";
import { becomeOffline, requireBrowser } from "./startup";
import type { Engine } from "./worker";
import { NO_ROOM, removeChunks, storedBytes } from "./weights";

/** Models up to this size are loaded without asking. */
const SMALL = 32e6;
/** Set where the user has deleted the model, so that it is not loaded again at once. */
const DELETED = scoped("deleted");
const GEMMA_TERMS =
  "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.";
const NOT_STORED =
  "The browser's storage is full: the page works now, but not offline, and the next visit loads it again.";
/** Lines of a message that are shown while it is written. */
const MOST_LINES = 8;

const page = {
  side: control("side"),
  menu: control("menu", HTMLButtonElement),
  engine: control("engine"),
  list: control("list"),
  welcome: control("welcome"),
  load: control("load", HTMLButtonElement),
  progress: control("progress", HTMLProgressElement),
  stage: control("stage"),
  amount: control("amount"),
  talk: control("talk"),
  composer: control("composer", HTMLFormElement),
  text: control("text", HTMLTextAreaElement),
  send: control("send", HTMLButtonElement),
  stop: control("stop", HTMLButtonElement),
  file: control("file", HTMLInputElement),
  unsaved: control("unsaved"),
  notice: control("notice"),
  error: control("error"),
};

let conversations: Conversations;
let engine: Remote<Engine>;
let backend = "";
/** The conversation on the screen; none before the first message. */
let current: Conversation | undefined;
let busy = false;
/** What the button below the model's name does: it goes on where the last attempt failed. */
let proceed: () => Promise<void> = load;
/** Whether the user was told that the storage is too small, and so may load without it. */
let lacksRoom = false;

/** Does what the user asks for; what goes wrong is shown. */
async function attempt(action: () => Promise<unknown>): Promise<void> {
  page.error.textContent = page.notice.textContent = "";
  try {
    await action();
  } catch (error) {
    show(error);
  }
}

function show(error: unknown): void {
  page.error.textContent = sentence(error);
}

/** Says what is kept in this tab alone. */
function showUnsaved(count: number, reason: unknown): void {
  const what = count > 1 ? `${count} conversations are` : "A conversation is";
  const text = count
    ? `${what} not saved. ${sentence(reason)} This tab keeps what you wrote, and goes on trying; ` +
      "“Save as a file” makes a copy."
    : reason
      ? `Conversations cannot be read. ${sentence(reason)}`
      : "";
  setText(page.unsaved, text);
}

async function begin(): Promise<void> {
  requireBrowser();
  conversations = new Conversations({
    changed: (id, copy) => void changedElsewhere(id, copy).catch(show),
    unsaved: showUnsaved,
  });
  await offer();
}

/** Shows the site's model, and loads it where nobody has to be asked. */
async function offer(): Promise<void> {
  const { choice, stored } = await retryable(offer, async () => {
    setText(page.stage, "Starting");
    await becomeOffline(() => setText(page.notice, NOT_STORED));
    const choice = await chooseModel();
    return { choice, stored: await storedBytes(choice) };
  });
  const { name, bytes } = choice.model;
  document.title = name;
  control("name").textContent = name;
  control("what").textContent = `Chat with ${name}`;
  control("about").textContent =
    `The model (${megabytes(bytes)}) runs in this page: what you write stays on your device. ` +
    termsOf(choice.model);
  page.load.textContent = stored
    ? `Go on loading (${megabytes(bytes - stored)})`
    : `Load the model (${megabytes(bytes)})`;
  page.load.hidden = false;
  proceed = load;
  const isWanted = bytes <= SMALL && !sessionStorage.getItem(DELETED);
  if (stored === bytes || isWanted) await load();
}

function termsOf({ gemma, licence }: Model): string {
  if (gemma) return GEMMA_TERMS;
  return licence ? `Its licence: ${licence}.` : "";
}

/** Does something during which there is no button; if it fails, the button does `again`. */
async function retryable<T>(again: () => Promise<void>, action: () => Promise<T>): Promise<T> {
  const hadFocus = document.activeElement === page.load;
  page.load.hidden = true;
  try {
    return await action();
  } catch (error) {
    lacksRoom ||= error instanceof Error && error.name === NO_ROOM;
    proceed = again;
    page.load.textContent = lacksRoom ? "Load without storing it" : "Try again";
    page.load.hidden = false;
    if (hadFocus) page.load.focus();
    throw error;
  } finally {
    page.stage.textContent = "";
  }
}

async function load(): Promise<void> {
  const { worker, failed } = startWorker();
  engine = wrap<Engine>(worker);
  const loaded = await retryable(load, async () => {
    page.progress.hidden = false;
    try {
      const choice = await chooseModel();
      const mustStore = choice.model.bytes > SMALL && !lacksRoom;
      return await Promise.race([engine.load(choice, mustStore, ...shown(choice)), failed]);
    } catch (error) {
      worker.terminate();
      throw error;
    } finally {
      page.progress.hidden = true;
      page.amount.textContent = "";
    }
  });
  if (!loaded.isStored) setText(page.notice, NOT_STORED);
  backend = loaded.backend;
  sessionStorage.removeItem(DELETED);
  page.engine.textContent = backend;
  page.welcome.hidden = true;
  page.talk.hidden = false;
  await showList();
  await open((await conversations.list())[0]?.id);
}

/** The model's thread, which begins after the service worker: its policy binds the thread, too. */
function startWorker(): { worker: Worker; failed: Promise<never> } {
  const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "model" });
  const failed = new Promise<never>((_, reject) => {
    worker.onerror = (event) =>
      reject(new Error(`The model's thread ended: ${event.message || "it did not start"}.`));
  });
  return { worker, failed };
}

/** How the page shows a download, and that the model is being opened. */
function shown({ model }: Choice): [(done: number, waiting: boolean) => void, () => void] {
  const progress = (done: number, waiting: boolean): void => {
    page.progress.value = done / model.bytes;
    setText(page.stage, waiting ? "Waiting for the download in another tab" : "Downloading");
    page.amount.textContent = waiting ? "" : `${megabytes(done)} of ${megabytes(model.bytes)}`;
  };
  const opening = (): void => {
    page.progress.removeAttribute("value");
    page.amount.textContent = "";
    setText(page.stage, "Opening the model");
  };
  return [proxy(progress), proxy(opening)];
}

/** Screen readers read a status out whenever it is set. */
function setText(element: HTMLElement, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows a conversation, or an empty one. */
async function open(id?: string): Promise<void> {
  await take(id);
  closeSide();
  page.text.focus();
}

async function take(id?: string): Promise<void> {
  current = id ? await conversations.get(id) : undefined;
  showMessages(current?.messages ?? []);
  const state = current && (await conversations.state(current.id));
  try {
    await engine.open(state ?? null);
  } catch {
    await engine.open(null); // of another model: the messages are read again with the next one
  }
  await showList();
}

async function send(): Promise<void> {
  const content = page.text.value.trim();
  if (!content || busy) return;
  const message = { role: "user", content };
  await alone(current?.id ?? crypto.randomUUID(), async (id) => {
    page.text.value = "";
    fitText();
    addMessage(message);
    try {
      await answer(id, [...(current?.messages ?? []), message]);
    } catch (error) {
      page.text.value ||= content;
      fitText();
      throw error;
    }
  });
}

async function again(): Promise<void> {
  if (busy || !current) return;
  await alone(current.id, async (id) => {
    const all = current?.messages ?? [];
    const messages = all.slice(0, all.findLastIndex(({ role }) => role === "user") + 1);
    if (!messages.length) return;
    showMessages(messages);
    await answer(id, messages);
  });
}

/**
 * Works on a conversation while no other tab does, after taking over what another has changed. If
 * it fails, what was stored is shown again.
 */
async function alone(id: string, work: (id: string) => Promise<void>): Promise<void> {
  setBusy(true);
  try {
    await navigator.locks.request(scoped(id), { ifAvailable: true }, async (lock) => {
      if (!lock) throw new Error("This conversation is being answered in another tab.");
      const stored = current && (await conversations.get(id));
      if (stored && stored.changed !== current?.changed) await take(id);
      await work(id);
    });
  } catch (error) {
    showMessages(current?.messages ?? []);
    throw error;
  } finally {
    setBusy(false);
    await showList();
  }
}

/** Lets the model answer, and stores what came. */
async function answer(id: string, messages: Message[]): Promise<void> {
  const reply = beginReply();
  try {
    const made = await engine.reply(messages, settings(), proxy(reply.write));
    current = conversationOf(made.messages, id);
    await conversations.put(current, made.state);
    page.engine.textContent = `${backend}, ${rounded(made.tokensPerSecond)} tokens/s`;
    page.engine.title = `The last turn took ${made.read} tokens.`;
  } finally {
    reply.end();
  }
}

function rounded(number: number): string {
  return number < 10 ? number.toFixed(1) : number.toFixed(0);
}

async function changedElsewhere(id: string, copy = id): Promise<void> {
  if (page.talk.hidden) return;
  if (id === current?.id && !busy) await take((await conversations.get(copy)) && copy);
  else await showList();
}

async function showList(): Promise<void> {
  const items = (await conversations.list()).map(({ id, title }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    if (id === current?.id) button.setAttribute("aria-current", "true");
    button.onclick = () => void attempt(async () => busy || (await open(id)));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  page.list.replaceChildren(...items);
  const { usage } = (await navigator.storage.estimate?.()) ?? {};
  control("storage").textContent = usage ? `${megabytes(usage)} are stored in this browser.` : "";
  for (const id of ["export", "again", "delete"]) {
    control(id, HTMLButtonElement).disabled = busy || !current;
  }
}

async function exportState(): Promise<void> {
  const state = current && (await conversations.state(current.id));
  if (!current || !state) {
    throw new Error("The model's state is kept for the last conversations only: say something first.");
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([new Uint8Array(state)]));
  link.download = `${current.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.state`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the download may begin later
}

async function importState(): Promise<void> {
  const file = page.file.files?.[0];
  page.file.value = "";
  if (!file || busy) return;
  const state = new Uint8Array(await file.arrayBuffer());
  try {
    const made = conversationOf(await engine.open(state));
    await conversations.put(made, state);
    await open(made.id);
  } catch (error) {
    await open(current?.id);
    throw error;
  }
}

async function deleteCurrent(): Promise<void> {
  if (busy || !current || !confirm(`Delete “${current.title}”?`)) return;
  await alone(current.id, async (id) => {
    await conversations.delete(id);
    current = undefined;
  });
  await open((await conversations.list())[0]?.id);
}

async function removeModel(): Promise<void> {
  if (!confirm("Delete the model from this browser? Conversations stay.")) return;
  await removeChunks();
  sessionStorage.setItem(DELETED, "yes");
  location.reload();
}

function setBusy(now: boolean): void {
  busy = now;
  if (document.activeElement === (now ? page.send : page.stop)) page.text.focus(); // it goes away
  page.send.hidden = now;
  page.stop.hidden = !now;
}

function closeSide(): void {
  if (page.side.contains(document.activeElement)) page.menu.focus();
  page.side.classList.remove("open");
  page.menu.setAttribute("aria-expanded", "false");
}

/** Where the style sheet cannot do it: a message is shown with all its lines. */
function fitText(): void {
  if (CSS.supports("field-sizing", "content")) return;
  page.text.rows = Math.min(page.text.value.split("\n").length, MOST_LINES);
}

function listen(): void {
  const buttons: Record<string, () => Promise<unknown>> = {
    load: async () => {
      void navigator.storage.persist?.(); // without it a browser may delete the model some day
      await proceed();
    },
    new: async () => busy || (await open()),
    import: async () => page.file.click(),
    export: exportState,
    again,
    delete: deleteCurrent,
    remove: removeModel,
    stop: () => engine.stop(),
  };
  for (const [id, action] of Object.entries(buttons)) {
    control(id, HTMLButtonElement).onclick = () => void attempt(action);
  }
  page.file.onchange = () => void attempt(importState);
  page.composer.onsubmit = (event) => {
    event.preventDefault();
    if (!busy) void attempt(send);
  };
  page.text.oninput = fitText;
  page.text.onkeydown = (event) => {
    // Safari ends a composition before it tells of the key: 229.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    page.composer.requestSubmit();
  };
  page.menu.onclick = () => {
    const isOpen = page.side.classList.toggle("open");
    page.menu.setAttribute("aria-expanded", String(isOpen));
  };
  document.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    if (busy) void engine.stop();
    else closeSide();
  };
  window.onbeforeunload = (event) => {
    if (conversations?.isUnsaved) event.preventDefault();
  };
  window.onunhandledrejection = ({ reason }) => show(reason);
}

listen();
void attempt(begin);
