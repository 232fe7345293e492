// The page's controls by their ids, and the settings, which the browser keeps.

import { scoped } from "./site";
import type { ReplyOptions } from "./worker";

const DEFAULTS = { temperature: 0, longest: 512 };

/** The element with the id, of the kind that is wanted. */
export function control<T extends HTMLElement = HTMLElement>(id: string, kind?: new () => T): T {
  const found = document.getElementById(id);
  if (!found || (kind && !(found instanceof kind))) throw new Error(`the page lacks ${id}`);
  return found as T;
}

export function settings(): ReplyOptions {
  return { temperature: numberIn("temperature"), longest: numberIn("longest") };
}

/** What a field says, within its limits. */
function numberIn(id: keyof typeof DEFAULTS): number {
  const input = control(id, HTMLInputElement);
  const number = input.value === "" ? NaN : Number(input.value);
  if (Number.isNaN(number)) return DEFAULTS[id];
  const within = Math.min(Math.max(number, Number(input.min)), Number(input.max));
  return id === "longest" ? Math.round(within) : within;
}

for (const [id, standard] of Object.entries(DEFAULTS)) {
  const input = control(id, HTMLInputElement);
  input.value = kept(id) ?? String(standard);
  input.onchange = () => {
    input.value = String(numberIn(id as keyof typeof DEFAULTS));
    keep(id, input.value);
  };
}

/** Browsers that forbid cookies forbid this storage, too: then nothing is kept. */
function kept(id: string): string | null {
  try {
    return localStorage.getItem(scoped(id));
  } catch {
    return null;
  }
}

function keep(id: string, value: string): void {
  try {
    localStorage.setItem(scoped(id), value);
  } catch {
    return;
  }
}
