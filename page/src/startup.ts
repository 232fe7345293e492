// What a browser must have, and the service worker that lets the page work offline.

import { scoped } from "./site";

const RELOADED = scoped("reloaded");
/** The lock of every tab that runs this version: the name of its script has the hash of the contents. */
const RUNNING = scoped(`running ${import.meta.url.split("/").at(-1)}`);
/** Milliseconds after which the page goes on without the service worker, as after a forced reload. */
const PATIENCE = 3000;

/** @throws Error if the browser lacks what the page is built on. */
export function requireBrowser(): void {
  if (!isSecureContext) {
    throw new Error("Browsers run this page only over https, or from localhost. Use such an address.");
  }
  const missing = ["caches", "indexedDB", "WebAssembly"].filter((name) => !(name in globalThis));
  for (const name of ["locks", "storage"]) if (!(name in navigator)) missing.push(name);
  if (missing.length) {
    throw new Error(
      `This browser lacks ${missing.join(", ")}: it is too old, or a private window forbids it.`,
    );
  }
}

/**
 * Waits until the service worker stands between the page and the network. It also sends the headers
 * without which browsers give no threads; a page that came without them is loaded once more. Where
 * it cannot be installed, the page works online.
 * @param notStored Called when the browser has no room for the page's files.
 */
export async function becomeOffline(notStored: () => void): Promise<void> {
  const { serviceWorker } = navigator;
  await holdVersion();
  if (serviceWorker) serviceWorker.onmessage = ({ data }) => data === "not stored" && notStored();
  const controlled = new Promise((done) => {
    if (serviceWorker) serviceWorker.oncontrollerchange = done;
  });
  try {
    const { installing } = await serviceWorker.register("./sw.js");
    const failed = new Promise<void>((done) => {
      installing?.addEventListener("statechange", () => installing.state === "redundant" && done());
    });
    const ready = await Promise.race([serviceWorker.ready, failed]);
    if (!ready) return;
    if (!serviceWorker.controller) {
      ready.active?.postMessage("claim"); // a tab that was still loading when it began was not claimed
      await Promise.race([controlled, new Promise((done) => setTimeout(done, PATIENCE))]);
    }
    serviceWorker.controller?.postMessage("started");
  } catch {
    return;
  }
  if (crossOriginIsolated || sessionStorage.getItem(RELOADED)) return;
  sessionStorage.setItem(RELOADED, "once");
  location.reload();
  await new Promise(() => undefined);
}

/** Says for as long as this tab is open that it needs the files of its version. */
async function holdVersion(): Promise<void> {
  await new Promise<void>((held, failed) => {
    const forever = (): Promise<never> => {
      held();
      return new Promise(() => undefined);
    };
    navigator.locks.request(RUNNING, { mode: "shared" }, forever).catch(failed);
  });
}
