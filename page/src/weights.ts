// The model's files in the browser's cache: in chunks named by their hashes, so that a download that
// broke goes on where it was, and a new version brings only what has changed. Where the cache has no
// room, chunks are held in memory until the model is opened.

import { megabytes, type Choice, type ModelFile } from "./catalog";
import { isFull, sentence } from "./errors";
import { BASE, scoped } from "./site";

const CACHE = scoped("weights");
const LOCK = scoped("download");
const PARALLEL = 3;
/** Seconds to wait before each further try. */
const PAUSES = [1, 3, 9];
/** Milliseconds without a byte after which a connection is given up. */
const STALLED = 60_000;

type Data = Uint8Array<ArrayBuffer>;

/** Chunks that could not be stored, by their hashes. */
const held = new Map<string, Data>();

/** The name of the error that a model without room in the storage ends with. */
export const NO_ROOM = "NoRoom";

export type Progress = (bytes: number, waiting: boolean) => void;

/** How many bytes of the model are here. */
export async function storedBytes(choice: Choice): Promise<number> {
  const found = await namesIn(await caches.open(CACHE));
  return sum(chunksOf(choice).map(({ hash, bytes }) => (found.has(hash) ? bytes : 0)));
}

/**
 * Brings what is missing; returns whether all of it is stored. Of several tabs one downloads, and the
 * others wait for it.
 * @param mustStore Whether it fails where the storage has no room, with an error named `NO_ROOM`.
 * @throws Error if the server does not answer, or answers with something else.
 */
export async function download(choice: Choice, mustStore: boolean, progress: Progress): Promise<boolean> {
  if ((await storedBytes(choice)) === choice.model.bytes) return true;
  progress(0, true);
  await navigator.locks.request(LOCK, async () => {
    const cache = await caches.open(CACHE);
    const found = await namesIn(cache);
    const missing = chunksOf(choice).filter(({ hash }) => !found.has(hash));
    let bytes = choice.model.bytes - sum(missing.map((chunk) => chunk.bytes));
    progress(bytes, false);
    if (mustStore) await requireRoom(sum(missing.map((chunk) => chunk.bytes)));
    const advance = (more: number): void => {
      bytes += more;
      progress(bytes, false);
    };
    const work = async (): Promise<void> => {
      for (let chunk = missing.pop(); chunk; chunk = missing.pop()) {
        const data = await bring(chunk, advance);
        await store(cache, chunk, data).catch((error: unknown) => {
          if (mustStore) throw isFull(error) ? noRoom(sentence(error)) : error;
          held.set(chunk!.hash, data);
        });
      }
    };
    missing.reverse();
    // What the others are about to bring is kept, too.
    const ended = await Promise.allSettled(Array.from({ length: PARALLEL }, work));
    for (const one of ended) if (one.status === "rejected") throw one.reason;
  });
  return held.size === 0;
}

/** A file of the model, put together; a chunk that was damaged since is brought again. */
export async function readFile(file: ModelFile, chunkBytes: number): Promise<Data> {
  const cache = await caches.open(CACHE);
  const whole = new Uint8Array(file.bytes);
  for (const [i, chunk] of partsOf(file, chunkBytes).entries()) {
    const data = held.get(chunk.hash) ?? (await storedOrBrought(cache, chunk));
    whole.set(data, i * chunkBytes);
  }
  return whole;
}

/** Frees the chunks of these files, where they are held in memory. */
export function release(files: ModelFile[]): void {
  for (const hash of files.flatMap(({ chunks }) => chunks)) held.delete(hash);
}

async function storedOrBrought(cache: Cache, chunk: Chunk): Promise<Data> {
  const stored = await cache.match(addressOf(chunk.hash));
  const data = stored && new Uint8Array(await stored.arrayBuffer());
  if (data && (await sha256(data)) === chunk.hash) return data;
  const brought = await bring(chunk, () => undefined);
  await store(cache, chunk, brought).catch(() => undefined); // it is here all the same
  return brought;
}

async function store(cache: Cache, { hash }: Chunk, data: Data): Promise<void> {
  const type = { "Content-Type": "application/octet-stream" };
  await cache.put(addressOf(hash), new Response(data, { headers: type }));
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

/** Asks for a chunk, several times if need be. */
async function bring(chunk: Chunk, advance: (bytes: number) => void): Promise<Data> {
  for (let attempt = 0; ; attempt++) {
    let got = 0;
    const count = (bytes: number): void => {
      got += bytes;
      advance(bytes);
    };
    try {
      return await fetchChunk(chunk, attempt > 0, count);
    } catch (error) {
      advance(-got);
      const pause = PAUSES[attempt];
      if (pause === undefined) {
        throw new Error(`The download stopped: ${sentence(error)}. What is here is kept; try again.`);
      }
      await new Promise((done) => setTimeout(done, pause * 1000));
    }
  }
}

async function fetchChunk(
  { hash, bytes }: Chunk,
  again: boolean,
  count: (bytes: number) => void,
): Promise<Data> {
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
    throw noRoom(
      `The model takes ${megabytes(bytes)} more, and this browser gives ${megabytes(quota - usage)}. ` +
        "Free space on the device, or leave private browsing.",
    );
  }
}

/** An error whose name survives the way to the page's thread. */
function noRoom(message: string): Error {
  const error = new Error(`${message} Without storing it, the model is downloaded at each visit.`);
  error.name = NO_ROOM;
  return error;
}
function addressOf(hash: string): string {
  return `${BASE}chunks/${hash}.bin`;
}

async function namesIn(cache: Cache): Promise<Set<string>> {
  const addresses = (await cache.keys()).map((request) => request.url);
  return new Set(addresses.map((url) => url.slice(`${BASE}chunks/`.length, -".bin".length)));
}

async function sha256(data: Data): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function sum(numbers: number[]): number {
  return numbers.reduce((a, b) => a + b, 0);
}
