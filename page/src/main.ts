// The page: what is on the screen, and what its buttons do. The model is in worker.ts.

import type { Message } from "@huggingface/transformers";
import { proxy, wrap } from "comlink";
import { chooseModel, megabytes, type Choice } from "./catalog";
import { conversationOf, Conversations, type Conversation } from "./conversations";
import { addMessage, beginReply, showMessages } from "./messages";
import { control, settings } from "./settings";
import { becomeOffline, requireBrowser } from "./startup";
import type { Engine } from "./worker";
import { removeChunks, storedBytes } from "./weights";

/** Models up to this size are loaded without asking. */
const SMALL = 32e6;
const GEMMA_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use.";

const page = {
  side: control("side"),
  menu: control("menu", HTMLButtonElement),
  engine: control("engine"),
  list: control("list"),
  welcome: control("welcome"),
  load: control("load", HTMLButtonElement),
  progress: control("progress", HTMLProgressElement),
  stage: control("stage"),
  talk: control("talk"),
  composer: control("composer", HTMLFormElement),
  text: control("text", HTMLTextAreaElement),
  send: control("send", HTMLButtonElement),
  stop: control("stop", HTMLButtonElement),
  file: control("file", HTMLInputElement),
  error: control("error"),
};

const engine = wrap<Engine>(
  new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "model" }),
);
const conversations = new Conversations((id) => void attempt(() => changedElsewhere(id)));
let choice: Choice;
let backend = "";
/** The conversation on the screen; none before the first message. */
let current: Conversation | undefined;
let busy = false;

/** Does something that may fail; what goes wrong is shown. */
async function attempt(action: () => Promise<unknown>): Promise<void> {
  page.error.textContent = "";
  try {
    await action();
  } catch (error) {
    page.error.textContent = error instanceof Error ? error.message : String(error);
  }
}

async function begin(): Promise<void> {
  requireBrowser();
  await becomeOffline();
  choice = await chooseModel();
  const { name, bytes, gemma } = choice.model;
  document.title = name;
  control("name").textContent = name;
  control("what").textContent = `Chat with ${name}`;
  control("about").textContent =
    `The model (${megabytes(bytes)}) runs in this page: what you write stays on your device. ` +
    (gemma ? GEMMA_TERMS : "");
  const stored = await storedBytes(choice);
  page.load.hidden = false;
  page.load.textContent = stored ? `Go on loading (${megabytes(bytes - stored)})` : `Load the model (${megabytes(bytes)})`;
  if (bytes - stored <= SMALL) await load();
}

async function load(): Promise<void> {
  page.load.hidden = true;
  page.progress.hidden = false;
  const { bytes } = choice.model;
  try {
    backend = await engine.load(
      choice,
      proxy((done, waiting) => {
        page.progress.value = done / bytes;
        page.stage.textContent = waiting
          ? "Waiting for the download in another tab"
          : `${megabytes(done)} of ${megabytes(bytes)}`;
      }),
      proxy(() => {
        page.progress.removeAttribute("value");
        page.stage.textContent = "Opening the model";
      }),
    );
  } catch (error) {
    page.stage.textContent = "";
    page.load.hidden = false;
    page.load.textContent = "Try again";
    throw error;
  } finally {
    page.progress.hidden = true;
  }
  page.engine.textContent = backend;
  page.welcome.hidden = true;
  page.talk.hidden = false;
  await showList();
  await open((await conversations.list())[0]?.id);
}

/** Shows a conversation, or an empty one. */
async function open(id?: string): Promise<void> {
  current = id ? await conversations.get(id) : undefined;
  showMessages(current?.messages ?? []);
  const state = current && (await conversations.state(current.id));
  try {
    await engine.open(state ?? null);
  } catch {
    await engine.open(null); // of another model: the messages are read again with the next one
  }
  await showList();
  closeSide();
  page.text.focus();
}

async function send(): Promise<void> {
  const content = page.text.value.trim();
  if (!content || busy) return;
  await refresh();
  const message = { role: "user", content };
  page.text.value = "";
  addMessage(message);
  const before = current;
  const isAnswered = await answer([...(current?.messages ?? []), message]);
  if (isAnswered || current !== before) return;
  showMessages(before?.messages ?? []);
  page.text.value = content;
}

async function again(): Promise<void> {
  if (busy || !current) return;
  const messages = current.messages.slice(0, current.messages.findLastIndex(({ role }) => role === "user") + 1);
  if (!messages.length) return;
  showMessages(messages);
  if (!(await answer(messages))) showMessages(current.messages);
}

/** Lets the model answer, and stores what came; false if it could not. */
async function answer(messages: Message[]): Promise<boolean> {
  const conversation = conversationOf(messages, current?.id);
  const isMine = await navigator.locks.request(
    `rgexport-${conversation.id}`,
    { ifAvailable: true },
    async (lock) => {
      if (!lock) return false;
      setBusy(true);
      const reply = beginReply();
      try {
        const made = await engine.reply(messages, settings(), proxy(reply.write));
        current = { ...conversation, messages: made.messages, changed: Date.now() };
        await conversations.put(current, made.state);
        page.engine.textContent = `${backend}, ${rounded(made.tokensPerSecond)} tokens/s`;
        page.engine.dataset.read = String(made.read);
        return true;
      } finally {
        reply.end();
        setBusy(false);
        await showList();
      }
    },
  );
  if (!isMine) throw new Error("This conversation is being answered in another tab.");
  return isMine;
}

function rounded(number: number): string {
  return number < 10 ? number.toFixed(1) : number.toFixed(0);
}

/** Takes over what another tab has added to the conversation. */
async function refresh(): Promise<void> {
  if (!current) return;
  const stored = await conversations.get(current.id);
  if (stored && stored.changed !== current.changed) await open(current.id);
}

async function changedElsewhere(id: string): Promise<void> {
  if (id === current?.id && !busy) await open((await conversations.get(id)) && id);
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
  const { usage = 0 } = await navigator.storage.estimate();
  control("storage").textContent = `${megabytes(usage)} are stored in this browser.`;
  for (const id of ["export", "again", "delete"]) {
    control(id, HTMLButtonElement).disabled = busy || !current;
  }
}

async function exportState(): Promise<void> {
  const state = current && (await conversations.state(current.id));
  if (!current || !state) throw new Error("This conversation has no state yet: say something first.");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([new Uint8Array(state)]));
  link.download = `${current.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.state`;
  link.click();
  URL.revokeObjectURL(link.href);
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
  await conversations.delete(current.id);
  await open((await conversations.list())[0]?.id);
}

async function removeModel(): Promise<void> {
  if (!confirm("Delete the model from this browser? Conversations stay.")) return;
  await removeChunks();
  location.reload();
}

function setBusy(now: boolean): void {
  busy = now;
  page.send.hidden = now;
  page.stop.hidden = !now;
  (now ? page.stop : page.text).focus();
}

function closeSide(): void {
  page.side.classList.remove("open");
  page.menu.setAttribute("aria-expanded", "false");
}

function listen(): void {
  const buttons: Record<string, () => Promise<unknown>> = {
    load: async () => {
      void navigator.storage.persist(); // without it a browser may delete the model some day
      await load();
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
    void attempt(send);
  };
  page.text.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
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
    closeSide();
  };
}

listen();
void attempt(begin);
