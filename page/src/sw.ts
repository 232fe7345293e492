// The service worker: keeps the page's files, so that it works offline, and adds the headers that
// threads need, which many hosts cannot send. Where the browser has no room for the files, they come
// from the network. The model's files are kept by weights.ts.

/** What the build writes here: files that the page needs, files that it may do without, its policy. */
const PAGE = JSON.parse("PAGE") as { version: string; needed: string[]; others: string[]; policy: string };
const worker = self as unknown as ServiceWorkerGlobalScope;
const scope = new URL("./", worker.location.href);
const SITE = `rgexport-page ${scope.pathname}`;
/** Each version has a cache, because open tabs may still need the files of an earlier one. */
const CACHE = `${SITE} ${PAGE.version}`;
const CATALOG = "model.json";
const NEEDED = ["./", CATALOG, ...PAGE.needed];
const FILES = new Set([...NEEDED, ...PAGE.others]);
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // A policy in the page does not bind its worker.
  "Content-Security-Policy": PAGE.policy,
};
/** The locks that tabs of this version hold; see startup.ts. */
const RUNNING = new Set(
  PAGE.needed.map((file) => `rgexport-running ${file.split("/").at(-1)} ${scope.pathname}`),
);

worker.oninstall = (event) => {
  const install = async (): Promise<void> => {
    await fill();
    const small = PAGE.others.filter((file) => !isHashed(file));
    await Promise.allSettled(small.map(async (file) => keep(file, await fetch(anew(file)))));
    await worker.skipWaiting();
  };
  event.waitUntil(install());
};

worker.onactivate = (event) => {
  event.waitUntil(tidy().then(() => worker.clients.claim()));
};

worker.onmessage = (event) => {
  if (event.data === "claim") event.waitUntil(worker.clients.claim());
  if (event.data === "started") event.waitUntil(tidy());
};

worker.onfetch = (event) => {
  const { method, url } = event.request;
  if (method !== "GET" || !url.startsWith(scope.href)) return;
  const path = url.slice(scope.href.length).split(/[?#]/)[0]!;
  const file = path === "" || path === "index.html" ? "./" : path;
  if (FILES.has(file) || isHashed(file)) event.respondWith(answer(event, file));
};

/** The catalog from the network if that answers, other files from the cache if it has them. */
async function answer(event: FetchEvent, file: string): Promise<Response> {
  const stored = file === CATALOG ? undefined : await find(file);
  if (stored) return isolated(stored);
  const response = await fetch(event.request).catch(() => undefined);
  if (response?.ok) {
    // What the page needs is stored by `fill`, all of it or nothing.
    if (file === CATALOG || PAGE.others.includes(file)) event.waitUntil(keep(file, response.clone()));
    return FILES.has(file) ? isolated(response) : response;
  }
  const older = await find(file, true);
  return older ? isolated(older) : (response ?? Response.error());
}

/** Stores what the page needs: all of it or nothing. @throws TypeError if the server does not have it. */
async function fill(): Promise<void> {
  const isThere = await Promise.all(NEEDED.map((file) => find(file)));
  const missing = NEEDED.filter((_, i) => !isThere[i]);
  if (!missing.length) return;
  try {
    await (await caches.open(CACHE)).addAll(missing.map(anew));
  } catch (error) {
    if (error instanceof TypeError) throw error;
    await caches.delete(CACHE).catch(() => undefined);
    await tellNotStored();
  }
}

/** Stores what is missing and removes what is old; what fails is done at the next start of the page. */
async function tidy(): Promise<void> {
  await fill()
    .then(removeOlder)
    .catch(() => undefined);
}

async function keep(file: string, response: Response): Promise<void> {
  try {
    if (response.ok) await (await caches.open(CACHE)).put(file, response);
  } catch {
    await tellNotStored();
  }
}

/** What is stored: files named by their contents by any version, others by this one unless `older`. */
async function find(file: string, older = isHashed(file)): Promise<Response | undefined> {
  try {
    for (const cacheName of [CACHE, ...(older ? await olderCaches() : [])]) {
      const response = await caches.match(new URL(file, scope), { cacheName });
      if (response) return response;
    }
  } catch {
    return undefined; // the network has it
  }
  return undefined;
}

/** Removes earlier versions when no tab runs them; what this version shares with them it takes over. */
async function removeOlder(): Promise<void> {
  if (!(await find("./")) || !(await isEveryTabCurrent())) return;
  for (const cacheName of await olderCaches()) {
    for (const file of [...FILES].filter(isHashed)) {
      const response = await caches.match(new URL(file, scope), { cacheName });
      if (response) await (await caches.open(CACHE)).put(file, response);
    }
    await caches.delete(cacheName);
  }
}

async function olderCaches(): Promise<string[]> {
  const names = await caches.keys();
  return names.filter((name) => name !== CACHE && `${name} `.startsWith(`${SITE} `));
}

/** Whether each tab holds a lock of this version: those that just begin, or are of an early version, hold none. */
async function isEveryTabCurrent(): Promise<boolean> {
  const { held = [] } = await worker.navigator.locks.query();
  const running = held.map(({ name }) => name!).filter((name) => isLockOfTab(name));
  return running.every((name) => RUNNING.has(name)) && running.length >= (await tabs()).length;
}

function isLockOfTab(name: string): boolean {
  return name.startsWith("rgexport-running ") && name.endsWith(` ${scope.pathname}`);
}

async function tabs(): Promise<readonly WindowClient[]> {
  const windows = await worker.clients.matchAll({ type: "window", includeUncontrolled: true });
  return windows.filter(({ url }) => url.startsWith(scope.href));
}

/** Tells the tabs, which say it once. */
async function tellNotStored(): Promise<void> {
  for (const tab of await tabs()) tab.postMessage("not stored");
}

/** Whether a file's name has the hash of its contents. */
function isHashed(file: string): boolean {
  return file.startsWith("assets/");
}

function anew(file: string): Request {
  return new Request(file, { cache: "reload" });
}

function isolated(response: Response): Response {
  if (response.status === 0 || response.redirected) return response;
  const headers = new Headers(response.headers);
  for (const [header, value] of Object.entries(HEADERS)) headers.set(header, value);
  const { status, statusText } = response;
  return new Response(response.body, { status, statusText, headers });
}
