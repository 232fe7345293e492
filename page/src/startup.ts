// What a browser must have, and the service worker that lets the page work offline.

const RELOADED = "rgexport-reloaded";
/** Milliseconds after which the page goes on without the service worker, as after a forced reload. */
const PATIENCE = 3000;

/** @throws Error if the browser lacks what the page is built on. */
export function requireBrowser(): void {
  if (!isSecureContext) {
    throw new Error("Browsers run this page only over https, or from localhost. Use such an address.");
  }
  const missing = ["caches", "indexedDB", "WebAssembly"].filter((name) => !(name in globalThis));
  if (!navigator.serviceWorker) missing.push("service workers");
  if (missing.length) {
    throw new Error(`This browser lacks ${missing.join(", ")}. A private window may be the cause.`);
  }
}

/**
 * Waits until the service worker stands between the page and the network. It also sends the headers
 * without which browsers give no threads; a page that came without them is loaded once more.
 */
export async function becomeOffline(): Promise<void> {
  const controlled = new Promise((done) => {
    navigator.serviceWorker.oncontrollerchange = done;
  });
  await navigator.serviceWorker.register("./sw.js");
  const { active } = await navigator.serviceWorker.ready;
  if (!navigator.serviceWorker.controller) {
    active?.postMessage("claim"); // a tab that was still loading when it began was not claimed
    await Promise.race([controlled, new Promise((done) => setTimeout(done, PATIENCE))]);
  }
  if (crossOriginIsolated || sessionStorage.getItem(RELOADED)) return;
  sessionStorage.setItem(RELOADED, "once");
  location.reload();
  await new Promise(() => undefined);
}
