// Runs an artifact in stock onnxruntime-web (WASM) with nothing registered.
// node run.mjs FOLDER '[[ids of the first chunk], [ids of the second], …]' prints the last logits
// of each chunk as a JSON list of lists.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";

const [folder, chunksJson] = process.argv.slice(2);
const read = (name) => readFile(join(folder, name));
const manifest = JSON.parse(await read("rgexport.json"));
const data = "model.onnx.data";

ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(new Uint8Array(await read("model.onnx")), {
  executionProviders: ["wasm"],
  externalData: [{ path: data, data: new Uint8Array(await read(data)) }],
});

const int64 = (numbers) => new ort.Tensor("int64", numbers.map(BigInt), [1, numbers.length]);
const zeros = ({ dtype, shape }) => {
  const size = shape.reduce((a, b) => a * b, 1);
  const array = dtype === "float16" ? new Uint16Array(size) : new Float32Array(size);
  return new ort.Tensor(dtype, array, [1, ...shape]);
};
let states = Object.fromEntries(manifest.states.map((s) => [s.input, zeros(s)]));
let position = 0;
const found = [];
for (const ids of JSON.parse(chunksJson)) {
  const positions = ids.map((_, i) => position + i);
  const feeds = { input_ids: int64(ids), position_ids: int64(positions), ...states };
  const results = await session.run(feeds);
  found.push(Array.from(results.logits.data));
  states = Object.fromEntries(manifest.states.map((s) => [s.input, results[s.output]]));
  position += ids.length;
}
console.log(JSON.stringify(found));
