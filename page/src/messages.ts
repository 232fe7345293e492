// Shows messages. What the model wrote is Markdown; HTML in it is shown as text.

import type { Message } from "@huggingface/transformers";
import { micromark } from "micromark";
import { gfmAutolinkLiteral, gfmAutolinkLiteralHtml } from "micromark-extension-gfm-autolink-literal";
import { gfmStrikethrough, gfmStrikethroughHtml } from "micromark-extension-gfm-strikethrough";
import { gfmTable, gfmTableHtml } from "micromark-extension-gfm-table";
import { textOf } from "./conversations";

const log = document.getElementById("log")!;
const SPEAKERS: Record<string, string> = { user: "You", assistant: "Model" };
/** Pixels from the end within which a reader follows what comes. */
const NEAR = 80;
const extensions = [gfmAutolinkLiteral(), gfmStrikethrough(), gfmTable()];
const htmlExtensions = [gfmAutolinkLiteralHtml(), gfmStrikethroughHtml(), gfmTableHtml()];

export function showMessages(messages: Message[]): void {
  log.setAttribute("aria-live", "off"); // an older conversation is not read out
  requestAnimationFrame(() => log.setAttribute("aria-live", "polite"));
  log.replaceChildren(...messages.map((message) => element(message.role, textOf(message))));
  log.scrollTop = log.scrollHeight;
}

export function addMessage(message: Message): void {
  log.append(element(message.role, textOf(message)));
  log.scrollTop = log.scrollHeight;
}

/** A reply that is being written: `write` adds to it; screen readers wait for `end`. */
export function beginReply(): { write: (piece: string) => void; end: () => void } {
  const made = element("assistant", "");
  const body = made.lastElementChild!;
  made.setAttribute("aria-busy", "true");
  log.append(made);
  let [text, planned] = ["", false];
  const draw = (): void => {
    planned = false;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    render(body, text);
    if (follows) log.scrollTop = log.scrollHeight;
  };
  const write = (piece: string): void => {
    text += piece;
    if (!planned) requestAnimationFrame(draw);
    planned = true;
  };
  const end = (): void => {
    draw();
    made.removeAttribute("aria-busy");
  };
  return { write, end };
}

function element(role: string, text: string): HTMLElement {
  const made = document.createElement("article");
  const speaker = SPEAKERS[role] ?? role;
  made.className = role;
  made.setAttribute("aria-label", speaker);
  const body = document.createElement("div");
  if (role === "assistant") render(body, text);
  else body.textContent = text;
  made.append(body);
  return made;
}

/** micromark escapes HTML and drops addresses such as `javascript:`. */
function render(body: Element, markdown: string): void {
  body.innerHTML = micromark(markdown, { extensions, htmlExtensions });
  for (const link of body.querySelectorAll("a")) {
    link.target = "_blank"; // the chat stays
    link.rel = "noreferrer";
  }
}
