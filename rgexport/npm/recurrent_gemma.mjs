// RecurrentGemma for transformers.js: `const chat = await textGeneration(ARTIFACT);` gives the
// library's pipeline over what `rgexport onnx` made. After `register()` its own `pipeline` does, too.
//
// The model remembers what it has read: a prompt that begins with the text of an earlier call costs
// only its own tokens. Its memory of a text is a state of fixed size, which can be saved.

import {
  AutoConfig,
  AutoModelForCausalLM,
  AutoTokenizer,
  DynamicCache,
  PreTrainedModel,
  Tensor,
  TextGenerationPipeline,
  env,
} from "@huggingface/transformers";
import { readState, writeState } from "./state_file.mjs";

/** Tokens of a prompt that are read in one run: more would take more memory, but no less time. */
const CHUNK = 512;
/** How many texts a model remembers: the ends of prompts and of replies. */
const REMEMBERED = 4;
const MODEL_TYPE = "recurrent_gemma";

/** Who uses a tensor: a state after a text is shared by all who go on from there. */
const users = new WeakMap();

function hold(tensor) {
  users.set(tensor, (users.get(tensor) ?? 0) + 1);
}

function release(tensor) {
  const left = users.get(tensor) - 1;
  users.set(tensor, left);
  if (left === 0) tensor.dispose();
}

/** The states after the tokens `ids` (a list for each row), by the names of the model's inputs. */
export class States extends DynamicCache {
  #ids;

  /**
   * @param {bigint[][]} ids The tokens that led here.
   * @param {Record<string, Tensor>} [tensors] The states; none at the beginning of a text.
   */
  constructor(ids, tensors = {}) {
    super();
    this.#ids = ids;
    this.update(tensors);
  }

  /** The tokens that led here, a list for each row. */
  get ids() {
    return this.#ids;
  }

  get_seq_length() {
    return this.#ids[0].length;
  }

  /** Replaces states; those that nobody else uses are freed. */
  update(tensors) {
    for (const [name, tensor] of Object.entries(tensors)) {
      const before = this[name];
      if (before === tensor) continue;
      hold(tensor);
      this[name] = tensor;
      if (before) release(before);
    }
  }

  /** Replaces states after more tokens were read. */
  advance(ids, tensors) {
    this.#ids = this.#ids.map((row, i) => row.concat(ids[i]));
    this.update(tensors);
  }

  /** Another one at the same place, which can go on by itself. */
  fork() {
    return new States(this.#ids, { ...this });
  }

  async dispose() {
    for (const name of Object.keys(this)) {
      release(this[name]);
      delete this[name];
    }
  }
}

/** The model: `generate`, and so pipelines, streamers and chat templates, are the library's. */
export class RecurrentGemmaForCausalLM extends PreTrainedModel {
  /** Tokens that were read so far, of prompts and of replies. */
  tokensRead = 0;
  /** The vocabulary, by which the text of a reply is found again in other tokens. */
  tokenizer = null;
  /** @type {{states: States, pending: bigint[]}[]} The newest first; `pending` is the token after its states. */
  #remembered = [];

  /** As the library's; the files of the weights are those that config.json lists. */
  static async from_pretrained(model, options = {}) {
    const config = options.config ?? (await AutoConfig.from_pretrained(model, options));
    const own = config.rgexport;
    if (config.model_type !== MODEL_TYPE || !own) {
      throw new Error(`${model} is not an ONNX artifact of rgexport: config.json says so`);
    }
    const session = { ...options.session_options };
    if (!isLocalFolder(model)) {
      session.externalData ??= own.data_files.map((path) => ({ path, data: path }));
    }
    if (options.device === "webgpu") {
      const onCard = own.states.map((state) => [state.output, "gpu-buffer"]);
      session.preferredOutputLocation ??= Object.fromEntries(onCard);
    }
    const made = await super.from_pretrained(model, {
      ...options,
      // The library warns of every type that it does not know, except this one.
      config: { ...config, model_type: "custom" },
      dtype: "fp32", // the word for a file without a suffix
      subfolder: "",
      session_options: session,
    });
    made.config.model_type = MODEL_TYPE;
    return made;
  }

  constructor(config, sessions, configs) {
    super(config, sessions, configs);
    this.can_generate = true;
    this.forward_params = ["input_ids", "attention_mask", "past_key_values"];
    this._prepare_inputs_for_generation = (self, ids, inputs) => unread(ids, inputs);
    this._forward = (self, inputs) => self.#read(inputs);
  }

  /** As the library's; of a text that begins as an earlier one, only the rest is read. */
  async generate(options) {
    const input = options.input_ids ?? options.inputs;
    const rows = input.tolist();
    const mask = options.attention_mask ?? int64(Array(input.size).fill(1), input.dims);
    if (mask.tolist().flat().some((seen) => Number(seen) === 0)) {
      throw new Error("texts of unequal length were padded; a recurrent model reads them one by one");
    }
    if (options.past_key_values || rows.length !== 1) {
      const states = options.past_key_values ?? begun(rows.length);
      return this.#generate(options, input, mask, states, !options.past_key_values);
    }
    const { states, prompt } = this.#resume(rows[0].map(BigInt));
    const [ids, ones] = [prompt, Array(prompt.length).fill(1)].map((row) => int64(row, [1, row.length]));
    const made = await this.#generate(options, ids, ones, states, true);
    // The caller gets the prompt in the tokens that it gave.
    const given = (sequences) => withPrompt(rows[0], prompt.length, sequences);
    return made.sequences ? { ...made, sequences: given(made.sequences) } : given(made);
  }

  /** Continues the states, which are freed if they are `ours` and the caller does not get them. */
  async #generate({ inputs: _, ...options }, input_ids, attention_mask, states, ours) {
    let made;
    try {
      made = await super.generate({ ...options, input_ids, attention_mask, past_key_values: states });
      const sequences = made.sequences ?? made;
      if (states.ids.length === 1) {
        this.#remember(states, sequences.tolist()[0].map(BigInt).slice(states.get_seq_length()));
      }
    } finally {
      if (ours && !made?.past_key_values) await states.dispose();
    }
    return made;
  }

  /** Forgets all texts. */
  async forget() {
    for (const { states } of this.#remembered.splice(0)) await states.dispose();
  }

  async dispose() {
    await this.forget();
    return super.dispose();
  }

  /**
   * The state after the last text, as a file that every engine of rgexport can go on with.
   * @param {{ messages?: {role: string, content: string}[], precision?: "fp32" | "fp16" }} options
   * @returns {Promise<Uint8Array>} A safetensors file.
   */
  async saveState({ messages = null, precision } = {}) {
    if (!this.#remembered.length) throw new Error("nothing was read yet: there is no state to save");
    const [{ states, pending }] = this.#remembered;
    const arrays = {};
    for (const { input, name } of this.config.rgexport.states) {
      arrays[name] = await numbersOf(states[input]);
    }
    return writeState(this.config.rgexport, states.ids[0], arrays, { messages, precision, pending });
  }

  /**
   * Remembers the text of a state file: a prompt that begins with it costs only the rest.
   * @param {ArrayBuffer | Uint8Array} file
   * @returns {Promise<{ids: bigint[], messages: object[] | null}>} What the state has seen.
   */
  async loadState(file) {
    const { ids, position, messages, arrays } = await readState(this.config.rgexport, file);
    const tensors = {};
    for (const { input, name, dtype, shape } of this.config.rgexport.states) {
      tensors[input] = new Tensor(dtype, arrays[name], [1, ...shape]);
    }
    const states = new States([ids.slice(0, position)], tensors);
    this.#remember(states, ids.slice(position));
    await states.dispose();
    return { ids, messages };
  }

  /** Runs the model over tokens [B, T] that the states have not seen. */
  async #read({ input_ids: input, past_key_values: states }) {
    const rows = input.tolist();
    let outputs;
    for (let start = 0; start < rows[0].length; start += CHUNK) {
      outputs?.logits.dispose?.();
      const ids = rows.map((row) => row.slice(start, start + CHUNK));
      outputs = await this.#run(ids, states);
    }
    if (rows[0].length > 1) this.#remember(states);
    return outputs;
  }

  async #run(ids, states) {
    const [batch, count, seen] = [ids.length, ids[0].length, states.get_seq_length()];
    const positions = Array.from({ length: count }, (_, i) => BigInt(seen + i));
    const feeds = {
      input_ids: int64(ids.flat(), [batch, count]),
      position_ids: int64(Array(batch).fill(positions).flat(), [batch, count]),
    };
    for (const { input, dtype, shape } of this.config.rgexport.states) {
      feeds[input] = states[input] ?? zeros(dtype, [batch, ...shape]);
    }
    const session = this.sessions.model;
    const run = Object.entries(feeds).map(([name, tensor]) => [name, tensor.ort_tensor]);
    const found = await session.run(Object.fromEntries(run));
    const outputs = {};
    for (const [name, tensor] of Object.entries(found)) outputs[name] = new Tensor(tensor);
    const { states: records } = this.config.rgexport;
    states.advance(ids, Object.fromEntries(records.map((r) => [r.input, outputs[r.output]])));
    this.tokensRead += batch * count;
    return outputs;
  }

  /** The known states from which the fewest tokens of a text are left to read, and its tokens. */
  #resume(wanted) {
    const options = this.#remembered.map(({ states, pending }) => {
      const [seen] = states.ids;
      if (begins(wanted, seen)) return { states, prompt: wanted };
      const prompt = this.tokenizer && respelled(this.tokenizer, seen, pending, wanted);
      return prompt && begins(prompt, seen) ? { states, prompt } : null;
    });
    const unreadCount = ({ states, prompt }) => prompt.length - states.get_seq_length();
    const [best] = options.filter(Boolean).sort((a, b) => unreadCount(a) - unreadCount(b));
    return best ? { states: best.states.fork(), prompt: best.prompt } : { states: begun(1), prompt: wanted };
  }

  #remember(states, pending = []) {
    if (states.ids.length !== 1) return; // batches are not looked up
    const [ids] = states.ids;
    const same = this.#remembered.findIndex((other) => areEqual(other.states.ids[0], ids));
    if (same >= 0) this.#remembered.splice(same, 1)[0].states.dispose();
    this.#remembered.unshift({ states: states.fork(), pending });
    for (const old of this.#remembered.splice(REMEMBERED)) old.states.dispose();
  }
}

/**
 * The library's text generation pipeline for an artifact.
 * @param {string} model A folder, an address below `env.remoteHost`, or a name on the hub.
 * @param {object} [options] As those of the library's `pipeline`.
 */
export async function textGeneration(model, options = {}) {
  const [tokenizer, made] = await Promise.all([
    AutoTokenizer.from_pretrained(model, options),
    RecurrentGemmaForCausalLM.from_pretrained(model, options),
  ]);
  made.tokenizer = tokenizer;
  return new TextGenerationPipeline({ task: "text-generation", model: made, tokenizer });
}

/** Makes `AutoModelForCausalLM`, and so `pipeline`, load artifacts as they load other models. */
export function register() {
  if (AutoModelForCausalLM.from_pretrained.knowsRecurrentGemma) return;
  const others = AutoModelForCausalLM.from_pretrained;
  AutoModelForCausalLM.from_pretrained = async function (model, options = {}) {
    const config = await AutoConfig.from_pretrained(model, options);
    const load = config.model_type === MODEL_TYPE ? RecurrentGemmaForCausalLM : this;
    const from = load === this ? others : load.from_pretrained;
    return from.call(load, model, { ...options, config });
  };
  AutoModelForCausalLM.from_pretrained.knowsRecurrentGemma = true;
}

/** The states of texts of which nothing was read. */
function begun(batch) {
  return new States(Array.from({ length: batch }, () => []));
}

/** The model's inputs: of all tokens those that the states have not seen. */
function unread(rows, inputs) {
  const states = inputs.past_key_values;
  const rest = rows.map((row) => row.slice(states.get_seq_length()).map(BigInt));
  return { ...inputs, input_ids: int64(rest.flat(), [rest.length, rest[0].length]) };
}

/** Whether a text has more tokens than those that it begins with. */
function begins(text, ids) {
  return ids.length < text.length && areEqual(ids, text.slice(0, ids.length));
}

function areEqual(left, right) {
  return left.length === right.length && left.every((id, i) => id === right[i]);
}

/**
 * The tokens `wanted`, whose beginning is replaced by the tokens `seen` and `pending` with the same text;
 * null if they have another text. A model may spell a reply otherwise than the tokenizer does, and a template
 * trims it. The two are compared from one special token to the next.
 */
function respelled(tokenizer, seen, pending, wanted) {
  const special = new Set(tokenizer.all_special_ids.map(BigInt));
  // The template has an end of its own, whichever token ended the reply.
  const known = [...seen, ...pending.filter((id) => !special.has(id))];
  const [before, after] = [known, wanted].map((ids) => segments(ids, special));
  const texts = { skip_special_tokens: false, clean_up_tokenization_spaces: false };
  // A prompt ends with that by which replies begin.
  const opening = tokenizer.decode(after.at(-1), texts);
  const text = (ids) => {
    const whole = tokenizer.decode(ids, texts);
    return whole.startsWith(opening) ? opening + whole.slice(opening.length).trim() : whole;
  };
  const isSame = (ids, i) => after[i] && (areEqual(ids, after[i]) || text(ids) === text(after[i]));
  if (!before.every(isSame)) return null;
  return [...known, ...after.slice(before.length).flat()];
}

/** A text in pieces: the special tokens, and what is between them. */
function segments(ids, special) {
  const pieces = [];
  for (const [i, id] of ids.entries()) {
    const goesOn = i > 0 && !special.has(id) && !special.has(ids[i - 1]);
    if (goesOn) pieces.at(-1).push(id);
    else pieces.push([id]);
  }
  return pieces;
}

/** Generated sequences, whose first `count` tokens are replaced by a prompt. */
function withPrompt(prompt, count, sequences) {
  const rows = sequences.tolist().map((row) => [...prompt, ...row.slice(count)]);
  return int64(rows.flat(), [rows.length, rows[0].length]);
}

function int64(numbers, dims) {
  return new Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);
}

function zeros(dtype, dims) {
  const size = dims.reduce((a, b) => a * b, 1);
  return new Tensor(dtype, new (dtype === "float16" ? Uint16Array : Float32Array)(size), dims);
}

/** The numbers of a state, wherever it lies. */
async function numbersOf(tensor) {
  return tensor.location === "gpu-buffer" ? tensor.ort_tensor.getData() : tensor.data;
}

/** Whether Node reads the model from a folder, in which ONNX Runtime finds the weights by itself. */
function isLocalFolder(model) {
  const files = globalThis.process?.getBuiltinModule?.("node:fs");
  const places = [model, `${env.localModelPath}${model}`];
  return Boolean(files) && places.some((place) => files.existsSync(`${place}/config.json`));
}
