import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { defaultClientConditions, defineConfig, type Plugin } from "vite";

/** Tells the service worker which files the page has, and a version that changes with any of them. */
function listOfFiles(): Plugin {
  return {
    name: "list-of-files",
    generateBundle(_, bundle) {
      const worker = bundle["sw.js"];
      if (worker?.type !== "chunk") throw new Error("the build has no service worker");
      const assets = Object.keys(bundle)
        .filter((name) => name.startsWith("assets/"))
        .sort();
      // ONNX Runtime's are large, and a browser needs one of two.
      const large = assets.filter((name) => name.includes("ort-wasm"));
      const needed = assets.filter((name) => !large.includes(name));
      const given = readdirSync("public").sort();
      const policy = /Content-Security-Policy"\s+content="([^"]+)"/.exec(readFileSync("index.html", "utf-8"));
      if (!policy) throw new Error("index.html has no policy");
      const hash = createHash("sha256");
      for (const file of ["index.html", ...given.map((name) => `public/${name}`)]) {
        hash.update(readFileSync(file));
      }
      const version = hash.update(assets.join()).digest("hex").slice(0, 16);
      const others = [...given, ...large];
      const list = JSON.stringify({ version, needed, others, policy: policy[1] });
      worker.code = worker.code.replace(/(["`])PAGE\1/, () => JSON.stringify(list));
    },
  };
}

export default defineConfig({
  base: "./", // a site may lie anywhere
  plugins: [listOfFiles()],
  resolve: {
    preserveSymlinks: true, // rgexport-web finds transformers.js here
    // ONNX Runtime's WebAssembly as files of its own.
    conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions],
  },
  worker: { format: "es" },
  build: {
    target: "es2022",
    chunkSizeWarningLimit: 2000,
    modulePreload: { polyfill: false },
    rollupOptions: {
      input: { index: "index.html", sw: "src/sw.ts" },
      output: {
        entryFileNames: ({ name }) => (name === "sw" ? "sw.js" : "assets/[name]-[hash].js"),
      },
    },
  },
});
