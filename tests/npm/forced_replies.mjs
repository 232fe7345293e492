// What `tests/npm/test_guide.py` asks of an artifact in transformers.js: a conversation in
// which the model writes tokens that the test chose, each reply up to its last token.

import { readFileSync } from "node:fs";
import { env, LogitsProcessor, LogitsProcessorList, LogLevel } from "@huggingface/transformers";
import { textGeneration } from "rgexport-web";

const [artifact, job] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = "/";
env.logLevel = LogLevel.ERROR;
const chat = await textGeneration(artifact, { device: "cpu" });
const { model } = chat;

class Forced extends LogitsProcessor {
  constructor(ids) {
    super();
    this.ids = [...ids];
  }

  _call(_, logits) {
    logits.data.fill(-1e9);
    logits.data[this.ids.shift()] = 0;
    return logits;
  }
}

const turns = [];
let messages = [];
for (const { content, ids } of JSON.parse(readFileSync(job, "utf-8"))) {
  const before = model.tokensRead;
  const logits_processor = new LogitsProcessorList();
  logits_processor.push(new Forced(ids));
  const options = { max_new_tokens: ids.length, do_sample: false, logits_processor };
  const [{ generated_text }] = await chat([...messages, { role: "user", content }], options);
  messages = generated_text;
  const state = Buffer.from(await model.saveState({ messages })).toString("base64");
  turns.push({ read: model.tokensRead - before, reply: messages.at(-1).content, state });
  // As a page that was closed and opened again.
  await model.forget();
  await model.loadState(Buffer.from(state, "base64"));
}
console.log(JSON.stringify(turns));
