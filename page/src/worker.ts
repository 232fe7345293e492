// The model, in a thread of its own: transformers.js with the class of rgexport-web.

import {
  env,
  InterruptableStoppingCriteria,
  LogLevel,
  TextStreamer,
  type Message,
} from "@huggingface/transformers";
import { expose, transfer } from "comlink";
import asyncifyLoader from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import asyncifyBinary from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import loader from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import binary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import { textGeneration, type TextGeneration } from "rgexport-web";
import type { Choice } from "./catalog";
import { download, readFile, release, removeChunks, type Progress } from "./weights";

/** WebGPU needs the build that can wait for the card; the other is smaller and faster. */
const BUILDS = {
  webgpu: { mjs: asyncifyLoader, wasm: asyncifyBinary },
  wasm: { mjs: loader, wasm: binary },
};
const MOST_THREADS = 8;
const ROOT = "/model-files/";

export interface ReplyOptions {
  temperature: number;
  longest: number;
}

export interface Reply {
  messages: Message[];
  /** Tokens that the model took: what is new in the prompt, and the reply. */
  read: number;
  tokensPerSecond: number;
  /** The conversation as a state file. */
  state: Uint8Array;
}

export interface Loaded {
  /** On what the model runs. */
  backend: string;
  /** Whether the next visit has the model without a download. */
  isStored: boolean;
}

export class Engine {
  #chat: TextGeneration | undefined;
  readonly #stopping = new InterruptableStoppingCriteria();

  /** Downloads what is missing, and opens the model; `mustStore` as in `download`. */
  async load(choice: Choice, mustStore: boolean, progress: Progress, opening: () => void): Promise<Loaded> {
    const isStored = await download(choice, mustStore, progress);
    await removeChunks(choice);
    opening();
    const { profile, files } = choice.model;
    const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
    this.#prepare(choice, threads);
    const weights = files.filter(({ path }) => path.startsWith("model.onnx."));
    const externalData = await Promise.all(
      weights.map(async (file) => ({ path: file.path, data: await readFile(file, choice.chunkBytes) })),
    );
    release(weights);
    this.#chat = await textGeneration("model", { device: profile, session_options: { externalData } });
    letMessagesIn(this.#chat.model);
    const wasm = `WASM, ${threads} thread${threads > 1 ? "s" : ""}`;
    return { backend: profile === "webgpu" ? "WebGPU" : wasm, isStored };
  }

  /** Goes on from a state file, or begins anew; returns the messages that it has seen. */
  async open(state: Uint8Array | null): Promise<Message[]> {
    const { model } = this.#loaded();
    await model.forget();
    const messages = state ? (await model.loadState(state)).messages : [];
    if (!messages) throw new Error("this state file has no messages: it is not of a chat");
    return messages;
  }

  /** Answers the last message; `show` gets the text as it comes. */
  async reply(messages: Message[], options: ReplyOptions, show: (piece: string) => void): Promise<Reply> {
    const chat = this.#loaded();
    const before = chat.model.tokensRead;
    let [written, first] = [0, 0];
    const streamer = new TextStreamer(chat.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: show,
      token_callback_function: () => {
        first ||= performance.now();
        written += 1;
      },
    });
    this.#stopping.reset();
    const [made] = await chat(messages, {
      max_new_tokens: options.longest,
      ...(options.temperature > 0
        ? { do_sample: true, temperature: options.temperature, top_k: 0 }
        : { do_sample: false }),
      streamer,
      stopping_criteria: this.#stopping,
    });
    const seconds = (performance.now() - first) / 1000;
    const all = made!.generated_text as Message[];
    const state = await chat.model.saveState({ messages: all });
    const reply = {
      messages: all,
      read: chat.model.tokensRead - before,
      tokensPerSecond: written > 1 ? (written - 1) / seconds : 0,
      state,
    };
    return transfer(reply, [state.buffer as ArrayBuffer]);
  }

  /** Ends the reply after the token that is being computed. */
  stop(): void {
    this.#stopping.interrupt();
  }

  #loaded(): TextGeneration {
    if (!this.#chat) throw new Error("the model is not loaded");
    return this.#chat;
  }

  /** Makes the library read the model's files from our store, and nothing from elsewhere. */
  #prepare({ model, chunkBytes }: Choice, threads: number): void {
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = ROOT;
    env.useBrowserCache = false;
    env.useWasmCache = false;
    env.logLevel = LogLevel.ERROR;
    env.fetch = async (input: string | URL) => {
      const path = String(input).split("/").at(-1);
      const file = model.files.find((one) => one.path === path);
      if (!file) return new Response(null, { status: 404 });
      return new Response(await readFile(file, chunkBytes));
    };
    const wasm = env.backends.onnx.wasm!;
    const { mjs, wasm: file } = BUILDS[model.profile];
    wasm.wasmPaths = { mjs: absolute(mjs), wasm: absolute(file) };
    wasm.numThreads = threads;
  }
}

/** Lets this thread hear `stop` between two tokens: WASM computes without a pause. */
function letMessagesIn(model: TextGeneration["model"]): void {
  const forward = model._forward;
  const { port1, port2 } = new MessageChannel();
  model._forward = async (...inputs: unknown[]) => {
    await new Promise((done) => {
      port1.onmessage = done;
      port2.postMessage(null);
    });
    return forward(...inputs);
  };
}

function absolute(address: string): string {
  return new URL(address, self.location.href).href;
}

expose(new Engine());
