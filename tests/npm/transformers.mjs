// What `tests/runtimes/onnx/test_web.py` asks of an artifact in transformers.js, in Node
// and in a page. `job` has some of: `ids` to continue, `messages` of one conversation, a `state` to
// begin from and the `text` that goes on from it.

/** Does a job with the modules of an artifact; `load(name)` imports one. */
export async function run(library, module, artifact, job, device) {
  const { env, pipeline, Tensor, TextStreamer } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.logLevel = library.LogLevel.ERROR;
  if (job.root) env.localModelPath = job.root;
  let chat;
  if (job.registered) {
    module.register();
    chat = await pipeline("text-generation", artifact, { device });
  } else {
    chat = await module.textGeneration(artifact, { device });
  }
  const { model, tokenizer } = chat;
  const found = { turns: [], live: count(model) };
  const options = { max_new_tokens: job.most ?? 8, do_sample: false };
  if (job.state) found.loaded = (await model.loadState(decoded(job.state))).messages;
  for (const content of job.messages ?? []) {
    const messages = [...(found.turns.at(-1)?.messages ?? found.loaded ?? []), { role: "user", content }];
    const [before, pieces] = [model.tokensRead, []];
    const streamer = new TextStreamer(tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: (piece) => pieces.push(piece),
    });
    const [{ generated_text }] = await chat(messages, { ...options, streamer });
    found.turns.push({
      messages: generated_text,
      reply: generated_text.at(-1).content,
      streamed: pieces.join(""),
      read: model.tokensRead - before,
    });
  }
  if (job.save) {
    const { messages } = found.turns.at(-1);
    found.state = encoded(await model.saveState({ messages, precision: job.precision }));
  }
  if (job.ids) {
    await model.forget();
    const inputs = new Tensor("int64", BigInt64Array.from(job.ids, BigInt), [1, job.ids.length]);
    const made = await model.generate({ inputs, ...options });
    found.ids = made.tolist()[0].slice(job.ids.length).map(Number);
  }
  found.live = found.live();
  return found;
}

/** Counts the states that are on a graphics card and were not freed. */
function count(model) {
  let live = 0;
  const { model: session } = model.sessions;
  const run = session.run.bind(session);
  session.run = async (...feeds) => {
    const found = await run(...feeds);
    for (const tensor of Object.values(found)) {
      if (tensor.location !== "gpu-buffer") continue;
      const dispose = tensor.dispose.bind(tensor);
      live += 1;
      tensor.dispose = () => ((live -= 1), dispose());
    }
    return found;
  };
  return () => live;
}

function encoded(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function decoded(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

if (globalThis.process?.versions?.node) {
  const [artifact, job] = process.argv.slice(2);
  const { readFileSync } = await import("node:fs");
  const library = await import("@huggingface/transformers");
  const module = await import("rgexport-web");
  const asked = JSON.parse(readFileSync(job, "utf-8"));
  console.log(JSON.stringify(await run(library, module, artifact, { root: "/", ...asked }, "cpu")));
}
