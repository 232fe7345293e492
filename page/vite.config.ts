import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { defaultClientConditions, defineConfig, type Plugin } from "vite";

/** Tells the service worker which files it has to keep, and a version that changes with any of them. */
function listOfFiles(): Plugin {
  return {
    name: "list-of-files",
    generateBundle(_, bundle) {
      const worker = bundle["sw.js"];
      if (worker?.type !== "chunk") throw new Error("the build has no service worker");
      // ONNX Runtime's are large, and a browser needs one of two: they are kept when they come.
      const made = Object.keys(bundle).filter((name) => /^assets\/(?!ort-wasm)/.test(name));
      const given = readdirSync("public");
      const hash = createHash("sha256");
      for (const file of ["index.html", ...given.map((name) => `public/${name}`)]) {
        hash.update(readFileSync(file));
      }
      const version = hash.update(made.sort().join()).digest("hex").slice(0, 16);
      const list = JSON.stringify({ version, files: [...given, ...made] });
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
