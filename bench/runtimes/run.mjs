// Files in onnxruntime-node or onnxruntime-web, in node:  node run.mjs PACKAGE FOLDER MODULES
//
// FOLDER/files.json names the files, MODULES holds node_modules. A JSON line per row, as run.py prints them.

import fs from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { printed, rows } from "./rows.mjs";

const [name, folder, modules] = process.argv.slice(2);
const ort = createRequire(join(modules, "package.json"))(name);
ort.env.logLevel = "error";

const write = process.stdout.write.bind(process.stdout);
const kept = fs.mkdtempSync(join(tmpdir(), "profile-"));
const native = name === "onnxruntime-node";
const lines = [];
if (!native) {
  ort.env.wasm.numThreads = 1;
  const writeSync = fs.writeSync; // by which wasm prints, straight to a descriptor
  fs.writeSync = (to, text, ...more) => (to === 1 ? lines.push(String(text)) : writeSync(to, text, ...more));
}

const place = {
  read: async (file) => new Uint8Array(fs.readFileSync(join(folder, file))),
  now: () => {
    const { user, system } = process.cpuUsage(); // of all threads: a session of onnxruntime-node runs in one of its own
    return (user + system) / 1e3;
  },
  clock: "CPU",
  settles: !native,
  options: { executionProviders: [native ? "cpu" : "wasm"], intraOpNumThreads: 1, interOpNumThreads: 1 },
  profiling: { enableProfiling: true, profileFilePrefix: join(kept, "profile") },
  profile: async (session) => {
    session.endProfiling();
    if (!native) return printed(lines.splice(0));
    const newest = fs.readdirSync(kept).sort().at(-1);
    const text = fs.readFileSync(join(kept, newest), "utf8");
    fs.rmSync(join(kept, newest));
    return text;
  },
  emit: (row) => write(`${JSON.stringify(row)}\n`),
};

try {
  await rows(ort, place);
} finally {
  fs.rmSync(kept, { recursive: true });
}
