// What `tests/runtimes/onnx/test_web.py` asks of an artifact in a transformers.js
// that knows RecurrentGemma: the arguments are its sources, the artifact and a job.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [library, artifact, job] = process.argv.slice(2);
const { env, AutoModelForCausalLM, LogLevel, pipeline, Tensor } = await import(pathToFileURL(library));
const { ids, turns, messages, most } = JSON.parse(readFileSync(job, "utf-8"));
env.allowRemoteModels = false;
env.localModelPath = "/";
env.logLevel = LogLevel.WARNING;
const where = { device: "cpu", dtype: "fp32", subfolder: "" };
const found = {};

const model = await AutoModelForCausalLM.from_pretrained(artifact, where);
found.type = model.constructor.name;

function int64(numbers) {
  return new Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
}

// Each turn goes on from the states of the one before.
let states = null;
let text = [...ids];
for (const more of turns) {
  text.push(...more);
  const options = { max_new_tokens: most, do_sample: false, return_dict_in_generate: true };
  const inputs = { inputs: int64(text), attention_mask: int64(text.map(() => 1)) };
  const made = await model.generate({ ...inputs, ...options, past_key_values: states });
  states = made.past_key_values;
  text = made.sequences.tolist()[0].map(Number);
  found.seen = states.get_seq_length();
}
found.text = text;

if (messages) {
  const chat = await pipeline("text-generation", artifact, where);
  const [{ generated_text }] = await chat(messages, { max_new_tokens: most, do_sample: false });
  found.reply = generated_text.at(-1).content;
}
console.log(JSON.stringify(found));
