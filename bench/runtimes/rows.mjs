// Rows of files in onnxruntime's JavaScript packages: what run.py does, for node and for a page of a browser.
//
// `place` is what the two do differently: `read(name)` gives a file's bytes, `now()` milliseconds, `clock` the name of
// that clock, `options` those of a session, `profile(session)` the text of its profile, `emit(row)` takes a row.
// `settles` says that code gets faster as it runs: V8 compiles wasm again some seconds after its start.

const LEVELS = { disable: "disabled", basic: "basic", extended: "extended", layout: "layout", all: "all" };
const INTEGER = /^(QLinear(Conv|MatMul)|QGemm|MatMulInteger|ConvInteger|DynamicQuantizeMatMul)/;
const PRODUCT = /^((Nhwc)?(Fused)?Conv\w*|(Fused)?MatMul\w*|(Fused)?Gemm)$/;
const WARM = 3;

export async function rows(ort, place) {
  const given = JSON.parse(new TextDecoder().decode(await place.read("files.json")));
  for (const file of given.files)
    for (const level of Object.keys(LEVELS)) place.emit({ file: file.file, level, ...(await codes(ort, place, file, level)) });
  for (const pair of given.pairs) {
    const row = { file: pair.int8.file, level: "all", ...(await codes(ort, place, pair.int8, "all")) };
    if (row.error === null) {
      Object.assign(row, await speed(ort, place, pair, given));
      Object.assign(row, await integers(ort, place, pair.int8));
    }
    place.emit(row);
  }
}

async function load(ort, place, file, level, more = {}) {
  const options = { ...place.options, graphOptimizationLevel: LEVELS[level], logSeverityLevel: 4, ...more };
  const session = await ort.InferenceSession.create(await place.read(file.file), options);
  const x = new ort.Tensor("float32", await floats(place, file.file, "x"), file.shape);
  const run = async () => (await session.run({ [session.inputNames[0]]: x }))[session.outputNames[0]];
  return { session, run };
}

async function floats(place, name, ending) {
  const bytes = await place.read(name.replace(/\.onnx$/, `.${ending}`));
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

async function codes(ort, place, file, level) {
  const expected = await floats(place, file.file, "y");
  let found;
  try {
    const { session, run } = await load(ort, place, file, level);
    found = (await run()).data;
    await session.release();
  } catch (error) {
    const error_line = String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 400) || "an error without words";
    return { off: null, furthest: null, of: expected.length, error: error_line };
  }
  let [least, most, furthest, off] = [Infinity, -Infinity, 0, 0];
  for (const value of expected) [least, most] = [Math.min(least, value), Math.max(most, value)];
  expected.forEach((value, index) => {
    const distance = Math.abs(found[index] - value) / (most - least);
    if (!(distance <= 1 / 255)) off++;
    furthest = Math.max(furthest, distance);
  });
  return { off, furthest: Number.isFinite(furthest) ? Number(furthest.toPrecision(2)) : null, of: expected.length, error: null };
}

async function speed(ort, place, pair, { rounds, settle_ms }) {
  const loaded = { int8: await load(ort, place, pair.int8, "all"), float: await load(ort, place, pair.float, "all") };
  const taken = { int8: [], float: [] };
  for (const begun = performance.now(); place.settles && performance.now() < begun + settle_ms; ) {
    await loaded.int8.run();
    await loaded.float.run();
  }
  for (let number = 0; number < rounds + WARM; number++)
    for (const key of number % 2 ? ["int8", "float"] : ["float", "int8"]) {
      const start = place.now();
      await loaded[key].run();
      const milliseconds = place.now() - start;
      if (number >= WARM) taken[key].push(milliseconds);
    }
  for (const { session } of Object.values(loaded)) await session.release();
  const ratios = taken.int8.map((int8, index) => int8 / taken.float[index]);
  const round = (value) => Number(value.toFixed(3));
  const [int8_ms, float_ms, ratio] = [taken.int8, taken.float, ratios].map((values) => round(median(values)));
  return { int8_ms, float_ms, ratio, clock: place.clock, rounds };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

async function integers(ort, place, file) {
  const { session, run } = await load(ort, place, file, "all", place.profiling);
  await run();
  const events = JSON.parse(await place.profile(session));
  const kernels = {};
  for (const event of events) {
    const name = event.name.endsWith("_kernel_time") ? event.args.op_name : "";
    if (INTEGER.test(name) || PRODUCT.test(name)) kernels[name] = (kernels[name] ?? 0) + 1;
  }
  const count = (names) => names.reduce((sum, name) => sum + kernels[name], 0);
  const names = Object.keys(kernels).sort();
  const integer = count(names.filter((name) => INTEGER.test(name)));
  return { integer, products: count(names), kernels: Object.fromEntries(names.map((name) => [name, kernels[name]])) };
}

// onnxruntime in wasm prints its profile, a line per event.
export function printed(lines) {
  const events = lines.join("\n").match(/^\{"cat".*\}(?=,?$)/gm);
  return `[${(events ?? []).join(",\n")}]`;
}
