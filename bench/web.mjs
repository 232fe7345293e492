// How long a step and a prefill of an artifact for `wasm` take in Node, which has Chromium's engine.
// node bench/web.mjs FOLDER [THREADS]; tests/npm has onnxruntime-web, after `npm install` there.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "../tests/npm/node_modules/onnxruntime-web/dist/ort.node.min.mjs";
import { Model } from "../docs/web/recurrentgemma.mjs";

const [folder, threads = "2"] = process.argv.slice(2);
const PROMPT = 128, STEPS = 10;
ort.env.wasm.numThreads = Number(threads);

const seconds = async (work) => {
  const start = performance.now();
  await work();
  return (performance.now() - start) / 1e3;
};
let model;
const opening = await seconds(async () => {
  model = await Model.open(ort, (name) => readFileSync(join(folder, name)), "wasm");
});
const steps = [];
for (let i = 0; i < STEPS; i++) steps.push(await seconds(() => model.next([2])));
const prompt = await seconds(() => model.next(Array.from({ length: PROMPT }, (_, i) => i + 2)));
const step = Math.min(...steps); // the first ones wait for the compiler
console.log(`onnxruntime-web ${ort.env.versions.web}, ${threads} threads: opened in ${opening.toFixed(1)} s,`);
console.log(`a step ${step.toFixed(3)} s, a prefill of ${PROMPT} tokens ${prompt.toFixed(2)} s`);
