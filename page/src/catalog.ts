// `model.json`: what the site has, as rgexport/web_page/site.py writes it.

export interface ModelFile {
  path: string;
  bytes: number;
  /** SHA-256 of its parts of `chunk_bytes`, in order; the last may be shorter. */
  chunks: string[];
}

export interface Model {
  name: string;
  profile: "webgpu" | "wasm";
  /** Whether it is made of Google's weights, so that Gemma's terms apply. */
  gemma: boolean;
  /** As the model's card names it; null or absent if it does not. */
  licence?: string | null;
  /** Of the download: a chunk that occurs twice counts once. */
  bytes: number;
  files: ModelFile[];
}

export interface Catalog {
  chunk_bytes: number;
  models: Model[];
}

export interface Choice {
  model: Model;
  chunkBytes: number;
  /** All that the site has. */
  models: Model[];
}

/** The model for this browser: that for graphics cards if it has WebGPU, else that for processors. */
export async function chooseModel(): Promise<Choice> {
  const catalog = await readCatalog();
  const isOffered = catalog.models.some((model) => model.profile === "webgpu");
  for (const profile of isOffered && (await hasWebGpu()) ? ["webgpu", "wasm"] : ["wasm"]) {
    const model = catalog.models.find((one) => one.profile === profile);
    if (model) return { model, chunkBytes: catalog.chunk_bytes, models: catalog.models };
  }
  throw new Error(
    "This model needs WebGPU, which this browser does not offer here. Try a current Chrome, Edge or Safari.",
  );
}

async function readCatalog(): Promise<Catalog> {
  const response = await fetch("model.json", { cache: "no-cache" }).catch(() => {
    throw new Error("The server does not answer. Check the connection, then try again.");
  });
  if (!response.ok) {
    throw new Error(
      `The site is incomplete: its list of models, model.json, cannot be read (${response.status}). ` +
        "Try again, or tell whoever runs the site.",
    );
  }
  return (await response.json().catch(() => {
    throw new Error("The site's list of models, model.json, is damaged. Tell whoever runs the site.");
  })) as Catalog;
}

/** Whether WebGPU runs on a graphics card; `?device=webgpu` and `?device=wasm` decide it by hand. */
async function hasWebGpu(): Promise<boolean> {
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<unknown> } };
  const wanted = new URLSearchParams(location.search).get("device");
  if (!gpu || wanted === "wasm") return false;
  // Chromium complains in the console if there is no adapter, so it is not asked in vain.
  return (wanted === "webgpu" || hasGraphicsCard()) && Boolean(await gpu.requestAdapter());
}

/** WebGL names the card, or the program that stands in for one. */
function hasGraphicsCard(): boolean {
  const webgl = document.createElement("canvas").getContext("webgl2") as WebGL2RenderingContext | null;
  if (!webgl) return false;
  let name = String(webgl.getParameter(webgl.RENDERER));
  if (name === "WebKit WebGL") {
    const info = webgl.getExtension("WEBGL_debug_renderer_info");
    if (info) name = String(webgl.getParameter(info.UNMASKED_RENDERER_WEBGL));
  }
  webgl.getExtension("WEBGL_lose_context")?.loseContext();
  return !/swiftshader|llvmpipe|software|basic render/i.test(name);
}

/** Such as "8.7 MB". */
export function megabytes(bytes: number): string {
  const [unit, name] = bytes < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${(bytes / unit).toPrecision(3)} ${name}`;
}
