// State files of rgexport, as rgexport/chat/state_file.py reads and writes them: safetensors with
// the canonical states, the tokens that they have seen, and one JSON object of metadata.

const METADATA = "rgexport.state";
const FORMAT_VERSION = 2;
const TOKENS = "tokens";

/**
 * A state file.
 * @param {object} model `rgexport` of config.json: the model's identity, and its states.
 * @param {bigint[]} ids The tokens that the states have seen.
 * @param {Record<string, Float32Array | Uint16Array>} arrays State → numbers as the graph has them.
 * @param {object} options `pending`: the token after these, which the states have not seen, in a list.
 * @returns {Promise<Uint8Array>}
 */
export async function writeState(model, ids, arrays, { messages = null, precision, pending = [] } = {}) {
  if (![undefined, "fp32", "fp16"].includes(precision)) {
    throw new Error(`the precision of states is ${precision}; expected fp32 or fp16`);
  }
  const tokens = Int32Array.from([...ids, ...pending], Number);
  const entries = [[TOKENS, "I32", [tokens.length], tokens]];
  for (const { name, layout, dtype, shape } of model.states) {
    const half = precision ? precision === "fp16" && !name.endsWith(".rg_lru") : dtype === "float16";
    const numbers = turned(layout, shape, asFloats(arrays[name], dtype), ids.length, true);
    const canonical = layout === "ring" ? shape.slice(-2) : shape;
    entries.push([name, half ? "F16" : "F32", canonical, half ? toHalves(numbers) : numbers]);
  }
  const data = joined(entries.map(([, , , array]) => bytesOf(array)));
  const fields = {
    format_version: FORMAT_VERSION,
    identity: model.identity,
    tokens: tokens.length,
    position: ids.length,
    has_text: true,
    messages,
    engine: "transformers.js",
    tool: `rgexport ${model.version}`,
    sha256: await sha256(data),
  };
  const header = { __metadata__: { [METADATA]: JSON.stringify(fields) } };
  let at = 0;
  for (const [name, dtype, shape, { byteLength }] of entries) {
    header[name] = { dtype, shape, data_offsets: [at, (at += byteLength)] };
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  text = joined([text, new Uint8Array(-text.length & 7).fill(0x20)]);
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(text.length), true);
  return joined([length, text, data]);
}

/**
 * What is in a state file of the model.
 * @returns {Promise<{ids: bigint[], position: number, messages: object[] | null,
 *   arrays: Record<string, Float32Array | Uint16Array>}>} `arrays` as the graph has them.
 */
export async function readState(model, file) {
  const bytes = new Uint8Array(file.buffer ?? file, file.byteOffset ?? 0, file.byteLength);
  const { header, data } = parsed(bytes);
  const fields = JSON.parse(header.__metadata__[METADATA]);
  if (fields.format_version !== FORMAT_VERSION) {
    throw new Error(`the state file has format version ${fields.format_version}, not ${FORMAT_VERSION}`);
  }
  requireSameModel(fields, model.identity);
  if ((await sha256(data)) !== fields.sha256) {
    throw new Error("the state file is damaged: its contents do not have the hash that it names");
  }
  requireSound(model, header, fields);
  if (!fields.has_text) {
    throw new Error("the state file has no text, only its hash; save one with its text");
  }
  const part = (name) => {
    const { dtype, data_offsets: [start, end] } = header[name];
    return { dtype, buffer: data.slice(start, end).buffer };
  };
  const arrays = {};
  for (const { name, layout, dtype, shape } of model.states) {
    const { dtype: stored, buffer } = part(name);
    const floats = stored === "F16" ? fromHalves(new Uint16Array(buffer)) : new Float32Array(buffer);
    const numbers = turned(layout, shape, floats, fields.position, false);
    arrays[name] = dtype === "float16" ? toHalves(numbers) : numbers;
  }
  const ids = Array.from(new Int32Array(part(TOKENS).buffer), BigInt);
  return { ids, position: fields.position, messages: fields.messages, arrays };
}

function parsed(bytes) {
  try {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    JSON.parse(header.__metadata__[METADATA]);
    return { header, data: bytes.subarray(8 + length) };
  } catch {
    throw new Error("this is no state file of rgexport");
  }
}

/** The header is not covered by the hash, so what it says must fit together. */
function requireSound(model, header, { position, tokens, has_text: hasText, messages = null }) {
  const unseen = tokens - position;
  const counts = [position, tokens].every((n) => Number.isSafeInteger(n) && n >= 0);
  const wanted = hasText ? [[TOKENS, ["I32"], [tokens]]] : [];
  for (const { name, layout, shape } of model.states) {
    wanted.push([name, ["F32", "F16"], layout === "ring" ? shape.slice(-2) : shape]);
  }
  const fits = ([name, dtypes, shape]) =>
    header[name] && dtypes.includes(header[name].dtype) && `${header[name].shape}` === `${shape}`;
  const isMessage = (m) => typeof m?.role === "string" && typeof m.content === "string";
  if (messages !== null && !(Array.isArray(messages) && messages.every(isMessage))) {
    throw new Error("the state file is damaged: its messages are no list of roles and texts");
  }
  if (!counts || unseen < 0 || unseen > 1 || !wanted.every(fits)) {
    throw new Error("the state file is damaged, or of a model with other states");
  }
}

function requireSameModel({ identity = {}, messages = null }, own) {
  const differing = {
    [`the model ${identity.name} with other weights`]: identity.weights !== own.weights,
    [`a window of ${identity.window} tokens`]: identity.window !== own.window,
    "another chat template": messages !== null && identity.template !== own.template,
  };
  const what = Object.keys(differing).find((name) => differing[name]);
  if (what) throw new Error(`the state file is of ${what}; this model is ${own.name}`);
}

/**
 * A ring as the canonical state, oldest first, or back; other states as they are.
 * Position p is in slot p modulo the window.
 */
function turned(layout, shape, numbers, position, toCanonical) {
  if (layout !== "ring") return numbers;
  const [window, width] = shape.slice(-2);
  const found = new Float32Array(numbers.length);
  for (let age = 0; age < window; age++) {
    const slot = (position + age) % window;
    const [from, to] = toCanonical ? [slot, age] : [age, slot];
    found.set(numbers.subarray(from * width, (from + 1) * width), to * width);
  }
  return found;
}

function asFloats(array, dtype) {
  return dtype === "float16" ? fromHalves(new Uint16Array(array.buffer, array.byteOffset, array.length)) : array;
}

const FLOAT = new Float32Array(1);
const BITS = new Uint32Array(FLOAT.buffer);

/** float32 → float16, rounded to nearest, ties to even. */
export function toHalves(numbers) {
  return Uint16Array.from(numbers, (number) => {
    FLOAT[0] = number;
    const sign = (BITS[0] >>> 16) & 0x8000;
    const size = Math.abs(FLOAT[0]);
    if (Number.isNaN(size)) return sign | 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    // Adding a power of two makes the float's own rounding drop the bits that a half lacks.
    const exponent = Math.max((BITS[0] & 0x7f800000) >>> 23, 113) - 127;
    const unit = 2 ** (exponent - 10);
    const units = evenly(size / unit);
    return sign | (units < 1024 ? units : ((exponent + 14) << 10) + units);
  });
}

function evenly(x) {
  const low = Math.floor(x);
  const over = x - low;
  return over > 0.5 || (over === 0.5 && low % 2 === 1) ? low + 1 : low;
}

/** float16 → float32. */
export function fromHalves(halves) {
  return Float32Array.from(halves, (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const [exponent, rest] = [(bits >>> 10) & 31, bits & 1023];
    if (exponent === 31) return rest ? NaN : sign * Infinity;
    return sign * (exponent ? (1024 + rest) * 2 ** (exponent - 25) : rest * 2 ** -24);
  });
}

function bytesOf(array) {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

function joined(parts) {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) throw new Error("hashes need a page over https, or localhost");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
