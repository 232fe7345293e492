// Errors as sentences. Browsers report many of them by a name alone, with an empty message.

/** What the user is told of errors by these names, whatever their message. */
const MEANINGS: Record<string, string> = {
  QuotaExceededError:
    "The browser's storage is full. Free space on the device, or delete conversations here.",
  AbortError: "The browser stopped this before it was done. Try again.",
  InvalidStateError: "The browser has closed its storage. Reload the page.",
  NotFoundError: "The browser no longer has what was stored. Reload the page.",
  NotReadableError: "The file cannot be read. Choose it again.",
  SecurityError: "The browser does not let this page store anything. Allow it, or leave private browsing.",
  UnknownError: "The browser cannot use its storage. Restart the browser, or free space on the device.",
  VersionError: "A newer version of this page has run in this browser. Reload the page.",
};

export function isFull(error: unknown): boolean {
  return nameOf(error) === "QuotaExceededError";
}

/** A sentence for whatever was thrown; it is never empty. */
export function sentence(error: unknown): string {
  const name = nameOf(error);
  const message = typeof error === "object" ? (error as Error | null)?.message : error && String(error);
  if (typeof error === "number") {
    return `The model's engine failed (code ${error}), often for lack of memory. Close other tabs, then reload the page.`;
  }
  if (isFull(error) || !message?.trim()) {
    return (
      MEANINGS[name] ?? `Something failed, and the browser does not say what (${name}). Reload the page.`
    );
  }
  return message;
}

/** By the name: a class is lost on the way between threads. */
function nameOf(error: unknown): string {
  const name = (error as { name?: unknown } | null | undefined)?.name;
  return typeof name === "string" && name ? name : "unknown error";
}
