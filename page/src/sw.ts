// The service worker: keeps the page's files, so that it works offline, and adds the headers that
// threads need, which many hosts cannot send. The model's files are kept by weights.ts.

/** What the build writes here: files that the page needs, files that it may do without, its policy. */
const PAGE = JSON.parse("PAGE") as { version: string; needed: string[]; others: string[]; policy: string };
const worker = self as unknown as ServiceWorkerGlobalScope;
const scope = new URL("./", worker.location.href);
/** One for all versions: names have hashes, and what two versions share is kept. */
const CACHE = `rgexport-page ${scope.pathname}`;
const CATALOG = "model.json";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // A policy in the page does not bind its worker.
  "Content-Security-Policy": PAGE.policy,
};
const FILES = new Set(["./", CATALOG, ...PAGE.needed, ...PAGE.others]);

worker.oninstall = (event) => {
  const anew = (file: string): Request => new Request(file, { cache: "reload" });
  const install = async (): Promise<void> => {
    const cache = await caches.open(CACHE);
    await cache.addAll(["./", CATALOG, ...PAGE.needed].map(anew)); // all of them or none
    const small = PAGE.others.filter((file) => !file.startsWith("assets/"));
    await Promise.allSettled(small.map((file) => cache.add(anew(file))));
    await worker.skipWaiting();
  };
  event.waitUntil(install());
};

worker.onactivate = (event) => {
  event.waitUntil(removeOlder().then(() => worker.clients.claim()));
};

worker.onmessage = (event) => {
  if (event.data === "claim") event.waitUntil(worker.clients.claim());
};

worker.onfetch = (event) => {
  const { method, url } = event.request;
  if (method !== "GET" || !url.startsWith(scope.href)) return;
  const path = url.slice(scope.href.length).split(/[?#]/)[0]!;
  const file = path === "" || path === "index.html" ? "./" : path;
  if (!FILES.has(file)) return;
  event.respondWith(file === CATALOG ? newest(event.request) : kept(event.request, file));
};

/** From the network; without an answer, what came last. */
async function newest(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const found = await cache.match(CATALOG);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(CATALOG, response.clone());
    return isolated(response.ok || !found ? response : found);
  } catch (error) {
    if (!found) throw error;
    return isolated(found);
  }
}

/** What is kept; ONNX Runtime's large files are kept when they come. */
async function kept(request: Request, file: string): Promise<Response> {
  const cache = await caches.open(CACHE);
  const found = await cache.match(file);
  if (found) return isolated(found);
  const response = await fetch(request);
  if (response.ok) await cache.put(file, response.clone());
  return isolated(response);
}

function isolated(response: Response): Response {
  if (response.status === 0 || response.redirected) return response;
  const headers = new Headers(response.headers);
  for (const [header, value] of Object.entries(HEADERS)) headers.set(header, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}

async function removeOlder(): Promise<void> {
  const cache = await caches.open(CACHE);
  const wanted = new Set([...FILES].map((file) => new URL(file, scope).href));
  for (const request of await cache.keys()) {
    if (!wanted.has(request.url)) await cache.delete(request);
  }
}
