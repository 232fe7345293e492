// The service worker: keeps the page's files, so that it works offline, and adds the headers that
// threads need, which many hosts cannot send. The model's files are kept by weights.ts.

/** The build writes here which files the page has. */
const PAGE = JSON.parse("PAGE") as { version: string; files: string[] };
const CACHE = `rgexport-page-${PAGE.version}`;
const CATALOG = "model.json";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

const worker = self as unknown as ServiceWorkerGlobalScope;
const scope = new URL("./", worker.location.href).href;

worker.oninstall = (event) => {
  const wanted = ["./", CATALOG, ...PAGE.files];
  const requests = wanted.map((file) => new Request(file, { cache: "reload" }));
  const kept = caches.open(CACHE).then((cache) => cache.addAll(requests));
  event.waitUntil(kept.then(() => worker.skipWaiting()));
};

worker.onactivate = (event) => {
  event.waitUntil(removeOlder().then(() => worker.clients.claim()));
};

worker.onmessage = (event) => {
  if (event.data === "claim") event.waitUntil(worker.clients.claim());
};

worker.onfetch = (event) => {
  const { method, url } = event.request;
  const path = url.startsWith(scope) ? url.slice(scope.length).split(/[?#]/)[0]! : null;
  if (method !== "GET" || path === null || path.startsWith("chunks/")) return;
  event.respondWith(path === CATALOG ? newest(event.request) : kept(event.request, path));
};

/** From the network; without one, what came last. */
async function newest(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(CATALOG, response.clone());
    return isolated(response);
  } catch (error) {
    const found = await cache.match(CATALOG);
    if (!found) throw error;
    return isolated(found);
  }
}

/** What is kept; files with a hash in their names are kept when they come. */
async function kept(request: Request, path: string): Promise<Response> {
  const cache = await caches.open(CACHE);
  const found = await cache.match(path === "index.html" || path === "" ? "./" : path);
  if (found) return isolated(found);
  const response = await fetch(request);
  if (response.ok && path.startsWith("assets/")) await cache.put(path, response.clone());
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
  for (const other of await caches.keys()) {
    if (other.startsWith("rgexport-page-") && other !== CACHE) await caches.delete(other);
  }
}
