// A RecurrentGemma artifact of `rgexport onnx --profile wasm|webgpu` in onnxruntime-web.

/** The model and the state of one conversation. */
export class Model {
  /**
   * Opens an artifact.
   * @param ort onnxruntime-web, from "onnxruntime-web/webgpu" or "onnxruntime-web/wasm".
   * @param read an async function from the name of a file to its bytes, an ArrayBuffer.
   * @param provider "wasm" or "webgpu".
   * @param options of the session, beside what is set here.
   */
  static async open(ort, read, provider, options = {}) {
    const manifest = JSON.parse(new TextDecoder().decode(await read("rgexport.json")));
    const files = Object.keys(manifest.files).filter((name) => name.startsWith("model.onnx.data"));
    const externalData = [];
    for (const path of files) externalData.push({ path, data: new Uint8Array(await read(path)) });
    const session = await ort.InferenceSession.create(new Uint8Array(await read("model.onnx")), {
      executionProviders: [provider],
      externalData,
      // On a graphics card the state stays where it is; only logits come back.
      preferredOutputLocation: Object.fromEntries([
        ["logits", "cpu"],
        ...manifest.states.map((s) => [s.output, provider === "webgpu" ? "gpu-buffer" : "cpu"]),
      ]),
      ...options,
    });
    return new Model(ort, session, manifest);
  }

  constructor(ort, session, manifest) {
    [this.ort, this.session, this.manifest] = [ort, session, manifest];
    this.reset();
  }

  /** Forgets the conversation. */
  reset() {
    this.position = 0;
    this.#keep(Object.fromEntries(this.manifest.states.map((s) => [s.input, this.#zeros(s)])));
  }

  /** Takes token ids, any number of them; gives the logits of what comes after the last one. */
  async next(ids) {
    const positions = ids.map((_, i) => this.position + i);
    const feeds = { input_ids: this.#int64(ids), position_ids: this.#int64(positions) };
    const results = await this.session.run({ ...feeds, ...this.states });
    this.#keep(Object.fromEntries(this.manifest.states.map((s) => [s.input, results[s.output]])));
    this.position += ids.length;
    return results.logits.data;
  }

  /** Takes token ids; gives the likeliest `count` tokens after them, one by one. */
  async *continue(ids, count) {
    for (let logits = await this.next(ids); count > 0; count--) {
      const token = logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
      yield token;
      if (count > 1) logits = await this.next([token]);
    }
  }

  #keep(states) {
    for (const tensor of Object.values(this.states ?? {})) tensor.dispose();
    this.states = states;
  }

  #zeros({ dtype, shape }) {
    const size = shape.reduce((a, b) => a * b, 1);
    const array = dtype === "float16" ? new Uint16Array(size) : new Float32Array(size);
    return new this.ort.Tensor(dtype, array, [1, ...shape]);
  }

  #int64(numbers) {
    return new this.ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
  }
}
