// Runs an artifact in stock onnxruntime-web (WASM) with nothing registered.
// node run.mjs FOLDER '[[ids of the first chunk], [ids of the second], …]' prints the last logits
// of each chunk as a JSON list of lists.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";
import { Model } from "../../docs/web/recurrentgemma.mjs";

const [folder, chunksJson] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const model = await Model.open(ort, (name) => readFile(join(folder, name)), "wasm");
const found = [];
for (const ids of JSON.parse(chunksJson)) found.push(Array.from(await model.next(ids)));
console.log(JSON.stringify(found));
