// The model's files in the browser's cache: in chunks named by their hashes, so that a download that
// broke goes on where it was, and a new version brings only what has changed.

import { megabytes, type Choice, type ModelFile } from "./catalog";
import { BASE, scoped } from "./site";

const CACHE = scoped("weights");
const LOCK = scoped("download");
const PARALLEL = 3;
/** Seconds to wait before each further try. */
const PAUSES = [1, 3, 9];
/** Milliseconds without a byte after which a connection is given up. */
const STALLED = 60_000;

export type Progress = (bytes: number, waiting: boolean) => void;

/** How many bytes of the model are here. */
export async function storedBytes(choice: Choice): Promise<number> {
  const found = await namesIn(await caches.open(CACHE));
  return sum(chunksOf(choice).map(({ hash, bytes }) => (found.has(hash) ? bytes : 0)));
}

/**
 * Brings what is missing. Of several tabs one downloads, and the others wait for it.
 * @throws Error if the server does not answer, or answers with something else.
 */
export async function download(choice: Choice, progress: Progress): Promise<void> {
  if ((await storedBytes(choice)) === choice.model.bytes) return;
  progress(0, true);
  await navigator.locks.request(LOCK, async () => {
    const cache = await caches.open(CACHE);
    const found = await namesIn(cache);
    const missing = chunksOf(choice).filter(({ hash }) => !found.has(hash));
    let bytes = choice.model.bytes - sum(missing.map((chunk) => chunk.bytes));
    progress(bytes, false);
    await requireRoom(sum(missing.map((chunk) => chunk.bytes)));
    const advance = (more: number): void => progress((bytes += more), false);
    const work = async (): Promise<void> => {
      for (let chunk = missing.pop(); chunk; chunk = missing.pop()) await bring(cache, chunk, advance);
    };
    missing.reverse();
    // What the others are about to bring is kept, too.
    const ended = await Promise.allSettled(Array.from({ length: PARALLEL }, work));
    for (const one of ended) if (one.status === "rejected") throw one.reason;
  });
}

/** A file of the model, put together; a chunk that was damaged since is brought again. */
export async function readFile(file: ModelFile, chunkBytes: number): Promise<Uint8Array<ArrayBuffer>> {
  const cache = await caches.open(CACHE);
  const whole = new Uint8Array(file.bytes);
  for (const [i, chunk] of partsOf(file, chunkBytes).entries()) {
    let stored = await cache.match(addressOf(chunk.hash));
    let data = stored && new Uint8Array(await stored.arrayBuffer());
    if (!data || (await sha256(data)) !== chunk.hash) {
      await bring(cache, chunk, () => undefined);
      stored = await cache.match(addressOf(chunk.hash));
      data = new Uint8Array(await stored!.arrayBuffer());
    }
    whole.set(data, i * chunkBytes);
  }
  return whole;
}

/** Deletes chunks: all, or those that the site does not have any more. */
export async function removeChunks(except?: Choice): Promise<void> {
  const cache = await caches.open(CACHE);
  const kept = new Set(except?.models.flatMap(({ files }) => files.flatMap((file) => file.chunks)));
  for (const hash of await namesIn(cache)) {
    if (!kept.has(hash)) await cache.delete(addressOf(hash));
  }
}

interface Chunk {
  hash: string;
  bytes: number;
}

function partsOf(file: ModelFile, chunkBytes: number): Chunk[] {
  return file.chunks.map((hash, i) => ({
    hash,
    bytes: Math.min(chunkBytes, file.bytes - i * chunkBytes),
  }));
}

/** The chunks of all files, each once. */
function chunksOf({ model, chunkBytes }: Choice): Chunk[] {
  const all = model.files.flatMap((file) => partsOf(file, chunkBytes));
  return [...new Map(all.map((chunk) => [chunk.hash, chunk])).values()];
}

async function bring(cache: Cache, chunk: Chunk, advance: (bytes: number) => void): Promise<void> {
  for (let attempt = 0; ; attempt++) {
    let got = 0;
    const count = (bytes: number): void => {
      got += bytes;
      advance(bytes);
    };
    try {
      const data = await fetchChunk(chunk, attempt > 0, count);
      const type = { "Content-Type": "application/octet-stream" };
      await cache.put(addressOf(chunk.hash), new Response(data, { headers: type }));
      return;
    } catch (error) {
      advance(-got);
      const pause = PAUSES[attempt];
      if (pause === undefined || isFull(error)) throw explained(error);
      await new Promise((done) => setTimeout(done, pause * 1000));
    }
  }
}

async function fetchChunk(
  { hash, bytes }: Chunk,
  again: boolean,
  count: (bytes: number) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const stopping = new AbortController();
  const giveUp = (): void => stopping.abort(new Error("the server sent nothing for a minute"));
  let waiting = setTimeout(giveUp, STALLED);
  const data = new Uint8Array(bytes);
  let at = 0;
  try {
    // What an earlier try left in the browser's own cache may be what was wrong.
    const cache = again ? "reload" : "no-store";
    const response = await fetch(addressOf(hash), { cache, signal: stopping.signal });
    if (!response.ok || !response.body) {
      throw new Error(`the server answered ${response.status} for a part of the model`);
    }
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      clearTimeout(waiting);
      waiting = setTimeout(giveUp, STALLED);
      if (at + part.value.length > bytes) throw new Error("a part of the model came damaged");
      data.set(part.value, at);
      at += part.value.length;
      count(part.value.length);
    }
  } finally {
    clearTimeout(waiting);
    stopping.abort(); // what is left of it
  }
  if (at !== bytes || (await sha256(data)) !== hash) {
    throw new Error("a part of the model came damaged");
  }
  return data;
}

async function requireRoom(bytes: number): Promise<void> {
  const { quota = Infinity, usage = 0 } = (await navigator.storage.estimate?.()) ?? {};
  if (quota - usage < bytes) {
    throw new Error(
      `The model takes ${megabytes(bytes)} more, and this browser gives ${megabytes(quota - usage)}. ` +
        "Free space on the device, or leave private browsing.",
    );
  }
}

function explained(error: unknown): Error {
  const reason = error instanceof Error ? error.message : String(error);
  if (isFull(error)) return new Error("The browser's storage is full. Free space on the device, then go on.");
  return new Error(`The download stopped: ${reason}. What is here is kept; try again.`);
}

function isFull(error: unknown): boolean {
  return error instanceof DOMException && error.name === "QuotaExceededError";
}

function addressOf(hash: string): string {
  return `${BASE}chunks/${hash}.bin`;
}

async function namesIn(cache: Cache): Promise<Set<string>> {
  const addresses = (await cache.keys()).map((request) => request.url);
  return new Set(addresses.map((url) => url.slice(`${BASE}chunks/`.length, -".bin".length)));
}

async function sha256(data: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function sum(numbers: number[]): number {
  return numbers.reduce((a, b) => a + b, 0);
}
